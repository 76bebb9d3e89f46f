"""The command ``growconv compare``: table, CSV and plots over runs.

Runs that differ only in their seed are one line. What cannot be compared is left out and named.
"""

import html
import math
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from growconv.errors import ArgumentValueError
from growconv.reporting.comparison import FIGURES, Comparison, Difference, compare, standings
from growconv.reporting.comparison_plots import draw_costs, draw_courses, draw_differences, draw_frontier
from growconv.reporting.records import csv_text, is_number, plain_text
from growconv.reporting.style import save_figure
from growconv.reporting.terminal import make_console, make_table, metric, shown, told

FILES = ("comparison.md", "comparison.csv", "comparison.tex", "runs.csv")
Rows = list[list[str]]
"""A table as text, its heading first."""


def main(arguments: Namespace) -> None:
    """Compare runs, and write and print what comes of it."""
    output = arguments.output
    if any((output / name).exists() for name in FILES) and not arguments.overwrite:
        fix = "--overwrite replaces it, --output FOLDER writes elsewhere"
        raise ArgumentValueError(
            "this folder already contains a comparison", where="--output", got=str(output), fix=fix
        )
    comparison = compare(arguments.runs, arguments.baseline, arguments.by)
    write_comparison(comparison, output)
    _print(comparison, output)


def write_comparison(comparison: Comparison, output: Path) -> None:
    """Write the table as comparison.md, .csv and .tex, runs.csv, and the figures as .svg and .png into a folder."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "comparison.md").write_text(to_markdown(comparison), encoding="utf-8")
    (output / "comparison.tex").write_text(to_latex(comparison), encoding="utf-8")
    for name, rows in (("comparison.csv", _group_rows(comparison)), ("runs.csv", _run_rows(comparison))):
        (output / name).write_text(csv_text(list(rows[0]), rows), encoding="utf-8")
    for name, draw in _figures(comparison).items():
        save_figure(partial(draw, comparison), output / f"{name}.svg", output / f"{name}.png")


def _figures(comparison: Comparison) -> dict[str, Callable[[Comparison], Figure]]:
    figures = {"comparison": draw_differences, "costs": draw_costs, "courses": draw_courses}
    return {**figures, "frontier": draw_frontier} if standings(comparison) else figures


def table_rows(comparison: Comparison) -> Rows:
    """Each group's means, spreads and differences to the baseline."""
    differences = [f"difference to {comparison.baseline.label}", f"{comparison.loss_name}, difference"]
    rows = [["method", "n", *comparison.headings.values(), "growing %", *differences]]
    for group in comparison.groups:
        spreads = [_spread(group.mean(figure), group.std(figure), figure) for figure in FIGURES]
        score, loss = comparison.difference(group), comparison.difference(group, "test_loss")
        share = told(100 * group.growth_share, ".0f")
        rows.append([group.label, str(len(group.runs)), *spreads, share, _difference(score, 2), _difference(loss, 3)])
    return rows


def frontier_rows(comparison: Comparison) -> Rows:
    """The growing groups beside the best fixed network of their training FLOPs; empty without any."""
    heading = ["grown", "best fixed network of as many FLOPs", f"{comparison.loss_name}, difference", "head start kept"]
    rows = [
        [each.group.label, each.best.label, _difference(each.difference, 3), told(each.head_start, ".0%")]
        for each in standings(comparison)
    ]
    return [heading, *rows] if rows else []


