"""One round of growth or pruning: from growth batches to proposals, and which of them go into the model."""

import math
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from growconv.errors import ArgumentTypeError, ScheduleError
from growconv.growth.amplitude import AmplitudeChoice, choose_amplitudes, mean_loss, rescaled
from growconv.growth.cost import ModelCost, batch_size
from growconv.growth.decision import Batch, Loss, Proposal
from growconv.growth.distributed import agreed, from_first, reduce_statistics, summed, world_size
from growconv.growth.pruning import PruneBack
from growconv.network.event import GrowthEvent, Optimizers, grow, shrink
from growconv.network.model import undisturbed
from growconv.network.optimizer import Journal
from growconv.network.plan import plan_size
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite, Site
from growconv.solvers.assembly import require_statistics
from growconv.solvers.base import Channels, Solver, solve, solver_of
from growconv.solvers.energy import Found, gains_known, until_known
from growconv.solvers.gradmax import gradmax
from growconv.statistics.accumulator import OF_PRODUCERS, SCRATCH_BYTES
from growconv.statistics.collect import collect_statistics
from growconv.statistics.pair import Updates, best_updates
from growconv.statistics.problem import widest_of

ROOM_BYTES = 2**23
"""What statistics and samples may take in any case. Beyond this, and beyond half of what a training step holds, sites
are collected and solved in several parts, each from its own passes over the batches."""

Answer = tuple[ChannelGrowth, float | None, int | None, Tensor | None]
"""What a site is offered, ‖v‖²/n there, the samples behind it, and `Proposal.slopes`."""

PHASES = ("collect", "solve", "amplitude", "surgery")

Needs = Sequence[Mapping[tuple[str, str], float]]
"""Per site the bytes of what it needs, by names; what several sites need has the same names at each."""


def parts_of(
    sites: Sequence[Site], cost: ModelCost, reads: Set[str], kept: int, batches: Sequence[Batch], apart: bool = False
) -> tuple[list[list[list[int]]], int]:
    """Sites in parts whose statistics leave a round's memory near that of a training step.

    What several sites of a part read of a layer is kept once.

    Args:
        sites: in order.
        cost: knows the sizes of their maps.
        reads: the statistics that are collected.
        kept: samples that are kept for a site, where `reads` has them.
        batches: one of them stands for a training batch.
        apart: whether samples may come from passes of their own, over as many batches as they take, once the averages
            of a part are known. They do where that takes fewer passes.

    Returns:
        For each part the indices of its sites, in portions whose samples are kept at a time, and how many bytes of
        batches may be held until W* is known: 0 where there is no room for all of them, 1 where all are kept samples,
        which are held anyway.
    """
    sizes = list(accumulate((batch_size(inputs) for inputs, _ in batches), initial=0))
    kept = min(kept, sizes[-1]) if "samples" in reads else 0
    room = max(cost.activations() * sizes[1] / 2, ROOM_BYTES)
    every = range(len(sites))
    maps = [cost.maps(site) for site in sites]
    held = [{key: kept * size for key, size in own.items()} for own in maps]
    projected = [moment_bytes(site, reads | ({"update"} if "N" in reads else set())) for site in sites]
    moments = _total(projected)
    if moments + (sizes[-1] * _total(maps) if "N" in reads else _total(held)) <= room:
        return [[list(every)]], int(room - moments)
    own = projected if kept >= sizes[-1] else [moment_bytes(site, reads) for site in sites]
    joint = [[part] for part in _packed(every, [one | other for one, other in zip(own, held, strict=True)], room)]
    if not apart or kept >= sizes[-1]:
        return joint, int(kept >= sizes[-1])
    parts = [_portions(part, own, held, room) for part in _packed(every, own, room)]
    first = bisect_left(sizes, kept)  # batches that samples take
    passes = sum(len(batches) + (first * len(part) if len(part) > 1 else 0) for part in parts)
    return (parts if passes < len(joint) * len(batches) else joint), 0


