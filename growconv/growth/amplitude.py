"""How strongly new channels start: an amplitude γ for their outgoing weights, chosen by the true loss."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from growconv.errors import ArgumentValueError, StatisticsError
from growconv.growth.decision import Batch, Loss
from growconv.network import layers
from growconv.network.apply import grow
from growconv.network.model import attribute, copied, example_arguments, undisturbed
from growconv.network.optimizer import refresh
from growconv.network.plan import plan_growth
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite, Site
from growconv.solvers.weights import at_old_scale, columns_of, homogeneous, new_sizes, old_sizes

CAP = 1.0
"""Strength of the strongest new channel, relative to the mean old one, beyond which no amplitude goes unless asked: of
1/8, 1/4, 1/2, 1 and no cap the best at the end of training (experiments/benchmarks/amplitude.py)."""

HEAVIEST = 4.0
"""Norm of the largest new outgoing weights, relative to the mean old ones, that a cap of 1 allows: what comes before
them learns the faster, the larger they are, and a channel that is quiet would need very large ones."""

COARSE = (1.0, 1 / 4, 1 / 16, 1 / 64)
"""Shares of the cap that are tried first; the neighbours of the best, a factor of two away, are tried then. Without a
cap they are shares of a cap of 1, and the amplitude is doubled for as long as the loss falls."""

MOST = 24
"""Losses measured at most."""


@dataclass(frozen=True)
class AmplitudeChoice:
    """What `choose_amplitude` found.

    Attributes:
        amplitude: γ, between 0 and `cap`.
        losses: mean held-out loss per amplitude tried, 0 among them.
        cap: the largest amplitude that was allowed (`amplitude_cap`); inf: none was forbidden.
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
    model: nn.Module,
    site: Site,
    growth: ChannelGrowth,
    batches: Sequence[Batch],
    loss: Loss,
    strongest: float | int | None = CAP,
) -> AmplitudeChoice:
    """The amplitude with the lowest loss on samples that the solver did not see.

    γ = 0 is among the candidates. The cap (`amplitude_cap`) lets no new channel come out stronger than the old ones:
    without one, the amplitude that is best for the immediate loss can be a thousand times too strong for the training
    that follows. The losses are those of a grown copy of the model, as it will be; a loss that calls the model itself
    sees it without the new channels.

    Args:
        model: the model of the site, or one with the same names; not changed. Norm layers stay in the mode that they
            are in.
        growth: the proposal, which changes no old weights.
        batches: held-out (inputs, targets) pairs.
        loss: loss(output, targets), averaged over the batch.
        strongest: of `amplitude_cap`; None: no cap, as in TINY's line search.

    Returns:
        The choice, with every loss that was measured.

    Raises:
        ArgumentValueError: no batches, or a proposal that changes old weights or has no channels.
        StatisticsError: the loss is not finite without the new channels.
    """
    _check(site, growth, batches)
    site = site.of(model)
    site.check()
    unit = amplitude_cap(site, growth, 1.0)
    cap = math.inf if strongest is None else strongest * unit
    start = min(unit, cap)
    losses: dict[float, float] = {}
    trials = Trials(model, site, growth, batches, loss)

    def measure(amplitude: float) -> None:
        if amplitude not in losses:
            losses[amplitude] = trials.loss(amplitude)

    with torch.no_grad():
        measure(0.0)
        if not torch.isfinite(torch.tensor(losses[0.0])):
            raise StatisticsError("the loss on the held-out batches is not finite", got=losses[0.0], where=site.name)
        if start > 0:
            for share in COARSE:
                measure(share * start)
            best = _best(losses)
            if best > 0:
                measure(best / 2)
                measure(min(2 * best, cap))
            while (best := _best(losses)) == max(losses) and best < cap and len(losses) < MOST:
                measure(min(2 * best, cap))
    best = _best(losses)
    change = f"held-out loss {losses[0.0]:.4g} → {losses[best]:.4g}"
    if best == 0.0:
        reason = "no amplitude lowers the held-out loss: the channels start silent"
    else:
        reason = f"{change}, at the cap" if best == cap else change
    return AmplitudeChoice(best, losses, cap, reason)


def _check(site: Site, growth: ChannelGrowth, batches: Sequence[Batch]) -> None:
    """Refuse what has no amplitude to choose."""
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


def amplitude_cap(site: Site, growth: ChannelGrowth, strongest: float | int = CAP) -> float:
    """The largest γ at which no new channel is too strong beside the old ones.

    The strength of a channel is its size (`solvers.scale`: behind a norm layer what that gives, else ‖α‖) times ‖ω‖;
    the strongest new one gets at most `strongest` of the old ones' mean, and ‖ω‖ alone at most four times that share of
    theirs.

    Args:
        strongest: share of the old channels' mean strength, above 0.

    Returns:
        0 where the new or the old channels have no outgoing weights.
    """
    own = site.cap(growth)
    if own is not None:
        return strongest * own
    site, units = cast(GrowthSite, site), growth.channels // site.granularity
    new = _outgoing_norms(weight.unflatten(1, (units, -1)) for weight in growth.outgoing.values())
    old = _outgoing_norms(columns_of(site, site.model, path) for path in site.consumers)
    largest, typical = float((new_sizes(site, growth) * new).max()), float(old_sizes(site).mean() * old.mean())
    if largest <= 0:
        return 0.0
    return strongest * min(typical / largest, HEAVIEST * float(old.mean() / new.max()))


