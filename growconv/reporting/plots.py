"""Figures of reports and comparisons, as SVG text that needs no network, no font file and no JavaScript."""

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from growconv.reporting.comparison import Comparison, Group
from growconv.reporting.records import RunRecord, detail, is_number, number, plain_text

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#4D4D4D")
"""Okabe and Ito's palette, told apart by colour-blind readers too; line styles change once it is used up."""
STYLES = ("-", "--", ":", "-.")
EVENT = "#B3B3B3"
PANELS = 12
"""Sites whose spectra are drawn; more would be too small to read."""

_SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "path.simplify": True,
}


def settings(salt: str = "growconv") -> Any:
    """Matplotlib settings of every figure, for a `with` block; `salt` tells the ids inside one SVG from another's."""
    return matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": salt})


def svg_text(draw: Callable[[bool], Figure], name: str) -> str:
    """A figure for wide and for narrow screens, as two inline SVG elements of which style sheets show one.

    Args:
        draw: takes whether the screen is narrow, gives the figure.
        name: what the figure shows; read out by screen readers.
    """
    parts = []
    for narrow in (False, True):
        with settings(f"{name} {narrow}"):
            buffer = io.StringIO()
            draw(narrow).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        label = re.sub(r"[^\w ,]", "", name)
        text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        parts.append(f'<div class="{"narrow" if narrow else "wide"}">{text}</div>')
    return "\n".join(parts)


def save_figure(figure: Figure, *paths: Path) -> None:
    """Save a figure in the formats of the file names (.svg, .png)."""
    with settings():
        for path in paths:
            metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
            figure.savefig(path, dpi=150, metadata=metadata)


