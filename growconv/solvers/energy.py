"""New channels on kept samples, through the real activation: captured energy, first-order decrease, signs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from growconv.errors import SolverError, StatisticsError
from growconv.network.proposal import ChannelGrowth
from growconv.network.seats import Inserted
from growconv.network.site import GrowthSite
from growconv.solvers.weights import scaled
from growconv.statistics.collect import collect_statistics
from growconv.statistics.pair import PairStatistics
from growconv.statistics.samples import KeptPass, KeptSamples, Maps, by_sample

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
    agreement, size, energy = 0.0, 0.0, 0.0
    for piece in _pieces(kept.projected()):
        for delta, target in piece.beside_v(added_outputs(growth, piece)):
            agreement += float((target.double() * delta).sum())
            size += float(delta.double().square().sum())
            energy += float(target.double().square().sum())
    return agreement**2 / (size * energy) if agreement > 0 and size > 0 and energy > 0 else 0.0


def expected_decrease(subject: PairStatistics, growth: ChannelGrowth) -> float | None:
    """First-order decrease of the mean loss at amplitude 1: ⟨v, δz⟩ / n, since L(γ) = L(0) − γ⟨v, δz⟩/n + o(γ).

    Args:
        subject: statistics of the site. With kept samples, δz goes through the real activation; without them, it is
            taken as linear, ⟨N_raw, Θ⟩.

    Returns:
        The decrease, negative for a proposal that raises the loss; None if the statistics do not determine it.
    """
    if growth.channels == 0:
        return 0.0
    kept = subject.samples_kept
    if kept is not None and len(kept):
        total = 0.0
        for piece in _pieces(kept):
            for delta, wanted in piece.beside_v(added_outputs(growth, piece)):
                total += float((wanted * delta).sum(dtype=torch.float64))
        return total / len(kept)
    if not subject.growth_site.closed_form or any(each.N_raw is None for each in subject.consumers):
        return None
    rows = []
    for path in subject.growth_site.producers:
        bias = growth.incoming_bias.get(path)
        rows += [growth.incoming[path].flatten(1), *([] if bias is None else [bias[:, None]])]
    left = torch.cat(rows, 1)
    total = 0.0
    for each in subject.consumers:
        raw = torch.as_tensor(each.N_raw)
        right = growth.outgoing[each.consumer].flatten(1).unflatten(1, (growth.channels, -1)).to(raw)
        total += float(torch.einsum("ka,abc,ckb->", left.to(raw), raw, right))
    return total


def require_samples(subject: PairStatistics, what: str, least: int = 1) -> KeptSamples:
    """The kept samples, or an error that says how to keep them.

    Args:
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


DESIGN_ENTRIES = 2**22
"""Entries of what a consumer multiplies its columns with that are held at once."""


@torch.no_grad()
def captured_by_sample(subject: PairStatistics, growth: ChannelGrowth) -> Float[Tensor, "n k"]:
    """⟨v⊥, δz_k⟩ of every kept sample; δz_k is what channel k alone adds to the consumers, summed over consumers.

    Args:
        subject: statistics with kept samples, and with what v⊥ needs.
        growth: the proposal; norm layers get its moments, or those that are measured where it has none.
    """
    kept = require_samples(subject, growth.method)
    inserted, projected, rows = _inserted(kept, growth), kept.projected(), []
    for batch in projected.batches:
        row = torch.zeros(batch.samples, growth.channels, dtype=torch.float64, device=kept.like.device)
        for piece in batch.passes:
            read = piece.read(growth.incoming, growth.incoming_bias, inserted)
            for each in _agreements(read, piece, pulled_back(piece, read, growth.outgoing), growth.channels):
                row += by_sample(each, batch.samples)
        rows.append(row)
    return torch.cat(rows)


def pulled_back(piece: KeptPass, read: Maps, outgoing: Mapping[str, Tensor]) -> Maps:
    """∂⟨v, δz⟩/∂(what the consumers read of the new channels), which does not depend on what they read."""
    with torch.enable_grad():
        calls, layout = tree_flatten(read)
        leaves = [each.detach().requires_grad_() for each in calls]
        pairs = piece.beside_v(piece.added(tree_unflatten(leaves, layout), outgoing))
        total = torch.stack([(delta * wanted).sum() for delta, wanted in pairs]).sum()
        return tree_unflatten(torch.autograd.grad(total, leaves), layout)


