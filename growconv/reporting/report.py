"""The command ``growconv report``: one run, and the fixed networks beside it, as one HTML file without a network."""

import base64
import hashlib
import html
import math
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import yaml

from growconv.errors import CheckpointError
from growconv.reporting.records import METRICS, RunRecord, number, plain_text, read_run, replacing, to_number
from growconv.reporting.run_plots import drawings, event_places, score_name
from growconv.reporting.style import save_figure, style_sheet, svg_text
from growconv.reporting.terminal import magnitude, shown, told

REPORT = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html")
_SCRIPT = Path(__file__).with_name("report.js")
MOST_EVENTS = 1000
"""Rows of the table of events; later ones are in growth.jsonl."""


def main(arguments: Namespace) -> None:
    """Write the report of a run, and print where it lies."""
    print(shown(write_report(arguments.run, arguments.output)))
    if arguments.figures is not None:
        for path in write_figures(read_run(arguments.run), arguments.figures):
            print(shown(path))


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run; an unfinished run gets one of what there is so far.

    Args:
        run: run directory.
        output: file to write; None writes report.html into the run directory.

    Raises:
        CheckpointError: no run there, a damaged file, or no finished epoch yet; or the file cannot be written.
    """
    record = read_run(run)
    if not record.metrics:
        problem = "the run has not finished an epoch yet, so there is nothing to report"
        raise CheckpointError(problem, where=str(record.path / METRICS))
    path = Path(output) if output is not None else record.path / REPORT
    text = render(record)
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")  # halves of letters in names and texts
    except OSError as error:
        fix = "name a file in an existing folder"
        raise CheckpointError("the report cannot be written", where=str(path), got=error, fix=fix) from error
    return path


def write_figures(run: RunRecord, folder: Path) -> list[Path]:
    """Write every figure of the report as an SVG that follows light and dark pages into a folder: the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for title, _, draw in drawings(beside(run)[0]):
        paths.append(folder / f"{title.lower().replace(' ', '_')}.svg")
        save_figure(partial(draw, False), paths[-1])
    return paths


def render(run: RunRecord) -> str:
    """The report as HTML text; everything that comes from the run's files is escaped, and no script of theirs runs."""
    runs, broken = beside(run)
    config = f"<details><summary>config.yaml</summary><pre>{_escape(_yaml(run.config))}</pre></details>"
    sections = [("What growing bought", _results(runs, broken))] if len(runs) > 1 or broken else []
    for title, note, draw in drawings(runs):
        sections.append((title, (f'<p class="soft">{note}</p>' if note else "") + svg_text(draw, title)))
    sections += [
        ("Growth events", _event_table(run) if run.events else "<p>This run did not grow.</p>"),
        ("How to reproduce", _reproduction(run)),
        ("Configuration", config),
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
        sections="\n".join(f"<section><h2>{title}</h2>\n{body}</section>" for title, body in sections),
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


def _tiles(run: RunRecord) -> str:
    summary = run.summary or run.metrics[-1]
    total, score = number(summary, "seconds"), score_name(run)
    growing = run.growth_seconds / total if total > 0 else math.nan
    tiles = [
        (f"test {score}", _percent(number(summary, "test_accuracy"))),
        ("test loss", told(number(summary, "test_loss"), ".4g")),
        (f"best validation {score}", _percent(number(summary, "best_val_accuracy"))),
        ("parameters", magnitude(number(summary, "parameters"))),
        ("training FLOPs", magnitude(number(summary, "train_flops"))),
        ("seconds in all", magnitude(total)),
        ("of the time growing", _percent(growing)),
        ("growth events", str(len(run.events))),
    ]
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in tiles)
    return f'<div class="tiles">{shown}</div>'


def _results(runs: Mapping[str, RunRecord], broken: Sequence[str]) -> str:
    """Grown and fixed networks as a table; FLOPs also as a share of the dearest run's."""
    score = score_name(next(iter(runs.values())))
    heading = ["network", f"test {score} %", "test loss", "parameters", "training FLOPs", "share", "seconds", "growing"]
    most = max(number(run.summary, "train_flops", 0.0) for run in runs.values())
    rows = []
    for label, run in runs.items():
        accuracy, loss, parameters, flops, seconds = (
            number(run.summary, name) for name in ("test_accuracy", "test_loss", "parameters", "train_flops", "seconds")
        )
        cost = [magnitude(parameters), magnitude(flops), _percent(flops / most if most > 0 else math.nan)]
        growing = told(run.growth_seconds, ".1f") if run.events else "–"
        name = label if run.finished else f"{label} (unfinished)"
        rows.append([name, told(100 * accuracy, ".2f"), told(loss, ".4g"), *cost, told(seconds, ".1f"), growing])
    notes = "".join(f"<p>Left out: {_escape(reason)}</p>" for reason in broken)
    return _table(heading, rows) + notes


def _event_table(run: RunRecord) -> str:
    heading = ["site", "step", "epoch", "width", "parameters", "loss before", "after", "captured %", "seconds", "note"]
    rows = []
    for event, place in list(zip(run.events, event_places(run), strict=True))[:MOST_EVENTS]:
        before, after = losses_of(event)
        more = number(event, "parameters_after") - number(event, "parameters_before")
        notes = ["silent at first" if event.get("amplitude") == 0 else "", event["reason"]]
        rows.append(
            [
                event["site"],
                event.get("step", "–"),
                told(place, ".2f"),
                f"{event.get('width_before', '?')} → {event.get('width_after', '?')}",
                told(more, "+,.0f"),
                told(before, ".4g"),
                told(after, ".4g"),
                told(100 * number(event["details"], "captured_energy"), ".1f"),
                magnitude(number(event, "seconds")),
                "; ".join(filter(None, notes)),
            ]
        )
    later = len(run.events) - len(rows)
    note = (
        "Loss: of the held-out growth batches. Silent at first: the function stays, the new channels learn from there."
    )
    note += f" {later} later events are in growth.jsonl." if later else ""
    return f'<p class="soft">{note}</p>{_table(heading, rows, noted=True)}'


def losses_of(event: dict[str, Any]) -> tuple[float, float]:
    """The held-out loss before an event and at the amplitude that was chosen; NaN where they were not measured."""
    tried = event["details"].get("losses")
    pairs = [pair for pair in tried if isinstance(pair, list) and len(pair) == 2] if isinstance(tried, list) else []
    at = {to_number(place): to_number(loss) for place, loss in pairs}
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