def _portions(part: Sequence[int], moments: Needs, held: Needs, room: float) -> list[list[int]]:
    """A part's sites in portions: beside their samples lie the averages of all that are still to be solved."""
    portions, left = list[list[int]](), sorted(part, key=lambda index: sum(held[index].values()))
    while left:
        portion = _packed(left, held, room - _total(moments, left))[0]
        portions.append(portion)
        left = [index for index in left if index not in portion]
    return portions


def _packed(indices: Iterable[int], sizes: Needs, room: float) -> list[list[int]]:
    """Indices in parts, each in the first that has room for what it needs; one that fits nowhere is alone."""
    parts: list[list[int]] = []
    for index in indices:
        part = next((part for part in parts if _total(sizes, [*part, index]) <= room), None)
        if part is None:
            parts.append([index])
        else:
            part.append(index)
    return parts


def _total(sizes: Needs, indices: Sequence[int] | None = None) -> float:
    """Bytes of what some sites need; None: all of them."""
    chosen = sizes if indices is None else [sizes[index] for index in indices]
    return math.fsum({name: size for each in chosen for name, size in each.items()}.values())


def moment_bytes(site: Site, reads: Set[str]) -> dict[tuple[str, str], float]:
    """What the averages of a site that are read take, in float64; one without closed form has none.

    Returns:
        Bytes by layer or site and statistic. M, S2 and W* are a layer's own, and the same at each of its sites.
    """
    if not site.closed_form:
        return {}
    site = site.measured
    patch = sum(site.layer(path).filters()[0].numel() + 1 for path in site.producers)
    found = {(site.name, "patch"): patch**2} if "patch" in reads else {}
    producers, widest = Counter(route.consumer for route in site.routes), widest_of(site)
    for path in site.consumers:
        second = site.layer(path).filters()
        own, taps = second[0].numel() + 1, second[0, 0].numel()
        full = (patch * taps) ** 2
        sizes = {"S": patch**2, "N_raw": patch * taps * len(second), "S_full": full if 8 * full <= SCRATCH_BYTES else 0}
        sizes["N"] = sizes["N_raw"]
        if widest[path] != path and producers[path] == producers[widest[path]]:
            sizes |= dict.fromkeys(OF_PRODUCERS, 0)  # the very tensors of the other
        found |= {(f"{site.name}, {path}", name): size for name, size in sizes.items() if name in reads}
        sizes = {"M": own * len(second), "S2": own**2, "N": own * len(second)}  # W*, which N takes, is as large as M
        sizes["update"] = sizes["M"] + sizes["S2"]
        found |= {(path, name): size for name, size in sizes.items() if name in reads}
    return {name: 8.0 * entries for name, entries in found.items()}


def divided(batches: Iterable[Any], held_out: float) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """Growth batches for the statistics, and a share of them held out for the amplitude: one at least, unless 0."""
    data = list(batches)
    if not data:
        raise ScheduleError("no growth batches", expected="at least one (inputs, targets) pair", where="grow")
    for index, batch in enumerate(data):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ArgumentTypeError(
                "a growth batch must be a pair",
                expected="(inputs, targets)",
                got=type(batch).__name__,
                where=f"growth batch {index}",
                fix="if the model computes its own loss: ({'name': value}, None) and loss=lambda out, _: out.loss",
            )
    if held_out and len(data) < 2:
        raise ScheduleError(
            "the amplitude needs samples that the solver has not seen",
            expected="at least two growth batches",
            got=f"{len(data)}",
            where="GrowthScheduler.grow",
            fix="pass more batches, or give the scheduler a fixed amplitude such as amplitude=1.0",
        )
    pairs = [(inputs, targets) for inputs, targets in data]
    count = min(len(pairs) - 1, max(1, round(held_out * len(pairs)))) if held_out else 0
    return pairs[: len(pairs) - count], pairs[len(pairs) - count :]


