"""From growth batches to proposals: collect, solve, count what it costs."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from growconv.errors import ScheduleError
from growconv.growth.cost import ModelCost, batch_size
from growconv.growth.decision import Batch, Loss, Proposal
from growconv.growth.distributed import agreed, from_first, reduce_statistics, world_size
from growconv.network.model import undisturbed
from growconv.network.proposal import ChannelGrowth
from growconv.network.rank import RankSite
from growconv.network.site import GrowthSite, Site
from growconv.solvers.assembly import require_statistics
from growconv.solvers.base import Channels, Solver, solve
from growconv.solvers.gradmax import gradmax
from growconv.solvers.rank import RankStatistics, collect_rank_statistics, solve_rank
from growconv.solvers.sampling import Found, gains_known, until_known
from growconv.statistics.collect import collect_statistics
from growconv.statistics.pair import PairStatistics

ROOM_BYTES = 2**28
"""What the kept samples of all sites may take in any case; beyond half of what a training step holds, and beyond this,
sites are collected and solved in several parts, each from its own passes over the batches."""

Answer = tuple[ChannelGrowth, float | None, int | None, Tensor | None]
"""What a site is offered, ‖v‖²/n there, the samples behind it, and `Proposal.slopes`."""

PHASES = ("collect", "solve", "amplitude", "surgery")


@dataclass(frozen=True)
class Collection:
    """How statistics are collected.

    Attributes:
        options: further options of `collect_statistics`.
        relative_error: collect only until the sum of the gains is known this well at every site; None: all batches.
        slopes: measure the slopes of proposals too; every site has closed-form statistics then.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    relative_error: float | None = None
    slopes: bool = False


