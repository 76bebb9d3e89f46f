"""What a growth round costs, in training steps of the same network, by how many sites it has; and its peak memory.

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.rounds                              # depths 20, 56 and 110
    OMP_NUM_THREADS=1 python -m experiments.benchmarks.rounds --depths 20 --batch 128 --batches 20 --repeats 1

CIFAR ResNets (He et al. 2016) on random 3×32×32 images; a round asks all pairs of a block for a quarter of their width,
as by default, or the residual streams, or both (--sites). Every round grows a copy of the same network. CPU time of one
thread, a round and its steps in turn, medians; memory is what the process holds at its peak beyond what it held before.
"""

import argparse
import copy
import ctypes
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growconv
from experiments.benchmarks.solver_steps import cpu_seconds
from experiments.benchmarks.table import machine, markdown_table, versions
from growconv.network.site import GrowthSite
from growconv.solvers import FewSamplesWarning
from growconv.training.models import BasicBlock, ResidualNet

PHASES = ("collect", "solve", "amplitude", "surgery")
COLUMNS = ("depth", "sites", "method", "round ÷ step", "a site", *PHASES, "peak ÷ step's")
Batch = tuple[Tensor, Tensor]


def network(depth: int) -> nn.Module:
    """A CIFAR ResNet of 6n + 2 layers."""
    blocks = (depth - 2) // 6
    torch.manual_seed(0)
    return ResidualNet(
        BasicBlock, ((16, blocks), (32, blocks), (64, blocks)), 16, in_channels=3, classes=10, image_size=32
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One training step."""
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def trained(depth: int, batch: Batch) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network after three steps."""
    model = network(depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        step(model, optimizer, batch)
    return model, optimizer


def sites_of(model: nn.Module, batch: Batch, kind: str) -> list[GrowthSite]:
    """The sites between the two convolutions of a block (pairs), those that several blocks add to (streams), or all."""
    found = growconv.find_sites(model, batch[0][:2])
    return [site for site in found if kind in ("all", "streams" if len(site.producers) > 1 else "pairs")]


def peak(work: Callable[[], object]) -> float:
    """Bytes that a call holds at most beyond those before it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(name))
    return 1024 * float(line.split()[1])


def measured(depth: int, method: str, batches: list[Batch], repeats: int, kind: str) -> list[object]:
    """A row of the table."""
    model, optimizer = trained(depth, batches[0])
    held = peak(lambda: step(model, optimizer, batches[0]))
    sites = sites_of(model, batches[0], kind)
    rounds, shares, peaks = [], [], []
    for _ in range(repeats):
        grown, own = copy.deepcopy((model, optimizer))
        unit = statistics.median(cpu_seconds(lambda: step(model, optimizer, batches[0])) for _ in range(5))
        growing = growconv.GrowthScheduler(grown, own, sites, method=method)
        seconds: list[float] = []
        work = lambda: seconds.append(cpu_seconds(lambda: growing.grow(batches, F.cross_entropy)))  # noqa: B023, E731
        with mock.patch("time.perf_counter", time.process_time):  # phases by CPU time too
            peaks.append(peak(work))
        rounds.append(seconds[0] / unit)
        shares.append([growing.spent[phase] / seconds[0] for phase in PHASES])
    total = statistics.median(rounds)
    parts = [f"{statistics.median(share):.2f}" for share in zip(*shares, strict=True)]
    ratio = statistics.median(peaks) / held
    return [depth, len(sites), method, f"{total:.1f}", f"{total / len(sites):.2f}", *parts, f"{ratio:.2f}"]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", nargs="+", type=int, default=[20, 56, 110])
    parser.add_argument("--methods", nargs="+", default=["tiny"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2, help="growth batches, a part of which is held out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sites", choices=("pairs", "streams", "all"), default="pairs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FewSamplesWarning)
    draw = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(arguments.batch, 3, 32, 32, generator=draw), torch.randint(10, (arguments.batch,), generator=draw))
        for _ in range(arguments.batches)
    ]
    rows = []
    for method in arguments.methods:
        for depth in arguments.depths:
            rows.append(measured(depth, method, batches, arguments.repeats, arguments.sites))
            print(*rows[-1], sep="\t", flush=True)
    print(f"\n{machine()}; {versions()}\n\n{markdown_table(COLUMNS, rows)}")


if __name__ == "__main__":
    main()
