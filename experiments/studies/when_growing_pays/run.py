"""The runs of the study when_growing_pays and its tables; README.md beside this file is the protocol.

python -m experiments.studies.when_growing_pays.run rates frontier doubling --hours 2
python -m experiments.studies.when_growing_pays.run --tables
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from growconv.training.study import Job

E = 1.2e12
"""The unit of training FLOPs: about one epoch of width 1."""

WIDTHS = (0.5, 0.7, 1.0, 1.4, 2.0)
BUDGETS = (0.5, 1.0, 2.0, 4.0)
RATES = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)
TUNING, SEEDS = (100, 101), (0, 1, 2, 3, 4)
BASE = (
    "data=fashion_mnist",
    "data.validation=0.1",
    "model=small_cnn",
    "model._target_=growconv.training.models.PlainNet",
    "+model.args.plan=[16,pool,32,32,pool,64]",
    "optimizer=sgd",
    "lr_schedule=trapezoid",
    "lr_schedule.decay=0.4",
    "trainer.batch_size=128",
    "trainer.progress=none",
    "baselines=[]",
    "report=false",
)
METHODS = {
    "net2net": ["growth=net2net"],
    "net2net_rms": ["growth=net2net", "growth.solver.keeps=rms"],
    "functional": ["growth=functional"],
    "random": ["growth=random"],
    "variance_transfer": ["growth=variance_transfer"],
}
FASTER = "+growth.scheduler.learning_rate={policy: WarmUp, steps: 4, start: 1.0, peak: 1.3}"


def rates(runs: Path) -> Iterator[Job]:
    """One epoch's worth at every rate, on seeds that are never reported."""
    for seed, width, rate in itertools.product(TUNING, WIDTHS, RATES):
        fixed = (*BASE, "growth=none", f"model.width={width}", f"trainer.flops={E}", f"optimizer.lr={rate}")
        yield Job(runs / "rates" / f"width_{width}" / f"lr_{rate}" / f"seed{seed}", (*fixed, f"seed={seed}"))


def best_rate(runs: Path, width: float) -> float:
    """The rate that the protocol chooses for a width.

    Raises:
        SystemExit: not all rates were run, or the best lies at an end of the list.
    """
    means = {}
    for rate in RATES:
        folders = [runs / "rates" / f"width_{width}" / f"lr_{rate}" / f"seed{seed}" for seed in TUNING]
        if not all((folder / "summary.json").is_file() for folder in folders):
            raise SystemExit(f"width {width}: rate {rate} is not through yet; run `rates` first")
        last = [(folder / "metrics.jsonl").read_text().splitlines()[-1] for folder in folders]
        means[rate] = statistics.mean(json.loads(line)["val_loss"] for line in last)
    best = min(means, key=lambda rate: means[rate])
    if best in (RATES[0], RATES[-1]):
        raise SystemExit(f"width {width}: the best rate {best} is at an end of the list; make the list longer")
    return best


def frontier(runs: Path) -> Iterator[Job]:
    """Fixed widths at all budgets."""
    for seed, budget, width in itertools.product(SEEDS, BUDGETS, WIDTHS):
        fixed = (*BASE, "growth=none", f"model.width={width}", f"optimizer.lr={best_rate(runs, width)}")
        place = runs / "frontier" / f"budget_{budget}" / f"width_{width}" / f"seed{seed}"
        yield Job(place, (*fixed, f"trainer.flops={budget * E}", f"seed={seed}"))


def doubling(runs: Path) -> Iterator[Job]:
    """One doubling in the middle of 2 E, by every method at both rates, to width 1 and to width 2."""
    for seed, target, (name, method), faster in itertools.product(SEEDS, (1.0, 2.0), METHODS.items(), (False, True)):
        variant = f"{name}_1.3" if faster else name
        grown = (
            *BASE, *method, *([FASTER] if faster else []), f"model.width={target}", "growth.start=0.5",
            "growth.times=1", "growth.begin=0.5", "growth.amount=1.0", f"optimizer.lr={best_rate(runs, target)}",
        )  # fmt: skip
        place = runs / "doubling" / f"to_{target}" / variant / f"seed{seed}"
        yield Job(place, (*grown, f"trainer.flops={2 * E}", f"seed={seed}"))


QUESTIONS: dict[str, Callable[[Path], Iterator[Job]]] = {"rates": rates, "frontier": frontier, "doubling": doubling}


