"""What treating young entries by their age costs an optimizer step after growth.

    python -m experiments.benchmarks.optimizer_step [--optimizer AdamW] [--repetitions 5] [--device cpu] [--foreach]

A resnet20 has trained for a while, then one site or every site grows by an eighth. From then on two optimizers step the
grown parameters with the same gradients, in turn: the one that was passed to `grow`, and the same one without ages.
Printed are medians over repetitions of the ratio of their summed CPU times: over the exact first steps, over the first
256 (less than an epoch), and over all until every entry is old, when the hooks leave. Beside them stands by how much
that makes a whole training step longer, with the forward and backward pass of a batch.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
from torch import nn

import growconv
from experiments.benchmarks.table import machine, markdown_table, versions
from growconv.network.entry_ages import AGES, EXACT
from growconv.training.models import resnet20


def grown(
    kind: str, width: float, device: str, foreach: bool | None, sites: int | None = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose first sites (None: all) have grown by an eighth, and its optimizer."""
    torch.manual_seed(0)
    model = resnet20(in_channels=3, classes=10, image_size=(32, 32), width=width).to(device)
    options = {} if foreach is None else {"foreach": foreach}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3, **options)
    for _ in range(100):
        _gradients(model)
        optimizer.step()
    for site in growconv.find_sites(model, torch.randn(2, 3, 32, 32, device=device))[:sites]:
        growth = growconv.solve(site, method="random", channels=max(1, site.width // 8))
        growconv.grow(model, site, growth, optimizer=optimizer)
    _gradients(model)
    return model, optimizer


def _gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def _seconds(step: Callable[[], object], device: str) -> float:
    """Seconds of the step: CPU seconds, which somebody else's work hardly disturbs, or those until the GPU is done."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def ratios(
    kind: str, width: float, device: str, foreach: bool | None, sites: int | None, until: int
) -> tuple[list[float], int, float]:
    """Time with ages by time without: exact steps, the first 256, all; then when the hooks left, and plain seconds."""
    model, optimizer = grown(kind, width, device, foreach, sites)
    twin, plain = copy.deepcopy((model, optimizer))
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = mine.grad.clone() if mine.grad is not None else None
    for state in plain.state.values():
        state.pop(AGES, None)
    aged, bare = [], []
    left = 0
    for index in range(until):
        pair = [(optimizer, aged), (plain, bare)]
        for each, times in pair if index % 2 else reversed(pair):
            times.append(_seconds(each.step, device))
        if not left and not optimizer._optimizer_step_pre_hooks:
            left = index + 1
    usual = statistics.median(bare)
    aged, bare = ([min(each, 3 * usual) for each in times] for times in (aged, bare))  # somebody else's work
    parts = [slice(0, EXACT), slice(0, 256), slice(0, until)]
    return [sum(aged[part]) / sum(bare[part]) for part in parts], left, usual


def passes(width: float, device: str, batch: int) -> float:
    """Seconds of a forward and backward pass."""
    model = resnet20(in_channels=3, classes=10, image_size=(32, 32), width=width).to(device)
    x = torch.randn(batch, 3, 32, 32, device=device)
    return statistics.median(_seconds(lambda: model(x).sum().backward(), device) for _ in range(5))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", nargs="+", default=["AdamW"])
    parser.add_argument("--width", nargs="+", type=float, default=[1.0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=128, help="images of a whole training step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--foreach", action="store_true", default=None)
    arguments = parser.parse_args()
    rows = []
    for kind in arguments.optimizer:
        for width, sites in product(arguments.width, (1, None)):
            runs = [
                ratios(kind, width, arguments.device, arguments.foreach, sites, arguments.steps)
                for _ in range(arguments.repetitions)
            ]
            middle = [statistics.median(values) for values in zip(*(run[0] for run in runs), strict=True)]
            plain = statistics.median(run[2] for run in runs)
            whole = plain + passes(width, arguments.device, arguments.batch)
            rows.append(
                [
                    kind,
                    width,
                    sites or "all",
                    f"{1e6 * plain:.0f}",
                    *(f"{value:.3f}" for value in middle),
                    runs[0][1] or "later",
                    f"{1e3 * whole:.0f}",
                    *(f"{(value - 1) * plain / whole:.2%}" for value in middle),
                ]
            )
    columns = [
        "optimizer",
        "width",
        "sites grown",
        "plain step, µs",
        f"steps 1-{EXACT}",
        "1-256",
        f"1-{arguments.steps}",
        "hooks left at step",
        "whole step, ms",
        *(f"longer by, {part}" for part in (f"1-{EXACT}", "1-256", f"1-{arguments.steps}")),
    ]
    print(f"{machine()}; {versions()}\n\n{markdown_table(columns, rows)}")


if __name__ == "__main__":
    main()
