"""(e): widths that short growing finds, widths made by hand, and widths that are drawn, at equal inference FLOPs."""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from experiments.studies.when_growing_pays import nets
from experiments.studies.when_growing_pays.pieces import BASE, DATA, FALLING, FIXED, Arguments, Commands, Piece
from experiments.studies.when_growing_pays.rates import rate
from experiments.studies.when_growing_pays.record import Record
from growconv.growth.cost import ModelCost
from growconv.training.models import PlainNet

SEEDS = (0, 1, 2, 3, 4, 5, 6, 7)
FRESH_SEEDS = (8, 9, 10, 11, 12, 13, 14, 15)
"""Of what `SEEDS` led to."""
CRITERIA: dict[str, tuple[str, ...]] = {
    "gradient_per_flop": ("growth=random", "growth.where.by=gradient"),
    "energy_per_flop": ("growth=tiny", "growth.where.by=energy"),
    "decrease_per_flop": ("growth=tiny", "growth.where.by=decrease"),
    "fisher_per_flop": ("growth=senn", "growth.where.by=energy"),
    "curvature_per_flop": ("growth=splitting", "growth.where.by=energy"),
}
SEARCHES = (("gradient_per_flop", 0.05), *((name, 0.15) for name in CRITERIA))
"""Criteria, and the share of the final training that the search may cost."""
TRIALS = 5
"""Widths that are drawn; each is tried for a fifth of the longest search."""


@dataclass(frozen=True)
class Net:
    """A kind of network whose inner widths are free.

    Attributes:
        target: what builds it.
        argument: takes the widths, in the order of the layers.
        uniform: the widths that all others are compared with.
        sites: patterns of the sites that may grow.
        pools: after how many convolutions a plain net halves the grid.
    """

    target: Callable[..., nn.Module]
    argument: str
    uniform: tuple[int, ...]
    sites: str
    pools: tuple[int, ...] = ()

    def plan(self, widths: Sequence[int]) -> list[int | str]:
        """The value of `argument`."""
        placed: list[int | str] = []
        for number, width in enumerate(widths):
            placed += ["pool", width] if number in self.pools else [width]
        return placed

    def overrides(self, widths: Sequence[int]) -> tuple[str, ...]:
        """The model of these widths, as a user asks for it."""
        return (
            "model=small_cnn",
            f"model._target_={self.target.__module__}.{self.target.__name__}",
            f"+model.args.{self.argument}=[{','.join(map(str, self.plan(widths)))}]",
            f"model.hidden_sites=['{self.sites}']",
        )

    def flops(self, widths: Sequence[int], pixels: int) -> int:
        """FLOPs of one sample's forward pass."""
        arguments = {"in_channels": 1, "classes": 10, "image_size": pixels, self.argument: self.plan(widths)}
        return ModelCost.measure(self.target(**arguments), torch.zeros(2, 1, pixels, pixels)).flops()


@dataclass(frozen=True)
class Images:
    """A data set, and how long a network is trained on it.

    Attributes:
        overrides: what chooses it.
        pixels: side of an image.
        samples: training images without those held out.
        epochs: of the uniform network that a training costs.
    """

    overrides: tuple[str, ...]
    pixels: int
    samples: int
    epochs: int


NETS = {
    "plain": Net(PlainNet, "plan", (8, 16, 16, 32), "*", pools=(1, 3)),
    "residual": Net(nets.residual_blocks, "middles", (8, 8, 16, 16, 32), "blocks.*.conv1 -> *"),
    "mobile": Net(nets.mobile_blocks, "middles", (32, 32, 32, 64, 64), "blocks.*.expand -> *"),
}
IMAGES = {
    "fashion": Images(DATA["fashion"], 28, 54_000, epochs=2),
    "digits": Images(DATA["digits"], 8, 1_222, epochs=40),
}


@dataclass(frozen=True)
class Cell:
    """A network on a data set.

    Attributes:
        net: of NETS.
        images: of IMAGES.
    """

    net: str
    images: str

    @property
    def name(self) -> str:
        """In the paths of its runs."""
        return f"{self.images}_{self.net}"

    @property
    def budget(self) -> int:
        """Inference FLOPs of the uniform network."""
        return NETS[self.net].flops(NETS[self.net].uniform, IMAGES[self.images].pixels)

    @property
    def length(self) -> float:
        """Training FLOPs of a network that is trained from scratch: forward and backward are three passes."""
        images = IMAGES[self.images]
        return 3.0 * self.budget * images.samples * images.epochs

    def fixed(self, widths: Sequence[int], share: float = 1.0) -> tuple[str, ...]:
        """A training of fixed widths.

        Args:
            widths: of the free layers.
            share: of the whole length.
        """
        model = NETS[self.net].overrides(widths)
        ends = (*FIXED, *FALLING, f"trainer.flops={share * self.length}")
        return (*self._base, *model, *ends)

    def uniform(self) -> tuple[str, ...]:
        """The uniform network and the data."""
        net = NETS[self.net]
        return (*self._base, *net.overrides(net.uniform))

    @property
    def _base(self) -> Arguments:
        return (*BASE, *IMAGES[self.images].overrides, "trainer.channels_last=true")  # a third less time

    def scaled(self, shape: Sequence[float]) -> list[int]:
        """The largest widths in these proportions that cost no more than the uniform ones."""
        net, budget, pixels = NETS[self.net], self.budget, IMAGES[self.images].pixels

        def widths(factor: float) -> list[int]:
            return [max(1, round(factor * each)) for each in shape]

        low, high = 0.0, 1.0
        while net.flops(widths(high), pixels) <= budget:
            low, high = high, 2 * high
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if net.flops(widths(middle), pixels) <= budget else (low, middle)
        return widths(low)


