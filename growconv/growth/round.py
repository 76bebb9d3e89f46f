"""One round of growth or pruning: what it works with, and what it has changed so far."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn

from growconv.growth.amplitude import choose_amplitude, losses_of, rescaled
from growconv.growth.cost import ModelCost
from growconv.growth.decision import Batch, Loss, Proposal
from growconv.growth.distributed import mean_over_ranks, world_size
from growconv.growth.proposing import Collection, Stopwatch, propose
from growconv.growth.pruning import PruneBack, norm_scores
from growconv.network.apply import grow, shrink
from growconv.network.event import GrowthEvent, Optimizers
from growconv.network.model import undisturbed
from growconv.network.plan import plan_size
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite, Site
from growconv.solvers.base import Channels, Solver


@dataclass
class Round:
    """One round: proposals are asked for, taken one by one and put into the model; or channels are pruned.

    Attributes:
        model: the raw model.
        optimizer: its optimizer, a list of them, or None.
        solver: the growth method.
        amplitude: of new channels whose amplitude is not searched.
        collection: how statistics are collected.
        fitting: growth batches of this process that statistics are collected on.
        held_out: those that the amplitude is chosen on; none: it is not searched.
        amplitude_cap: how far the search may go, see `choose_amplitude`.
        loss: loss(output, targets).
        cost: the model's cost meter.
        generator: randomness of methods that draw.
        step: the training step.
        maximum: channels that a site may get; None: as many as asked for.
        room: gives the parameters and FLOPs that may still be added.
        note: takes one line about each decision.
        stopwatch: of the phases.
        events: what was changed so far.
    """

    model: nn.Module
    optimizer: Optimizers
    solver: Solver
    amplitude: float
    collection: Collection
    fitting: Sequence[Batch]
    held_out: Sequence[Batch]
    amplitude_cap: float | None
    loss: Loss
    cost: ModelCost
    generator: torch.Generator
    step: int
    maximum: int | None
    room: Callable[[], tuple[float, float]]
    note: Callable[[str], None]
    stopwatch: Stopwatch
    events: list[GrowthEvent] = field(default_factory=list)

    def ask(self, sites: Mapping[Site, Channels]) -> list[Proposal]:
        """Proposals for some sites, each with how many channels are wanted."""
        return propose(
            self.model,
            self.solver,
            sites,
            self.fitting,
            self.loss,
            self.cost,
            self.stopwatch,
            self.generator,
            self.collection,
        )

    def take(self, proposal: Proposal, reason: str) -> None:
        """Put a proposal into the model, as far as there is room.

        Args:
            proposal: of this round; the site's neighbours may have grown since.
            reason: why it was chosen.
        """
        growth = self._current(proposal)
        if growth is not None:
            event = self._applied(proposal.site, growth, reason)
            shown = what_was_seen(growth, self.solver, proposal)
            self.events.append(replace(event, details={**event.details, **shown}))

    def prune(self, pruning: PruneBack, sites: Sequence[Site]) -> None:
        """Shrink to a pruning policy's budget."""
        prunable = [cast(GrowthSite, site) for site in sites if site.own_method is None]
        with self.stopwatch.phase("collect"), undisturbed(self.model):
            chosen = pruning.choose(self.model, prunable, {site: norm_scores(site) for site in prunable}, self.cost)
        with self.stopwatch.phase("surgery"):
            for site, channels in chosen.items():
                event = shrink(self.model, site, channels, optimizer=self.optimizer)
                self.events.append(replace(event, step=self.step, reason="pruned back by norm"))
                self.note(str(self.events[-1]))

    def _current(self, proposal: Proposal) -> ChannelGrowth | None:
        """The proposal as it can be applied now; None where the budget has no room for a channel.

        A method that changes old weights computed the changes from weights and for a number of channels that may have
        changed since: it is asked again where a neighbour has grown in this round or the budget cut the number.
        """
        growth = self._cut(proposal)
        if growth is not None and growth.revised and (self.events or growth is not proposal.growth):
            growth = self.ask({proposal.site: growth.channels})[0].growth
            if not growth.channels:
                self.note(f"{proposal.site.name}: no channel is worth adding any more, {growth.reason}")
                return None
        return growth

    def _cut(self, proposal: Proposal) -> ChannelGrowth | None:
        """The proposal with as many channels as the maximum and the budget allow now, in whole groups."""
        growth, size = proposal.growth, proposal.site.granularity
        parameters, flops = self.room()
        groups = range(size, growth.channels + 1, size)
        flops_per_channel = self.cost.channel(proposal.site)[1] if flops < float("inf") else 0.0
        most = float("inf") if self.maximum is None else self.maximum
        limits = {
            "the budget of parameters": bisect_right(groups, parameters, key=lambda k: plan_size(proposal.site, k)),
            "the budget of FLOPs": bisect_right(groups, flops, key=lambda k: k * flops_per_channel),
            "the maximum of a round": bisect_right(groups, most),
        }
        limit = min(limits, key=lambda name: limits[name])
        if limits[limit] == len(groups):
            return growth
        fitting = limits[limit] * size
        if fitting == 0:
            self.note(f"{proposal.site.name}: {limit} has no room for {size} more channel{'s' if size > 1 else ''}")
            return None
        return growth.subset(range(fitting), f"{limit} has room for {fitting} of {growth.channels} channels")

    def _applied(self, site: Site, growth: ChannelGrowth, reason: str) -> GrowthEvent:
        growth = rescaled(site, growth)
        with self.stopwatch.phase("amplitude"), undisturbed(self.model):
            amplitude, details = self._measured(site, growth)
        losses = dict(details.get("losses", ()))
        with self.stopwatch.phase("surgery"):
            event = grow(self.model, site, growth, amplitude=amplitude, optimizer=self.optimizer)
        event = replace(
            event,
            step=self.step,
            realised_decrease=losses[0.0] - losses[amplitude] if losses else None,
            details={**event.details, **details},
            reason="; ".join(part for part in (reason, growth.reason) if part),
        )
        self.note(str(event))
        return event

    def _measured(self, site: Site, growth: ChannelGrowth) -> tuple[float, dict[str, Any]]:
        """The amplitude, and what an event tells of it: the held-out loss before and after where it is measured."""
        # new weights that belong together with changes of old ones have no amplitude of their own
        amplitude = 1.0 if growth.revised else self.amplitude
        if self.solver.function_preserving and site.own_method is None:
            return amplitude, {"unchanged": True}
        if not self.held_out:
            return amplitude, {}
        if growth.revised or growth.copied_from is not None:
            losses = losses_of(self.model, site, growth, self.held_out, self._shared_loss())
            return amplitude, {"losses": [[0.0, losses[0]], [amplitude, losses[1]]]}
        cap = self.amplitude_cap
        choice = choose_amplitude(self.model, site, growth, self.held_out, self._shared_loss(), cap)
        self.note(f"{site.name}: amplitude {choice.amplitude:.3g}, {choice.reason}")
        return choice.amplitude, {
            "losses": sorted([list(pair) for pair in choice.losses.items()]),
            "cap": choice.cap if math.isfinite(choice.cap) else None,
        }

    def _shared_loss(self) -> Loss:
        """The loss averaged over the processes, so that all of them choose the same amplitude."""
        if world_size() == 1:
            return self.loss
        return lambda output, targets: mean_over_ranks(self.loss(output, targets))


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
    if solver.gain_unit == "energy" and proposal.gradient_energy:
        shown["captured_energy"] = float(growth.gains.sum()) / proposal.gradient_energy
    if proposal.samples is not None:
        shown["samples"] = proposal.samples
    return shown
