"""The command ``growconv compare``: table, CSV and plots over runs.

Runs that differ only in their seed are one line. What cannot be compared is left out and named.
"""

import csv
import html
import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from growconv.errors import ArgumentValueError
from growconv.reporting.comparison import FIGURES, Comparison, Difference, Group, compare
from growconv.reporting.comparison_plots import draw_costs, draw_courses, draw_differences, draw_frontier
from growconv.reporting.frontier import Standing, standings
from growconv.reporting.records import csv_cell, is_number, plain_text
from growconv.reporting.style import save_figure
from growconv.reporting.terminal import make_console, make_table, metric, shown

FIGURE_FILES = {"comparison": draw_differences, "costs": draw_costs, "courses": draw_courses}
FILES = ("comparison.md", "comparison.csv", "comparison.tex", "runs.csv")


def main(arguments: Namespace) -> None:
    """Compare runs, and write and print what comes of it.

    Args:
        arguments: what `compare_parser` read.

    Raises:
        ArgumentValueError: a comparison lies in the folder already.
    """
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
    """Write the table as comparison.md, .csv and .tex, runs.csv, and the figures as .svg and .png into a folder.

    Args:
        comparison: what to write.
        output: the folder; made where it is missing. What lies there is replaced.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "comparison.md").write_text(to_markdown(comparison), encoding="utf-8")
    (output / "comparison.tex").write_text(to_latex(comparison), encoding="utf-8")
    _write_groups(comparison, output / "comparison.csv")
    _write_runs(comparison, output / "runs.csv")
    for name, draw in figures(comparison).items():
        save_figure(partial(draw, comparison), output / f"{name}.svg", output / f"{name}.png")


def figures(comparison: Comparison) -> dict[str, Callable[[Comparison], Figure]]:
    """The figures of a comparison by their files' names."""
    return {**FIGURE_FILES, "frontier": draw_frontier} if standings(comparison) else FIGURE_FILES


def frontier_rows(comparison: Comparison) -> list[list[str]]:
    """The growing runs beside the best fixed network of their training FLOPs as text, heading first; [] without any."""
    found = standings(comparison)
    heading = ["grown", "best fixed network of as many FLOPs", f"{comparison.loss_name}, difference", "head start kept"]
    return [heading, *map(_standing, found)] if found else []


def _standing(standing: Standing) -> list[str]:
    kept = "–" if math.isnan(standing.head_start) else f"{standing.head_start:.0%}"
    return [standing.group.label, standing.best.label, _difference_text(standing.difference, 3), kept]


def table_rows(comparison: Comparison) -> list[list[str]]:
    """The table as text, heading first."""
    name = comparison.baseline.label
    differences = [f"difference to {name}", f"{comparison.loss_name}, difference"]
    heading = ["method", "n", *comparison.headings.values(), "growing %", *differences]
    return [heading, *(_row(comparison, group) for group in comparison.groups)]


def _row(comparison: Comparison, group: Group) -> list[str]:
    shown = [_spread(group.mean(figure), group.std(figure), figure) for figure in FIGURES]
    share = group.growth_share
    return [
        group.label,
        str(len(group.runs)),
        *shown,
        "–" if math.isnan(share) else f"{100 * share:.0f}",
        _difference_text(comparison.difference(group), 2),
        _difference_text(comparison.difference(group, "test_loss"), 3),
    ]


def to_markdown(comparison: Comparison) -> str:
    """The table in Markdown, with what was left out below it."""
    heading, *body = [[_markdown(cell) for cell in row] for row in table_rows(comparison)]
    lines = [_markdown_row(heading), _markdown_row(["---"] * len(heading)), *map(_markdown_row, body)]
    lines += ["", "Mean ± standard deviation over n seeds; differences are paired by seed, with 95 % intervals."]
    if rows := [[_markdown(cell) for cell in row] for row in frontier_rows(comparison)]:
        lines += ["", _markdown_row(rows[0]), _markdown_row(["---"] * len(rows[0])), *map(_markdown_row, rows[1:]), ""]
    lines += [f"- {_markdown(note)}" for note in comparison.notes]
    lines += [f"- left out: {_markdown(path)}: {_markdown(reason)}" for path, reason in comparison.left_out]
    return "\n".join(lines) + "\n"