def to_markdown(comparison: Comparison) -> str:
    """The table in Markdown, with what was left out below it."""
    lines = _markdown_table(table_rows(comparison))
    lines += ["", "Mean ± standard deviation over n seeds; differences are paired by seed, with 95 % intervals."]
    if against := frontier_rows(comparison):
        lines += ["", *_markdown_table(against), ""]
    lines += [f"- {_markdown(note)}" for note in comparison.notes]
    lines += [f"- left out: {_markdown(path)}: {_markdown(reason)}" for path, reason in comparison.left_out]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: Rows) -> list[str]:
    heading, *body = [[_markdown(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *body)]


def _markdown(text: str) -> str:
    """Text of a stranger inside Markdown: no markup, no HTML, no link."""
    escaped = html.escape(plain_text(text), quote=False)
    return re.sub(r"([\\|`*~])", r"\\\1", escaped).replace("](", "]\\(")


def to_latex(comparison: Comparison) -> str:
    """The table in LaTeX, for documents that use the package booktabs."""
    heading, *body = [" & ".join(map(_latex, row)) + r" \\" for row in table_rows(comparison)]
    begin = r"\begin{tabular}{l" + "r" * heading.count(" & ") + "}"
    return "\n".join([begin, r"\toprule", heading, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])


def _latex(text: str) -> str:
    """Text of a stranger inside LaTeX: its own characters only."""
    names = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    names |= {letter: f"\\{letter}" for letter in "&%$#_{}"}
    names |= {"±": r"$\pm$", "–": "--", "²": r"\textsuperscript{2}"}
    return "".join(names.get(letter, letter) for letter in plain_text(text))


def _group_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The table with full precision, a line a group."""
    standing, rows = {each.group.label: each for each in standings(comparison)}, []
    for group in comparison.groups:
        place, difference = standing.get(group.label), comparison.difference(group)
        row = {"group": group.label, "n": len(group.runs), "seeds": " ".join(map(str, group.seeds))}
        for figure in FIGURES:
            row |= {f"{figure}_mean": group.mean(figure), f"{figure}_std": group.std(figure)}
        row |= {"growth_share": group.growth_share, **_interval("", difference)}
        row |= {"pairs": difference.pairs if difference else 0}
        row |= _interval("test_loss_", comparison.difference(group, "test_loss"))
        row |= {"best_fixed": place.best.label if place else ""}
        row |= _interval("frontier_", place.difference if place else None)
        rows.append({**row, "head_start_kept": place.head_start if place else math.nan})
    return rows


def _interval(prefix: str, difference: Difference | None) -> dict[str, float]:
    """A difference and the ends of its interval by the names of their columns."""
    values = (math.nan,) * 3 if difference is None else (difference.mean, difference.low, difference.high)
    return dict(zip((f"{prefix}{name}" for name in ("difference", "ci95_low", "ci95_high")), values, strict=True))


def _run_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A line a run, for analyses of one's own."""
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            figures = {name: run.summary[name] if is_number(run.summary.get(name)) else "" for name in FIGURES}
            growth = {"growth_seconds": run.growth_seconds, "growth_events": len(run.events)}
            rows.append({"group": group.label, "seed": run.seed, **figures, **growth, "run": run.path.as_posix()})
    return rows


def _spread(mean: float, std: float, figure: str) -> str:
    """Mean ± standard deviation: scores with fixed digits, costs with three digits and a prefix for thousands."""
    if math.isnan(mean):
        return "–"
    scale, prefix = 1.0, ""
    if figure == "test_loss" or figure.endswith("accuracy"):
        form = ".3f" if figure == "test_loss" else ".2f"
    else:
        scale, prefix = metric(abs(mean))
        std = math.nan if std == 0 else std
        tiny, size = 0 < abs(mean) < 1e-3, math.log10(abs(mean) / scale) if mean else 2
        form = ".2e" if tiny else f".{max(0, 2 - math.floor(size))}f"
    spread = "" if math.isnan(std) else f" ± {std / scale:{form}}"
    return f"{mean / scale:{form}}{spread} {prefix}".rstrip()


def _difference(difference: Difference | None, digits: int) -> str:
    if difference is None:
        return "–"
    figures = (difference.mean, difference.low, difference.high)
    mean, low, high = (f"{round(value, digits) + 0.0:+.{digits}f}" for value in figures)  # + 0.0: no -0.00
    interval = "" if math.isnan(difference.low) else f" [{low}, {high}]"
    return f"{mean}{interval} (n={difference.pairs})"


def _print(comparison: Comparison, output: Path) -> None:
    """The table, in three parts where the terminal is too narrow for one: scores, differences, and what they cost."""
    console, rows = make_console(), table_rows(comparison)
    scores = list(FIGURES).index("parameters")  # the costs follow
    halves = [[0, 1, *range(2, 2 + scores)], [0, -2, -1], [0, *range(2 + scores, len(rows[0]) - 2)]]
    whole = _table(rows, range(len(rows[0])))
    fits = console.measure(whole, options=console.options.update(max_width=1000)).maximum <= console.width
    console.print("mean ± std over seeds; differences paired by seed, 95 % intervals")
    for table in [whole] if fits else [_table(rows, half) for half in halves]:
        console.print(table)
    if against := frontier_rows(comparison):
        console.print(_table(against, range(len(against[0]))))
    for note in comparison.notes:
        console.print(f"note: {plain_text(note)}", markup=False)
    for path, reason in comparison.left_out:
        console.print(f"left out: {plain_text(path)}: {plain_text(reason)}", markup=False)
    drawn = ", ".join(_figures(comparison))
    console.print(f"written to {shown(output)}: {', '.join(FILES)}; figures {drawn} as .svg and .png", markup=False)


def _table(rows: Rows, columns: Sequence[int]) -> Table:
    """Some columns of a table, the first of which are words."""
    heading, *body = [[plain_text(row[column]) for column in columns] for row in rows]
    return make_table(heading[:1], heading[1:], body)
