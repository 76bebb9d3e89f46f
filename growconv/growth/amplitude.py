"""How strongly new channels start: an amplitude γ for their outgoing weights, chosen by the true loss."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.errors import ArgumentValueError, StatisticsError
from growconv.network.factorized import as_stored
from growconv.network.fitting import fitted
from growconv.network.proposal import ChannelGrowth
from growconv.network.rank_site import RankSite
from growconv.network.remainder import Remainder, added_outputs
from growconv.network.site import GrowthSite
from growconv.solvers.existing import readings_of
from growconv.solvers.scale import at_old_scale, homogeneous, new_sizes, old_sizes

STRONGEST = 0.125
"""Strength of the strongest new channel, relative to the mean old one, beyond which no amplitude goes. Above it the
loss of the next hundred steps can suffer although the held-out loss is lower."""

HEAVIEST = 0.5
"""Norm of the largest new outgoing weights, relative to the mean old ones, beyond which no amplitude goes: what comes
before them learns the faster, the larger they are, and a channel that is quiet would need very large ones."""

COARSE = (1.0, 1 / 4, 1 / 16, 1 / 64)
"""Shares of the cap that are tried first; the neighbours of the best, a factor of two away, are tried then."""


@dataclass(frozen=True)
class AmplitudeChoice:
    """What `choose_amplitude` found.

    Attributes:
        amplitude: γ, between 0 and `cap`.
        losses: mean held-out loss per amplitude tried, 0 among them.
        cap: the largest amplitude that was allowed (`amplitude_cap`).
        reason: one line.
    """

    amplitude: float
    losses: dict[float, float]
    cap: float
    reason: str

    @property
    def decrease(self) -> float:
        """Held-out loss that the new channels take away at once."""
        return self.losses[0.0] - self.losses[self.amplitude]


def choose_amplitude(
    model: torch.nn.Module,
    site: GrowthSite,
    growth: ChannelGrowth,
    batches: Sequence[tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor],
) -> AmplitudeChoice:
    """The amplitude with the lowest loss on samples that the solver did not see.

    γ = 0 is among the candidates. The cap (`amplitude_cap`) keeps every new channel well below the old ones: without
    one, the amplitude that is best for the immediate loss can be a thousand times too strong for the training that
    follows. What lies below the site's readers is computed once per batch (`Remainder`).

    Args:
        model: the model that the site belongs to; not changed. Norm layers stay in the mode that they are in.
        site: where.
        growth: the proposal, which changes no old weights.
        batches: held-out (inputs, targets) pairs.
        loss: loss(output, targets), averaged over the batch.

    Returns:
        The choice, with every loss that was measured.

    Raises:
        ArgumentValueError: no batches, or a proposal that changes old weights or has no channels.
        StatisticsError: the loss is not finite without the new channels.
    """
    if not batches:
        raise ArgumentValueError(
            "no held-out batches", expected="at least one (inputs, targets) pair", where="choose_amplitude"
        )
    if growth.revised or growth.copied_from is not None:
        raise ArgumentValueError(
            "this proposal changes old weights, so it has no amplitude of its own",
            got=growth.method,
            where=site.name,
            fix="grow with amplitude 1",
        )
    if growth.channels == 0:
        raise ArgumentValueError(
            "there are no new channels to choose an amplitude for", got=growth.reason, where=site.name
        )
    site.check(model)
    growth = as_stored(site, fitted(site, growth))
    cap = amplitude_cap(site, growth)
    losses: dict[float, float] = {}
    trials = [_Trial(site, growth, inputs, targets, loss) for inputs, targets in batches]

    def measure(amplitude: float) -> None:
        if amplitude not in losses:
            losses[amplitude] = sum(trial.loss(amplitude) for trial in trials) / len(trials)

    with torch.no_grad():
        measure(0.0)
        if not torch.isfinite(torch.tensor(losses[0.0])):
            raise StatisticsError("the loss on the held-out batches is not finite", got=losses[0.0], where=site.name)
        if cap > 0:
            for share in COARSE:
                measure(share * cap)
            best = min(losses, key=lambda amplitude: _rank(losses[amplitude]))
            if best > 0:
                for amplitude in (best / 2, min(2 * best, cap)):
                    measure(amplitude)
    best = min(sorted(losses), key=lambda amplitude: _rank(losses[amplitude]))
    change = f"held-out loss {losses[0.0]:.4g} → {losses[best]:.4g}"
    if best == 0.0:
        reason = "no amplitude lowers the held-out loss: the channels start silent"
    else:
        reason = f"{change}, at the cap" if best == cap else change
    return AmplitudeChoice(best, losses, cap, reason)


def amplitude_cap(site: GrowthSite, growth: ChannelGrowth) -> float:
    """The largest γ at which no new channel is strong beside the old ones.

    The strength of a channel is its size (`solvers.scale`: behind a norm layer what that gives, else ‖α‖) times ‖ω‖;
    the strongest new one gets at most an eighth of the old ones' mean, and ‖ω‖ alone at most a half of theirs.

    Args:
        site: where.
        growth: the proposal.

    Returns:
        0 where the new or the old channels have no outgoing weights.
    """
    if isinstance(site, RankSite):
        return STRONGEST * site.cap(growth)
    new = _outgoing_norms(weight.unflatten(1, (growth.channels, -1)) for weight in growth.outgoing.values())
    old = _outgoing_norms(readings_of(site, site.model, path) for path in site.consumers)
    strongest, typical = float((new_sizes(site, growth) * new).max()), float(old_sizes(site).mean() * old.mean())
    if strongest <= 0:
        return 0.0
    return min(STRONGEST * typical / strongest, HEAVIEST * float(old.mean() / new.max()))


def rescaled(site: GrowthSite, growth: ChannelGrowth) -> ChannelGrowth:
    """The same function with new channels at the old ones' scale, the outgoing weights inversely (`at_old_scale`).

    So amplitude 0 leaves live gradients on the outgoing weights. It is exact where all that lies between is positively
    homogeneous (ReLU, LeakyReLU, PReLU, pooling, a norm inserted transparently); elsewhere, as behind tanh or GELU, the
    scale of the filters has a meaning and the proposal comes back as it is. So does one that copies or changes old
    channels, or whose filters are all zero.

    Args:
        site: where.
        growth: the proposal.
    """
    if isinstance(site, RankSite) or growth.channels == 0 or growth.revised or growth.copied_from is not None:
        return growth
    silent = torch.stack([(weight == 0).flatten(1).all(1) for weight in growth.incoming.values()]).all(0)
    return growth if bool(silent.any()) or not homogeneous(site) else at_old_scale(site, growth)


class _Trial:
    """One held-out batch: its loss at any amplitude."""

    def __init__(
        self,
        site: GrowthSite,
        growth: ChannelGrowth,
        inputs: Any,
        targets: Any,
        loss: Callable[[Any, Any], Tensor],
    ) -> None:
        self.growth, self.targets, self.criterion = growth, targets, loss
        with torch.no_grad():
            self.remainder = Remainder(site, inputs)
            # Where no writer or reader is downstream of another reader, δz is linear in γ and computed once.
            simple = set(self.remainder.producer_inputs) == set(site.producers) and not growth.carried
            plain = simple or not self.remainder.partial
            self.deltas = added_outputs(site, growth, self.remainder.producer_inputs) if plain else None

    def loss(self, amplitude: float) -> float:
        """Mean loss of the batch at an amplitude."""
        if self.deltas is None:
            output = self.remainder.grown(self.growth, amplitude)
        else:
            scaled = {
                path: tuple(amplitude * d for d in delta) if isinstance(delta, tuple) else amplitude * delta
                for path, delta in self.deltas.items()
            }
            output = self.remainder.run(scaled)
        return float(self.criterion(output, self.targets))


def _outgoing_norms(weights: Iterable[Tensor]) -> Float[Tensor, " k"]:
    """Norm of each channel's weights in all readers, (out, k, ratio, *kernel) each."""
    squares = [weight.double().transpose(0, 1).flatten(1).square().sum(1) for weight in weights]
    return torch.stack(squares).sum(0).sqrt()


def _rank(loss: float) -> float:
    """The loss, with an undefined one as the worst of all."""
    return loss if loss == loss else float("inf")
