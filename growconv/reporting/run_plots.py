"""Figures of one run: what growing bought, curves, the network before and after, widths, spectra, predictions, time."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice, product
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from growconv.reporting import style
from growconv.reporting.records import RunRecord, number, plain_text, to_number

PANELS = 12
"""Sites whose spectra are drawn; more would be too small to read."""
ROUNDING = 1e-9
"""Gains below this share of an event's largest are not drawn: numerical zeros would squeeze the others together."""
ROWS = 40
"""Layers and sites that are drawn as rows; of more the first that grew are taken."""
_DECREASES = ("predicted_decrease", "realised_decrease")
Drawing = tuple[str, str, Callable[[bool], Figure]]
"""Title, what a reader should know, and the figure for a wide or a narrow screen."""


def drawings(runs: Mapping[str, RunRecord]) -> list[Drawing]:
    """The figures that a run has something for.

    Args:
        runs: the run, then the fixed networks beside it, by what they are called.
    """
    run = next(iter(runs.values()))
    layers, sites, spectra = grown_layers(run), len(sites_of(run)), len(spectra_sites(run))
    compared = all(any(not math.isnan(number(event, key)) for event in run.events) for key in _DECREASES)
    curves = "Solid: training (while the weights change); dashed: validation."
    boxes = "Every layer from input to output, as wide as its output channels: at the start, and what came around it."
    widths = "Channels of every site over the epochs; the darker, the nearer to its final width."
    gains = "Gains of the candidates, best first, dark to light over the run. Filled: kept; hollow: not taken."
    if run.events:
        curves += " Dotted lines: growth."
    if len(layers) > ROWS:
        boxes += f" The first {ROWS} that grew, of {len(layers)} layers."
    if sites > ROWS:
        widths += f" The first {ROWS} of {sites} sites."
    if sites > spectra:
        gains += f" Not drawn: {sites - spectra} sites with smaller gains or none."
    cost = "Best validation accuracy reached for the training FLOPs spent, of the grown and the fixed networks."
    share = "Share of the change that the loss asks of the consumers (‖v‖²) that the new channels give, to first order."
    decrease = "Decrease of the loss at insertion: first-order prediction and measurement, at the amplitude chosen."
    figures: list[tuple[bool, str, str, Callable[[bool], Figure]]] = [
        (len(runs) > 1, "Accuracy against cost", cost, partial(draw_bought, runs)),
        (True, "Training", curves, partial(draw_curves, run)),
        (bool(finite(run.column("learning_rate"))), "Learning rate", "", partial(draw_rate, run)),
        (bool(layers), "Network before and after", boxes, partial(draw_network, run)),
        (sites > 0, "Widths", widths, partial(draw_widths, run)),
        (spectra > 0, "Spectra", gains, partial(draw_spectra, run)),
        (bool(finite([*map(captured_energy, run.events)])), "Captured energy", share, partial(draw_energy, run)),
        (compared, "Predicted and realised decrease", decrease, partial(draw_decrease, run)),
        (sites > 0 and number(run.summary, "seconds", 0.0) > 0, "Time", "", partial(draw_time, run)),
    ]
    return [(title, note, draw) for has, title, note, draw in figures if has]


