"""On how many samples `tiny` should choose the signs of new channels: what they capture, for a few numbers.

    OMP_NUM_THREADS=1 nice python -m experiments.benchmarks.signs       # about 10 minutes on one core

Networks on Fashion-MNIST after 30 and after 300 steps; at each site eight channels from the same S and N, with signs
that are chosen on the first of 1024 growth samples, and what share of the bottleneck they capture on 1024 other images
(`captured_energy`). Sites are grouped by the locations of what their consumer gives.
"""

import argparse
import math
import statistics
from collections import defaultdict
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growconv
from experiments.benchmarks.table import write_section
from growconv.growth.cost import ModelCost
from growconv.solvers.assembly import added_outputs, require_samples
from growconv.solvers.energy import captured_share
from growconv.solvers.tiny import Tiny
from growconv.training.data import load_data
from growconv.training.models import BasicBlock, ResidualNet

COUNTS = (16, 32, 64, 128, 256, 512, 1024)
CHANNELS, BATCH, STEPS = 8, 64, (30, 300)


def residual() -> nn.Module:
    """Three stages of 8, 16 and 32 channels on 32², 16² and 8² locations."""
    return ResidualNet(
        BasicBlock, ((8, 1), (16, 1), (32, 1)), 8, in_channels=1, classes=10, image_size=32
    )  # fmt: skip


def plain() -> nn.Module:
    """Three convolutions on 16², 8² and 4² locations, and a linear layer."""
    layers: list[nn.Module] = [nn.AvgPool2d(2)]
    for before in (1, 8, 8):
        layers += [nn.Conv2d(before, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 10))


def perceptron() -> nn.Module:
    """Three hidden layers of 32."""
    hidden = [part for _ in range(2) for part in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 32), nn.ReLU(), *hidden, nn.Linear(32, 10))


NETWORKS = {"residual": residual, "plain": plain, "perceptron": perceptron}


def images() -> tuple[Tensor, Tensor]:
    """20 000 images of 32², with labels."""
    dataset = load_data("fashion_mnist", validation=0.1, augmentation="none", limit=None, root=".")
    return F.pad(dataset.inputs(dataset.train, torch.arange(20000)), (2, 2, 2, 2)), dataset.train.targets[:20000]


def trained(name: str, seed: int, steps: int, x: Tensor, y: Tensor) -> nn.Module:
    """A network after some steps with momentum."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        index = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return model


def captured(model: nn.Module, x: Tensor, y: Tensor) -> dict[int, list[list[float]]]:
    """By locations: for each site what every number of samples captures."""
    solver, cost, found = Tiny(), ModelCost.measure(model, x[:2]), defaultdict(list)
    parts = torch.randperm(len(x))[: 2 * COUNTS[-1]].split(COUNTS[-1])
    batches, others = ([(x[part], y[part]) for part in indices.split(128)] for indices in parts)
    options = {"quantities": solver.reads, "keep_samples": COUNTS[-1]}
    for site in growconv.find_sites(model, x[:2]):
        subject, unseen = (
            growconv.collect_statistics(model, site, part, F.cross_entropy, **options)[site.name]
            for part in (batches, others)
        )
        kept, others_kept = (require_samples(each, "a sign") for each in (subject, unseen))
        wanted = replace(others_kept, consumers=kept.consumers).projected()
        row = []
        for count in COUNTS:
            some = replace(subject, samples_kept=kept.subset(slice(0, count)))
            growth = growconv.solve(some, solver, CHANNELS)
            row.append(captured_share(wanted, added_outputs(wanted, growth)))
        found[round(max(cost.locations[path] for path in site.consumers))].append(row)
    return found


def main() -> None:
    """Measure all networks and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--no-write", action="store_true", help="print the table alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x, y = images()
    rows = []
    for name in NETWORKS:
        groups: dict[tuple[int, int], list[list[float]]] = defaultdict(list)
        for steps in STEPS:
            for seed in range(arguments.seeds):
                for locations, found in captured(trained(name, seed, steps, x, y), x, y).items():
                    groups[locations, steps] += found
        for (locations, steps), found in sorted(groups.items(), reverse=True):
            most = statistics.mean(row[-1] for row in found)
            cells = [f"{100 * most:.3f}"]
            for column in range(len(COUNTS) - 1):
                values = [row[column] / (most or math.nan) for row in found]
                lost = [(row[column] - row[-1]) / (most or math.nan) for row in found]
                error = statistics.stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else math.nan
                cells.append(f"{statistics.mean(values):.2f} ± {error:.2f}")
            rows.append([name, locations, steps, len(found), *cells])
            print(*rows[-1], flush=True)
    columns = [
        "network",
        "locations",
        "steps",
        "sites",
        f"captured with {COUNTS[-1]}, %",
        *(f"{count}, ÷" for count in COUNTS[:-1]),
    ]
    if not arguments.no_write:
        write_section(
            "signs",
            "Signs of new channels",
            f"OMP_NUM_THREADS=1 python -m experiments.benchmarks.signs --seeds {arguments.seeds}",
            columns,
            rows,
            notes=["Captured ÷ what the signs of 1024 samples capture; ± is the standard error of the difference."],
        )


if __name__ == "__main__":
    main()
