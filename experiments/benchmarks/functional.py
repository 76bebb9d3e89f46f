"""What `functional` captures and takes, over tasks, networks and sites; two states of the package side by side.

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.functional
    OMP_NUM_THREADS=1 python -m experiments.benchmarks.functional --save old.json     # there: an older state
    OMP_NUM_THREADS=1 python -m experiments.benchmarks.functional --before old.json   # here: both

The network of the benchmark of amplitudes (4, 8 and 16 channels, the second pair with max pooling in between, the third
one a linear layer behind pooling) after 80 steps; eight channels a site from 512 kept samples, and the captured energy
on others, whose bottleneck is that of the fitting samples' W*. CPU time over that of a training step of 128 samples.
"""

import argparse
import json
import math
import statistics
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

import growconv
from experiments.benchmarks.amplitude import ROUNDS, TASKS, Run, images
from experiments.benchmarks.solver_steps import cpu_seconds
from experiments.benchmarks.table import markdown_table
from growconv.solvers import FewSamplesWarning
from growconv.solvers.energy import captured_energy
from growconv.statistics import collect_statistics

PAIRS = (("0", "3"), ("3", "7"), ("7", "12"))
KEPT, CHANNELS, REPEATS = 512, 8, 2
COLUMNS = ("task", "norm", "site", "energy before", "now", "steps before", "now")


def measured(task: str, norm: bool, seed: int, pair: tuple[str, str]) -> tuple[float, float]:
    """Captured energy on other samples, and CPU time in training steps."""
    run = Run(task, norm, seed)
    run.train(ROUNDS[0])
    (x, y), test = images(task)
    site = growconv.site(run.model, *pair, example_input=x[:2])
    batches = [(x[i : i + 128], y[i : i + 128]) for i in range(0, KEPT, 128)]
    quantities = {"samples", "N"}
    found = collect_statistics(
        run.model, [site], batches, F.cross_entropy, quantities=quantities, keep_samples=KEPT
    )[site.name]  # fmt: skip

    def step() -> None:
        run.model.zero_grad()
        F.cross_entropy(run.model(x[:128]), y[:128]).backward()

    seconds = []
    for _ in range(REPEATS):
        unit = cpu_seconds(step, 10)
        growths = []
        draws = torch.Generator().manual_seed(seed)
        solve = lambda: growths.append(growconv.solve(found, "functional", CHANNELS, generator=draws))  # noqa: B023, E731
        seconds.append(cpu_seconds(solve) / unit)
    others = [(x[i : i + 128], y[i : i + 128]) for i in range(KEPT, min(len(x), 2000), 128)] + [test]
    energy = captured_energy(run.model, site, growths[0], others, F.cross_entropy, statistics=found)
    return energy, statistics.median(seconds)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="write the figures to a file")
    parser.add_argument("--before", type=Path, help="read those of another state of the package")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FewSamplesWarning)
    found: dict[str, list[float]] = {}
    before = json.loads(arguments.before.read_text()) if arguments.before else {}
    rows, ratios = [], []
    for task in TASKS:
        for norm in (False, True):
            for pair in PAIRS:
                name = f"{task} {'BatchNorm' if norm else 'none'} {pair[0]}→{pair[1]}"
                runs = [measured(task, norm, seed, pair) for seed in range(arguments.seeds)]
                found[name] = [statistics.mean(values) for values in zip(*runs, strict=True)]
                old = before.get(name, [math.nan, math.nan])
                ratios.append((found[name][0] / old[0], found[name][1] / old[1]))
                cells = [f"{old[0]:.4f}", f"{found[name][0]:.4f}", f"{old[1]:.0f}", f"{found[name][1]:.0f}"]
                rows.append([*name.split(" "), *cells])
                print(*rows[-1], sep="\t", flush=True)
    energy, steps = (statistics.geometric_mean(each) for each in zip(*ratios, strict=True))
    print(f"\n{markdown_table(COLUMNS, rows)}\n\nGeometric mean of the ratios: energy {energy:.3f}, steps {steps:.3f}.")
    if arguments.save:
        arguments.save.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
