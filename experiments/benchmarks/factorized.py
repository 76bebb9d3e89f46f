"""Forward time, parameters and kernel error of CP and Tucker convolutions, beside nn.Conv2d and tensorly-torch.

    python -m experiments.benchmarks.factorized                                    # a few minutes on one core
    python -m experiments.benchmarks.factorized --rival /tmp/tltorch/bin/python    # tensorly-torch, too
    python -m experiments.benchmarks.factorized --device cuda

The layer is 64 → 128 channels, 3×3, padding 1, on 32×32 maps; its kernel is the random one of a new nn.Conv2d, which
has no structure to find: the errors are the worst a kernel can have. Times are medians of rounds in which every layer
runs once, so that a disturbance meets all alike; on one thread they are processor time. The rival runs in an
environment of its own:

    python -m venv /tmp/tltorch && /tmp/tltorch/bin/pip install torch==2.13.0 tensorly-torch
"""

import argparse
import json
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import growconv
from experiments.benchmarks.table import write_section
from growconv.convolution.decomposition import ConvergenceWarning
from growconv.convolution.factorized import FactorizedConv

CHANNELS, SIZE, BATCH = (64, 128), 32, 16
CP_RANKS = (46, 93, 186, 372)
TUCKER_RANKS = ((16, 8), (32, 16), (64, 32), (116, 58))
ROOT = Path(__file__).parents[2]
COLUMNS = (
    "layer",
    "implementation",
    "rank",
    "of full",
    "parameters",
    "MFLOPs",
    "kernel error",
    "forward ms",
    "of nn.Conv2d",
)


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rival", help="python of an environment with tensorly-torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", ConvergenceWarning)  # random kernels have no low-rank structure to converge to
    conv = nn.Conv2d(*CHANNELS, 3, padding=1).to(arguments.device)
    layers: dict[tuple[str, str, Any], nn.Module] = {("nn.Conv2d", "", ""): conv}
    for kind, ranks in ((growconv.CPConv2d, CP_RANKS), (growconv.TuckerConv2d, TUCKER_RANKS)):
        for rank in ranks:
            layer = kind.from_conv(conv, rank=rank)
            for implementation in kind.implementations:
                other = kind(*CHANNELS, 3, padding=1, rank=rank, implementation=implementation).to(arguments.device)
                other.load_state_dict(layer.state_dict())
                other.fit = layer.fit
                layers[(kind.__name__, implementation, rank)] = other
    x = torch.randn(BATCH, CHANNELS[0], SIZE, SIZE, device=arguments.device)
    clock = clock_for(arguments.device, arguments.threads)
    times = measure(layers, x, arguments.rounds, clock)
    rows = [row(key, layer, times[key], times["nn.Conv2d", "", ""]) for key, layer in layers.items()]
    if arguments.rival:
        rows += rival_rows(arguments, times["nn.Conv2d", "", ""])
    square = nn.Conv2d(64, 64, 3).to(arguments.device)
    start = clock()
    fit = growconv.CPConv2d.from_conv(square, rank="same").fit
    seconds = clock() - start
    notes = [
        f"Batch {BATCH}, {arguments.device}, {arguments.threads} thread(s), float32, no gradients. A full CP rank has "
        "as many parameters as the kernel, a full Tucker rank is (128, 64). FLOPs are 2 × multiply-adds per sample."
    ]
    if fit:
        notes.append(
            f'`CPConv2d.from_conv` of a random 64×64×3×3 kernel at rank="same" (275): {seconds:.1f} s, '
            f"{fit.iterations} sweeps, relative error {fit.error:.3f}."
        )
    command = "python -m experiments.benchmarks.factorized" + (
        "" if arguments.device == "cpu" else f" --device {arguments.device}"
    )
    command += " --rival PYTHON" if arguments.rival else ""
    name = "factorized" if arguments.device == "cpu" else f"factorized-{arguments.device}"
    title = f"Factorized convolutions, 64 → 128 channels, 3×3, 32×32 maps ({arguments.device})"
    print(write_section(name, title, command, COLUMNS, rows, notes, packages=("tensorly",)))


def clock_for(device: str, threads: int) -> Callable[[], float]:
    """Wall-clock of the device, or the processor time of the only thread, which other processes do not change."""
    if device != "cpu":

        def synchronized() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronized
    return time.thread_time if threads == 1 else time.perf_counter


def measure(
    layers: dict[tuple[str, str, Any], nn.Module], x: torch.Tensor, rounds: int, clock: Callable[[], float]
) -> dict[tuple[str, str, Any], float]:
    """Median milliseconds of a forward pass of every layer."""
    samples: dict[tuple[str, str, Any], list[float]] = {key: [] for key in layers}
    with torch.inference_mode():
        for number in range(rounds + 3):
            for key, layer in layers.items():
                start = clock()
                layer(x)
                if number >= 3:
                    samples[key].append((clock() - start) * 1e3)
    return {key: median(values) for key, values in samples.items()}


def row(key: tuple[str, str, Any], layer: nn.Module, milliseconds: float, conv: float) -> list[str]:
    """One line of the table."""
    name, implementation, rank = key
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    flops = growconv.conv_cost(layer, (SIZE, SIZE)).flops / 1e6
    error = f"{layer.fit.error:.3f}" if isinstance(layer, FactorizedConv) and layer.fit else ""
    return [
        name,
        implementation,
        str(rank),
        share(rank),
        f"{parameters:,}",
        f"{flops:.0f}",
        error,
        f"{milliseconds:.2f}",
        f"{milliseconds / conv:.2f}",
    ]


def share(rank: Any) -> str:
    """The rank as a part of the full one."""
    if rank == "":
        return ""
    return f"{rank / CP_RANKS[-1]:.2f}" if isinstance(rank, int) else f"{rank[0] / CHANNELS[1]:.2f}"


def rival_rows(arguments: argparse.Namespace, conv: float) -> list[list[str]]:
    """tensorly-torch's layers, measured by its own interpreter."""
    settings = {
        "channels": CHANNELS,
        "size": SIZE,
        "batch": BATCH,
        "device": arguments.device,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "cp": CP_RANKS,
        "tucker": [(*ranks, 3, 3) for ranks in TUCKER_RANKS],
    }
    output = subprocess.run(
        [arguments.rival, "-m", "experiments.benchmarks.factorized_rival", json.dumps(settings)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    rows = []
    for each in json.loads(output.splitlines()[-1]):
        rank = each["rank"] if isinstance(each["rank"], int) else tuple(each["rank"][:2])
        rows.append(
            [
                f"tensorly-torch {each['kind']}",
                each["implementation"],
                str(rank),
                share(rank),
                f"{each['parameters']:,}",
                "",
                "",
                f"{each['milliseconds']:.2f}",
                f"{each['milliseconds'] / conv:.2f}",
            ]
        )
    return rows


if __name__ == "__main__":
    main()
