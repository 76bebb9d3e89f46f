"""The command ``growconv report``: one run as one HTML file that needs no network and no JavaScript."""

import argparse
import html
import math
import os
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import yaml

from growconv.errors import CheckpointError
from growconv.reporting import plots
from growconv.reporting.records import METRICS, RunRecord, number, plain_text, read_json, read_run

REPORT = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html")


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``growconv report``.

    Args:
        argv: arguments after the command's name; None reads the process's.

    Returns:
        0, the exit status.
    """
    parser = argparse.ArgumentParser(prog="growconv report", description="One run as one self-contained HTML file.")
    parser.add_argument("run", help="run directory")
    parser.add_argument("--output", help=f"file to write (default: RUN/{REPORT})")
    arguments = parser.parse_args(argv)
    print(write_report(arguments.run, arguments.output))
    return 0


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run; an unfinished run gets one of what there is so far.

    Args:
        run: run directory.
        output: file to write; None writes report.html into the run directory.

    Returns:
        The file written.

    Raises:
        CheckpointError: no run there, a damaged file, or no finished epoch yet.
    """
    record = read_run(run)
    if not record.metrics:
        raise CheckpointError("no epoch in it yet, so there is nothing to report", where=str(record.path / METRICS))
    path = Path(output) if output is not None else record.path / REPORT
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(render(record), encoding="utf-8")
    os.replace(temporary, path)
    return path


def render(run: RunRecord) -> str:
    """The report as HTML text; everything that comes from the run's files is escaped."""
    sections = [
        _figure_section(run, "Training", plots.draw_curves, "Dashed lines: growth events."),
        *(_growth_sections(run) if run.events else [_section("Growth", "<p>This run did not grow.</p>")]),
        _section("How to reproduce", _reproduction(run)),
        _section(
            "Configuration", f"<details><summary>config.yaml</summary><pre>{_escape(_yaml(run.config))}</pre></details>"
        ),
    ]
    state = "" if run.finished else "unfinished, so far: "
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=_escape(plain_text(f"{run.method} on {_data(run)}, seed {run.seed}")),
        subtitle=_escape(f"{state}{run.path.resolve()}"),
        tiles=_tiles(run),
        sections="\n".join(section for section in sections if section),
    )


def _growth_sections(run: RunRecord) -> list[str]:
    sections = [_figure_section(run, "Widths", plots.draw_widths)]
    drawn = len(plots.spectra_sites(run))
    if drawn:
        note = "Gains of the candidates, best first, dark to light over the run. Filled: kept; hollow: not taken."
        left_out = len(plots.sites_of(run)) - drawn
        note += f" Not drawn: {left_out} sites with smaller gains or none." if left_out else ""
        sections.append(_figure_section(run, "Spectra", plots.draw_spectra, note))
    if any(not math.isnan(plots.captured_energy(event)) for event in run.events):
        note = "How much of the change that the loss asks of the consumers the new channels give, to first order."
        sections.append(_figure_section(run, "Captured energy", plots.draw_energy, note))
    if _has(run, "predicted_decrease") and _has(run, "realised_decrease"):
        note = "First-order prediction against the measured decrease of the loss, at the amplitude chosen."
        sections.append(_figure_section(run, "Predicted and realised decrease", plots.draw_decrease, note))
    if number(run.summary, "seconds", 0.0) > 0:
        sections.append(_figure_section(run, "Time", plots.draw_time))
    sections.append(_section("Growth events", _event_table(run)))
    return sections


def _has(run: RunRecord, key: str) -> bool:
    return any(not math.isnan(number(event, key)) for event in run.events)


def _tiles(run: RunRecord) -> str:
    summary = run.summary or run.metrics[-1]
    total = number(summary, "seconds")
    tiles = [
        ("test accuracy", _percent(number(summary, "test_accuracy"))),
        ("best validation accuracy", _percent(number(summary, "best_val_accuracy"))),
        ("parameters", _figure(number(summary, "parameters"))),
        ("training FLOPs", _figure(number(summary, "train_flops"))),
        ("seconds", _figure(total)),
        ("of them growing", _percent(run.growth_seconds / total) if total > 0 else "–"),
        ("growth events", str(len(run.events))),
    ]
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in tiles)
    return f'<div class="tiles">{shown}</div>'


def _figure_section(run: RunRecord, title: str, draw: Callable[[RunRecord, bool], plots.Figure], note: str = "") -> str:
    shown = plots.svg_text(partial(draw, run), title)
    return _section(title, (f'<p class="soft">{note}</p>' if note else "") + shown)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>\n{body}</section>"


def _event_table(run: RunRecord) -> str:
    heading = ["step", "site", "width", "amplitude", "gain", "predicted", "realised", "seconds", "note"]
    lines = []
    for event in run.events:
        gains = [value for value in plots.spectrum_of({"gains": event.get("gains")}) if not math.isnan(value)]
        cells = [
            event.get("step", "–"),
            event["site"],
            f"{event.get('width_before', '?')} → {event.get('width_after', '?')}",
            _figure(number(event, "amplitude")),
            _figure(sum(gains)) if gains else "–",
            _figure(number(event, "predicted_decrease")),
            _figure(number(event, "realised_decrease")),
            _figure(number(event, "seconds")),
            event.get("reason") or "",
        ]
        lines.append("<tr>" + "".join(f"<td>{_escape(plain_text(cell))}</td>" for cell in cells) + "</tr>")
    head = "<tr>" + "".join(f"<th>{name}</th>" for name in heading) + "</tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def _reproduction(run: RunRecord) -> str:
    command = f"<p>This command runs it again:</p><pre>{_escape(reproduce_command(run))}</pre>"
    about = {key: value for key, value in environment_of(run).items() if key != "command"}
    return command + (f"<p>It ran with:</p><pre>{_escape(_yaml(about))}</pre>" if about else "")


def reproduce_command(run: RunRecord) -> str:
    """The command line that runs the same again: the recorded one, but into a directory of its own."""
    recorded = environment_of(run).get("command")
    if isinstance(recorded, list) and len(recorded) > 0:
        given = [str(part) for part in recorded[1:] if not str(part).startswith(("hydra.run.dir=", "resume="))]
        if not any(str(part).startswith("resume=") for part in recorded):
            return shlex.join(["growconv", *given])
    return shlex.join(["growconv", "--config-path", str(run.path.resolve()), "--config-name", "config"])


def environment_of(run: RunRecord) -> dict[str, Any]:
    """What the run wrote about machine, versions and command; empty where it wrote nothing."""
    path = run.path / "environment.json"
    try:
        told = read_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _data(run: RunRecord) -> str:
    settings = run.settings
    return str(settings.get("data.name", settings.get("data", "unknown data")))


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _escape(text: object) -> str:
    return html.escape(str(text))


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else plots.magnitude(value)
