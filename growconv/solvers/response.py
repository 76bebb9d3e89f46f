"""What each new channel alone does on kept samples, through the model's own operations: signs and noise."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.network import layers
from growconv.network.proposal import ChannelGrowth
from growconv.network.seats import Inserted
from growconv.solvers.energy import expected_decrease, inserted_by, require_samples
from growconv.solvers.existing import scaled_columns, scaled_rows
from growconv.statistics.pair import PairStatistics
from growconv.statistics.samples import KeptPass, KeptSamples, Maps, by_sample

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
        leaves = {path: tuple(each.detach().requires_grad_() for each in calls) for path, calls in read.items()}
        added = piece.added(leaves, outgoing)
        pairs = [pair for path in added for pair in zip(added[path], piece.v[path], strict=True)]
        total = torch.stack([(delta * wanted).sum() for delta, wanted in pairs]).sum()
    found = iter(torch.autograd.grad(total, [each for calls in leaves.values() for each in calls]))
    return {path: tuple(next(found) for _ in calls) for path, calls in leaves.items()}


def _agreements(read: Maps, piece: KeptPass, pulled: Maps, channels: int) -> list[Float[Tensor, "rows k"]]:
    """⟨v, δz_k⟩ of every row, per consumer and call."""
    found = []
    for path, calls in read.items():
        layer = layers.weighted(piece.region.site.model.get_submodule(path))
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
    both = (growth, _scaled(growth, -growth.gains.new_ones(growth.channels)))
    scores = _scores(kept.projected(), both)
    flip = scores[1] > scores[0] * (1 + 1e-6)  # an exact tie, as behind a linear activation, keeps the fixed sign
    chosen = _scaled(growth, torch.where(flip, -1.0, 1.0))
    like = growth.incoming[subject.producer]
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
    entries = sum(
        each[:1].numel() * weight[0].numel() // weight.shape[0]  # locations times columns
        for path, weight in growths[0].outgoing.items()
        for each in projected.passes[0].v[path]
    )
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


def _scaled(growth: ChannelGrowth, signs: Tensor) -> ChannelGrowth:
    """Both sides of every channel times a sign."""
    return replace(
        growth,
        incoming={path: scaled_rows(weight, signs) for path, weight in growth.incoming.items()},
        incoming_bias={path: scaled_rows(bias, signs) for path, bias in growth.incoming_bias.items()},
        outgoing={path: scaled_columns(weight, signs) for path, weight in growth.outgoing.items()},
        norms={path: (scaled_rows(mean, signs), variance) for path, (mean, variance) in growth.norms.items()},
    )
