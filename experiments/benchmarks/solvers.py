"""What the solvers capture on data they did not see, and how long they take, beside GroMo's solution.

    python -m experiments.benchmarks.solvers                    # all tables, about a quarter of an hour on 2 cores
    python -m experiments.benchmarks.solvers --part energy      # captured energy on Fashion-MNIST
    python -m experiments.benchmarks.solvers --part time        # seconds to solve, C = 64 to 512
    python -m experiments.benchmarks.solvers --part exact       # seconds of exact on a 1125×1125 S_full

Captured energy: a small network with the pair conv 8 → hidden, activation, conv hidden → 16 (3×3) on 14×14 maps is
trained on Fashion-MNIST; every solver gets the statistics of the same 3000 fitting samples (functional: 2000 of them,
kept) and is measured on 3000 others. GroMo's column is its `compute_optimal_added_parameters` on the same S and N.
Time: matrices of the sizes of a 3×3 pair of C channels, S with a power-law spectrum, N with a flat one after whitening,
which is the hard case for an iterative method; the same matrices for both, float64, medians of three runs after a
warm-up (one run of GroMo's above C = 256, where it takes minutes).
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growconv
from experiments.benchmarks.table import write_section
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite
from growconv.solvers import Request, exact, tiny
from growconv.solvers.assembly import assemble
from growconv.solvers.energy import captured_energy
from growconv.statistics import PairStatistics, collect_statistics
from growconv.training.data import load_data

Batches = list[tuple[Tensor, Tensor]]
METHODS = ("gromo", "tiny", "exact", "functional", "gradmax", "random")
WIDTHS = (64, 128, 256, 512)
NEW = 64
"""New channels in the timing."""
SHORT = 256
"""Widest pair at which GroMo's solution is timed three times."""