def draw_bought(runs: Mapping[str, RunRecord], narrow: bool) -> Figure:
    """Best validation accuracy so far against training FLOPs so far, of a run and of its baselines."""
    figure, axis = _axis(narrow, 3.4)
    ends = []
    for index, (label, run) in enumerate(runs.items()):
        spent, reached = course(run, "train_flops")
        if not spent.size:
            continue
        colour, marker = style.method_style(run.method, label, {})
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": style.DASHES[index % 4]}
        axis.plot(spent, reached, markevery=max(1, len(spent) // 8), label=label, **look)
        ends.append(reached)
    axis.set(xlabel="training FLOPs so far", ylabel=f"best validation {score_name(next(iter(runs.values())))} % so far")
    if ends:
        style.log_ticks(axis, "x")
    zoom(axis, ends)
    figure.legend(loc="outside lower center", ncols=1 if narrow else 3)
    return figure


def draw_curves(run: RunRecord, narrow: bool) -> Figure:
    """Loss and accuracy, training and validation, against epochs and training FLOPs; growth as vertical lines."""
    figure = _figure(narrow, 9.4 if narrow else 5.2)
    axes = figure.subplots(4, 1) if narrow else figure.subplots(2, 2).T.reshape(-1)
    parts = (("train", "training", style.BLUE, "-"), ("val", "validation", style.VERMILION, "--"))
    costs = (("epoch", "epoch"), ("train_flops", "training FLOPs so far"))
    panels = product(costs, (("loss", "loss", 1.0), ("accuracy", f"{score_name(run)} %", 100.0)))
    for axis, ((key, cost), (quantity, title, scale)) in zip(axes, panels, strict=True):
        spent, drawn = run.column(key), []
        for part, label, colour, dash in parts:
            values = [scale * value for value in run.column(f"{part}_{quantity}")]
            axis.plot(spent, values, color=colour, linestyle=dash, linewidth=1.4, label=label)
            drawn += [value for at, value in zip(spent, values, strict=True) if math.isfinite(at + value)]
        axis.set(xlabel=cost, ylabel=title)
        for place in sorted(set(event_places(run, key))):
            axis.axvline(place, color=style.SOFT, linewidth=0.7, linestyle=":", zorder=0)
        if quantity == "loss" and min(drawn, default=0.0) > 0:
            style.log_ticks(axis, "y")
        if key == "epoch":
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            style.magnitude_ticks(axis, "x")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def draw_rate(run: RunRecord, narrow: bool) -> Figure:
    """The learning rate at the end of every epoch."""
    figure, axis = _axis(narrow, 1.9)
    axis.plot(run.column("epoch"), run.column("learning_rate"), color=style.BLUE)
    for place in sorted(set(event_places(run))):
        axis.axvline(place, color=style.SOFT, linewidth=0.7, linestyle=":", zorder=0)
    axis.set(xlabel="epoch", ylabel="learning rate")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def draw_network(run: RunRecord, narrow: bool) -> Figure:
    """Layers as boxes from input to output, as wide as their channels: the start inside, later growth around it."""
    layers = grown_layers(run)
    shown = layers if len(layers) <= ROWS else [layer for layer in layers if len(layer[1]) > 1][:ROWS]
    figure, axis = _axis(narrow, 1.0 + 0.3 * len(shown))
    last = max([*finite(run.column("epoch")), 1.0])
    shades = ScalarMappable(Normalize(0, last), matplotlib.colormaps["viridis"])
    for row, (path, rings) in enumerate(shown):
        for place, width in reversed(rings):
            colour = shades.cmap(place / last)
            axis.barh(row, width, 0.72, -width / 2, color=colour, edgecolor=style.INK, linewidth=0.4)
        widths = [rings[0][1], rings[-1][1]]
        text = " → ".join(f"{width:.0f}" for width in dict.fromkeys(widths))
        _beside(axis, widths[-1] / 2, row, text)
        _beside(axis, -widths[-1] / 2, row, style.shortened(path, 22 if narrow else 40), left=True)
    widest = max([rings[-1][1] for _, rings in shown], default=1.0)
    margin = widest * (1.3 if narrow else 0.75)
    axis.set(xlim=(-widest / 2 - margin, widest / 2 + margin / 2), ylim=(len(shown) - 0.4, -0.6), xticks=[], yticks=[])
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(shades, ax=axis, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_label("epoch in which the channels came; 0: the start", fontsize=8)
    bar.locator = MaxNLocator(integer=True, nbins=6)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


def grown_layers(run: RunRecord) -> list[tuple[str, list[tuple[float, float]]]]:
    """Every layer in the model's order, with (epoch, output channels) at the start and after each growth of it.

    Empty where the run did not write down its layers.
    """
    layers = run.environment.get("layers")
    rings: dict[str, list[tuple[float, float]]] = {}
    for path, shape in layers.items() if isinstance(layers, dict) else ():
        width = to_number(shape[0]) if isinstance(shape, list) and shape else 0.0
        if 0 < width < 1e6:
            rings[plain_text(path, 100)] = [(0.0, width)]
    for event, place in zip(run.events, event_places(run), strict=True):
        for path, change in _added_outputs(event).items():
            if path in rings:
                rings[path].append((place, max(1.0, rings[path][-1][1] + change)))
    return list(rings.items())


def _added_outputs(event: dict[str, Any]) -> dict[str, float]:
    """By how many output channels an event changed each layer."""
    added: dict[str, float] = {}
    edits = event.get("edits")
    for edit in edits if isinstance(edits, list) else ():
        if isinstance(edit, dict) and edit.get("tensor") == "weight" and edit.get("axis") == 0:
            path, taken = plain_text(edit.get("module"), 100), edit.get("removed")
            change = -len(taken) if isinstance(taken, list) else number(edit, "count", 0.0)
            added[path] = added.get(path, 0.0) + change
    return {path: change for path, change in added.items() if abs(change) < 1e6}


def draw_widths(run: RunRecord, narrow: bool) -> Figure:
    """Heat map of the channels of every site over the epochs, each change with its number."""
    sites = sites_of(run)[:ROWS]
    places = event_places(run)
    times = sorted({0.0, *places, max([*finite(run.column("epoch")), *places, 0.0])})
    widths = np.zeros((len(sites), max(1, len(times) - 1)))
    for row, site in enumerate(sites):
        of_site = [(at, event) for at, event in zip(places, run.events, strict=True) if event["site"] == site]
        widths[row] = number(of_site[0][1], "width_before", 0.0)
        for at, event in of_site:
            widths[row, min(times.index(at), widths.shape[1]) :] = number(event, "width_after", 0.0)
    figure, axis = _axis(narrow, 1.3 + 0.3 * len(sites))
    edges = times if len(times) > 1 else [0.0, 1.0]
    share = widths / np.maximum(widths.max(axis=1, keepdims=True), 1e-9)
    axis.pcolormesh(edges, np.arange(len(sites) + 1), share, cmap="Blues", vmin=0, vmax=1.2, edgecolors="white", lw=0.6)
    span = edges[-1] - edges[0] or 1.0
    for row in range(len(sites)):
        for column in range(widths.shape[1]):
            new = column == 0 or widths[row, column] != widths[row, column - 1]
            if new and edges[column + 1] - edges[column] > span * (0.07 if narrow else 0.03):
                middle, text = (edges[column] + edges[column + 1]) / 2, f"{widths[row, column]:.0f}"
                colour = "#ffffff" if share[row, column] > 0.7 else "#08306b"
                axis.text(middle, row + 0.5, text, ha="center", va="center", fontsize=8, color=colour)
    names = [style.shortened(site, 20 if narrow else 44) for site in sites]
    axis.set_yticks(np.arange(len(sites)) + 0.5, names, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="epoch")
    axis.grid(visible=False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def draw_spectra(run: RunRecord, narrow: bool) -> Figure:
    """Gains of the candidate channels at every event, a panel a site; filled: kept, hollow: not taken."""
    sites = spectra_sites(run)
    columns = min(len(sites), 2 if narrow else 4)
    rows = math.ceil(len(sites) / columns)
    figure = _figure(narrow, 1.9 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(sites) :]:
        axis.remove()
    for axis, site in zip(axes.flat, sites, strict=False):
        events = [event for event in run.events if event["site"] == site]
        for order, event in enumerate(events):
            spectrum = np.array(spectrum_of(event))
            if not (spectrum > 0).any():
                continue
            shade = matplotlib.colormaps["viridis"](0.2 + 0.65 * order / max(1, len(events) - 1))
            ranks = np.arange(1, len(spectrum) + 1)
            positive = spectrum > ROUNDING * spectrum.max()
            kept = positive & (ranks <= number(event, "channels", len(spectrum)))
            axis.plot(ranks[positive], spectrum[positive], color=shade, linewidth=0.8)
            for part, face in ((kept, shade), (positive & ~kept, style.PAPER)):
                axis.plot(ranks[part], spectrum[part], "o", color=shade, markersize=3.2, markerfacecolor=face)
        style.log_ticks(axis, "y")
        axis.set_title(style.shortened(site, 22 if narrow else 26), fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("candidate, best first", fontsize=9)
    figure.supylabel("gain", fontsize=9)
    return figure


def draw_energy(run: RunRecord, narrow: bool) -> Figure:
    """Share of the output change that the loss asks for (‖v‖²) that the new channels capture, by event."""
    shares = [100 * captured_energy(event) for event in run.events]
    points = list(zip(event_places(run), shares, strict=True))
    figure, axis = _sites_axis(run, narrow, 2.7, points, markersize=4, linewidth=0.9)
    axis.set(xlabel="epoch", ylabel="% of ‖v‖²")
    axis.set_ylim(bottom=0)
    return figure


def draw_decrease(run: RunRecord, narrow: bool) -> Figure:
    """Predicted against realised decrease of the loss, a point an event; on the diagonal the prediction was right."""
    pairs = [(number(event, _DECREASES[0]), number(event, _DECREASES[1])) for event in run.events]
    figure, axis = _sites_axis(run, narrow, 3.2, pairs, markersize=5, linestyle="")
    known = finite([value for pair in pairs for value in pair])
    ends = [min([*known, 0.0]), max([*known, 0.0])]
    axis.plot(ends, ends, color=style.SOFT, linewidth=1, zorder=0)
    axis.set(xlabel="predicted", ylabel="realised")
    return figure


def _sites_axis(
    run: RunRecord, narrow: bool, height: float, points: Sequence[tuple[float, float]], **look: Any
) -> tuple[Figure, Axes]:
    """A line a site through the points of its events, with a legend below; `points` has one an event."""
    sites = sites_of(run)
    figure, axis = _axis(narrow, height + 0.16 * math.ceil(len(sites) / (1 if narrow else 3)))
    for index, site in enumerate(sites):
        own = [point for event, point in zip(run.events, points, strict=True) if event["site"] == site]
        line: dict[str, Any] = {
            "color": style.LINES[index % len(style.LINES)],
            "linestyle": style.DASHES[index // len(style.LINES) % len(style.DASHES)],
        }
        line |= {"marker": "os^Dv<>P"[index % 8], **look}
        axis.plot(*zip(*own, strict=True), label=style.shortened(site, 40), **line)
    figure.legend(loc="outside lower center", ncols=1 if narrow else 3)
    return figure, axis


def draw_time(run: RunRecord, narrow: bool) -> Figure:
    """Seconds of training and of each phase of growing, a bar each."""
    total, growing = number(run.summary, "seconds", 0.0), run.growth_seconds
    phases: dict[str, float] = {}
    for event in run.events:
        known = event["details"].get("seconds")
        for name in known if isinstance(known, dict) else ():
            phases[name] = phases.get(name, 0.0) + number(known, name, 0.0)
    phases = dict(islice(phases.items(), 8))
    rest = growing - sum(phases.values())
    parts = {"training": max(total - growing, 0.0), **phases}
    if rest > 0.01 * total or not phases:
        parts["other growing" if phases else "growing"] = rest
    figure, axis = _axis(narrow, 0.8 + 0.26 * len(parts))
    names = [plain_text(name, 40) for name in parts]
    axis.barh(range(len(parts)), list(parts.values()), color=style.BLUE, height=0.6)
    for row, seconds in enumerate(parts.values()):
        _beside(axis, seconds, row, f"{seconds:.1f} s ({100 * seconds / total if total else 0:.0f} %)")
    axis.set_yticks(range(len(parts)), names)
    axis.invert_yaxis()
    axis.set(xlabel="seconds", xlim=(0, 1.3 * max([*parts.values(), 1e-9])))
    axis.grid(visible=False)
    return figure


def score_name(run: RunRecord) -> str:
    """What the accuracy of a run is: R² for the regression on a teacher's outputs."""
    return "R²" if run.data == "synthetic" else "accuracy"


def course(run: RunRecord, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """What was spent, and the best validation accuracy in percent that had been reached by then."""
    spent, reached = np.array(run.column(cost)), 100 * np.array(run.column("val_accuracy"))
    there = ~(np.isnan(spent) | np.isnan(reached)) & (spent > 0)
    return spent[there], np.maximum.accumulate(reached[there]) if there.any() else reached[there]


def zoom(axis: Axes, courses: Sequence[np.ndarray]) -> None:
    """Leave out the steep beginning of accuracy curves, where nothing can be told apart."""
    if courses:
        top = max(float(values.max()) for values in courses)
        bottom = min(float(np.quantile(values, 0.5)) for values in courses)
        margin = max(0.05 * (top - bottom), 0.1)
        axis.set_ylim(bottom - margin, top + margin)


def event_places(run: RunRecord, key: str = "epoch") -> list[float]:
    """Where each event lies on an axis of epochs or of another metric, from its step; an epoch's end is its number."""
    steps = [0.0, *run.column("step")]
    values = [0.0, *run.column(key)]
    known = [(step, value) for step, value in zip(steps, values, strict=True) if not math.isnan(step + value)]
    if len(known) < 2:
        return [number(event, key, 0.0) for event in run.events]
    at_steps, at_values = zip(*known, strict=True)
    return [float(np.interp(number(event, "step", 0.0), at_steps, at_values)) for event in run.events]


def sites_of(run: RunRecord) -> list[str]:
    """Sites that grew, in order of their first event."""
    return list(dict.fromkeys(str(event["site"]) for event in run.events))


def captured_energy(event: dict[str, Any]) -> float:
    """The share of ‖v‖² that an event's channels capture; NaN where it was not recorded."""
    return number(event["details"], "captured_energy")


def spectrum_of(event: dict[str, Any]) -> Sequence[float]:
    """Gains of all candidates of an event, best first; of the kept ones where no others were recorded."""
    recorded = event["details"].get("spectrum")
    values = recorded if isinstance(recorded, list) and recorded else event["gains"]
    return [to_number(value) for value in values]


def spectra_sites(run: RunRecord) -> list[str]:
    """Sites with a spectrum to draw: those with the largest gains, in order of their first event."""
    largest: dict[str, float] = {}
    for event in run.events:
        largest[event["site"]] = max([largest.get(event["site"], 0.0), *spectrum_of(event)])
    chosen = sorted((site for site in largest if largest[site] > 0), key=lambda site: -largest[site])[:PANELS]
    return [site for site in sites_of(run) if site in chosen]


def _beside(axis: Axes, x: float, y: float | int, text: str, left: bool = False) -> None:
    """Text a little to the right (or left) of a point."""
    place, align = ((-5, 0), "right") if left else ((5, 0), "left")
    axis.annotate(text, (x, y), xytext=place, ha=align, textcoords="offset points", va="center", fontsize=8)


def finite(values: Sequence[float]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if math.isfinite(value)]


def _figure(narrow: bool, height: float) -> Figure:
    return Figure(figsize=(4.1 if narrow else 9.6, height), layout="constrained")


def _axis(narrow: bool, height: float) -> tuple[Figure, Axes]:
    figure = _figure(narrow, height)
    return figure, figure.subplots()
