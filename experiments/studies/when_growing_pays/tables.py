"""Tables and figures of the study when_growing_pays, out of results.jsonl.

python -m experiments.studies.when_growing_pays.tables
"""

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from scipy import stats

from experiments.studies.when_growing_pays.allocation import CELLS
from experiments.studies.when_growing_pays.questions import BUDGETS, HALF, LENGTH, WIDTHS, E
from experiments.studies.when_growing_pays.record import Record, Result
from growconv.reporting.comparison import head_start_kept

HERE = Path(__file__).parent
Row = list[str]


def interval(values: Sequence[float], digits: int = 4) -> str:
    """Mean and 95 % interval of Student's t; the mean alone of one value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.{digits}f} (n=1)"
    half = _half(values)
    return f"{mean:.{digits}f} [{mean - half:.{digits}f}, {mean + half:.{digits}f}] (n={len(values)})"


def _half(values: Sequence[float]) -> float:
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def table(titles: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]


def nll(results: Mapping[int, Result]) -> list[float]:
    """Test NLL of each seed."""
    return [result.test_loss for result in results.values()]


def paired(results: Mapping[int, Result], reference: Mapping[int, Result]) -> list[float]:
    """Differences of test NLL, seed by seed."""
    return [result.test_loss - reference[seed].test_loss for seed, result in results.items() if seed in reference]


def row(name: str, results: Mapping[int, Result], references: Sequence[Mapping[int, Result]]) -> Row:
    """A variant: NLL, accuracy, what it cost, and its paired differences."""
    differences = [interval(found) if (found := paired(results, each)) else "" for each in references]
    accuracy = 100 * statistics.mean(result.test_accuracy for result in results.values())
    cost = statistics.median(result.train_flops for result in results.values()) / 1e12
    seconds = statistics.median(result.seconds for result in results.values())
    peak = [result.peak_mib for result in results.values() if result.peak_mib is not None]
    memory = f"{statistics.median(peak):.0f}" if peak else ""
    size = f"{statistics.median(result.parameters for result in results.values()):.0f}"
    return [
        name,
        interval(nll(results)),
        f"{accuracy:.2f}",
        *differences,
        size,
        f"{cost:.2f}",
        f"{seconds:.0f}",
        memory,
    ]


def titles(*references: str) -> Row:
    """The head of a table of `row`."""
    differences = [f"NLL less {name}, paired" for name in references]
    return ["variant", "test NLL", "accuracy %", *differences, "parameters", "TFLOP", "seconds", "MiB"]


class Tables:
    """All answers.

    Args:
        record: of the finished runs.
    """

    def __init__(self, record: Record):
        self.record = record

    def fixed(self, width: float, budget: float = LENGTH / E) -> dict[int, Result]:
        """A fixed width of the frontier."""
        return self.record.of("frontier", f"budget_{budget}/width_{width}")

    def best(self, budget: float = LENGTH / E) -> tuple[float, dict[int, Result]] | None:
        """The fixed width with the lowest mean NLL at a budget, and its runs; None before all widths have one."""
        found = {width: self.fixed(width, budget) for width in WIDTHS}
        if not all(found.values()):
            return None
        width = min(found, key=lambda width: statistics.mean(nll(found[width])))
        return width, found[width]

    def rates(self) -> list[str]:
        """Mean validation NLL at every rate."""
        tried: dict[str, dict[float, list[float]]] = {}
        for variant in self.record.variants("rates"):
            net, _, rate = variant.partition("/lr_")
            tried.setdefault(net, {})[float(rate)] = [
                each.val_loss for each in self.record.of("rates", variant).values()
            ]
        rates = sorted({rate for by_rate in tried.values() for rate in by_rate})
        rows = [
            [net, *(f"{statistics.mean(by_rate[rate]):.4f}" if rate in by_rate else "" for rate in rates)]
            for net, by_rate in tried.items()
        ]
        return table(["net", *(f"{rate:g}" for rate in rates)], rows)

    def frontier(self) -> list[str]:
        """(a)."""
        rows = []
        for width in WIDTHS:
            cells = [self.fixed(width, budget) for budget in BUDGETS]
            rows.append([f"{width:g}", *(interval(nll(cell)) if cell else "" for cell in cells)])
        return table(["width", *(f"{budget:g} E" for budget in BUDGETS)], rows)

    def head_start(self, target: float, results: Mapping[int, Result]) -> str:
        """Head start kept, as the protocol defines it, of runs of 2 E that doubled in the middle."""
        large = {budget: statistics.mean(nll(found)) for budget in BUDGETS if (found := self.fixed(target, budget))}
        if not (small := self.fixed(target / 2, HALF / E)):
            return ""
        kept = head_start_kept(statistics.mean(nll(results)), (LENGTH - HALF) / E, large, statistics.mean(nll(small)))
        return "outside" if math.isnan(kept) else f"{kept:.0%}"

    def doubling(self) -> list[str]:
        """(b)."""
        lines = []
        if (best := self.best()) is None:
            return ["The frontier comes first."]
        for target in (1.0, 2.0):
            rows = [
                [
                    *row(name, found, [self.fixed(target), best[1]]),
                    self.head_start(target, found) if "_at_" not in name else "",
                ]
                for name, found in self.group("doubling", f"to_{target}/").items()
            ]
            heads = [*titles(f"width {target:g}", f"the best, {best[0]:g}"), "head start kept"]
            lines += [f"To width {target:g}:", "", *table(heads, rows), ""]
        return lines

    def group(self, question: str, prefix: str) -> dict[str, dict[int, Result]]:
        """The variants under a path, by the rest of their names."""
        named = [name for name in self.record.variants(question) if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.record.of(question, name) for name in named}

    def finished(self) -> list[str]:
        """(c)."""
        lines = []
        for small in (0.5, 1.0):
            scratch = {
                f"width {2 * small:g} from scratch, {budget:g} E": self.fixed(2 * small, budget)
                for budget in (HALF / E, LENGTH / E)
            }
            reference = self.record.of("finished", f"from_{small}/small")
            rows = [row(name, found, [reference]) for name, found in scratch.items() if found]
            rows += [row(name, found, [reference]) for name, found in self.group("finished", f"from_{small}/").items()]
            lines += [f"From width {small:g}:", "", *table(titles("trained on as it is"), rows), ""]
        return lines

    def family(self) -> list[str]:
        """(d)."""
        rows = []
        for number, width in enumerate(("½", "¾", "1")):
            alone = self.record.of("family", f"alone/{number}")
            for name in ("trunk", "alone"):
                if found := self.record.of("family", f"{name}/{number}"):
                    rows.append(row(f"width {width}, {name}", found, [alone]))
        return [*table(titles("alone"), rows), "", self.family_in_all()]

    def family_in_all(self) -> str:
        """The three members together."""
        by_name = {
            name: [self.record.of("family", f"{name}/{number}") for number in range(3)] for name in ("trunk", "alone")
        }
        seeds = set.intersection(*(set(found) for each in by_name.values() for found in each))
        if not seeds:
            return ""
        mean = {
            name: {seed: statistics.mean(found[seed].test_loss for found in each) for seed in seeds}
            for name, each in by_name.items()
        }
        differences = [mean["trunk"][seed] - mean["alone"][seed] for seed in sorted(seeds)]
        return f"Mean NLL of the three, trunk less alone: {interval(differences)}."

    def allocation(self, question: str = "allocation") -> list[str]:
        """(e): a table for each cell, and all cells together."""
        lines: list[str] = []
        summary: dict[str, dict[str, list[float]]] = {}
        for cell in CELLS:
            found = self.group(question, f"{cell.name}/")
            uniform = found.get("uniform", {})
            for name, results in found.items():
                if name != "uniform":
                    summary.setdefault(name, {})[cell.name] = paired(results, uniform)
            rows = [row(name, results, [uniform]) for name, results in found.items()]
            if rows:
                lines += [f"{cell.net} on {cell.images}:", "", *table(titles("uniform"), rows), ""]
        names = [cell.name for cell in CELLS]
        rows = [
            [name, *(interval(cells[each]) if cells.get(each) else "" for each in names)]
            for name, cells in summary.items()
        ]
        return [*lines, "NLL less uniform, paired:", "", *table(["variant", *names], rows)]

    def size_and_depth(self) -> list[str]:
        """(f)."""
        lines = []
        for target in (1.0, 2.0):
            rows = [
                row(name, found, [self.fixed(target)])
                for name, found in self.group("size_and_depth", f"plain/to_{target}/").items()
            ]
            lines += [f"Plain net, to width {target:g}:", "", *table(titles(f"width {target:g}"), rows), ""]
        residual = self.group("size_and_depth", "residual/")
        references = [residual.get(f"residual_{blocks}", {}) for blocks in ("2_2_2", "4_3_3")]
        rows = [row(name, found, references) for name, found in residual.items()]
        return [*lines, "Residual net:", "", *table(titles("2, 2, 2 blocks", "4, 3, 3 blocks"), rows)]

    def directions(self) -> list[str]:
        """(g)."""
        random = {
            amplitude: self.record.of("directions", f"random_{amplitude}") for amplitude in ("0.0", "line_search")
        }
        rows = [
            row(
                name.replace("_0.0", ", amplitude 0").replace("_line_search", ", line search"),
                found,
                [random[name.split("_", 1)[1]]],
            )
            for name, found in self.group("directions", "").items()
        ]
        return table(titles("random"), rows)

    def text(self) -> str:
        """All tables of what there is."""
        parts = {
            "rates": ("Rates: mean validation NLL", self.rates),
            "frontier": ("(a) The frontier: test NLL", self.frontier),
            "doubling": ("(b) One doubling", self.doubling),
            "finished": ("(c) A finished net, grown", self.finished),
            "family": ("(d) A family from one trunk", self.family),
            "allocation": ("(e) Allocation", self.allocation),
            "allocation_again": ("(e) Allocation, fresh seeds", lambda: self.allocation("allocation_again")),
            "size_and_depth": ("(f) Image size and depth", self.size_and_depth),
            "directions": ("(g) Initial directions", self.directions),
        }
        there = [title_and_table for question, title_and_table in parts.items() if self.record.variants(question)]
        return "\n\n".join("\n".join([f"## {title}", "", *make()]).rstrip() for title, make in there) + "\n"

    def draw_frontier(self, target: Path) -> None:
        """The frontier, and what the doublings reached."""
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for number, width in enumerate(WIDTHS):
            found = {budget: self.fixed(width, budget) for budget in BUDGETS}
            means = {budget: statistics.mean(nll(cell)) for budget, cell in found.items() if cell}
            axes.plot(
                [*means], [*means.values()], marker="osD^v"[number], label=f"fixed, width {width:g}", linewidth=1.2
            )
        for target_width, marker in ((1.0, "+"), (2.0, "x")):
            groups = self.group("doubling", f"to_{target_width}/")
            means = [statistics.mean(nll(found)) for found in groups.values()]
            axes.scatter(
                [LENGTH / E] * len(means),
                means,
                marker=marker,
                color="black",
                zorder=3,
                label=f"grown to {target_width:g}",
            )
        axes.set(xscale="log", xlabel=f"training FLOPs in E = {E:.2g}", ylabel="test NLL", xticks=BUDGETS)
        axes.set_xticklabels([f"{budget:g}" for budget in BUDGETS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(target, dpi=150)
        plt.close(figure)

    def differences(self, question: str, prefix: str, reference: Mapping[int, Result]) -> dict[str, list[float]]:
        """Paired differences of a question's variants, by their names."""
        found = {name: paired(results, reference) for name, results in self.group(question, prefix).items()}
        return {name: values for name, values in found.items() if values}

    def family_differences(self) -> dict[str, list[float]]:
        """Those of (d): each member of the trunk less the same width alone."""
        found = {}
        for number, width in enumerate(("½", "¾", "1")):
            trunk, alone = (self.record.of("family", f"{name}/{number}") for name in ("trunk", "alone"))
            if values := paired(trunk, alone):
                found[f"width {width}"] = values
        return found

    def draw_allocation(self, target: Path) -> None:
        """Paired differences of all cells: a panel for each data set, a colour for each net."""
        names = list(dict.fromkeys(cell.images for cell in CELLS))
        figure, panels = plt.subplots(1, len(names), figsize=(10, 4.5), layout="constrained", sharey=True)
        for axes, images in zip(panels, names, strict=True):
            cells = [cell for cell in CELLS if cell.images == images]
            for number, cell in enumerate(cells):
                uniform = self.record.of("allocation", f"{cell.name}/uniform")
                found = self.differences("allocation", f"{cell.name}/", uniform)
                found.pop("uniform", None)
                places = [place + 0.22 * (number - 1) for place in range(len(found))]
                _draw_intervals(axes, places, list(found.values()), f"C{number}", cell.net)
                axes.set_yticks(range(len(found)), [name.replace("_", " ") for name in found])
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set(xlabel="test NLL less that of uniform widths", title=images)
            axes.grid(axis="x", alpha=0.3)
        panels[0].invert_yaxis()
        panels[-1].legend(fontsize=8)
        figure.savefig(target, dpi=150)
        plt.close(figure)


