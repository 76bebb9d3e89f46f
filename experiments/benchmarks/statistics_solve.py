"""Solving for W* = S2⁺ M, next to an eigendecomposition and to a bare Cholesky factor.

    python -m experiments.benchmarks.statistics_solve              # C = 64, 128 and 256
    python -m experiments.benchmarks.statistics_solve 512 --no-write

On one thread by CPU time, alternating and as medians.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from experiments.benchmarks.table import write_section
from growconv.linalg import solve_psd, whiten

COLUMNS = (
    "C", "rows of S2", "samples × locations", "÷ decomposition with its checks", "÷ bare Cholesky factor",
    "captured energy, error relative to v's",
)  # fmt: skip


def equations(channels: int, rows: int) -> tuple[Tensor, Tensor, float]:
    """S2 and M of 3×3 patches of rectified 8×8 maps and random v, and the energy of v."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(-(-rows // 64), channels, 8, 8, generator=generator)
    h = torch.relu(h + 0.3 * torch.randn(1, channels, 1, 1, generator=generator))
    patches = functional.unfold(h, 3, padding=1).transpose(1, 2).reshape(-1, 9 * channels)
    patches = torch.cat([patches, torch.ones(len(patches), 1)], 1)
    v = torch.randn(len(patches), channels, generator=generator)
    return (patches.T @ patches).double(), (patches.T @ v).double(), float(v.double().square().sum())


def decomposed(gram: Tensor, right: Tensor) -> Tensor:
    """The solution by `whiten`: a Cholesky factor where that serves, else an eigendecomposition."""
    whitening = whiten(gram)
    return whitening.unwhiten(whitening.whiten(right))


def timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """CPU seconds and the result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def row(channels: int, rows: int, repeats: int) -> list[str]:
    """One row of the table."""
    gram, right, energy = equations(channels, rows)
    lifted = gram + 1e-3 * float(gram.diagonal().max()) * torch.eye(len(gram), dtype=gram.dtype)
    ways = {
        "ours": lambda: solve_psd(gram, right),
        "decomposed": lambda: decomposed(gram, right),
        "factor": lambda: torch.linalg.cholesky(lifted),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    captured = {}
    for _ in range(repeats):
        for name, way in ways.items():
            took, found = timed(way)
            seconds[name].append(took)
            if name != "factor":
                captured[name] = float(2 * (found * right).sum() - (found * (gram @ found)).sum())
    ours = median(seconds["ours"])
    error = abs(captured["ours"] - captured["decomposed"]) / energy
    ratios = [f"{ours / median(seconds[name]):.2f}" for name in ("decomposed", "factor")]
    return [str(channels), str(len(gram)), str(rows), *ratios, f"{error:.0e}"]


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description="Solving for the best update.")
    parser.add_argument("channels", nargs="*", type=int, default=[64, 128, 256])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for channels in options.channels:
        for count in (64 * (9 * channels * 3 // 256), 64 * 9 * channels):
            rows.append(row(channels, count, options.repeats))
            print(" | ".join(rows[-1]), flush=True)
    if not options.no_write:
        command = "python -m experiments.benchmarks.statistics_solve"
        note = "With fewer samples × locations than rows, S2 lacks full rank. CPU time in float64 on one thread."
        write_section("statistics-solve", "Statistics: solving for W*", command, COLUMNS, rows, [note])


if __name__ == "__main__":
    main()