def rescaled(site: Site, growth: ChannelGrowth) -> ChannelGrowth:
    """The same function with new channels at the old ones' scale, the outgoing weights inversely (`at_old_scale`).

    So amplitude 0 leaves live gradients on the outgoing weights. It is exact where all that lies between is positively
    homogeneous (ReLU, LeakyReLU, PReLU, pooling, a norm inserted transparently); elsewhere, as behind tanh or GELU, the
    scale of the filters has a meaning and the proposal comes back as it is. So does one that copies or changes old
    channels, or whose filters are all zero.
    """
    if site.own_method or growth.channels == 0 or growth.revised or growth.copied_from is not None:
        return growth
    site, units = cast(GrowthSite, site), growth.channels // site.granularity
    rows = [(weight == 0).unflatten(0, (units, -1)).flatten(1).all(1) for weight in growth.incoming.values()]
    silent = torch.stack(rows).all(0)
    return growth if bool(silent.any()) or not homogeneous(site) else at_old_scale(site, growth)


class Trials:
    """A grown copy of the model, and the loss of the held-out batches on it at any amplitude.

    The copy is grown once; another amplitude multiplies the entries that hold the new outgoing weights. Where a layer
    stores its weight otherwise (as a length and a direction), the copy's entries are planned anew for each amplitude.
    Dropout is off, norm layers are in the mode that the model is in, every amplitude sees the same random numbers.

    Args:
        model: the model; not changed.
        site: one of its sites.
        batches: held-out (inputs, targets) pairs.
        loss: loss(output, targets), averaged over the batch.
    """

    def __init__(
        self, model: nn.Module, site: Site, growth: ChannelGrowth, batches: Sequence[Batch], loss: Loss
    ) -> None:
        self.site, self.growth, self.batches, self.criterion = site, growth, batches, loss
        self.model = _without_dropout(model)
        grow(self.model, site, growth)
        strong, silent = self._entries(1.0), self._entries(0.0)
        self.scaled = {path: tensor for path, tensor in strong.items() if not torch.equal(tensor, silent[path])}
        moved = ((tensor != silent[path], silent[path]) for path, tensor in self.scaled.items())
        self.linear = all(bool((old[mask] == 0).all()) for mask, old in moved)
        self.masks = {path: silent[path] != tensor for path, tensor in self.scaled.items()}

    def _entries(self, amplitude: float) -> dict[str, Tensor]:
        """The tensors that growth changes, as they are at an amplitude."""
        plan = plan_growth(self.site, self.growth, amplitude)
        revised = ((each, each.tensor if each.revised is None else each.revised) for each in plan.changes)
        return {each.path: each.resized(old.detach().to(each.tensor)) for each, old in revised}

    def loss(self, amplitude: float) -> float:
        """Mean loss of the batches at an amplitude."""
        entries = None if self.linear else self._entries(amplitude)
        for path, strong in self.scaled.items():
            tensor = attribute(self.model, path)
            if isinstance(tensor, Tensor):
                scaled = torch.where(self.masks[path], strong * amplitude, strong)
                tensor.detach().copy_(scaled if entries is None else entries[path])
        refresh(self.model)
        return _mean_loss(self.model, self.batches, self.criterion)


def losses_of(
    model: nn.Module, site: Site, growth: ChannelGrowth, batches: Sequence[Batch], loss: Loss
) -> tuple[float, float]:
    """Mean loss of held-out batches on copies of the model, as it is and grown; for proposals that change old weights.

    Args:
        model: the model; not changed.
        site: one of its sites.
        batches: held-out (inputs, targets) pairs.
        loss: loss(output, targets), averaged over the batch.
    """
    with torch.no_grad():
        return _mean_loss(_without_dropout(model), batches, loss), Trials(model, site, growth, batches, loss).loss(1.0)


def _without_dropout(model: nn.Module) -> nn.Module:
    """A copy of the model that drops nothing."""
    model = copied(model)
    for module in model.modules():
        if layers.is_dropout(module):
            module.eval()
    return model


def _mean_loss(model: nn.Module, batches: Sequence[Batch], loss: Loss) -> float:
    """Mean over the batches."""
    total = 0.0
    with undisturbed(model):
        for inputs, targets in batches:
            arguments, keywords = example_arguments(inputs)
            total += float(loss(model(*arguments, **keywords), targets))
    return total / len(batches)


def _outgoing_norms(weights: Iterable[Tensor]) -> Float[Tensor, " units"]:
    """Norm of the weights on each unit of channels in all consumers, (out, units, entries, *kernel) each."""
    squares = [weight.double().transpose(0, 1).flatten(1).square().sum(1) for weight in weights]
    return torch.stack(squares).sum(0).sqrt()


def _best(losses: dict[float, float]) -> float:
    """The amplitude of the lowest loss, the smallest where several have it."""
    return min(sorted(losses), key=lambda amplitude: _rank(losses[amplitude]))


def _rank(loss: float) -> float:
    """The loss, with an undefined one as the worst of all."""
    return loss if loss == loss else float("inf")