def line_style(index: int) -> dict[str, Any]:
    """Colour and dash of the index-th line."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // len(COLOURS) % len(STYLES)]}


# comparison ------------------------------------------------------------------------------------------------------


def draw_comparison(comparison: Comparison) -> Figure:
    """Test accuracy against final parameters; validation accuracy against training FLOPs and against seconds."""
    with settings():
        rows = math.ceil(len(comparison.groups) / 3)
        figure = Figure(figsize=(11.5, 3.7 + 0.2 * rows), layout="constrained")
        axes = figure.subplots(1, 3)
        for index, group in enumerate(comparison.groups):
            style = line_style(index)
            _draw_final(axes[0], group, style["color"], index)
            _draw_course(axes[1], group, "train_flops", style)
            _draw_course(axes[2], group, "seconds", style)
        axes[0].set(xlabel="final parameters", ylabel="test accuracy %", title="against parameters")
        axes[1].set(xlabel="training FLOPs so far", ylabel="validation accuracy %", title="against training FLOPs")
        axes[2].set(xlabel="seconds so far", ylabel="validation accuracy %", title="against seconds")
        for axis in axes:
            _log_ticks(axis, "x")
        for axis in axes[1:]:
            _zoom(axis)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
    return figure


def _draw_final(axis: Axes, group: Group, colour: str, index: int) -> None:
    spread = [0.0 if math.isnan(value := group.std(figure)) else value for figure in ("parameters", "test_accuracy")]
    axis.errorbar(
        group.mean("parameters"),
        group.mean("test_accuracy"),
        xerr=spread[0],
        yerr=spread[1],
        color=colour,
        marker="osD^vP*X"[index % 8],
        linestyle="",
        capsize=3,
        label=f"{group.label} (n={len(group.runs)})",
    )


def _draw_course(axis: Axes, group: Group, cost: str, style: dict[str, Any]) -> None:
    """Mean over the seeds of the best validation accuracy reached at a cost, with a band of one standard deviation."""
    courses = [_course(run, cost) for run in group.runs]
    courses = [course for course in courses if course[0].size]
    if not courses:
        return
    low = max(course[0][0] for course in courses)
    high = min(course[0][-1] for course in courses)
    if not high > low > 0:
        return
    grid = np.geomspace(low, high, 200)
    values = np.array([np.interp(grid, *course) for course in courses])
    mean, spread = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(grid))
    axis.plot(grid, mean, linewidth=1.4, **style)
    axis.fill_between(grid, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)


def _course(run: RunRecord, cost: str) -> tuple[np.ndarray, np.ndarray]:
    spent, reached = np.array(run.column(cost)), 100 * np.array(run.column("val_accuracy"))
    there = ~(np.isnan(spent) | np.isnan(reached)) & (spent > 0)
    return spent[there], np.maximum.accumulate(reached[there]) if there.any() else reached[there]


def _log_ticks(axis: Axes, which: str) -> None:
    """A logarithmic axis labelled 2 k, 5 M, 1e-4: plain text, without mathematical typesetting."""
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    chosen = axis.xaxis if which == "x" else axis.yaxis
    low, high = sorted(axis.get_xlim() if which == "x" else axis.get_ylim())
    few = low > 0 and high / low < 30
    chosen.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=8))
    chosen.set_major_formatter(FuncFormatter(lambda value, _: magnitude(value)))
    chosen.set_minor_formatter(NullFormatter())


def magnitude(value: float | int) -> str:
    """A number with a suffix for its thousands: 12 345 is 12.3 k; small ones as 2e-4."""
    for power, suffix in ((15, " P"), (12, " T"), (9, " G"), (6, " M"), (3, " k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g}{suffix}"
    return f"{value:.3g}" if abs(value) >= 0.01 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def _zoom(axis: Axes) -> None:
    """Leave out the steep beginning of accuracy curves, where nothing can be told apart."""
    ends = [np.asarray(line.get_ydata(), dtype=float) for line in axis.get_lines()]
    if ends:
        top = max(float(values.max()) for values in ends)
        bottom = min(float(np.quantile(values, 0.25)) for values in ends)
        margin = max(0.05 * (top - bottom), 0.1)
        axis.set_ylim(bottom - margin, top + margin)


# report ----------------------------------------------------------------------------------------------------------


def draw_curves(run: RunRecord, narrow: bool) -> Figure:
    """Training loss and validation accuracy by epoch, growth events as vertical lines."""
    figure = _figure(narrow, 3.1, rows=2)
    axes = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    epochs = run.column("epoch")
    axes[0].plot(epochs, run.column("train_loss"), color=COLOURS[0], marker="." if len(epochs) < 40 else "")
    axes[0].set(xlabel="epoch", ylabel="training loss", title="Training loss")
    accuracy = [100 * value for value in run.column("val_accuracy")]
    axes[1].plot(epochs, accuracy, color=COLOURS[1], marker="." if len(epochs) < 40 else "")
    axes[1].set(xlabel="epoch", ylabel="%", title="Validation accuracy")
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for place in sorted(set(event_epochs(run))):
            axis.axvline(place, color=EVENT, linewidth=0.8, linestyle="--", zorder=0)
    return figure


def draw_widths(run: RunRecord, narrow: bool) -> Figure:
    """Hidden channels of every site that grew, by epoch."""
    sites = sites_of(run)
    figure = _figure(narrow, 2.7 + 0.16 * (len(sites) if narrow else math.ceil(len(sites) / 3)))
    axis = figure.subplots()
    last = max([*run.column("epoch"), *event_epochs(run), 0.0])
    for index, site in enumerate(sites):
        places, widths = [0.0], []
        for event, place in zip(run.events, event_epochs(run), strict=True):
            if event["site"] == site:
                widths = widths or [number(event, "width_before")]
                places.append(place)
                widths.append(number(event, "width_after"))
        thick = 1.4 + 2.4 * (len(sites) - 1 - index) / len(sites)
        axis.step(
            [*places, last], [*widths, widths[-1]], where="post", label=site, linewidth=thick, **line_style(index)
        )
    axis.set(xlabel="epoch", ylabel="channels", title="Width of each site")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=1 if narrow else 3)
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
            shade = matplotlib.colormaps["viridis"](0.9 * order / max(1, len(events) - 1))
            ranks = np.arange(1, len(spectrum) + 1)
            positive = spectrum > 0
            kept = positive & (ranks <= number(event, "channels", len(spectrum)))
            axis.plot(ranks[positive], spectrum[positive], color=shade, linewidth=0.8)
            axis.plot(ranks[kept], spectrum[kept], color=shade, marker="o", markersize=3.2, linestyle="")
            rest = positive & ~kept
            axis.plot(ranks[rest], spectrum[rest], color=shade, marker="o", markersize=3.2, linestyle="", mfc="white")
        _log_ticks(axis, "y")
        axis.set_title(_shorten(site, 22 if narrow else 26), fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("candidate, best first", fontsize=9)
    figure.supylabel("gain", fontsize=9)
    return figure


def draw_energy(run: RunRecord, narrow: bool) -> Figure:
    """Share of the output change that the loss asks for (‖v‖²) that the new channels capture, by event."""
    places = event_epochs(run)
    figure = _figure(narrow, 2.7 + (0.16 * len(sites_of(run)) if narrow else 0.0))
    axis = figure.subplots()
    for index, site in enumerate(sites_of(run)):
        points = [
            (place, 100 * captured_energy(event))
            for event, place in zip(run.events, places, strict=True)
            if event["site"] == site
        ]
        style = line_style(index)
        axis.plot(*zip(*points, strict=True), label=site, marker="o", markersize=4, linewidth=0.9, **style)
    axis.set(xlabel="epoch", ylabel="% of ‖v‖²", title="Captured energy at each event")
    axis.set_ylim(bottom=0)
    if narrow:
        figure.legend(loc="outside lower center", ncols=1)
    return figure


def draw_decrease(run: RunRecord, narrow: bool) -> Figure:
    """Predicted against realised decrease of the loss, a point an event; on the diagonal the prediction was right."""
    figure = _figure(narrow, 3.2)
    axis = figure.subplots()
    sites = sites_of(run)
    pairs = [(number(event, "predicted_decrease"), number(event, "realised_decrease")) for event in run.events]
    for event, (predicted, realised) in zip(run.events, pairs, strict=True):
        colour = COLOURS[sites.index(event["site"]) % len(COLOURS)]
        axis.plot(predicted, realised, marker="o", markersize=5, linestyle="", color=colour)
    known = [value for pair in pairs for value in pair if not math.isnan(value)]
    ends = [min([*known, 0.0]), max([*known, 0.0])]
    axis.plot(ends, ends, color=EVENT, linewidth=1, zorder=0)
    axis.set(xlabel="predicted", ylabel="realised", title="Loss decrease at insertion")
    return figure


def draw_time(run: RunRecord, narrow: bool) -> Figure:
    """Seconds spent training and growing, as one bar."""
    figure = _figure(narrow, 1.9 if narrow else 1.5)
    axis = figure.subplots()
    total, growing = number(run.summary, "seconds", 0.0), run.growth_seconds
    phases = run.growth_phases
    rest = growing - sum(phases.values())
    parts = {"training": max(total - growing, 0.0), **phases}
    if rest > 0.01 * total or not phases:
        parts["other growing" if phases else "growing"] = rest
    left = 0.0
    for index, (name, seconds) in enumerate(parts.items()):
        label = f"{plain_text(name, 40)} {seconds:.1f} s ({100 * seconds / total if total else 0:.0f} %)"
        axis.barh(0, seconds, left=left, color=COLOURS[index % len(COLOURS)], height=0.6, label=label)
        left += seconds
    axis.set(xlabel="seconds", yticks=[])
    axis.grid(visible=False)
    axis.spines["left"].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2 if narrow else 5)
    return figure


def event_epochs(run: RunRecord) -> list[float]:
    """Where on the axis of epochs each event lies, from its step; the end of an epoch is its number."""
    steps = [0.0, *run.column("step")]
    epochs = [0.0, *run.column("epoch")]
    known = [(step, epoch) for step, epoch in zip(steps, epochs, strict=True) if not math.isnan(step + epoch)]
    if len(known) < 2:
        return [number(event, "epoch", 0.0) for event in run.events]
    at_steps, at_epochs = zip(*known, strict=True)
    return [float(np.interp(number(event, "step", 0.0), at_steps, at_epochs)) for event in run.events]


def sites_of(run: RunRecord) -> list[str]:
    """Sites that grew, in order of their first event."""
    return list(dict.fromkeys(str(event["site"]) for event in run.events))


def captured_energy(event: dict[str, Any]) -> float:
    """The share of ‖v‖² that an event's channels capture; NaN where it was not recorded."""
    return number(event.get("details") or {}, "captured_energy")


def spectrum_of(event: dict[str, Any]) -> Sequence[float]:
    """Gains of all candidates of an event, best first; of the kept ones where no others were recorded."""
    recorded = detail(event, "spectrum")
    values = recorded if isinstance(recorded, list) and recorded else event.get("gains") or ()
    return [float(value) if is_number(value) else math.nan for value in values]


def spectra_sites(run: RunRecord) -> list[str]:
    """Sites with a spectrum to draw: those with the largest gains, in order of their first event."""
    largest: dict[str, float] = {}
    for event in run.events:
        largest[event["site"]] = max([largest.get(event["site"], 0.0), *spectrum_of(event)])
    chosen = sorted((site for site in largest if largest[site] > 0), key=lambda site: -largest[site])[:PANELS]
    return [site for site in sites_of(run) if site in chosen]


def _figure(narrow: bool, height: float, rows: int = 1) -> Figure:
    size = (4.1, height * rows * 0.85 if rows > 1 else height) if narrow else (9.6, height)
    return Figure(figsize=size, layout="constrained")


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[-(length - 1) :]
