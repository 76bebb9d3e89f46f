"""What the statistics of a pair cost relative to its forward and backward pass, over channels, maps, kernels, strides.

    python -m experiments.benchmarks.statistics_grid                   # a few shapes of each kind
    python -m experiments.benchmarks.statistics_grid --all             # every combination, hours
    python -m experiments.benchmarks.statistics_grid 64x16x32k5s2 --no-write
    python -m experiments.benchmarks.statistics_grid --save old.json   # there: an older state of the package
    python -m experiments.benchmarks.statistics_grid --before old.json # here: with a column of the older state

Everything is timed in one process on one thread by the CPU time it takes, alternating and as medians: other processes
on the machine slow the clock on the wall, and much less this one. Freed memory stays with the process, as in one that
has larger tensors too: else glibc gives blocks of some sizes back and takes them anew, which costs up to as much as the
work on them and comes and goes with the shapes.
"""

import argparse
import ctypes
import itertools
import json
import time
from pathlib import Path
from statistics import median

import torch

from experiments.benchmarks.statistics import Bench, collection
from experiments.benchmarks.table import write_section

QUICK = (
    "32x16x32", "64x16x32", "128x16x32", "32x32x32", "64x32x32",
    "16x8x32", "16x16x32", "16x32x32", "64x8x32", "128x8x32",
    "64x16x32k1", "16x16x32k5", "64x8x32k5", "16x32x32s2", "64x16x32s2", "256x8x32", "256x16x32", "16x56x128",
)  # fmt: skip
LARGEST = 2**28
"""Entries of a batch's three maps, above which a shape of the whole grid is left out."""
COLUMNS = (
    "C", "image", "batch", "kernel", "stride", "target", "a batch ÷ fwd+bwd", "before", "the rest ÷ fwd+bwd", "before",
)  # fmt: skip


def shapes() -> list[str]:
    """Every combination that fits."""
    found = []
    for c, image, batch, k, s in itertools.product(
        (16, 32, 64, 128, 256), (8, 16, 32, 56), (32, 128), (1, 3, 5), (1, 2)
    ):
        if 3 * c * image**2 * batch <= LARGEST:
            found.append(f"{c}x{image}x{batch}k{k}s{s}")
    return found


def target(bench: Bench) -> float:
    """How much a batch may cost, in forward and backward passes of the pair."""
    plain = bench.kernel == 3 and bench.stride == 1
    return 1.5 if plain and bench.channels >= 32 and bench.image >= 16 else 2.5


def measured(bench: Bench, repeats: int) -> tuple[float, float]:
    """A batch more and the rest of a collection, in forward and backward passes."""
    more = max(2, bench.options.get("moments_every", 1))
    bench.train_step()
    collection(bench, 1)
    steps, ones, batches = [], [], []
    for _ in range(repeats):
        steps.append(bench.timed(bench.train_step))
        ones.append(collection(bench, 1))
        steps.append(bench.timed(bench.train_step))
        batches.append((collection(bench, 1 + more) - ones[-1]) / more)
    step, batch = median(steps), median(batches)
    return batch / step, (median(ones) - batch) / step


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description="Cost of the statistics over many shapes.")
    parser.add_argument("shapes", nargs="*", help="channels x image x batch, with k and s: 64x16x32k5s2")
    parser.add_argument("--all", action="store_true", help="every combination")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--moments-every", type=int, default=1, help="an option of the collector; with --no-write")
    parser.add_argument("--save", type=Path, help="write the ratios to a file, and no table")
    parser.add_argument("--before", type=Path, help="read the ratios of another state of the package")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for option, value in ((-1, 2**30), (-3, 2**25)):  # M_TRIM_THRESHOLD; M_MMAP_THRESHOLD, whose largest value this is
        ctypes.CDLL("libc.so.6").mallopt(option, value)
    found: dict[str, tuple[float, float]] = {}
    rows, notes = [], [
        "S, S2, M and N of a pair of convolutions with biases and a ReLU in between; the stride is that of the first. "
        "CPU time in float32 on one thread. A batch: the time of a collection of three batches minus that of one "
        "batch, halved, in units of the pair's forward and backward pass. The rest: what a collection takes for any "
        "number of batches, without solving for W*. Freed memory stays with the process. Before (--before): the same "
        "for a version of the package that summed P instead of holding batches."
    ]  # fmt: skip
    for shape in options.shapes or (shapes() if options.all else QUICK):
        bench = Bench(shape, "cpu", time.process_time)
        bench.options["moments_every"] = options.moments_every
        found[shape] = measured(bench, options.repeats)
        before = json.loads(options.before.read_text()) if options.before else {}
        cells = [str(bench.channels), f"{bench.image}²", str(bench.batch), str(bench.kernel), str(bench.stride)]
        cells += [f"≤ {target(bench)}"]
        for part in (0, 1):
            cells += [f"{found[shape][part]:.2f}", f"{before[shape][part]:.2f}" if shape in before else "–"]
        print(" | ".join(cells), flush=True)
        rows.append(cells)
        if options.save:
            options.save.write_text(json.dumps(found))
        elif not options.no_write:
            command = "python -m experiments.benchmarks.statistics_grid"
            write_section("statistics-grid", "Statistics: all shapes", command, COLUMNS, rows, notes)


if __name__ == "__main__":
    main()
