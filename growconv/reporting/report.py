"""The command ``growconv report``: one run, and the fixed networks beside it, as one HTML file without a network."""

import base64
import hashlib
import html
import math
import shlex
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import yaml
from matplotlib.figure import Figure

from growconv.errors import CheckpointError
from growconv.reporting import run_plots
from growconv.reporting.records import METRICS, RunRecord, number, plain_text, read_run, replacing
from growconv.reporting.style import magnitude, save_figure, style_sheet, svg_text
from growconv.reporting.terminal import shown

REPORT = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html")
_SCRIPT = Path(__file__).with_name("report.js")
MOST_EVENTS = 1000
"""Rows of the table of events; later ones are in growth.jsonl."""

Drawing = tuple[str, str, Callable[[bool], Figure]]
"""Title, what a reader should know, and the figure for a wide or a narrow screen."""


def main(arguments: Namespace) -> None:
    """Write the report of a run, and print where it lies.

    Args:
        arguments: what `report_parser` read.
    """
    print(shown(write_report(arguments.run, arguments.output)))
    if arguments.figures is not None:
        for path in write_figures(read_run(arguments.run), arguments.figures):
            print(shown(path))


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run; an unfinished run gets one of what there is so far.

    Args:
        run: run directory.
        output: file to write; None writes report.html into the run directory.

    Returns:
        The file written.

    Raises:
        CheckpointError: no run there, a damaged file, or no finished epoch yet; or the file cannot be written.
    """
    record = read_run(run)
    if not record.metrics:
        raise CheckpointError(
            "the run has not finished an epoch yet, so there is nothing to report", where=str(record.path / METRICS)
        )
    path = Path(output) if output is not None else record.path / REPORT
    text = render(record)
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")  # halves of letters in names and texts
    except OSError as error:
        raise CheckpointError(
            "the report cannot be written", where=str(path), got=error, fix="name a file in an existing folder"
        ) from error
    return path


def write_figures(run: RunRecord, folder: Path) -> list[Path]:
    """Write every figure of the report as an SVG that follows light and dark pages.

    Args:
        folder: where to; made where it is missing.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for title, _, draw in _drawings(run, beside(run)[0]):
        paths.append(folder / f"{title.lower().replace(' ', '_')}.svg")
        save_figure(partial(draw, False), paths[-1])
    return paths


def render(run: RunRecord) -> str:
    """The report as HTML text; everything that comes from the run's files is escaped, and no script of theirs runs."""
    runs, broken = beside(run)
    figures = [_figure_section(*drawing) for drawing in _drawings(run, runs)]
    sections = [
        _section("What growing bought", _results(runs, broken)) if len(runs) > 1 or broken else "",
        *figures,
        _section("Growth events", _event_table(run) if run.events else "<p>This run did not grow.</p>"),
        _section("How to reproduce", _reproduction(run)),
        _section(
            "Configuration", f"<details><summary>config.yaml</summary><pre>{_escape(_yaml(run.config))}</pre></details>"
        ),
    ]
    script = _SCRIPT.read_text(encoding="utf-8")
    state = "" if run.finished else "unfinished, so far: "
    growth = "fixed" if run.method == "fixed" else f"grown by {run.method}"
    started = plain_text(run.environment.get("started") or "", 40)
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=_escape(plain_text(f"{run.model} on {run.data}, {growth}, seed {run.seed}")),
        subtitle=_escape(f"{state}{started} {run.path.resolve()}".strip()),
        colours=style_sheet(),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        tiles=_tiles(run),
        sections="\n".join(section for section in sections if section),
    )


def beside(run: RunRecord) -> tuple[dict[str, RunRecord], list[str]]:
    """The run and the fixed networks trained beside it, by what they are called; and why others are left out."""
    runs, broken = {"fixed" if run.method == "fixed" else f"grown, {run.method}": run}, []
    for folder in sorted(run.path.glob("fixed_*/")):
        try:
            fixed = read_run(folder)
        except CheckpointError as error:
            broken.append(plain_text(error))
            continue
        if fixed.metrics:
            runs[folder.name.replace("_", " ")] = fixed
    return runs, broken