class Stopwatch:
    """Wall-clock seconds of each phase of a growth round, device work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def propose(
    model: nn.Module,
    solver: Solver,
    asked: Mapping[Site, Channels],
    batches: Sequence[Batch],
    loss: Loss,
    cost: ModelCost,
    stopwatch: Stopwatch,
    generator: torch.Generator,
    collection: Collection,
) -> list[Proposal]:
    """Ask the solver for channels at several sites; the model is as before afterwards.

    Args:
        model: the raw model.
        solver: the growth method.
        asked: how many channels to ask for at which sites.
        batches: (inputs, targets) pairs of this process to collect statistics from.
        loss: loss(output, targets), a scalar.
        cost: the model's cost meter.
        stopwatch: gets the seconds of collecting and solving.
        generator: randomness of methods that draw.
        collection: how statistics are collected.

    Returns:
        One proposal per site, in the order of `asked`; with several processes the same one on each.
    """
    sites, device = [site for site in asked if site.room != 0], next(model.parameters()).device
    ranks = [cast(RankSite, site) for site in sites if site.own_method == "rank"]
    moments: dict[str, RankStatistics] = {}

    def solved(site: Site, statistics: Found) -> Answer:
        if site.own_method == "rank":
            terms = 1 if asked[site] == "auto" else min(int(asked[site]), site.room or 1)
            seen = moments[site.name]
            return solve_rank(cast(RankSite, site), seen, terms), seen.gradient_energy, None, None
        subject = statistics.get(site.name)
        given = subject if solver.reads else None
        growth = solve(given or cast(GrowthSite, site), solver, asked[site], model, generator)
        slopes = _slopes(statistics[site.name], growth.channels) if collection.slopes else None
        if given is None:
            return growth, None, None, slopes
        return growth, given.gradient_energy, given.samples, slopes

    answers: list[Answer] = []
    with undisturbed(model):
        if ranks:
            with stopwatch.phase("collect"):
                moments = agreed(lambda: collect_rank_statistics(model, ranks, batches, loss))
        kept = collection.options.get("keep_samples", solver.keep_samples) if "samples" in solver.reads else 0
        for part in from_first(lambda: parts_of(sites, cost, kept, batches), device):
            statistics: Found = {}  # those of the part before are gone now
            own = [sites[index] for index in part]
            wanted: dict[GrowthSite, Channels] = {
                cast(GrowthSite, site): asked[site] for site in own if site.own_method is None
            }
            if (solver.reads or collection.slopes) and wanted:
                with stopwatch.phase("collect"):
                    statistics = _collected(model, solver, wanted, batches, loss, collection, generator)
            with stopwatch.phase("solve"):
                answers += from_first(partial(_each, solved, own, statistics), device)
    return [
        Proposal(site, growth, energy, *cost.channel(site), samples, slopes)
        for site, (growth, energy, samples, slopes) in zip(sites, answers, strict=True)
    ]


def _slopes(subject: PairStatistics, channels: int) -> Tensor:
    """See `Proposal.slopes`; zeros for channels beyond the rank of N_raw."""
    (raw,) = require_statistics(subject, "N_raw")
    slopes = gradmax(torch.cat([each.flatten(1) for each in raw], 1)[:, None], max(1, channels)).gains[:channels]
    return torch.nn.functional.pad(slopes, (0, channels - len(slopes)))


def _each(solved: Callable[[Site, Found], Answer], sites: Sequence[Site], statistics: Found) -> list[Answer]:
    return [solved(site, statistics) for site in sites]


def parts_of(sites: Sequence[Site], cost: ModelCost, kept: int, batches: Sequence[Batch]) -> list[list[int]]:
    """The indices of sites, in parts whose kept samples leave a round's memory near that of a training step.

    Args:
        sites: in order.
        cost: knows the sizes of their maps.
        kept: samples that are kept for a site; 0: none.
        batches: one of them stands for a training batch.
    """
    held = 3 * batch_size(batches[0][0]) * sum(cost.entries(path) for path in cost.locations) / 2  # of maps and norms
    room = max(held / 2, ROOM_BYTES / 4)
    samples = min(kept, sum(batch_size(inputs) for inputs, _ in batches))
    parts: list[list[int]] = []
    taken = math.inf
    for index, site in enumerate(sites):
        own = samples * sum(cost.entries(path) for path in (*site.producers, *site.consumers))
        if taken + own > room:
            parts.append([])
            taken = 0.0
        parts[-1].append(index)
        taken += own
    return parts


def _collected(
    model: nn.Module,
    solver: Solver,
    asked: Mapping[GrowthSite, Channels],
    batches: Sequence[Batch],
    loss: Loss,
    collection: Collection,
    generator: torch.Generator,
) -> Found:
    """Statistics over all processes: of all batches, or of as many as make the gains known."""
    error = collection.relative_error
    reads = solver.reads | (set() if error is None else {"samples"}) | ({"N_raw"} if collection.slopes else set())
    keep = {"keep_samples": solver.keep_samples} if "samples" in reads else {}
    settings = {"quantities": reads, "hold": world_size() == 1, **keep, **collection.options}

    def collect(part: Sequence[Batch]) -> Found:
        own = collect_statistics(model, asked, part, loss, run=agreed, average=reduce_statistics, **settings)
        return reduce_statistics(own)

    if error is None:
        return collect(batches)
    device = next(model.parameters()).device

    def known(found: Found) -> bool:
        return from_first(lambda: gains_known(found, asked, solver, error, model, generator), device)

    return until_known(collect, batches, known)


def split(batches: Sequence[Batch], held_out: float) -> tuple[list[Batch], list[Batch]]:
    """Growth batches for the statistics, and others for the amplitude.

    Args:
        batches: at least two.
        held_out: share of the batches to hold out; at least one is, and one is not.

    Returns:
        (fitting, held out), in the order in which they came.
    """
    if len(batches) < 2:
        raise ScheduleError(
            "the amplitude is chosen on samples that the solver has not seen",
            expected="at least two growth batches",
            got=f"{len(batches)}",
            where="GrowthScheduler.grow",
            fix="pass more batches, or give the scheduler a fixed amplitude such as amplitude=1.0",
        )
    count = min(len(batches) - 1, max(1, round(held_out * len(batches))))
    return list(batches[:-count]), list(batches[-count:])
