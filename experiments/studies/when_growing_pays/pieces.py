"""What a piece of the study is: commands that are run without a break, and their results."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

DECAY = 0.4
"""The last share of a run, in which the rate falls."""
FIXED = ("growth=none",)
BASE = ("optimizer=sgd", "trainer.progress=none", "baselines=[]", "report=false")
FALLING = ("lr_schedule=trapezoid", f"lr_schedule.decay={DECAY}")
DATA: dict[str, tuple[str, ...]] = {
    "fashion": ("data=fashion_mnist", "data.validation=0.1", "trainer.batch_size=128"),
    "digits": ("data=digits", "trainer.batch_size=64"),
}
Arguments = tuple[str, ...]
Commands = Callable[[Path], Iterator[Arguments]]


@dataclass(frozen=True)
class Piece:
    """What is run without a break, and started anew where it was cut.

    Attributes:
        question: of the protocol.
        variant: what is run, as a path.
        seed: of every run in it.
        commands: what growconv is called with, one call after the other, in a folder.
        outcomes: variant to the run directory, in that folder, that holds its result.
    """

    question: str
    variant: str
    seed: int
    commands: Commands
    outcomes: Mapping[str, str]


def run(question: str, variant: str, seed: int, *overrides: str) -> Piece:
    """A piece of one run with a falling rate."""

    def commands(folder: Path) -> Iterator[Arguments]:
        yield (*BASE, *FALLING, *overrides, f"seed={seed}", f"hydra.run.dir={folder}")

    return Piece(question, variant, seed, commands, {variant: "."})
