"""The runs that answer the study's questions; README.md beside this file is the protocol."""

import itertools
import json
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from experiments.studies.when_growing_pays.record import Record
from growconv.growth.cost import ModelCost
from growconv.training.models import PlainNet

E = 3e11
"""The unit of training FLOPs: about one epoch of width 1."""
BUDGETS = (1.0, 2.0, 4.0, 8.0)
LENGTH, HALF = 4.0 * E, 2.0 * E
"""Training FLOPs of the runs of all other questions, and where they grow."""
WIDTHS = (0.5, 0.7, 1.0, 1.4, 2.0)
RATES = (0.05, 0.1, 0.2, 0.4)
TUNING, SEEDS = (100, 101), (0, 1, 2, 3, 4)
DECAY = 0.4
PLAN = (8, "pool", 16, 16, "pool", 32)
SITES = (
    "features.0 -> features.4",
    "features.4 -> features.7",
    "features.7 -> features.11",
    "features.11 -> classifier",
)
BASE = (
    "data=fashion_mnist",
    "data.validation=0.1",
    "optimizer=sgd",
    "trainer.batch_size=128",
    "trainer.progress=none",
    "baselines=[]",
    "report=false",
)
FALLING = ("lr_schedule=trapezoid", f"lr_schedule.decay={DECAY}")
RESIDUAL = ("model=resnet20", "model._target_=experiments.studies.when_growing_pays.nets.residual", "model.width=0.25")
NETS: dict[str, tuple[str, ...]] = {
    "plain": (
        "model=small_cnn",
        "model._target_=growconv.training.models.PlainNet",
        f"+model.args.plan=[{','.join(map(str, PLAN))}]",
    ),
    "residual_2_2_2": (*RESIDUAL, "+model.args.blocks=[2,2,2]"),
    "residual_4_3_3": (*RESIDUAL, "+model.args.blocks=[4,3,3]"),
}
FIXED, AT_HALF = ("growth=none",), ("growth.start=0.5", "growth.times=1", "growth.begin=0.5", "growth.amount=1.0")
METHODS: dict[str, tuple[str, ...]] = {
    "net2net": ("growth=net2net",),
    "net2net_rms": ("growth=net2net", "growth.solver.keeps=rms"),
    "functional": ("growth=functional",),
    "random": ("growth=random",),
    "variance_transfer": ("growth=variance_transfer",),
}
FASTER = "+growth.scheduler.learning_rate={policy: WarmUp, steps: 4, start: 1.0, peak: 1.3}"
CRITERIA: dict[str, tuple[str, ...]] = {
    "gradient_per_flop": (),
    "energy_per_flop": ("growth=tiny", "growth.where.by=energy"),
    "gradient_per_parameter": ("growth.where.per=parameter",),
}
SEARCHES = (("gradient_per_flop", 0.1), ("gradient_per_flop", 1.0), *((criterion, 0.3) for criterion in CRITERIA))
HAND_MADE = {"equal": (1.0, 1.0, 1.0, 1.0), "steep": (1.0, 3.0, 3.0, 9.0)}
TRIALS, TRIAL = 5, 0.06

Commands = Callable[[Path], Iterator[tuple[str, ...]]]


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

    def commands(folder: Path) -> Iterator[tuple[str, ...]]:
        yield (*BASE, *FALLING, *overrides, f"seed={seed}", f"hydra.run.dir={folder}")

    return Piece(question, variant, seed, commands, {variant: "."})


def rates(record: Record) -> Iterator[Piece]:
    """Every net and width at every rate, on seeds that are never reported."""
    jobs = [("plain", width) for width in WIDTHS] + [(net, None) for net in NETS if net != "plain"]
    for seed, (net, width), rate in itertools.product(TUNING, jobs, RATES):
        yield _rated(net, width, rate, seed)
    for net, width in jobs:
        while (best := _best(record, net, width)) in (min(tried := _tried(record, net, width)), max(tried)):
            for seed in TUNING:
                yield _rated(net, width, best * 2 if best == max(tried) else best / 2, seed)


def _name(net: str, width: float | None) -> str:
    return net if width is None else f"width_{width}"


def _rated(net: str, width: float | None, rate: float, seed: int) -> Piece:
    wide = () if width is None else (f"model.width={width}",)
    overrides = (*NETS[net], *FIXED, *wide, f"trainer.flops={HALF}", f"optimizer.lr={rate}")
    return run("rates", f"{_name(net, width)}/lr_{rate}", seed, *overrides)


def _tried(record: Record, net: str, width: float | None) -> dict[float, float]:
    """Mean validation NLL by rate, of the rates that all tuning seeds have run."""
    found = {}
    for variant in record.variants("rates"):
        name, _, rate = variant.partition("/lr_")
        results = record.of("rates", variant)
        if name == _name(net, width) and set(TUNING) <= set(results):
            found[float(rate)] = statistics.mean(result.val_loss for result in results.values())
    return found


def _best(record: Record, net: str, width: float | None) -> float:
    tried = _tried(record, net, width)
    return min(tried, key=lambda rate: tried[rate])


def rate(record: Record, net: str = "plain", width: float | None = None) -> str:
    """The override with the rate that the protocol chooses.

    Raises:
        SystemExit: not all rates were run, or the best lies at an end of the list.
    """
    tried = _tried(record, net, width)
    if not set(RATES) <= set(tried) or _best(record, net, width) in (min(tried), max(tried)):
        raise SystemExit(f"{_name(net, width)}: its rate is not chosen yet; run `rates` first")
    return f"optimizer.lr={_best(record, net, width)}"


