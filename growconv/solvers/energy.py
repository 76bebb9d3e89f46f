"""The yardstick of every solver, through the real activation: captured energy and first-order decrease."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from growconv.errors import SolverError, StatisticsError
from growconv.network.proposal import ChannelGrowth
from growconv.network.seats import Inserted
from growconv.network.site import GrowthSite
from growconv.statistics import KeptSamples, PairStatistics, collect_statistics
from growconv.statistics.samples import KeptPass, Maps

ALL = 2**62
"""More samples than there are."""


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
    """Share of the expressivity bottleneck that new channels take away: ⟨v⊥, δz⟩² / (‖δz‖² ‖v⊥‖²).

    δz is what the new channels add to the consumers' outputs, through the model's own operations in between; its best
    single scale is taken. Measure it on samples that the solver did not see. Inputs and gradients of the site's layers
    are held in memory for all samples.

    Args:
        model: the model that the site belongs to; not changed.
        site: where.
        growth: the proposal.
        batches: (inputs, targets) pairs.
        loss: loss(output, targets).
        statistics: whose W* defines v⊥ = v − W*·Hp, usually those that the solver read; None takes the best update for
            these very batches.
        **options: of `collect_statistics`.

    Returns:
        Between 0 and 1; 0 for a proposal that would raise the loss, or where there is nothing to gain.
    """
    if growth.channels == 0:
        return 0.0
    collected = collect_statistics(model, [site], batches, loss, quantities={"samples"}, keep_samples=ALL, **options)
    kept = require_samples(collected[site.name], "captured_energy")
    if statistics is not None and all(each.best_update is not None for each in statistics.consumers):
        kept = replace(kept, consumers={each.consumer: each for each in statistics.consumers})
    agreement, size, energy = 0.0, 0.0, 0.0
    for piece in _pieces(kept.projected()):
        for path, calls in added_outputs(growth, piece).items():
            for delta, target in zip(calls, piece.v[path], strict=True):
                agreement += float((target.double() * delta).sum())
                size += float(delta.double().square().sum())
                energy += float(target.double().square().sum())
    return agreement**2 / (size * energy) if agreement > 0 and size > 0 and energy > 0 else 0.0


def expected_decrease(subject: PairStatistics, growth: ChannelGrowth) -> float | None:
    """First-order decrease of the mean loss at amplitude 1: ⟨v, δz⟩ / n (MATH: L(γ) = L(0) − γ⟨v, δz⟩/n + o(γ)).

    Args:
        subject: statistics of the site. Kept samples put the real activation into δz; without them δz is taken as
            linear, ⟨N_raw, Θ⟩.
        growth: the proposal.

    Returns:
        The decrease, negative for a proposal that raises the loss; None where the statistics do not tell.
    """
    if growth.channels == 0:
        return 0.0
    kept = subject.samples_kept
    if kept is not None and len(kept):
        total = 0.0
        for piece in _pieces(kept):
            for path, calls in added_outputs(growth, piece).items():
                for delta, wanted in zip(calls, piece.v[path], strict=True):
                    total += float((wanted * delta).sum(dtype=torch.float64))
        return total / len(kept)
    if not subject.growth_site.closed_form or any(each.N_raw is None for each in subject.consumers):
        return None
    weight, bias = growth.incoming[subject.producer], growth.incoming_bias.get(subject.producer)
    left = weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)
    total = 0.0
    for each in subject.consumers:
        raw = torch.as_tensor(each.N_raw)
        right = growth.outgoing[each.consumer].flatten(1).unflatten(1, (growth.channels, -1)).to(raw)
        total += float(torch.einsum("ka,abc,ckb->", left.to(raw), raw, right))
    return total


def require_samples(subject: PairStatistics, what: str, least: int = 1) -> KeptSamples:
    """The kept samples, or an error that says how to keep them.

    Args:
        subject: the statistics.
        what: who asks, for the message.
        least: how many are needed.

    Raises:
        StatisticsError: no samples, or fewer.
    """
    kept = subject.samples_kept
    if kept is None or len(kept) < max(least, 1):
        raise StatisticsError(
            f"{what} needs kept samples",
            expected=f"at least {least}",
            got="none" if kept is None else len(kept),
            where=subject.site,
            fix="collect with keep_samples=512, say, on a model whose own forward is called",
        )
    return kept


def inserted_by(growth: ChannelGrowth, site: GrowthSite) -> Inserted:
    """What surgery will put between producers and consumers for a proposal."""
    copied = growth.copied_from
    if copied is not None and bool((copied < 0).any()):
        raise SolverError(
            "a proposal of new channels and halves of old ones has no δz: it changes old weights",
            got=growth.method,
            where=site.name,
            fix="compare the loss before and after growing",
        )
    units = None if copied is None else copied[:: site.granularity] // site.granularity
    return Inserted(growth.norms, growth.norm_scale, growth.carried, units)


@torch.no_grad()
def added_outputs(growth: ChannelGrowth, piece: KeptPass) -> Maps:
    """What new channels at amplitude 1 add to each consumer's output, per call, on one piece of the samples."""
    read = piece.read(growth.incoming, growth.incoming_bias, inserted_by(growth, piece.region.site))
    return piece.added(read, growth.outgoing)


def _pieces(kept: KeptSamples) -> Iterable[KeptPass]:
    first = kept.passes[0]
    entries = sum(each.numel() for maps in (first.x, first.v) for calls in maps.values() for each in calls)
    return kept.pieces(entries // max(first.samples, 1), 2**25)