def gromo_solution(subject: PairStatistics, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """GroMo's α (k, a), ω (k, b, c) and singular values on the same S and N, its own thresholds."""
    from gromo.utils.tools import compute_optimal_added_parameters

    consumer = subject.consumer
    S, N = consumer.S, consumer.N
    if S is None or N is None:
        raise RuntimeError("S and N are needed")
    alpha, omega, values = compute_optimal_added_parameters(S, N.flatten(1), maximum_added_neurons=channels)
    return alpha, omega.mT.reshape(-1, *N.shape[1:]), values


def network(hidden: int, activation: type[nn.Module]) -> nn.Sequential:
    """Stem, the pair, pooling and a linear head, for 28×28 images."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        activation(),
        nn.Conv2d(8, hidden, 3, padding=1),
        activation(),
        nn.Conv2d(hidden, 16, 3, padding=1),
        activation(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 49, 10),
    )


def trained(hidden: int, activation: type[nn.Module], steps: int, data: Any, seed: int) -> nn.Sequential:
    """A network after some Adam steps of 128 images."""
    torch.manual_seed(seed)
    model = network(hidden, activation)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        index = torch.randint(0, 20_000, (128,))
        optimizer.zero_grad()
        F.cross_entropy(model(data.inputs[index]), data.targets[index]).backward()
        optimizer.step()
    return model


def proposal(method: str, subject: PairStatistics, site: GrowthSite, model: nn.Module, channels: int) -> ChannelGrowth:
    """What one method proposes from the statistics."""
    if method == "gromo":
        alpha, omega, values = gromo_solution(subject, channels)
        plain = replace(subject, samples_kept=None)
        growth = assemble(Request(site.of(model), channels, plain), "gromo", alpha, omega.flatten(1), values.square())
        return at_scale(growth, alpha.norm(dim=1))
    options = {"random": {"outgoing": 1.0}, "gradmax": {}}.get(method, {})
    return growconv.solve(
        subject, method=method, channels=channels, generator=torch.Generator().manual_seed(0), **options
    )


def at_scale(growth: ChannelGrowth, norms: Tensor) -> ChannelGrowth:
    """The same channels with filters of these norms, biases included: assembling gives them that of the old filters."""
    square = growth.alpha.flatten(1).square().sum(1)
    square = square if growth.alpha_bias is None else square + growth.alpha_bias.square()
    factor = norms.to(square) / square.sqrt()
    return replace(
        growth,
        incoming={path: weight * factor.view(-1, 1, 1, 1) for path, weight in growth.incoming.items()},
        incoming_bias={path: bias * factor for path, bias in growth.incoming_bias.items()},
        outgoing={path: weight / factor.view(1, -1, 1, 1) for path, weight in growth.outgoing.items()},
    )


def own_objective(subject: PairStatistics, growth: ChannelGrowth) -> float:
    """Share of the linearised bottleneck that Θ captures at its best scale, on the fitting samples."""
    consumer = subject.consumer
    full, N, energy = consumer.S_full, consumer.N, subject.bottleneck_energy
    bias = growth.alpha_bias
    if full is None or N is None or energy is None or bias is None:
        raise RuntimeError("S_full and N of a producer with a bias are needed")
    left = torch.cat([growth.alpha.flatten(1), bias[:, None]], 1).double()
    theta = torch.einsum("ka,ckb->abc", left, growth.omega.flatten(2).double())
    size = float((theta.flatten(0, 1) * (full @ theta.flatten(0, 1))).sum())
    return float((N * theta).sum()) ** 2 / (size * energy) if size > 0 else 0.0


def fashion_mnist() -> Any:
    """The training split as tensors."""
    dataset = load_data("fashion_mnist", validation=0.1, augmentation="none", limit=None, root=".")
    return replace(dataset.train, inputs=dataset.inputs(dataset.train, torch.arange(len(dataset.train))))


def energy_rows(seeds: int) -> tuple[list[list[object]], dict[str, float]]:
    """A row a cell, and geometric means over the cells against GroMo."""
    data = fashion_mnist()
    fitting = [(data.inputs[i : i + 250], data.targets[i : i + 250]) for i in range(20_000, 23_000, 250)]
    fresh = [(data.inputs[i : i + 250], data.targets[i : i + 250]) for i in range(30_000, 33_000, 250)]
    rows: list[list[object]] = []
    ratios: dict[str, list[float]] = {}
    for activation in (nn.ReLU, nn.SELU):
        for steps in (200, 600):
            for seed in range(seeds):
                model = trained(2, activation, steps, data, seed)
                site = growconv.site(model, "2", "4", example_input=data.inputs[:1])
                subject = collect_statistics(
                    model,
                    [site],
                    fitting,
                    F.cross_entropy,
                    quantities={"S", "N", "N_raw", "S_full", "patch", "samples"},
                    keep_samples=2000,
                )[site.name]
                for channels in (2, 6, 16):
                    cells, own = {}, {}
                    for method in METHODS:
                        started = time.perf_counter()
                        growth = proposal(method, subject, site, model, channels)
                        seconds = time.perf_counter() - started
                        cells[method] = captured_energy(model, site, growth, fresh, F.cross_entropy, statistics=subject)
                        if method in ("gromo", "exact"):
                            own[method] = own_objective(subject, growth)
                        if method in ("exact", "functional"):
                            ratios.setdefault(f"{method} seconds", []).append(seconds)
                    ratios.setdefault("exact own", []).append(own["exact"] / own["gromo"])
                    for method in ("tiny", "exact", "functional"):
                        ratio = max(cells[method], 1e-12) / max(cells["gromo"], 1e-12)
                        ratios.setdefault(f"{method} {activation.__name__}", []).append(ratio)
                    rows.append(
                        [activation.__name__, steps, seed, channels]
                        + [f"{1e4 * cells[method]:.2f}" for method in METHODS]
                        + [
                            f"{cells['functional'] / max(cells['gromo'], 1e-12):.2f}",
                            f"{own['exact'] / own['gromo']:.2f}",
                        ]
                    )
                    print(*rows[-1], sep="\t", flush=True)
    summary = {name: math.exp(sum(map(math.log, values)) / len(values)) for name, values in ratios.items()}
    summary["exact own, least"] = min(ratios["exact own"])
    summary["functional seconds, most"] = max(ratios["functional seconds"])
    return rows, summary


def matrices(width: int) -> tuple[Tensor, Tensor]:
    """S (a, a) and N (a, 9·C) of a 3×3 pair of `width` channels, float64."""
    generator = torch.Generator().manual_seed(0)
    size = 9 * width

    def normal() -> Tensor:
        return torch.randn(size, size, generator=generator, dtype=torch.float64)

    spectrum = 1 / (1 + torch.arange(size, dtype=torch.float64) / 10)
    vectors = torch.linalg.qr(normal())[0]
    S = (vectors * spectrum) @ vectors.mT
    return (S + S.mT) / 2, (vectors * spectrum.sqrt()) @ normal() / size**0.5


def seconds_of(function: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Result, and the median of the wall-clock seconds of several calls."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - started)
    return result, statistics.median(seconds)


def time_rows(widths: tuple[int, ...]) -> list[list[object]]:
    """A row a width."""
    from gromo.utils.tools import compute_optimal_added_parameters

    rows: list[list[object]] = []
    tiny(*_shaped(*matrices(16)), channels=4)  # warm up
    for width in widths:
        S, N = matrices(width)
        repeats = 3 if width <= SHORT else 1
        ours, wall = seconds_of(lambda S=S, N=N: tiny(*_shaped(S, N), channels=NEW), 3)
        theirs, their_wall = seconds_of(
            lambda S=S, N=N: compute_optimal_added_parameters(S, N, maximum_added_neurons=NEW), repeats
        )
        mine, other = ours.alpha.mT @ ours.omega.flatten(1), theirs[0].mT @ theirs[1].mT
        difference = float((mine - other).norm() / other.norm())
        rows.append(
            [width, 9 * width, f"{wall:.2f}", f"{their_wall:.2f}", f"{their_wall / wall:.1f}", f"{difference:.1e}"]
        )
        print(*rows[-1], sep="\t", flush=True)
    return rows


def functional_seconds() -> float:
    """Median seconds of `functional` for 6 channels between 8 and 16, on 2000 kept samples of 14×14 maps."""
    data = fashion_mnist()
    seconds = []
    for seed in range(3):
        model = trained(2, nn.ReLU, 200, data, seed)
        site = growconv.site(model, "2", "4", example_input=data.inputs[:1])
        reads = {"S", "N", "patch", "samples"}
        batches = [(data.inputs[i : i + 250], data.targets[i : i + 250]) for i in range(20_000, 22_000, 250)]
        options = {"quantities": reads, "keep_samples": 2000}
        subject = collect_statistics(model, [site], batches, F.cross_entropy, **options)[site.name]
        seconds.append(seconds_of(lambda subject=subject: growconv.solve(subject, "functional", 6), 1)[1])
    return statistics.median(seconds)


def exact_rows() -> list[list[object]]:
    """`exact` on a 1125×1125 S_full: 5, 6 and 7 channels, 3×5 and 5×3 kernels, no padding; what six channels made."""
    generator = torch.Generator().manual_seed(0)
    rows: list[list[object]] = []
    for noise in (0.0, 0.5):
        x = torch.randn(300, 5, 9, 10, generator=generator, dtype=torch.float64)
        alpha = torch.randn(6, 5, 3, 5, generator=generator, dtype=torch.float64)
        omega = torch.randn(7, 6, 5, 3, generator=generator, dtype=torch.float64)
        wanted = F.conv2d(F.conv2d(x, alpha), omega)
        wanted = wanted + noise * wanted.std() * torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
        hidden = F.unfold(x, (3, 5)).view(300, 75, 7, 6)
        patches = F.unfold(hidden, (5, 3)).mT.flatten(0, 1)  # (n·m, a·b)
        target = wanted.flatten(2).mT.flatten(0, 1)
        S_full, N = patches.mT @ patches / 300, (patches.mT @ target / 300).view(75, 15, 7)
        energy = float(target.square().sum()) / 300
        for channels in (1, 3, 6):
            before = time.process_time()
            found = exact(S_full, N, channels)
            spent = time.process_time() - before
            rows.append([noise, channels, f"{spent:.2f}", f"{1 + found.history[-1] / energy:.2e}"])
    return rows


def _shaped(S: Tensor, N: Tensor) -> tuple[Tensor, Tensor]:
    return S, N.view(len(N), 9, -1)


def exact_part(write: bool) -> None:
    """The section on `exact`."""
    rows = exact_rows()
    print(*rows, sep="\n")
    if write:
        write_section(
            "solvers-exact",
            "Solvers: exact on a large S_full",
            "python -m experiments.benchmarks.solvers --part exact",
            ["noise", "channels", "seconds of CPU", "residual energy"],
            rows,
            [
                "S_full is 1125×1125 with rank 245, N is (75, 15, 7), in float64, generated by six linear channels "
                "with 3×5 and 5×3 kernels without padding; noise is relative to what they generate."
            ],
        )


def main() -> None:
    """Run the parts asked for and write their sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("energy", "time", "exact", "all"), default="all")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.part in ("energy", "all"):
        rows, summary = energy_rows(arguments.seeds)
        notes = [
            "Captured energy ×10⁴ on 3000 held-out Fashion-MNIST samples, at the best single scale of each proposal; "
            "gradmax starts with α = 0 and adds nothing at first, by design (lifted channels add a little).",
            "Geometric means over the cells, relative to GroMo's solution: "
            + ", ".join(f"{name} {value:.2f}×" for name, value in summary.items() if "seconds" not in name)
            + '. "exact own" is the linearised objective on the fitting samples, which exact minimises.',
            f"Seconds to solve, geometric mean: exact {summary['exact seconds']:.2f}, functional "
            f"{summary['functional seconds']:.2f} (most {summary['functional seconds, most']:.2f}).",
        ]
        print(*notes, sep="\n")
        if not arguments.no_write:
            write_section(
                "solvers-energy",
                "Solvers: captured energy",
                "python -m experiments.benchmarks.solvers --part energy",
                ["activation", "steps", "seed", "K", *METHODS, "functional ÷ gromo", "exact ÷ gromo, own objective"],
                rows,
                notes,
                packages=("gromo",),
            )
    if arguments.part in ("time", "all"):
        rows = time_rows(tuple(arguments.widths))
        functional = functional_seconds()
        print(f"functional: {functional:.2f} s")
        if not arguments.no_write:
            write_section(
                "solvers-time",
                "Solvers: time to solve",
                "python -m experiments.benchmarks.solvers --part time",
                ["C", "A", "tiny s", "GroMo s", "ratio", "‖ΔΘ‖/‖Θ‖"],
                rows,
                [
                    f"{NEW} new channels, with the same float64 matrices of a 3×3 pair for both; the "
                    "whitened N is random, with a flat spectrum. Medians of three runs, except for a single one of "
                    "GroMo at C = 512.",
                    "`functional`, 6 channels between 8 and 16, through the ReLU on 2000 kept samples of 14×14 maps: "
                    f"{functional:.1f} s (median over three networks).",
                ],
                packages=("gromo",),
            )
    if arguments.part in ("exact", "all"):
        exact_part(not arguments.no_write)


if __name__ == "__main__":
    main()