def losses(folder: Path) -> dict[int, float]:
    """Test NLL by seed of the finished runs of a variant."""
    found = sorted(folder.glob("seed*/summary.json"))
    return {int(path.parent.name.removeprefix("seed")): json.loads(path.read_text())["test_loss"] for path in found}


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval of Student's t."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.4f} (n=1)"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.4f} [{mean - half:.4f}, {mean + half:.4f}] (n={len(values)})"


def frontier_table(runs: Path) -> list[str]:
    """Test NLL of every width at every budget."""
    lines = ["| width | " + " | ".join(f"{budget:g} E" for budget in BUDGETS) + " |", "|---" * (len(BUDGETS) + 1) + "|"]
    for width in WIDTHS:
        cells = [losses(runs / "frontier" / f"budget_{budget}" / f"width_{width}") for budget in BUDGETS]
        lines.append(
            f"| {width:g} | " + " | ".join(interval([*cell.values()]) if cell else "" for cell in cells) + " |"
        )
    return lines


def head_start(runs: Path, target: float, loss: float) -> float | None:
    """Head start kept, as README.md defines it, of runs of 2 E that doubled to a width in the middle."""
    means = {}
    for width in (target / 2, target):
        found = {budget: losses(runs / "frontier" / f"budget_{budget}" / f"width_{width}") for budget in BUDGETS}
        means[width] = {budget: statistics.mean(cell.values()) for budget, cell in found.items() if cell}
    large, small = means[target], means[target / 2].get(1.0)
    curve = sorted((value, float(np.log(budget))) for budget, value in large.items())
    if small is None or len(curve) < 2 or not all(curve[0][0] <= value <= curve[-1][0] for value in (loss, small)):
        return None

    def needed(value: float) -> float:
        return float(np.exp(np.interp(value, [at for at, _ in curve], [log for _, log in curve])))

    return (needed(loss) - 1.0) / needed(small)


def doubling_table(runs: Path) -> list[str]:
    """NLL of the grown runs, beside the best fixed width of the same budget, with the head start kept."""
    fixed = {width: losses(runs / "frontier" / "budget_2.0" / f"width_{width}") for width in WIDTHS}
    fixed = {width: found for width, found in fixed.items() if found}
    if not fixed:
        return ["The frontier comes first."]
    best = min(fixed, key=lambda width: statistics.mean(fixed[width].values()))
    lines = [f"Best fixed width at 2 E: {best:g}.", ""]
    lines += ["| to width | method | test NLL | difference, paired | head start kept |", "|---|---|---|---|---|"]
    for target in (1.0, 2.0):
        for folder in sorted((runs / "doubling" / f"to_{target}").glob("*")):
            found = losses(folder)
            if found:
                paired = [value - fixed[best][seed] for seed, value in found.items() if seed in fixed[best]]
                kept = head_start(runs, target, statistics.mean(found.values()))
                cells = [
                    interval([*found.values()]),
                    interval(paired) if paired else "",
                    f"{kept:.0%}" if kept is not None else "",
                ]
                lines.append(f"| {target:g} | {folder.name} | " + " | ".join(cells) + " |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's own text; gives 1 where a run failed or time ran out."""
    parser = argparse.ArgumentParser(description="Run pieces of the study; started again, it goes on.")
    parser.add_argument("questions", nargs="*", choices=[*QUESTIONS, []], help="which pieces, in order")
    parser.add_argument("--hours", type=float, default=float("inf"), help="start no run after so many hours")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--runs", type=Path, default=Path("runs/when_growing_pays"), help="where the runs lie")
    parser.add_argument("--tables", action="store_true", help="print what there is")
    arguments = parser.parse_args(argv)
    runs, began = arguments.runs.resolve(), time.monotonic()
    for question in arguments.questions:
        for job in QUESTIONS[question](runs):
            if job.done:
                continue
            if time.monotonic() - began > 3600 * arguments.hours:
                print("time is up; started again, it goes on here")
                return 1
            _, code, output = job.run(arguments.threads)
            print(job.directory, "done" if code == 0 else f"FAILED with exit code {code}\n{output}", flush=True)
            if code != 0:
                return 1
        print(f"{question}: all is done")
    if arguments.tables:
        print("\n".join(["", *frontier_table(runs), "", *doubling_table(runs)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
