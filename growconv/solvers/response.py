"""What each new channel alone does on kept samples, through the model's own operations: signs, decrease, noise."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.network import layers
from growconv.network.proposal import ChannelGrowth
from growconv.solvers.energy import expected_decrease, inserted_by, require_samples
from growconv.solvers.existing import scaled_columns, scaled_rows
from growconv.statistics.pair import PairStatistics
from growconv.statistics.samples import KeptPass, Maps, by_sample


@dataclass(frozen=True, eq=False)
class Responses:
    """Per sample and channel; δz_k is what channel k alone adds to the consumers' outputs, summed over consumers.

    Attributes:
        captured: ⟨v⊥, δz_k⟩ (n, k).
        energy: ‖δz_k‖² (n, k).
        decrease: ⟨v, δz_k⟩ (n, k): the first-order decrease of the sample's loss.
        norms: per norm layer in between, mean and variance (k,) of the channels' own values before it.
    """

    captured: Float[Tensor, "n k"]
    energy: Float[Tensor, "n k"]
    decrease: Float[Tensor, "n k"]
    norms: dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def channel_responses(subject: PairStatistics, growth: ChannelGrowth) -> Responses:
    """Run every channel of a proposal on the kept samples by itself.

    Args:
        subject: statistics with kept samples, and with what v⊥ needs.
        growth: the proposal; norm layers get its moments, or those that are measured where it has none.
    """
    kept = require_samples(subject, growth.method)
    norms = {**kept.moments(growth.incoming, growth.incoming_bias), **growth.norms}
    inserted = replace(inserted_by(growth, kept.site), norms=norms)
    projected = kept.projected()
    rows = []
    for batch, wanted in zip(kept.batches, projected.batches, strict=True):
        row = torch.zeros(3, batch.samples, growth.channels, dtype=torch.float64, device=kept.like.device)
        for piece, target in zip(batch.passes, wanted.passes, strict=True):
            read = piece.read(growth.incoming, growth.incoming_bias, inserted)
            for channel in range(growth.channels):
                row[:, :, channel] += _one_channel(piece, target, read, growth, channel, batch.samples)
        rows.append(row)
    captured, energy, decrease = torch.cat(rows, 1)
    return Responses(captured, energy, decrease, norms)


def _one_channel(
    piece: KeptPass, target: KeptPass, read: Maps, growth: ChannelGrowth, channel: int, samples: int
) -> Tensor:
    """⟨v⊥, δz⟩, ‖δz‖² and ⟨v, δz⟩ of one channel, (3, samples)."""
    found = torch.zeros(3, samples, dtype=torch.float64, device=read[next(iter(read))][0].device)
    for path, weight in growth.outgoing.items():
        layer, ratio = layers.weighted(piece.region.site.model.get_submodule(path)), weight.shape[1] // growth.channels
        own = weight.narrow(1, channel * ratio, ratio)
        for values, wanted, projected in zip(read[path], piece.v[path], target.v[path], strict=True):
            part = values.narrow(layer.channel_axis(values.dim()), channel * ratio, ratio)
            change = layer.apply(part, own.to(part), None)
            pairs = (change * projected, change.square(), change * wanted)
            found += torch.stack([by_sample(pair, samples) for pair in pairs])
    return found


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
    flipped = _scaled(growth, -growth.gains.new_ones(growth.channels))
    both = [channel_responses(subject, each) for each in (growth, flipped)]
    scores = []
    for responses in both:
        captured, energy = responses.captured.sum(0), responses.energy.sum(0)
        scores.append(captured.clamp_min(0).square() / energy.clamp_min(torch.finfo(energy.dtype).tiny))
    flip = scores[1] > scores[0] * (1 + 1e-6)  # an exact tie, as behind a linear activation, keeps the fixed sign
    chosen = _scaled(growth, torch.where(flip, -1.0, 1.0))
    kept, like = require_samples(subject, growth.method), growth.incoming[subject.producer]
    measured = kept.moments(chosen.incoming, chosen.incoming_bias)
    norms = {path: (mean.to(like), variance.to(like)) for path, (mean, variance) in measured.items()}
    chosen = replace(chosen, norms={**norms, **chosen.norms})
    return replace(chosen, expected_decrease=expected_decrease(subject, chosen))


def _scaled(growth: ChannelGrowth, signs: Tensor) -> ChannelGrowth:
    """Both sides of every channel times a sign."""
    return replace(
        growth,
        incoming={path: scaled_rows(weight, signs) for path, weight in growth.incoming.items()},
        incoming_bias={path: scaled_rows(bias, signs) for path, bias in growth.incoming_bias.items()},
        outgoing={path: scaled_columns(weight, signs) for path, weight in growth.outgoing.items()},
        norms={path: (scaled_rows(mean, signs), variance) for path, (mean, variance) in growth.norms.items()},
    )
