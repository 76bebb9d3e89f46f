"""The runs that answer the questions of the study; README.md beside this file is the protocol."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.studies.when_growing_pays.allocation import FRESH_SEEDS, allocation, allocation_again
from experiments.studies.when_growing_pays.allocation import SEEDS as SEEDS_OF_ALLOCATION
from experiments.studies.when_growing_pays.allocation import SETTINGS as SETTINGS_OF_CELLS
from experiments.studies.when_growing_pays.pieces import BASE, DATA, DECAY, FALLING, FIXED, Piece, run
from experiments.studies.when_growing_pays.rates import rate
from experiments.studies.when_growing_pays.record import Record

E = 3e11
"""The unit of training FLOPs: about one epoch of width 1."""
BUDGETS = (1.0, 2.0, 4.0, 8.0)
LENGTH, HALF = 4.0 * E, 2.0 * E
"""Training FLOPs of the runs of all other questions, and where they grow."""
WIDTHS = (0.5, 0.7, 1.0, 1.4, 2.0)
SEEDS = (0, 1, 2, 3, 4)
RESIDUAL = (
    *DATA["fashion"],
    "model=resnet20",
    "model._target_=experiments.studies.when_growing_pays.nets.residual",
    "model.width=0.25",
)
NETS: dict[str, tuple[str, ...]] = {
    "plain": (
        *DATA["fashion"],
        "model=small_cnn",
        "model._target_=growconv.training.models.PlainNet",
        "+model.args.plan=[8,pool,16,16,pool,32]",
    ),
    "residual_2_2_2": (*RESIDUAL, "+model.args.blocks=[2,2,2]"),
    "residual_4_3_3": (*RESIDUAL, "+model.args.blocks=[4,3,3]"),
}
AT_HALF = ("growth.start=0.5", "growth.times=1", "growth.begin=0.5", "growth.amount=1.0")
METHODS: dict[str, tuple[str, ...]] = {
    "net2net": ("growth=net2net",),
    "net2net_rms": ("growth=net2net", "growth.solver.keeps=rms"),
    "functional": ("growth=functional",),
    "random": ("growth=random",),
    "variance_transfer": ("growth=variance_transfer",),
}
FASTER = "+growth.scheduler.learning_rate={_target_: growconv.growth.WarmUp, steps: 4, start: 1.0, peak: 1.3}"
SETTINGS: dict[str, tuple[str, ...]] = {
    **{f"width_{width}": (*NETS["plain"], *FIXED, f"model.width={width}", f"trainer.flops={HALF}") for width in WIDTHS},
    **{net: (*NETS[net], *FIXED, f"trainer.flops={HALF}") for net in NETS if net != "plain"},
    **SETTINGS_OF_CELLS,
}
"""What a rate is chosen for."""


def frontier(record: Record, seed: int) -> Iterator[Piece]:
    """(a): fixed widths at all budgets."""
    for budget, width in itertools.product(BUDGETS, WIDTHS):
        overrides = (*NETS["plain"], *FIXED, f"model.width={width}", f"trainer.flops={budget * E}")
        yield run("frontier", f"budget_{budget}/width_{width}", seed, *overrides, rate(record, f"width_{width}"))


def _doubling(record: Record, target: float, variant: str, seed: int, *overrides: str) -> Piece:
    grown = (*NETS["plain"], f"model.width={target}", *overrides, f"trainer.flops={LENGTH}")
    return run("doubling", f"to_{target}/{variant}", seed, *grown, rate(record, f"width_{target}"))


def doubling(record: Record, seed: int) -> Iterator[Piece]:
    """(b): one doubling in the middle, to width 1 and to width 2."""
    for target, (name, method), faster in itertools.product((1.0, 2.0), METHODS.items(), (False, True)):
        more = (FASTER,) if faster else ()
        yield _doubling(record, target, f"{name}_1.3" if faster else name, seed, *method, *AT_HALF, *more)


def doubling_when(record: Record, seed: int) -> Iterator[Piece]:
    """(b): the doubling at 30 and 60 %."""
    pairs = {"net2net_1.3": (*METHODS["net2net"], FASTER), "random": METHODS["random"]}
    for target, (name, method), begin in itertools.product((1.0, 2.0), pairs.items(), (0.3, 0.6)):
        at = (*AT_HALF, f"growth.begin={begin}", f"growth.end={begin}")
        yield _doubling(record, target, f"{name}_at_{begin}", seed, *method, *at)


def finished(record: Record, seed: int) -> Iterator[Piece]:
    """(c): a net that was trained to its end, trained on as it is, and grown first."""
    for small in (0.5, 1.0):
        chosen = rate(record, f"width_{small}")

        def commands(folder: Path, small: float = small, chosen: str = chosen) -> Iterator[tuple[str, ...]]:
            begun = (*BASE, *FALLING, *NETS["plain"], *FIXED, f"model.width={small}", f"trainer.flops={HALF}", chosen)
            yield (*begun, f"seed={seed}", f"hydra.run.dir={folder / 'small'}")
            for method in ("net2net", "functional"):
                yield (
                    "grow",
                    f"{folder / 'small'}",
                    "--factor",
                    "2",
                    "--method",
                    method,
                    "--output",
                    f"{folder / method}",
                )
                yield (f"resume={folder / method}", f"trainer.flops={LENGTH}")
            yield (f"resume={folder / 'small'}", f"trainer.flops={LENGTH}")

        variant = f"from_{small}"
        outcomes = {f"{variant}/{name}": name for name in ("net2net", "functional", "small")}
        yield Piece("finished", variant, seed, commands, outcomes)


def family(record: Record, seed: int) -> Iterator[Piece]:
    """(d): widths ½, ¾ and 1 from one trunk, and one by one for the same FLOPs in all."""
    marks = (0.2, 0.5)  # of the largest member's length: where the trunk grows
    lengths = [mark * LENGTH / (1 - DECAY) for mark in marks] + [LENGTH]
    trunk = (1 - DECAY) * LENGTH
    spent = trunk + sum(DECAY * length for length in lengths)
    chosen = rate(record, "width_1.0")

    def commands(folder: Path) -> Iterator[tuple[str, ...]]:
        grown = (
            "growth=net2net",
            "growth.start=0.5",
            "growth.times=2",
            f"growth.begin={marks[0]}",
            f"growth.end={marks[1]}",
        )
        length = ("growth.amount=0.5", f"trainer.flops={LENGTH}")
        yield (
            "family",
            *BASE,
            *FALLING,
            *NETS["plain"],
            *grown,
            *length,
            chosen,
            f"seed={seed}",
            f"hydra.run.dir={folder}",
        )

    yield Piece("family", "trunk", seed, commands, {f"trunk/{number}": f"member_{number}" for number in range(3)})
    for number, (width, tuned) in enumerate(((0.5, 0.5), (0.75, 0.7), (1.0, 1.0))):
        flops = lengths[number] * spent / sum(lengths)
        overrides = (*NETS["plain"], *FIXED, f"model.width={width}", f"trainer.flops={flops}")
        yield run("family", f"alone/{number}", seed, *overrides, rate(record, f"width_{tuned}"))


def size_and_depth(record: Record, seed: int) -> Iterator[Piece]:
    """(f): smaller images at first, and blocks copied, alone and with a doubling."""
    small, grown = ("data.size=[[0.25,14]]",), (*METHODS["net2net"], FASTER, *AT_HALF)
    for target in (1.0, 2.0):
        wide = (*NETS["plain"], f"model.width={target}", f"trainer.flops={LENGTH}", rate(record, f"width_{target}"))
        yield run("size_and_depth", f"plain/to_{target}/size", seed, *wide, *small, *FIXED)
        yield run("size_and_depth", f"plain/to_{target}/size_and_width", seed, *wide, *small, *grown)
    shallow, deep = "residual_2_2_2", "residual_4_3_3"
    for net in (shallow, deep):
        fixed = (*NETS[net], *FIXED, f"trainer.flops={LENGTH}")
        yield run("size_and_depth", f"residual/{net}", seed, *fixed, rate(record, net))
    copied = (*NETS[shallow], "growth.depth.at=[0.4]", f"trainer.flops={LENGTH}", rate(record, deep))
    yield run("size_and_depth", "residual/depth", seed, *FIXED, *copied)
    yield run("size_and_depth", "residual/depth_and_width", seed, *grown, *copied)


def directions(record: Record, seed: int) -> Iterator[Piece]:
    """(g): methods that differ in the initial weights only, silent at first and with the amplitude searched."""
    for method, amplitude in itertools.product(("tiny", "functional", "gradmax", "random"), ("0.0", "line_search")):
        overrides = (f"growth={method}", *AT_HALF, f"growth.amplitude={amplitude}", "model.width=1.0")
        ends = (f"trainer.flops={LENGTH}", rate(record, "width_1.0"))
        yield run("directions", f"{method}_{amplitude}", seed, *NETS["plain"], *overrides, *ends)


QUESTIONS: dict[str, Callable[[Record, int], Iterator[Piece]]] = {
    "frontier": frontier,
    "doubling": doubling,
    "finished": finished,
    "family": family,
    "size_and_depth": size_and_depth,
    "directions": directions,
    "allocation": allocation,
    "doubling_when": doubling_when,
    "allocation_again": allocation_again,
}
SEEDS_OF = dict.fromkeys(QUESTIONS, SEEDS)
SEEDS_OF |= {"allocation": SEEDS_OF_ALLOCATION, "allocation_again": FRESH_SEEDS}
"""The seeds that are reported."""
