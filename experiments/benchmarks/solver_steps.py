"""What the solvers cost, in training steps of the network that they grow.

    OMP_NUM_THREADS=1 nice python -m experiments.benchmarks.solver_steps
    OMP_NUM_THREADS=1 nice python -m experiments.benchmarks.solver_steps --methods tiny gromo --channels 64
    OMP_NUM_THREADS=1 nice python -m experiments.benchmarks.solver_steps --width 256 --steps 2

Three convolutions of C channels on 8×8 maps; a step is forward and backward of 128 samples, a solution that of the pair
of the last two from 256 kept samples. CPU time of one thread, the steps measured right before each solution; medians of
five ratios, a first solution not counted (its own ratio, with what it imports, stands beside). "gromo" is the
`compute_optimal_added_parameters` of GroMo on the S and N of `tiny`, on which `tiny` also chooses signs and scales.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growconv
from experiments.benchmarks.solvers import gromo_solution
from experiments.benchmarks.table import machine, markdown_table, versions
from growconv.network.site import GrowthSite
from growconv.solvers import FewSamplesWarning, get_solver
from growconv.statistics import PairStatistics, collect_statistics

METHODS = ("tiny", "gromo", "gradmax", "north", "firefly", "splitting", "senn", "functional", "exact")
BATCH = 128
Batch = tuple[Tensor, Tensor]


def network(width: int) -> nn.Sequential:
    """Stem, the pair, and a linear head, for 8×8 images of 3 channels."""
    pair = [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), *pair, *head)


def problem(width: int) -> tuple[nn.Module, GrowthSite, list[Batch]]:
    """A network after 30 steps on noisy prototypes, its site, and two batches."""
    torch.manual_seed(0)
    model = network(width)
    prototypes = F.interpolate(torch.randn(10, 3, 4, 4), size=(8, 8), mode="bilinear")

    def batch() -> Batch:
        labels = torch.randint(0, 10, (BATCH,))
        return prototypes[labels] + torch.randn(BATCH, 3, 8, 8), labels

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        x, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, growconv.site(model, "2", "4", example_input=batch()[0][:1]), [batch(), batch()]


def cpu_seconds(work: Callable[[], object], times: int = 1) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times


def ratios(
    model: nn.Module, subject: PairStatistics, method: str, channels: int, batch: Batch, options: argparse.Namespace
) -> list[float]:
    """Steps that a solution takes, a first time and those asked for."""

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()

    def solve() -> None:
        if method == "gromo":
            gromo_solution(subject, channels)
        else:
            growconv.solve(subject, method, channels, generator=torch.Generator().manual_seed(0))

    found = []
    for _ in range(1 + options.repeats):
        unit = cpu_seconds(step, options.steps)
        found.append(cpu_seconds(solve) / unit)
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--channels", nargs="+", type=int, default=[8])
    parser.add_argument("--steps", type=int, default=10, help="steps measured before each solution")
    parser.add_argument("--repeats", type=int, default=5, help="solutions after the first")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FewSamplesWarning)
    rows = []
    for method in arguments.methods:
        for channels in arguments.channels:
            model, site, batches = problem(arguments.width)
            reads = get_solver("tiny" if method == "gromo" else method).reads
            keep: dict[str, Any] = {"keep_samples": 2 * BATCH} if "samples" in reads else {}
            collected = collect_statistics(model, [site], batches, F.cross_entropy, quantities=reads, **keep)
            first, *others = ratios(model, collected[site.name], method, channels, batches[0], arguments)
            rows.append(
                [method, arguments.width, channels, f"{statistics.median(others or [first]):.1f}", f"{first:.1f}"]
            )
            print(*rows[-1], sep="\t", flush=True)
    columns = ["method", "C", "K", "steps", "steps, first solution"]
    print(f"\n{machine()}; {versions()}\n\n{markdown_table(columns, rows)}")


if __name__ == "__main__":
    main()