CELLS = [Cell(net, images) for images, net in itertools.product(IMAGES, NETS)]
SETTINGS = {cell.name: cell.fixed(NETS[cell.net].uniform) for cell in CELLS}
"""What a rate is chosen for."""


def allocation(record: Record, seed: int) -> Iterator[Piece]:
    """Every way to choose widths in every cell, each trained at the same cost and rate."""
    for cell in CELLS:
        ends = (rate(record, cell.name), f"seed={seed}")
        uniform = NETS[cell.net].uniform
        ways: dict[str, Commands] = {
            "uniform": partial(_trained, cell, list(uniform), ends),
            "by_hand_equal": partial(_trained, cell, cell.scaled([1.0] * len(uniform)), ends),
            "by_hand_steep": partial(_trained, cell, cell.scaled([float(width * width) for width in uniform]), ends),
            "at_random": partial(_drawn, cell, random.Random(seed), ends),
            "end_to_end": partial(_end_to_end, cell, ends),
        }
        ways |= {f"{name}_{share}": partial(_searched, cell, name, share, ends) for name, share in SEARCHES}
        for name, commands in ways.items():
            variant = f"{cell.name}/{name}"
            yield Piece("allocation", variant, seed, commands, {variant: "found"})


def allocation_again(record: Record, seed: int) -> Iterator[Piece]:
    """The criterion that `allocation` led to, beside the one before and uniform widths, on fresh seeds."""
    for cell in CELLS:
        ends = (rate(record, cell.name), f"seed={seed}")
        ways: dict[str, Commands] = {"uniform": partial(_trained, cell, list(NETS[cell.net].uniform), ends)}
        for name in ("gradient_per_flop", "decrease_per_flop"):
            ways[f"{name}_0.15"] = partial(_searched, cell, name, 0.15, ends)
        for name, commands in ways.items():
            variant = f"{cell.name}/{name}"
            yield Piece("allocation_again", variant, seed, commands, {variant: "found"})


def _trained(cell: Cell, widths: Sequence[int], ends: Arguments, folder: Path) -> Iterator[Arguments]:
    yield (*cell.fixed(widths), *ends, _in(folder / "found"))


def _searched(cell: Cell, criterion: str, share: float, ends: Arguments, folder: Path) -> Iterator[Arguments]:
    """`growconv search`, and what it found from scratch."""
    length = (f"trainer.flops={share * cell.length}", f"growth.budget.flops={cell.budget}")
    yield ("search", *cell.uniform(), *length, *CRITERIA[criterion], *ends, _in(folder / "search"))
    last = (*FIXED, *FALLING, f"trainer.flops={cell.length}", *ends)
    yield ("--config-dir", f"{folder / 'search'}", "experiment=found", *cell.uniform(), *last, _in(folder / "found"))


def _end_to_end(cell: Cell, ends: Arguments, folder: Path) -> Iterator[Arguments]:
    """The recipe of the search in the first 30 % of a whole training."""
    grown = ("experiment=search", *CRITERIA["gradient_per_flop"], f"growth.budget.flops={cell.budget}")
    ends = ("growth.end=0.3", *FALLING, f"trainer.flops={cell.length}", *ends)
    yield (*grown, *cell.uniform(), *ends, _in(folder / "found"))


def _drawn(cell: Cell, drawn: random.Random, ends: Arguments, folder: Path) -> Iterator[Arguments]:
    """Widths up to twice as wide or narrow in their proportions; the best of short trainings, from scratch."""
    uniform = NETS[cell.net].uniform
    tried = [cell.scaled([2 ** drawn.uniform(-1, 1) * width for width in uniform]) for _ in range(TRIALS)]
    share = max(share for _, share in SEARCHES) / TRIALS
    for number, widths in enumerate(tried):
        yield (*cell.fixed(widths, share), *ends, _in(folder / f"trial_{number}"))
    lines = [(folder / f"trial_{number}" / "metrics.jsonl").read_text().splitlines() for number in range(TRIALS)]
    losses = [json.loads(each[-1])["val_loss"] for each in lines]
    yield from _trained(cell, tried[losses.index(min(losses))], ends, folder)


def _in(folder: Path) -> str:
    return f"hydra.run.dir={folder}"
