"""What new channels capture on kept samples: how much, how surely, and how many channels and samples that justifies."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from growconv.errors import ArgumentValueError, SolverError, StatisticsError
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite
from growconv.solvers.assembly import added_outputs, agreements, empty, inserted_by, pulled_back, require_samples
from growconv.solvers.base import Channels, Request, Solver, get_solver
from growconv.statistics import PairStatistics, collect_statistics
from growconv.statistics.pair import without
from growconv.statistics.samples import KeptPass, KeptSamples, Maps, by_sample

Found = dict[str, PairStatistics]
Solve = Callable[[Request], ChannelGrowth]

ALL = 2**62
"""More samples than there are."""
HELD_OUT = 0.5
CONFIDENCE = 2.0


def captured_energy(
    model: nn.Module,
    site: GrowthSite,
    growth: ChannelGrowth,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    *,
    statistics: PairStatistics | None = None,
    **options: Any,
) -> float:
    """Share of the expressivity bottleneck that new channels capture: ⟨v⊥, δz⟩² / (‖δz‖² ‖v⊥‖²).

    δz is what the new channels add to the consumers' outputs, through the model's own operations in between, at its
    best single scale. Measure it on samples that the solver did not see. Inputs and gradients of the site's layers
    are held in memory for all samples.

    Args:
        model: the model that the site belongs to; not changed.
        batches: (inputs, targets) pairs.
        loss: loss(output, targets).
        statistics: their W* defines v⊥ = v − W*·Hp; usually the statistics that the solver read. None takes the best
            update for these very batches.
        **options: options of `collect_statistics`.

    Returns:
        A number between 0 and 1; 0 for a proposal that would raise the loss, or if there is nothing to gain.

    Example:
        >>> growth = growconv.solve(sites[0], "random", channels=2, model=model)
        >>> growconv.captured_energy(model, sites[0], growth, batches, loss) >= 0
        True
    """
    if growth.channels == 0:
        return 0.0
    collected = collect_statistics(model, [site], batches, loss, quantities={"samples"}, keep_samples=ALL, **options)
    kept = require_samples(collected[site.name], "captured_energy")
    if statistics is not None and all(each.best_update is not None for each in statistics.consumers):
        kept = replace(kept, consumers={each.consumer: each for each in statistics.consumers})
    return captured_share(kept.projected(), added_outputs(kept.projected(), growth))


@torch.no_grad()
def captured_share(samples: KeptSamples, added: Iterable[tuple[KeptPass, Maps]]) -> float:
    """⟨v, δz⟩² / (‖δz‖² ‖v‖²) of δz that is added on the samples, piece by piece; 0 where ⟨v, δz⟩ < 0."""
    agreement = size = 0.0
    for piece, changes in added:
        for delta, wanted in piece.beside_v(changes):
            agreement += float((wanted * delta).sum(dtype=torch.float64))
            size += float(delta.square().sum(dtype=torch.float64))
    return agreement**2 / (size * samples.energy) if min(agreement, size, samples.energy) > 0 else 0.0


@torch.no_grad()
def captured_by_sample(subject: PairStatistics, growth: ChannelGrowth) -> Float[Tensor, "n k"]:
    """⟨v⊥, δz_k⟩ of every kept sample; δz_k is what channel k alone adds to the consumers, summed over consumers.

    Norm layers get the proposal's moments, or those that are measured where it has none.
    """
    kept = require_samples(subject, growth.method)
    inserted, projected, rows = inserted_by(growth, kept, measured=True), kept.projected(), []
    for batch in projected.batches:
        row = torch.zeros(batch.samples, growth.channels, dtype=torch.float64, device=kept.like.device)
        for piece in batch.passes:
            read = piece.read(growth.incoming, growth.incoming_bias, inserted)
            for each in agreements(piece, read, pulled_back(piece, read, growth.outgoing), growth.channels):
                row += by_sample(each, batch.samples)
        rows.append(row)
    return torch.cat(rows)


@dataclass(frozen=True, eq=False)
class MeasuredGains:
    """First-order gain of every channel on samples, with the standard error of its mean.

    Attributes:
        gains: (k,) mean of ⟨v⊥, δz_k⟩ over the samples, through the real activation.
        errors: (k,) its standard error.
        samples: number of samples.
    """

    gains: Float[Tensor, " k"]
    errors: Float[Tensor, " k"]
    samples: int

    @property
    def relative_error(self) -> float:
        """Error of the summed gains (channels taken as independent) over that sum; infinite if the sum is no gain."""
        total = float(self.gains.sum())
        return float(self.errors.square().sum().sqrt()) / total if total > 0 else float("inf")

    def __str__(self) -> str:
        """One channel a line."""
        lines = [f"gains on {self.samples} samples"]
        pairs = zip(self.gains.tolist(), self.errors.tolist(), strict=True)
        lines += [f"  {channel}: {gain:.3g} ± {error:.1g}" for channel, (gain, error) in enumerate(pairs)]
        return "\n".join(lines)


def measure_gains(subject: PairStatistics, growth: ChannelGrowth) -> MeasuredGains:
    """Gains of a proposal on the kept samples, with error bars; unbiased where the solver has not seen these samples.

    Raises:
        StatisticsError: fewer than two samples were kept.
    """
    kept = require_samples(subject, "an error bar", least=2)
    captured = captured_by_sample(subject, growth)
    return MeasuredGains(captured.mean(0), captured.std(0) / len(kept) ** 0.5, len(kept))


def held_out_gains(solve: Solve, request: Request) -> tuple[ChannelGrowth, MeasuredGains]:
    """What a solver proposes without half of the kept samples, and its gains on those.

    Raises:
        StatisticsError: fewer than four samples were kept, or none are left to solve on.
    """
    subject = request.subject
    fitting, held_out = require_samples(subject, "a held-out gain", least=4).split(1 - HELD_OUT)
    rest = without(subject, held_out, fitting)
    proposal = solve(replace(request, statistics=rest))
    return proposal, measure_gains(replace(rest, samples_kept=held_out), proposal)


def worthwhile(solve: Solve, request: Request) -> ChannelGrowth:
    """As many channels as hold their gain on samples that the solver has not seen.

    The solver proposes up to as many channels as there are (at least 8), and those whose held-out gain is above two
    error bars are counted. The solver is then asked for that number on all samples; the reason says how many held.
    """
    site = request.site
    most = site.growable_channels(max(8, site.width))
    candidates, measured = held_out_gains(solve, replace(request, channels=most))
    if candidates.channels == 0:
        return candidates
    count = int((measured.gains > CONFIDENCE * measured.errors).sum()) // site.granularity * site.granularity
    why = (
        f"{count} of {candidates.channels} gains exceed {CONFIDENCE:g} error bars "
        f"on {measured.samples} held-out samples"
    )
    asked = replace(request, channels=count)
    return replace(solve(asked), reason=why) if count else empty(asked, candidates.method, why)


def collect_until_known(
    model: nn.Module,
    asked: Mapping[GrowthSite, Channels],
    batches: Iterable[tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor],
    method: str | Solver = "tiny",
    relative_error: float = 0.1,
    keep_samples: int = 512,
    **options: Any,
) -> Found:
    """Statistics of as many batches as it takes to know the gains to within a relative error (samples="auto").

    See `until_known` for the rounds, `gains_known` for the criterion.

    Args:
        model: the model that the sites belong to.
        asked: number of channels that will be requested from the solver, by site.
        batches: (input, target) pairs, read only as far as needed.
        loss: loss(output, target), a mean over samples.
        method: the solver whose gains are to be known; it must work on statistics of pairs.
        relative_error: standard error of the summed gains over their sum, at every site.
        keep_samples: how many samples to keep per site; half of them judge what the others propose.
        **options: options of `collect_statistics`.

    Returns:
        Statistics by site name; `samples` says how many it took.

    Raises:
        ArgumentValueError: a relative error that is not positive.
        SolverError: a site or a method without such statistics.
        StatisticsError: no batches.
    """
    if not relative_error > 0:
        raise ArgumentValueError(
            "the relative error must be positive", expected="> 0", got=relative_error, where="relative_error"
        )
    solver = get_solver(method)
    require_known_gains(solver, asked)
    settings = {"quantities": solver.reads | {"samples"}, "keep_samples": keep_samples, **options}
    return until_known(
        lambda part: collect_statistics(model, asked, part, loss, **settings),
        batches,
        lambda found: gains_known(found, asked, solver, relative_error, model),
    )


def require_known_gains(solver: Solver, sites: Iterable[GrowthSite]) -> None:
    """Refuse what has no gains that more samples would make known.

    Raises:
        SolverError: a method without statistics of pairs, or a site without closed form.
    """
    if solver.gain_unit != "energy":
        raise SolverError(
            "this method has no gains to estimate from samples",
            expected="a method on the statistics of pairs, such as tiny, exact or functional",
            got=solver.name,
            where='samples="auto"',
        )
    for site in sites:
        if not site.closed_form:
            raise SolverError(
                'samples="auto" judges gains on the statistics of one producer and its consumers',
                got=site.no_closed_form,
                where=site.name,
                fix="give a number of samples for this site",
            )


def until_known(
    collect: Callable[[list[Any]], Found], batches: Iterable[tuple[Any, Any]], known: Callable[[Found], bool]
) -> Found:
    """Collect from 1, 2, 4, 8, … batches until the statistics are enough (`known`) or there are no more batches.

    Every round starts anew, since statistics that took a second pass cannot be added up; all rounds together read at
    most twice the batches of the last.

    Raises:
        StatisticsError: no batches.
    """
    source, used = iter(batches), []
    found: Found = {}
    while fresh := list(islice(source, max(1, len(used)))):
        used += fresh
        found = collect(used)
        if known(found):
            break
    if not used:
        raise StatisticsError("there were no batches", fix="pass at least one (input, target) pair")
    return found


def gains_known(
    statistics: Found,
    asked: Mapping[GrowthSite, Channels],
    solver: Solver,
    relative_error: float,
    model: nn.Module,
    generator: torch.Generator | None = None,
) -> bool:
    """Whether the sum of the gains is known to a relative error at every site.

    Half of the kept samples are taken out of the statistics; what the solver proposes from the rest is measured on
    them, through the real activation. Their spread gives the error of an average over all samples. "auto" channels
    stand for 8.
    """
    for site, channels in asked.items():
        subject = statistics[site.name]
        count = site.growable_channels(8) if channels == "auto" else site.growable_channels(channels)
        if subject.samples_kept is None or len(subject.samples_kept) < 4:
            return False
        proposal, measured = held_out_gains(solver.solve, Request(site.of(model), count, subject, generator))
        if proposal.channels and measured.relative_error * (measured.samples / subject.samples) ** 0.5 > relative_error:
            return False
    return True
