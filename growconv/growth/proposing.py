"""From growth batches to proposals: collect, solve, count what it costs."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from growconv.errors import ScheduleError
from growconv.growth.cost import ModelCost
from growconv.growth.decision import Proposal
from growconv.growth.distributed import agreed, from_first, reduce_statistics
from growconv.growth.preservation import undisturbed
from growconv.network import layers
from growconv.network.growing import plan_size
from growconv.network.parametrized import effective_weight
from growconv.network.proposal import ChannelGrowth
from growconv.network.rank_site import RankSite
from growconv.network.site import GrowthSite
from growconv.solvers.base import Channels, Solver, solve
from growconv.solvers.rank import RankStatistics, collect_rank_statistics, solve_rank
from growconv.solvers.sampling import Found, gains_known, until_known
from growconv.statistics.collect import collect_statistics
from growconv.statistics.pair import PairStatistics

Batch = tuple[Any, Any]
Loss = Callable[[Any, Any], Tensor]

SLOTS = {"writes": layers.writing_slots, "reads": layers.reading_slots, "carries": layers.carrying_slots}
KEEP_SAMPLES = 512
"""Samples per process and site whose tensors are kept for methods that read them."""
PHASES = ("collect", "solve", "amplitude", "surgery")


@dataclass(frozen=True)
class Collection:
    """How statistics are collected.

    Attributes:
        options: further options of `collect_statistics`.
        relative_error: collect only until the sum of the gains is known this well at every site; None: all batches.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    relative_error: float | None = None


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
    asked: Mapping[GrowthSite, Channels],
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
    ranks = [site for site in asked if isinstance(site, RankSite) and site.width < site.bound]
    layer_sites = [site for site in asked if not isinstance(site, RankSite)]
    sites, device = [site for site in asked if site in ranks or site in layer_sites], next(model.parameters()).device
    statistics: dict[str, PairStatistics] = {}
    rank_statistics: dict[str, RankStatistics] = {}
    with undisturbed(model):
        if ranks:
            with stopwatch.phase("collect"):
                rank_statistics = agreed(lambda: collect_rank_statistics(model, ranks, batches, loss))
        if solver.reads and layer_sites:
            with stopwatch.phase("collect"):
                statistics = _collected(model, solver, layer_sites, asked, batches, loss, collection, generator)
        with stopwatch.phase("solve"):

            def solve_all() -> list[tuple[ChannelGrowth, float | None, int | None]]:
                answer = []
                for site in sites:
                    if isinstance(site, RankSite):
                        moments = rank_statistics[site.name]
                        terms = 1 if asked[site] == "auto" else min(int(asked[site]), site.bound - site.width)
                        answer.append((solve_rank(site, moments, terms), moments.gradient_energy, None))
                        continue
                    subject = statistics.get(site.name)
                    growth = solve(subject or site, solver, asked[site], model, generator)
                    seen = (None, None) if subject is None else (gradient_energy(subject), subject.samples)
                    answer.append((growth, *seen))
                return answer

            solved = from_first(solve_all, device)
    return [
        Proposal(site, growth, energy, *channel_cost(site, cost), samples)
        for site, (growth, energy, samples) in zip(sites, solved, strict=True)
    ]


def _collected(
    model: nn.Module,
    solver: Solver,
    sites: Sequence[GrowthSite],
    asked: Mapping[GrowthSite, Channels],
    batches: Sequence[Batch],
    loss: Loss,
    collection: Collection,
    generator: torch.Generator,
) -> Found:
    """Statistics over all processes: of all batches, or of as many as make the gains known."""
    error = collection.relative_error
    reads = solver.reads | (set() if error is None else {"samples"})
    keep = {"keep_samples": KEEP_SAMPLES} if "samples" in reads else {}
    settings = {"quantities": reads, **keep, **collection.options}

    def collect(part: Sequence[Batch]) -> Found:
        own = collect_statistics(model, sites, part, loss, run=agreed, average=reduce_statistics, **settings)
        return reduce_statistics(own)

    if error is None:
        return collect(batches)
    wanted: dict[GrowthSite, Channels] = {site: asked[site] for site in sites}
    device = next(model.parameters()).device

    def known(found: Found) -> bool:
        return from_first(lambda: gains_known(found, wanted, solver, error, model, generator), device)

    return until_known(collect, batches, known)


def what_was_seen(growth: ChannelGrowth, solver: Solver, proposal: Proposal) -> dict[str, Any]:
    """What a report shows of a proposal besides its gains, as JSON-able values.

    Args:
        growth: what was taken of the proposal.
        solver: the method.
        proposal: the proposal.

    Returns:
        `spectrum`, the gains of all candidates, where there were more than were taken; `captured_energy`, the share of
        ‖v‖²/n that the channels capture, where the method's gains are energies; `samples`, how many the statistics
        were collected on.
    """
    shown: dict[str, Any] = {}
    if growth.spectrum is not None:
        shown["spectrum"] = growth.spectrum.tolist()
    if solver.energy_gains and proposal.gradient_energy:
        shown["captured_energy"] = float(growth.gains.sum()) / proposal.gradient_energy
    if proposal.samples is not None:
        shown["samples"] = proposal.samples
    return shown


def gradient_energy(statistics: PairStatistics) -> float:
    """‖v‖²/n summed over the readers of a site."""
    return float(sum(reader.gradient_energy for reader in statistics.readers))


def channel_cost(site: GrowthSite, cost: ModelCost) -> tuple[float | int, float | int]:
    """Parameters, and FLOPs of one sample's forward pass, that one more channel costs at the site's present shapes.

    Args:
        site: where.
        cost: the model's cost meter.

    Returns:
        (parameters, flops) per channel.
    """
    if isinstance(site, RankSite):
        parameters = plan_size(site, 1) if site.width < site.bound else 0
        return parameters, cost.layer(site.path, parameters)
    flops = 0.0
    for binding in site.bindings:
        if binding.role in SLOTS:
            module = site.model.get_submodule(binding.path)
            slot = SLOTS[binding.role](module)[0]
            weight = effective_weight(module) if slot.name == "weight" else module.get_parameter(slot.name)
            entries = sum(part.ratio for part in binding.layout if part.space.root() is site.space)
            flops += cost.layer(binding.path, float(entries) * weight.numel() / weight.shape[slot.axis])
    return plan_size(site, site.granularity) / site.granularity, flops


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