@dataclass
class Round:
    """One round: proposals are asked for, taken and put into the model; or channels are pruned."""

    model: nn.Module  # the raw model
    optimizer: Optimizers  # its optimizer, a list of them, or None
    solver: Solver  # the growth method
    amplitude: float  # of new channels whose amplitude is not searched
    amplitude_cap: float | None  # how far the search may go, see `choose_amplitudes`
    statistics: Mapping[str, Any]  # further options of `collect_statistics`
    # collect only until the sum of the gains is known this well at every site; None: all batches
    relative_error: float | None
    slopes: bool  # measure the slopes of proposals too; every site has closed-form statistics then
    fitting: Sequence[Batch]  # growth batches of this process that statistics are collected on
    held_out: Sequence[Batch]  # those that the amplitude is chosen on; none: it is not searched
    loss: Loss  # loss(output, targets)
    cost: ModelCost  # the model's cost meter
    generator: torch.Generator  # randomness of methods that draw
    step: int  # the training step
    maximum: int | None  # channels that a site may get; None: as many as asked for
    room: Callable[[], tuple[float, float]]  # gives the parameters and FLOPs that may still be added
    note: Callable[[str], None]  # takes one line about each decision
    # wall-clock seconds so far by phase, device work included
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    events: list[GrowthEvent] = field(default_factory=list)  # what was changed so far

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda device: None
        wait(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            wait(self.device)
            self.seconds[name] += time.perf_counter() - start

    def ask(self, sites: Mapping[Site, Channels]) -> list[Proposal]:
        """Proposals for some sites, each with how many channels are wanted; with several processes the same on each.

        The model is as before afterwards.
        """
        groups: dict[str | None, dict[Site, Channels]] = {}
        for site, channels in sites.items():
            if site.room is not None:  # such a site cannot say by itself
                channels = min(1 if channels == "auto" else channels, site.room)
            if channels:
                groups.setdefault(site.own_method, {})[site] = channels
        answers: dict[Site, Answer] = {}
        with undisturbed(self.model):
            for asked in groups.values():
                answers |= self._answers(solver_of(next(iter(asked)), self.solver), asked)
        return [
            Proposal(site, growth, energy, *self.cost.channel(site), samples, slopes)
            for site, (growth, energy, samples, slopes) in ((site, answers[site]) for site in sites if site in answers)
        ]

    def _answers(self, solver: Solver, sites: Mapping[Site, Channels]) -> dict[Site, Answer]:
        """What a method offers each of the sites that it serves."""
        reads, kept = solver.reads, self.statistics.get("keep_samples", solver.keep_samples)
        if solver is self.solver:  # not the own method of these sites
            reads |= set() if self.relative_error is None else {"samples"}
            reads |= {"N_raw"} if self.slopes else set()
        listed, answers = list(sites), dict[Site, Answer]()
        apart = {"N", "samples"} <= reads and self._are_apart(solver)
        parts, hold = from_first(partial(parts_of, listed, self.cost, reads, kept, self.fitting, apart), self.device)
        hold = hold if world_size() == 1 else 0
        projects = "N" in reads and not hold
        updates = cache(partial(self._best_updates, listed)) if projects else lambda count: Updates()
        options: dict[str, Any] = {"hold_bytes": hold}
        if projects and sum(map(len, parts)) > 1:
            options["keep_dtype"] = self._keep_dtype(solver, sites.values())
        for part in parts:
            found: Found = {}  # those of the part before are gone now
            several = len(part) > 1
            asked: dict[Site, Channels] = {listed[index]: sites[listed[index]] for portion in part for index in portion}
            if reads:
                with self.phase("collect"):
                    wanted = {"quantities": reads - ({"samples"} if several else set()), **options}
                    found = self._collected(solver, asked, wanted, updates)
            for portion in part:
                asked = {listed[index]: sites[listed[index]] for index in portion}
                if several:
                    with self.phase("collect"):
                        found |= self._with_samples(solver, asked, found, options)
                with self.phase("solve"):
                    offered = from_first(partial(self._solved, solver, asked, found), self.device)
                    answers |= zip(asked, offered, strict=True)
                for site in asked:
                    found.pop(site.name, None)
        return answers

    def _are_apart(self, solver: Solver) -> bool:
        """Whether samples may come from passes of their own: who judges gains reads them together with the averages."""
        judged = solver is self.solver and self.relative_error is not None
        return not judged and self.statistics.get("nonfinite") != "skip" and "quantities" not in self.statistics

    def _with_samples(self, solver: Solver, asked: Iterable[Site], found: Found, options: Mapping[str, Any]) -> Found:
        """Statistics of some sites with kept samples, over all processes, from as many batches as these take."""
        kept = self.statistics.get("keep_samples", solver.keep_samples)
        sizes = list(accumulate((batch_size(inputs) for inputs, _ in self.fitting), initial=0))
        batches = self.fitting[: bisect_left(sizes, kept)]
        settings = {**options, **self._further("full"), "quantities": frozenset({"samples"}), "keep_samples": kept}
        samples = self._statistics(asked, batches, settings)
        return {name: found[name].with_samples(each.samples_kept) for name, each in samples.items()}

    def _further(self, *left_out: str) -> dict[str, Any]:
        """The user's options of the collection, without some."""
        return {name: value for name, value in self.statistics.items() if name not in left_out}

    def _keep_dtype(self, solver: Solver, channels: Iterable[Channels]) -> torch.dtype | None:
        """The short type of kept samples where memory is short; None where gains are judged on them, or in float64."""
        judged = self.relative_error is not None or "auto" in channels
        return None if judged or next(self.model.parameters()).dtype == torch.float64 else solver.keep_dtype

    def _statistics(self, sites: Iterable[Site], batches: Sequence[Batch], settings: Mapping[str, Any]) -> Found:
        """Statistics of some batches over all processes."""
        options = {"run": agreed, "average": reduce_statistics, **settings}
        return reduce_statistics(collect_statistics(self.model, sites, batches, self.loss, **options))

    def _best_updates(self, sites: Sequence[Site], count: int) -> Updates:
        """W* of all consumers from the first growth batches: with these each part of the sites takes a single pass."""
        reads, updates = frozenset({"update"}), Updates()
        options = self._further("keep_samples", "quantities", "full", "hold_bytes")
        for (part,) in from_first(partial(parts_of, sites, self.cost, reads, 0, self.fitting), self.device)[0]:
            asked = [sites[index] for index in part]
            found = self._statistics(asked, self.fitting[:count], {"quantities": reads, "hold_bytes": 0, **options})
            updates |= from_first(partial(best_updates, found), self.device)
        return updates

    def _collected(
        self,
        solver: Solver,
        asked: Mapping[Site, Channels],
        settings: Mapping[str, Any],
        updates: Callable[[int], Updates],
    ) -> Found:
        """Statistics over all processes: of all batches, or of as many as make the gains known."""
        model, error = self.model, self.relative_error
        if "samples" in settings["quantities"]:
            settings = {**settings, "keep_samples": solver.keep_samples, **self.statistics}
        else:
            settings = {**settings, **self._further("keep_samples")}

        def collect(batches: Sequence[Batch]) -> Found:
            return self._statistics(asked, batches, {**settings, "updates": updates(len(batches))})

        if error is None or solver is not self.solver:
            return collect(self.fitting)
        pairs = cast(Mapping[GrowthSite, Channels], asked)

        def known(found: Found) -> bool:
            return from_first(lambda: gains_known(found, pairs, solver, error, model, self.generator), self.device)

        return until_known(collect, self.fitting, known)

    def _solved(self, solver: Solver, asked: Mapping[Site, Channels], statistics: Found) -> list[Answer]:
        """What a method offers each site, on these statistics."""
        answers: list[Answer] = []
        for site, channels in asked.items():
            given = statistics.get(site.name) if solver.reads else None
            growth = solve(given or site, solver, channels, self.model, self.generator)
            slopes = None
            if self.slopes and solver is self.solver:  # zeros for channels beyond the rank of N_raw
                raw = torch.cat([each.flatten(1) for each in require_statistics(statistics[site.name], "N_raw")], 1)
                slopes = gradmax(raw[:, None], max(1, growth.channels)).gains[: growth.channels]
                slopes = nn.functional.pad(slopes, (0, growth.channels - len(slopes)))
            energy, samples = (None, None) if given is None else (given.gradient_energy, given.samples)
            answers.append((growth, energy, samples, slopes))
        return answers

    def decrease(self, proposal: Proposal) -> float:
        """How much a proposal alone lowers the held-out loss; the model is as before afterwards."""
        site, growth = proposal.site, rescaled(proposal.site, proposal.growth)
        with self.phase("amplitude"), undisturbed(self.model):
            if self._is_searched(proposal):
                before, after = self._choice([(site, growth)]).held_out
                return before - after
            before = self._held_out_loss()
            journal = Journal(self.model, values=[*self.model.parameters(), *self.model.buffers()])
            try:
                grow(self.model, site, growth)
                return before - self._held_out_loss()
            finally:
                journal.restore()

    def take(self, chosen: Sequence[tuple[Proposal, str]]) -> None:
        """Put proposals into the model, as far as there is room.

        The amplitudes of all whose amplitude is searched are chosen together. Others come first: they change old
        weights, and what others do is measured on the model as it is then. Each has the reason why it was chosen.
        """
        first, searched, others = len(self.events), [], []
        for each in chosen:
            (searched if self._is_searched(each[0]) else others).append(each)
        self._take_as_they_are(others)
        if searched:
            self._take_at_best(searched)
        for event in self.events[first:]:
            self.note(str(event))

    def _is_searched(self, proposal: Proposal) -> bool:
        """Whether an amplitude is chosen: new weights that belong together with changes of old ones have none."""
        growth = proposal.growth
        return bool(self.held_out) and not growth.revised and growth.copied_from is None and not self._silent(proposal)

    def _silent(self, proposal: Proposal) -> bool:
        """Whether the new channels change no output at first."""
        return solver_of(proposal.site, self.solver).function_preserving

    def _take_as_they_are(self, chosen: Sequence[tuple[Proposal, str]]) -> None:
        first = len(self.events)
        measured = bool(self.held_out) and not all(self._silent(proposal) for proposal, _ in chosen)
        with self.phase("amplitude"):
            before = self._held_out_loss() if measured else None
        for proposal, reason in chosen:
            growth = self._current(proposal)
            if growth is not None:
                amplitude = 1.0 if growth.revised else self.amplitude
                details = {"unchanged": True} if self._silent(proposal) else {}
                self._put(proposal, rescaled(proposal.site, growth), amplitude, reason, details)
        if before is not None and len(self.events) > first:
            with self.phase("amplitude"):
                after = self._held_out_loss()
            self._tell(first, before, after)

    def _take_at_best(self, chosen: Sequence[tuple[Proposal, str]]) -> None:
        first, taken = len(self.events), []

        def cut() -> Iterator[tuple[Site, ChannelGrowth]]:
            for proposal, reason in chosen:
                growth = self._cut(proposal)
                if growth is not None:
                    taken.append((proposal, reason))
                    yield proposal.site, rescaled(proposal.site, growth)

        with self.phase("amplitude"), undisturbed(self.model):
            choice = self._choice(cut())
        if taken:
            sites = f"{len(taken)} sites" if len(taken) > 1 else taken[0][0].site.name
            self.note(f"{sites}: strength {choice.strength:.3g}, {choice.reason}")
        for (proposal, reason), (_, growth), unit in zip(taken, choice.growths, choice.units, strict=True):
            cap = choice.cap * unit
            details = {
                "losses": sorted([strength * unit, loss] for strength, loss in choice.losses.items()),
                "cap": cap if math.isfinite(cap) else None,
            }
            self._put(proposal, growth, choice.strength * unit, reason, details)
        self._tell(first, *choice.held_out)

    def _put(
        self, proposal: Proposal, growth: ChannelGrowth, amplitude: float, reason: str, details: dict[str, Any]
    ) -> None:
        """Grow; the event also holds what a report shows of the proposal besides its gains, as JSON-able values."""
        with self.phase("surgery"):
            event = grow(self.model, proposal.site, growth, amplitude=amplitude, optimizer=self.optimizer)
        seen: dict[str, Any] = {"samples": proposal.samples, "decrease": proposal.decrease}
        if growth.spectrum is not None:  # the gains of all candidates, where there were more than were taken
            seen["spectrum"] = growth.spectrum.tolist()
        if solver_of(proposal.site, self.solver).gain_unit == "energy" and proposal.gradient_energy:
            seen["captured_energy"] = float(growth.gains.sum()) / proposal.gradient_energy
        if proposal.slopes is not None:
            seen["slopes"] = proposal.slopes[: growth.channels].tolist()
        details |= {name: value for name, value in seen.items() if value is not None}
        told = "; ".join(filter(None, (reason, growth.reason)))
        self.events.append(replace(event, step=self.step, details={**event.details, **details}, reason=told))

    def _choice(self, growths: Iterable[tuple[Site, ChannelGrowth]]) -> AmplitudeChoice:
        return choose_amplitudes(self.model, growths, self.held_out, self._shared_loss, self.amplitude_cap)

    def _held_out_loss(self) -> float:
        return mean_loss(self.model, self.held_out, self._shared_loss)

    def _shared_loss(self, output: Any, targets: Any) -> Tensor:
        """The loss averaged over the processes, so that all of them choose the same amplitude."""
        return summed(self.loss(output, targets)) / world_size()

    def _tell(self, first: int, before: float, after: float) -> None:
        """Enter the held-out loss before and after into the events from `first` on.

        What they have achieved together is shared out by what was predicted of each, or evenly.
        """
        events = self.events[first:]
        predicted = [max(event.predicted_decrease or 0.0, 0.0) for event in events]
        total = sum(predicted)
        for index, (event, own) in enumerate(zip(events, predicted, strict=True), start=first):
            share = own / total if total > 0 else 1 / len(events)
            losses = event.details.get("losses", [[0.0, before], [event.amplitude, after]])
            details = {**event.details, "losses": losses}
            self.events[index] = replace(event, realised_decrease=(before - after) * share, details=details)

    def prune(self, pruning: PruneBack, sites: Sequence[Site]) -> None:
        """Shrink to a pruning policy's budget."""
        prunable = [site for site in sites if isinstance(site, GrowthSite)]
        with self.phase("collect"), undisturbed(self.model):
            chosen = pruning.choose(self.model, prunable, self.cost)
        with self.phase("surgery"):
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
            "the budget of parameters": bisect_right(groups, parameters, key=partial(plan_size, proposal.site)),
            "the budget of FLOPs": bisect_right(groups, flops, key=lambda k: k * flops_per_channel),
            "the maximum of a round": bisect_right(groups, most),
        }
        limit = min(limits, key=limits.__getitem__)
        if limits[limit] == len(groups):
            return growth
        fitting = limits[limit] * size
        if fitting == 0:
            self.note(f"{proposal.site.name}: {limit} has no room for {size} more channel{'s' if size > 1 else ''}")
            return None
        return growth.subset(range(fitting), f"{limit} has room for {fitting} of {growth.channels} channels")