def _agreements(read: Maps, piece: KeptPass, pulled: Maps, channels: int) -> list[Float[Tensor, "rows k"]]:
    """⟨v, δz_k⟩ of every row, per consumer and call."""
    found = []
    for path, calls in read.items():
        layer = piece.region.site.layer(path)
        for values, back in zip(calls, pulled[path], strict=True):
            product = (values * back).movedim(layer.channel_axis(values.dim()), 1).unflatten(1, (channels, -1))
            found.append(product.flatten(2).sum(2, dtype=torch.float64))
    return found


def _energies(piece: KeptPass, read: Maps, outgoing: Mapping[str, Tensor], channels: int) -> Float[Tensor, " k"]:
    """‖δz_k‖² of every channel on a piece, from the second moments of its own columns."""
    total = torch.zeros(channels, dtype=torch.float64, device=next(iter(outgoing.values())).device)
    for path, calls in read.items():
        designs = piece.design(path, calls)
        for design, weight in zip(designs, outgoing[path].to(designs[0]).chunk(len(designs)), strict=True):
            own = design.unflatten(0, (channels, -1))
            columns = weight.flatten(1).unflatten(1, (channels, -1)).transpose(0, 1)
            total += ((own @ own.mT) * (columns.mT @ columns)).sum((1, 2), dtype=torch.float64)
    return total


def _inserted(kept: KeptSamples, growth: ChannelGrowth) -> Inserted:
    """What norm layers in between get: the proposal's moments, or measured ones where it has none."""
    norms = {**kept.moments(growth.incoming, growth.incoming_bias), **growth.norms}
    return replace(inserted_by(growth, kept.site), norms=norms)


def choose_signs(subject: PairStatistics, growth: ChannelGrowth) -> ChannelGrowth:
    """Of (α, ω) and (−α, −ω) take per channel the one that captures more through the real activation.

    The linear theory cannot tell them apart; behind ReLU one of them may be dead on most samples. The share captured is
    ⟨v⊥, δz⟩²/‖δz‖², and nothing where ⟨v⊥, δz⟩ < 0, since channels enter with a positive amplitude.

    Args:
        subject: statistics with kept samples.
        growth: what a closed form proposes.

    Returns:
        The proposal with its signs, `expected_decrease` and the moments of norm layers that were not known before.
    """
    kept = require_samples(subject, growth.method)
    turned = -growth.gains.new_ones(growth.channels)
    both = (growth, scaled(growth, turned, turned))
    scores = _scores(kept.projected(), both)
    flip = scores[1] > scores[0] * (1 + 1e-6)  # an exact tie, as behind a linear activation, keeps the fixed sign
    signs = torch.where(flip, -1.0, 1.0)
    chosen = scaled(growth, signs, signs)
    like = next(iter(growth.incoming.values()))
    measured = kept.moments(chosen.incoming, chosen.incoming_bias)
    norms = {path: (mean.to(like), variance.to(like)) for path, (mean, variance) in measured.items()}
    chosen = replace(chosen, norms={**norms, **chosen.norms})
    return replace(chosen, expected_decrease=expected_decrease(subject, chosen))


@torch.no_grad()
def _scores(projected: KeptSamples, growths: tuple[ChannelGrowth, ChannelGrowth]) -> Float[Tensor, "2 k"]:
    """max(⟨v⊥, δz_k⟩, 0)²/‖δz_k‖² of a proposal and of the one with all signs turned."""
    channels = growths[0].channels
    inserted = [_inserted(projected, each) for each in growths]
    captured = torch.zeros(2, channels, dtype=torch.float64, device=projected.like.device)
    energy = torch.zeros_like(captured)
    entries = 0
    for path, weight in growths[0].outgoing.items():
        for each in projected.passes[0].v[path]:
            entries += each[:1].numel() * weight[0].numel() // len(weight)  # locations times columns
    for piece in projected.pieces(entries, DESIGN_ENTRIES):
        pulled: Maps = {}
        for index, (growth, between) in enumerate(zip(growths, inserted, strict=True)):
            read = piece.read(growth.incoming, growth.incoming_bias, between)
            pulled = pulled or pulled_back(piece, read, growth.outgoing)
            sign = 1 - 2 * index  # ω turned turns what is pulled back
            for each in _agreements(read, piece, pulled, channels):
                captured[index] += sign * each.sum(0)
            energy[index] += _energies(piece, read, growth.outgoing, channels)
    return captured.clamp_min(0).square() / energy.clamp_min(torch.finfo(energy.dtype).tiny)
