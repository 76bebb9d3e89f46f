"""What each new channel alone does on kept samples, through the model's own operations: signs, decrease, noise."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from growconv.errors import StatisticsError
from growconv.network import layers
from growconv.network.proposal import ChannelGrowth
from growconv.solvers.sampled import SampledSite, apply_layer
from growconv.statistics.pair import PairStatistics


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
def channel_responses(subject: PairStatistics, growth: ChannelGrowth, model: nn.Module) -> Responses:
    """Run every channel of a proposal on the kept samples by itself.

    Args:
        subject: statistics with kept samples, and with what v⊥ needs.
        growth: the proposal; only its weights are read.
        model: the model.
    """
    sampled, kept = SampledSite.of(subject, model, growth.method), subject.samples_kept
    if kept is None:
        raise StatisticsError("no samples were kept", where=subject.site, fix="collect with keep_samples=512, say")
    like = next(iter(kept.x.values()))  # samples are kept in float32 where the model is in half precision
    incoming, biases, outgoing = (
        {path: weight.to(like) for path, weight in weights.items()}
        for weights in (growth.incoming, growth.incoming_bias, growth.outgoing)
    )
    norms: dict[str, tuple[Tensor, Tensor]] = {}
    hidden = sampled.hidden(incoming, biases, norms)
    residuals = {path: kept.v_perp(path) for path in outgoing}
    columns: list[Tensor] = []
    for channel in range(growth.channels):
        column = torch.zeros(3, len(kept), dtype=torch.float64, device=like.device)
        for path, weight in outgoing.items():
            module, values, ratio = model.get_submodule(path), hidden[path], weight.shape[1] // growth.channels
            axis = layers.channel_axis(module, values.dim())
            own = values.narrow(axis, channel * ratio, ratio), weight.narrow(1, channel * ratio, ratio)
            change = apply_layer(module, *own, None)
            pairs = (change * residuals[path], change.square(), change * kept.v[path])
            column += torch.stack([pair.flatten(1).double().sum(1) for pair in pairs])
        columns.append(column)
    captured, energy, decrease = torch.stack(columns, 2) if columns else torch.zeros(3, len(kept), 0)
    return Responses(captured, energy, decrease, norms)


def choose_signs(subject: PairStatistics, growth: ChannelGrowth, model: nn.Module) -> ChannelGrowth:
    """Of (α, ω) and (−α, −ω) take per channel the one that captures more through the real activation.

    The linear theory cannot tell them apart; behind ReLU one of them may be dead on most samples. The share captured is
    ⟨v⊥, δz⟩²/‖δz‖², and nothing where ⟨v⊥, δz⟩ < 0, since channels enter with a positive amplitude.

    Args:
        subject: statistics with kept samples.
        growth: what a closed form proposes.
        model: the model.

    Returns:
        The proposal with its signs, `expected_decrease` and the moments of norm layers that were not known before.
    """
    flipped = _scaled(growth, -growth.gains.new_ones(growth.channels))
    both = [channel_responses(subject, each, model) for each in (growth, flipped)]
    scores = []
    for responses in both:
        captured, energy = responses.captured.sum(0), responses.energy.sum(0)
        scores.append(captured.clamp_min(0).square() / energy.clamp_min(torch.finfo(energy.dtype).tiny))
    flip = scores[1] > scores[0] * (1 + 1e-6)  # an exact tie, as behind a linear activation, keeps the fixed sign
    signs = torch.where(flip, -1.0, 1.0)
    decrease = torch.where(flip, both[1].decrease, both[0].decrease).mean(0).sum()
    chosen = _scaled(growth, signs)
    norms = {
        path: tuple(
            torch.where(flip.to(first.device), second, first).to(growth.incoming[next(iter(growth.incoming))])
            for first, second in zip(both[0].norms[path], both[1].norms[path], strict=True)
        )
        for path in both[0].norms
    }
    return replace(chosen, norms={**norms, **chosen.norms}, expected_decrease=float(decrease))


def _scaled(growth: ChannelGrowth, signs: Tensor) -> ChannelGrowth:
    """Both sides of every channel times a sign."""

    def rows(weight: Tensor) -> Tensor:
        return weight * signs.to(weight).view(-1, *[1] * (weight.dim() - 1))

    def columns(weight: Tensor) -> Tensor:
        blocks = weight.unflatten(1, (growth.channels, -1))
        return (blocks * signs.to(weight).view(1, -1, *[1] * (blocks.dim() - 2))).flatten(1, 2)

    return replace(
        growth,
        incoming={path: rows(weight) for path, weight in growth.incoming.items()},
        incoming_bias={path: rows(bias) for path, bias in growth.incoming_bias.items()},
        outgoing={path: columns(weight) for path, weight in growth.outgoing.items()},
        norms={path: (rows(mean), variance) for path, (mean, variance) in growth.norms.items()},
    )