def _drawings(run: RunRecord, runs: Mapping[str, RunRecord]) -> list[Drawing]:
    """The figures that this run has something for."""
    found: list[Drawing] = []
    if len(runs) > 1:
        note = "Best validation accuracy reached for the training FLOPs spent, of the grown and the fixed networks."
        found.append(("Accuracy against cost", note, partial(run_plots.draw_bought, runs)))
    curves = "Solid: training (while the weights change); dashed: validation. Dotted lines: growth."
    found.append(
        ("Training", curves if run.events else curves.rpartition(" Dotted")[0], partial(run_plots.draw_curves, run))
    )
    if not all(map(math.isnan, run.column("learning_rate"))):
        found.append(("Learning rate", "", partial(run_plots.draw_rate, run)))
    layers = run_plots.grown_layers(run)
    if layers:
        note = (
            "Every layer from input to output, as wide as its output channels: at the start, and what came around it."
        )
        most = run_plots.ROWS
        note += f" The first {most} that grew, of {len(layers)} layers." if len(layers) > most else ""
        found.append(("Network before and after", note, partial(run_plots.draw_network, run)))
    return [*found, *_growth_drawings(run)] if run.events else found


def _growth_drawings(run: RunRecord) -> list[Drawing]:
    found: list[Drawing] = []
    sites = len(run_plots.sites_of(run))
    note = "Channels of every site over the epochs; the darker, the nearer to its final width."
    note += f" The first {run_plots.ROWS} of {sites} sites." if sites > run_plots.ROWS else ""
    found.append(("Widths", note, partial(run_plots.draw_widths, run)))
    drawn = len(run_plots.spectra_sites(run))
    if drawn:
        note = "Gains of the candidates, best first, dark to light over the run. Filled: kept; hollow: not taken."
        note += f" Not drawn: {sites - drawn} sites with smaller gains or none." if sites > drawn else ""
        found.append(("Spectra", note, partial(run_plots.draw_spectra, run)))
    if any(not math.isnan(run_plots.captured_energy(event)) for event in run.events):
        note = (
            "Share of the change that the loss asks of the consumers (‖v‖²) that the new channels give, to first order."
        )
        found.append(("Captured energy", note, partial(run_plots.draw_energy, run)))
    if _has(run, "predicted_decrease") and _has(run, "realised_decrease"):
        note = "Decrease of the loss at insertion: first-order prediction and measurement, at the amplitude chosen."
        found.append(("Predicted and realised decrease", note, partial(run_plots.draw_decrease, run)))
    if number(run.summary, "seconds", 0.0) > 0:
        found.append(("Time", "", partial(run_plots.draw_time, run)))
    return found


def _has(run: RunRecord, key: str) -> bool:
    return any(not math.isnan(number(event, key)) for event in run.events)


def _tiles(run: RunRecord) -> str:
    summary = run.summary or run.metrics[-1]
    total, score = number(summary, "seconds"), run_plots.score_name(run)
    tiles = [
        (f"test {score}", _percent(number(summary, "test_accuracy"))),
        ("test loss", _loss(number(summary, "test_loss"))),
        (f"best validation {score}", _percent(number(summary, "best_val_accuracy"))),
        ("parameters", _figure(number(summary, "parameters"))),
        ("training FLOPs", _figure(number(summary, "train_flops"))),
        ("seconds in all", _figure(total)),
        ("of the time growing", _percent(run.growth_seconds / total) if total > 0 else "–"),
        ("growth events", str(len(run.events))),
    ]
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in tiles)
    return f'<div class="tiles">{shown}</div>'