def frontier(record: Record, seed: int) -> Iterator[Piece]:
    """(a): fixed widths at all budgets."""
    for budget, width in itertools.product(BUDGETS, WIDTHS):
        overrides = (*NETS["plain"], *FIXED, f"model.width={width}", f"trainer.flops={budget * E}")
        yield run("frontier", f"budget_{budget}/width_{width}", seed, *overrides, rate(record, "plain", width))


def _doubling(record: Record, target: float, variant: str, seed: int, *overrides: str) -> Piece:
    grown = (*NETS["plain"], f"model.width={target}", *overrides, f"trainer.flops={LENGTH}")
    return run("doubling", f"to_{target}/{variant}", seed, *grown, rate(record, "plain", target))


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
        chosen = rate(record, "plain", small)

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
    chosen = rate(record, "plain", 1.0)

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
        yield run("family", f"alone/{number}", seed, *overrides, rate(record, "plain", tuned))


def allocation(record: Record, seed: int) -> Iterator[Piece]:
    """(e): widths found by short growing, by hand and at random, at equal inference FLOPs, from scratch for 2 E."""
    chosen, budget = rate(record, "plain", 1.0), inference_flops(PLAN)
    last = (*BASE, *FALLING, *NETS["plain"], *FIXED, f"trainer.flops={LENGTH}", chosen, f"seed={seed}")
    for criterion, share in SEARCHES:

        def searched(folder: Path, criterion: str = criterion, share: float = share) -> Iterator[tuple[str, ...]]:
            length = (f"trainer.flops={share * E}", f"growth.budget.flops={budget}")
            plain = (*BASE, *NETS["plain"], *length, *CRITERIA[criterion], chosen, f"seed={seed}")
            yield ("search", *plain, f"hydra.run.dir={folder / 'search'}")
            yield (
                "--config-dir",
                f"{folder / 'search'}",
                "experiment=found",
                *last,
                f"hydra.run.dir={folder / 'found'}",
            )

        variant = f"{criterion}_{share}"
        yield Piece("allocation", variant, seed, searched, {variant: "found"})
    for name, shape in HAND_MADE.items():

        def by_hand(folder: Path, shape: Sequence[float] = shape) -> Iterator[tuple[str, ...]]:
            yield (*_at(folder / "found", scaled_to(shape, budget)), *last, f"hydra.run.dir={folder / 'found'}")

        yield Piece("allocation", f"by_hand_{name}", seed, by_hand, {f"by_hand_{name}": "found"})

    def at_random(folder: Path) -> Iterator[tuple[str, ...]]:
        drawn = random.Random(seed)
        tried = [
            scaled_to([2 ** drawn.uniform(-1, 1) * wide for wide in widths_of(PLAN)], budget) for _ in range(TRIALS)
        ]
        short = (*BASE, *FALLING, *NETS["plain"], *FIXED, f"trainer.flops={TRIAL * E}", chosen, f"seed={seed}")
        for number, widths in enumerate(tried):
            yield (*_at(folder / f"widths_{number}", widths), *short, f"hydra.run.dir={folder / f'trial_{number}'}")
        losses = [_last(folder / f"trial_{number}")["val_loss"] for number in range(TRIALS)]
        best = losses.index(min(losses))
        yield (*_at(folder / "found", tried[best]), *last, f"hydra.run.dir={folder / 'found'}")

    yield Piece("allocation", "at_random_0.3", seed, at_random, {"at_random_0.3": "found"})


def size_and_depth(record: Record, seed: int) -> Iterator[Piece]:
    """(f): smaller images at first, and blocks copied, alone and with a doubling."""
    small, grown = ("data.size=[[0.25,14]]",), (*METHODS["net2net"], FASTER, *AT_HALF)
    for target in (1.0, 2.0):
        wide = (*NETS["plain"], f"model.width={target}", f"trainer.flops={LENGTH}", rate(record, "plain", target))
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
        ends = (f"trainer.flops={LENGTH}", rate(record, "plain", 1.0))
        yield run("directions", f"{method}_{amplitude}", seed, *NETS["plain"], *overrides, *ends)


def widths_of(plan: Sequence[int | str]) -> list[int]:
    """The channels in a plan."""
    return [entry for entry in plan if isinstance(entry, int)]


def inference_flops(plan: Sequence[int | str]) -> int:
    """FLOPs of one sample's forward pass through the plain net."""
    model = PlainNet(tuple(plan), in_channels=1, classes=10, image_size=28)
    return int(ModelCost.measure(model, torch.zeros(2, 1, 28, 28)).flops())


def scaled_to(shape: Sequence[float], budget: int) -> list[int]:
    """The largest widths in these proportions that a budget of inference FLOPs allows."""

    def widths(factor: float) -> list[int]:
        return [max(1, round(factor * each)) for each in shape]

    def cost(factor: float) -> int:
        wide = iter(widths(factor))
        return inference_flops([next(wide) if isinstance(entry, int) else entry for entry in PLAN])

    low, high = 0.0, 1.0
    while cost(high) <= budget:
        low, high = high, 2 * high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return widths(low)


def _at(folder: Path, widths: Sequence[int]) -> tuple[str, ...]:
    """Arguments that set the plain net's widths, by a config file of their own."""
    place = folder.with_name(f"{folder.name}_config")
    (place / "experiment").mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({"model": {"widths": dict(zip(SITES, widths, strict=True))}})
    (place / "experiment" / "found.yaml").write_text(f"# @package _global_\n{text}")
    return ("--config-dir", f"{place}", "experiment=found")


def _last(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


QUESTIONS: dict[str, Callable[[Record, int], Iterator[Piece]]] = {
    "frontier": frontier,
    "doubling": doubling,
    "finished": finished,
    "family": family,
    "size_and_depth": size_and_depth,
    "directions": directions,
    "allocation": allocation,
    "doubling_when": doubling_when,
}