def _draw_intervals(
    axes: Axes, places: Sequence[float], groups: Sequence[Sequence[float]], colour: str, label: str | None = None
) -> None:
    """Means with their 95 % intervals, one below the other."""
    halves = [_half(values) if len(values) > 1 else 0.0 for values in groups]
    means = [statistics.mean(values) for values in groups]
    axes.errorbar(means, places, xerr=halves, fmt="o", color=colour, capsize=3, markersize=4, label=label)


def draw_differences(groups: Mapping[str, Sequence[float]], target: Path, against: str) -> None:
    """Paired differences with their intervals."""
    if not groups:
        return
    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.32 * len(groups)), layout="constrained")
    _draw_intervals(axes, range(len(groups)), list(groups.values()), "#1f5f99")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(groups)), [name.replace("_", " ") for name in groups])
    axes.set(xlabel=f"test NLL less that of {against}; 95 % intervals over seeds")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def figures(tables: Tables) -> Iterator[tuple[str, Mapping[str, Sequence[float]], str]]:
    """The figures of differences: name, differences by variant, and what they are taken from, in words."""
    for target in (1.0, 2.0):
        fixed, against = tables.fixed(target), f"width {target:g} at the same FLOPs"
        yield f"doubling_to_{target:g}", tables.differences("doubling", f"to_{target}/", fixed), against
        size = tables.differences("size_and_depth", f"plain/to_{target}/", fixed)
        yield f"size_to_{target:g}", size, against
    for small, name in ((0.5, "half"), (1.0, "1")):
        alone = tables.record.of("finished", f"from_{small}/small")
        found = tables.differences("finished", f"from_{small}/", alone)
        yield f"finished_from_{name}", found, "the same net trained on"
    yield "family", tables.family_differences(), "the same width alone"
    shallow = tables.record.of("size_and_depth", "residual/residual_2_2_2")
    depth = tables.differences("size_and_depth", "residual/", shallow)
    yield "depth", depth, "2, 2, 2 blocks at the same FLOPs"
    random = tables.record.of("directions", "random_0.0")
    yield "directions", tables.differences("directions", "", random), "random, amplitude 0"


def main() -> int:
    """Write RESULTS.md and the figures."""
    matplotlib.use("Agg")
    tables = Tables(Record())
    (HERE / "RESULTS.md").write_text(
        f"# Results so far\n\n`python -m experiments.studies.when_growing_pays.tables`\n\n{tables.text()}"
    )
    if tables.record.variants("frontier"):
        tables.draw_frontier(HERE / "frontier.png")
    if tables.record.variants("allocation"):
        tables.draw_allocation(HERE / "allocation.png")
    for name, groups, against in figures(tables):
        draw_differences(groups, HERE / f"{name}.png", against)
    return 0


if __name__ == "__main__":
    sys.exit(main())