def _results(runs: Mapping[str, RunRecord], broken: Sequence[str]) -> str:
    """Grown and fixed networks as a table; FLOPs also as a share of the dearest run's."""
    first = next(iter(runs.values()))
    score = run_plots.score_name(first)
    heading = ["network", f"test {score} %", "test loss", "parameters", "training FLOPs", "share", "seconds", "growing"]
    most = max((number(run.summary, "train_flops", 0.0) for run in runs.values()), default=0.0)
    rows = []
    for label, run in runs.items():
        flops, seconds = number(run.summary, "train_flops"), number(run.summary, "seconds")
        share = flops / most if most > 0 else math.nan
        rows.append(
            [
                label if run.finished else f"{label} (unfinished)",
                _fixed(100 * number(run.summary, "test_accuracy"), 2),
                _loss(number(run.summary, "test_loss")),
                _figure(number(run.summary, "parameters")),
                _figure(flops),
                _percent(share),
                _fixed(seconds, 1),
                _fixed(run.growth_seconds, 1) if run.events else "–",
            ]
        )
    notes = "".join(f"<p>Left out: {_escape(reason)}</p>" for reason in broken)
    return _table(heading, rows) + notes


def _figure_section(title: str, note: str, draw: Callable[[bool], Figure]) -> str:
    return _section(title, (f'<p class="soft">{note}</p>' if note else "") + svg_text(draw, title))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>\n{body}</section>"


def _event_table(run: RunRecord) -> str:
    heading = ["site", "step", "epoch", "width", "parameters", "loss before", "after", "captured %", "seconds", "note"]
    rows = []
    for event, place in list(zip(run.events, run_plots.event_places(run), strict=True))[:MOST_EVENTS]:
        before, after = losses_of(event)
        more = number(event, "parameters_after") - number(event, "parameters_before")
        silent = event.get("amplitude") == 0
        rows.append(
            [
                event["site"],
                event.get("step", "–"),
                _fixed(place, 2),
                f"{event.get('width_before', '?')} → {event.get('width_after', '?')}",
                "–" if math.isnan(more) else f"{more:+,.0f}",
                _loss(before),
                _loss(after),
                _fixed(100 * run_plots.captured_energy(event), 1),
                _figure(number(event, "seconds")),
                "; ".join(filter(None, ["silent at first" if silent else "", event.get("reason") or ""])),
            ]
        )
    more = len(run.events) - len(rows)
    note = (
        "Loss: of the held-out growth batches. Silent at first: the function stays, the new channels learn from there."
    )
    note += f" {more} later events are in growth.jsonl." if more else ""
    return f'<p class="soft">{note}</p>{_table(heading, rows, noted=True)}'


def losses_of(event: dict[str, Any]) -> tuple[float, float]:
    """The held-out loss before an event and at the amplitude that was chosen; NaN where they were not measured."""
    details = event.get("details") or {}
    tried = details.get("losses")
    pairs = [pair for pair in tried if isinstance(pair, list) and len(pair) == 2] if isinstance(tried, list) else []
    at = {number({"x": place}, "x"): number({"x": loss}, "x") for place, loss in pairs}
    return at.get(0.0, math.nan), at.get(number(event, "amplitude"), math.nan)


def _table(heading: Sequence[str], rows: Sequence[Sequence[object]], noted: bool = False) -> str:
    """A table whose heads sort it on a click; `noted`: its last column is text."""
    head = "".join(f'<th><button type="button">{name}</button></th>' for name in heading)
    body = "".join("<tr>" + "".join(f"<td>{_escape(plain_text(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    kind = "scroll noted" if noted else "scroll"
    return f'<div class="{kind}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _reproduction(run: RunRecord) -> str:
    command = f"<p>This command runs it again:</p><pre>{_escape(reproduce_command(run))}</pre>"
    about = {key: value for key, value in run.environment.items() if key not in ("command", "layers")}
    return command + (f"<p>It ran with:</p><pre>{_escape(_yaml(about))}</pre>" if about else "")


def reproduce_command(run: RunRecord) -> str:
    """The command line that runs the same again: the recorded one, but into a directory of its own."""
    recorded = run.environment.get("command")
    if isinstance(recorded, list) and len(recorded) > 0:
        given = [str(part) for part in recorded[1:] if not str(part).startswith(("hydra.run.dir=", "resume="))]
        if not any(str(part).startswith("resume=") for part in recorded):
            return shlex.join(["growconv", *given])
    return shlex.join(["growconv", "--config-path", str(run.path.resolve()), "--config-name", "config"])


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _escape(text: object) -> str:
    return html.escape(str(text))


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def _fixed(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _loss(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else magnitude(value)
