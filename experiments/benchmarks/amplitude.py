"""How strongly new channels should start: the loss at the end of training, by the cap of the amplitude.

    OMP_NUM_THREADS=1 nice python -m experiments.benchmarks.amplitude       # about 25 minutes on one core
    python -m experiments.benchmarks.amplitude --tasks digits --arms "≤ 1" "≤ 1, one strength" --seeds 3 --no-write

A network of three convolutions is trained with momentum; its rate decays to zero over the second half. Both hidden
widths are doubled in two rounds, at a fifth and at two fifths of the steps. The arms share the steps before the first
round and differ in the amplitude alone: 0, the line search under a cap, the line search without one. Every run is
written to a file as soon as it is finished; the same command goes on where it was stopped.
"""

import argparse
import itertools
import json
import math
import statistics
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import growconv
from experiments.benchmarks.table import write_section
from growconv.solvers import FewSamplesWarning
from growconv.training.data import load_data

Batch = tuple[Tensor, Tensor]
Arm = tuple[str, dict[str, Any]]
ARMS: list[Arm] = [
    ("0", {"amplitude": 0.0}),
    *(
        (f"≤ {name}", {"amplitude_cap": cap})
        for name, cap in (("1/8", 1 / 8), ("1/4", 1 / 4), ("1/2", 1 / 2), ("1", 1.0))
    ),
    ("no cap", {"amplitude_cap": None}),
    ("≤ 1, one strength", {"amplitude_cap": 1.0, "together": True}),
]
CHANCE = math.log(10)
"""Loss of a network that has learned nothing; from there on a run counts as diverged."""
STEPS, BATCH, WIDTHS = 400, 64, (4, 8)
ROUNDS = (STEPS // 5, 2 * STEPS // 5)
TASKS = {"digits": (1000, 0.02), "fashion_mnist": (4000, 0.05)}
"""Training images and learning rate of each task."""


@cache
def images(task: str) -> tuple[Batch, Batch]:
    """Training and test images, at most 14 pixels wide, with labels."""
    root = {"root": "."} if task == "fashion_mnist" else {}
    dataset = load_data(task, validation=0.1, augmentation="none", limit=None, **root)

    def split(part: Any, most: int) -> Batch:
        x = dataset.inputs(part, torch.arange(min(len(part), most)))
        return (F.avg_pool2d(x, 2) if x.shape[-1] > 14 else x), part.targets[:most]

    return split(dataset.train, TASKS[task][0]), split(dataset.test, 2000)


def network(norm: bool) -> nn.Sequential:
    """Three 3×3 convolutions, pooling and a linear head."""

    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after) if norm else nn.Identity(), nn.ReLU()]

    first, second = WIDTHS
    layers = [*block(1, first), *block(first, second), nn.MaxPool2d(2), *block(second, 16)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def mean_loss(model: nn.Module, data: Batch) -> float:
    """Loss over a split, in eval mode."""
    model.eval()
    with torch.no_grad():
        loss = float(F.cross_entropy(model(data[0]), data[1]))
    model.train()
    return loss


class Run:
    """One network on its way: the model, its optimizer and where it stands."""

    def __init__(self, task: str, norm: bool, seed: int) -> None:
        torch.manual_seed(seed)
        self.task, self.seed, self.step = task, seed, 0
        self.model = network(norm)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=TASKS[task][1], momentum=0.9)
        decay = lambda step: min(1.0, 2 * (1 - step / STEPS))  # noqa: E731
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, decay)
        self.draws = torch.Generator().manual_seed(seed)

    def train(self, until: int) -> None:
        """Train up to a step."""
        x, y = images(self.task)[0]
        while self.step < until:
            index = torch.randint(len(x), (BATCH,), generator=self.draws)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x[index]), y[index]).backward()
            self.optimizer.step()
            self.schedule.step()
            self.step += 1

    def grow(self, method: str, arm: dict[str, Any]) -> list[growconv.GrowthEvent]:
        """One round at both sites, one after the other or together."""
        x, y = images(self.task)[0]
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))[:1024]
        sites = [growconv.site(self.model, *pair, example_input=x[:2]) for pair in (("0", "3"), ("3", "7"))]
        options = {**arm, "amount": WIDTHS[0] // 2 / sites[0].width, "method": method, "seed": self.step}
        rounds = [sites] if options.pop("together", False) else [[site] for site in sites]
        growing = [growconv.GrowthScheduler(self.model, self.optimizer, each, **options) for each in rounds]
        batches = [(x[part], y[part]) for part in order.split(128)]
        return [event for each in growing for event in each.grow(batches, F.cross_entropy)]


def outcome(task: str, norm: bool, seed: int, method: str, arm: Arm) -> dict[str, Any]:
    """Train, grow twice, train to the end."""
    run = Run(task, norm, seed)
    events = []
    for at in ROUNDS:
        run.train(at)
        events += run.grow(method, arm[1])
    run.train(STEPS)
    train, test = images(task)
    return {
        "task": task,
        "norm": norm,
        "seed": seed,
        "method": method,
        "arm": arm[0],
        "train": mean_loss(run.model, train),
        "test": mean_loss(run.model, test),
        "immediate": sum(event.realised_decrease or 0.0 for event in events),
    }


def outcomes(path: Path, method: str, seeds: int, tasks: list[str], arms: list[Arm]) -> list[dict[str, Any]]:
    """Every run of the plan: those of the file, and the others, which it then has too."""
    lines = path.read_text().splitlines() if path.exists() else []
    done = {
        (each["task"], each["norm"], each["seed"], each["method"], each["arm"]): each for each in map(json.loads, lines)
    }
    found = []
    for seed, task, norm, arm in itertools.product(range(seeds), tasks, (False, True), arms):
        key = (task, norm, seed, method, arm[0])
        if key not in done:
            done[key] = outcome(task, norm, seed, method, arm)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
            print(*done[key].values(), sep="\t", flush=True)
        found.append(done[key])
    return found


def ratio(runs: list[dict[str, Any]], arm: str, what: str) -> str:
    """Loss over that of amplitude 0, paired by seed: geometric mean, 95 % interval, and how many runs diverged."""
    losses = {name: {each["seed"]: each[what] for each in runs if each["arm"] == name} for name in (arm, ARMS[0][0])}
    pairs = [(losses[arm][seed], losses[ARMS[0][0]][seed]) for seed in losses[arm]]
    logs = [math.log(one / other) for one, other in pairs if math.isfinite(one) and one < CHANCE]
    if len(logs) < 2:
        return "diverged"
    half = float(stats.t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / len(logs) ** 0.5
    mean = statistics.mean(logs)
    lost = f", {len(pairs) - len(logs)} diverged" if len(logs) < len(pairs) else ""
    return f"{math.exp(mean):.3f} [{math.exp(mean - half):.3f}, {math.exp(mean + half):.3f}]{lost}"


def main() -> None:
    """Run what is missing and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="tiny", help="the growth method")
    parser.add_argument("--seeds", type=int, default=8, help="how many")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=[name for name, _ in ARMS[1:]], help="beside amplitude 0")
    parser.add_argument("--file", type=Path, default=Path("runs/amplitude.jsonl"), help="of the runs that are finished")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FewSamplesWarning)
    arms = [arm for arm in ARMS if arm[0] in (ARMS[0][0], *arguments.arms)]
    every = outcomes(arguments.file, arguments.method, arguments.seeds, arguments.tasks, arms)
    rows: list[list[object]] = []
    for task, norm in itertools.product(arguments.tasks, (False, True)):
        runs = [each for each in every if (each["task"], each["norm"]) == (task, norm)]
        zero = [each for each in runs if each["arm"] == ARMS[0][0]]
        for what in ("test", "train"):
            label = [task, "BatchNorm" if norm else "none", what, f"{statistics.mean(each[what] for each in zero):.4f}"]
            rows.append([*label, *(ratio(runs, arm, what) for arm, _ in arms[1:])])
            print(*rows[-1], sep="\t")
    if not arguments.no_write:
        write_section(
            "amplitude",
            "Amplitude: the loss at the end of training",
            f"python -m experiments.benchmarks.amplitude --method {arguments.method} --seeds {arguments.seeds}",
            ["task", "norm", "loss", "amplitude 0", *(arm for arm, _ in arms[1:])],
            rows,
            [
                f"Loss after {STEPS} steps, with the learning rate decayed to zero; both hidden widths are "
                f"doubled by `{arguments.method}` in two rounds, at steps {ROUNDS[0]} and {ROUNDS[1]}. Given are the "
                f"mean loss with amplitude 0 and the ratios to it, paired over {arguments.seeds} seeds: geometric mean "
                "and 95 % interval. "
                '"≤ c" is the line search under the cap c: the strongest new channel has at most c times the mean '
                'strength of the old ones. Each site has a round of its own; "one strength": both in one round.'
            ],
        )


if __name__ == "__main__":
    main()