def _write_groups(comparison: Comparison, path: Path) -> None:
    """The table with full precision, a line a group."""
    standing, rows = {each.group.label: each for each in standings(comparison)}, []
    for group in comparison.groups:
        place, difference = standing.get(group.label), comparison.difference(group)
        row = {"group": csv_cell(group.label), "n": len(group.runs), "seeds": " ".join(map(str, group.seeds))}
        for figure in FIGURES:
            row |= {f"{figure}_mean": group.mean(figure), f"{figure}_std": group.std(figure)}
        row |= {"growth_share": group.growth_share, **_interval("", difference)}
        row |= {"pairs": difference.pairs if difference else 0}
        row |= _interval("test_loss_", comparison.difference(group, "test_loss"))
        row |= {"best_fixed": csv_cell(place.best.label) if place else ""}
        row |= _interval("frontier_", place.difference if place else None)
        rows.append({**row, "head_start_kept": place.head_start if place else math.nan})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _interval(prefix: str, difference: Difference | None) -> dict[str, float]:
    """A difference and the ends of its interval by the names of their columns."""
    values = (math.nan,) * 3 if difference is None else (difference.mean, difference.low, difference.high)
    return dict(zip((f"{prefix}{name}" for name in ("difference", "ci95_low", "ci95_high")), values, strict=True))


def _write_runs(comparison: Comparison, path: Path) -> None:
    """A line a run, for analyses of one's own."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "seed", *FIGURES, "growth_seconds", "growth_events", "run"])
        for group in comparison.groups:
            for run in group.runs:
                figures = [run.summary[figure] if is_number(run.summary.get(figure)) else "" for figure in FIGURES]
                name, place = csv_cell(group.label), csv_cell(run.path.as_posix())
                writer.writerow([name, run.seed, *figures, run.growth_seconds, len(run.events), place])


def _spread(mean: float, std: float, figure: str) -> str:
    if math.isnan(mean):
        return "–"
    if figure.endswith("accuracy"):
        return f"{mean:.2f}" + ("" if math.isnan(std) else f" ± {std:.2f}")
    if figure == "test_loss":
        return f"{mean:.3f}" + ("" if math.isnan(std) else f" ± {std:.3f}")
    scale, prefix = metric(abs(mean))
    scaled = mean / scale
    if 0 < abs(scaled) < 1e-3:
        return f"{mean:.2e}" + ("" if math.isnan(std) or std == 0 else f" ± {std:.2e}")
    digits = max(0, 2 - math.floor(math.log10(abs(scaled)))) if scaled else 0
    spread = "" if math.isnan(std) or std == 0 else f" ± {std / scale:.{digits}f}"
    return f"{scaled:.{digits}f}{spread}{f' {prefix}' if prefix else ''}"


def _difference_text(difference: Difference | None, digits: int) -> str:
    if difference is None:
        return "–"
    figures = (difference.mean, difference.low, difference.high)
    mean, low, high = (f"{round(value, digits) + 0.0:+.{digits}f}" for value in figures)  # + 0.0: no -0.00
    interval = "" if math.isnan(difference.low) else f" [{low}, {high}]"
    return f"{mean}{interval} (n={difference.pairs})"


def to_latex(comparison: Comparison) -> str:
    """The table in LaTeX, for documents that use the package booktabs."""
    heading, *body = [[_latex(cell) for cell in row] for row in table_rows(comparison)]
    lines = [" & ".join(row) + r" \\" for row in (heading, *body)]
    columns = "l" + "r" * (len(heading) - 1)
    rules = [r"\begin{tabular}{" + columns + "}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([*rules, r"\end{tabular}", ""])


def _latex(text: str) -> str:
    """Text of a stranger inside LaTeX: its own characters only."""
    names = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    names |= {letter: f"\\{letter}" for letter in "&%$#_{}"}
    names |= {"±": r"$\pm$", "–": "--", "²": r"\textsuperscript{2}"}
    return "".join(names.get(letter, letter) for letter in plain_text(text))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown(text: str) -> str:
    """Text of a stranger inside Markdown: no markup, no HTML, no link."""
    escaped = html.escape(plain_text(text), quote=False)
    return re.sub(r"([\\|`*~])", r"\\\1", escaped).replace("](", "]\\(")


def _print(comparison: Comparison, output: Path) -> None:
    """The table, in two parts where the terminal is too narrow for one: accuracies, then what they cost."""
    console = make_console()
    rows = table_rows(comparison)
    every = range(len(rows[0]))
    scores = 1 + len(FIGURES) - 4  # method and n, then accuracies and loss, then four costs and the growing share
    costs = every[scores + 1 : scores + 6]
    halves = [[*every[: scores + 1]], [0, *every[-2:]], [0, *costs]]
    whole = _table(rows, every)
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
    drawn = ", ".join(figures(comparison))
    console.print(f"written to {shown(output)}: {', '.join(FILES)}; figures {drawn} as .svg and .png", markup=False)


def _table(rows: Sequence[Sequence[str]], columns: Iterable[int]) -> Table:
    """Some columns of the rows, the first of which is the heading."""
    first, *rest = columns
    body = [[plain_text(row[column]) for column in (first, *rest)] for row in rows[1:]]
    return make_table([rows[0][first]], [rows[0][column] for column in rest], body)
