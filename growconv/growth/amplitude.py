"""How strongly new channels start: an amplitude γ for their outgoing weights, chosen by the true loss."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from growconv.errors import ArgumentValueError, StatisticsError
from growconv.growth.decision import Batch, Loss
from growconv.network import layers
from growconv.network.event import grow
from growconv.network.model import example_arguments, undisturbed
from growconv.network.optimizer import Journal, refresh
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite, Site
from growconv.solvers.weights import at_old_scale, columns_of, new_sizes, norms_of, not_homogeneous, old_sizes, units_of

CAP = 1.0
"""Default limit on the strength of the strongest new channel, relative to the mean old one: of 1/8, 1/4, 1/2, 1 and no
cap, the best at the end of training (experiments/benchmarks/amplitude.py)."""

HEAVIEST = 4.0
"""Norm of the largest new outgoing weights, relative to the mean old ones, that a cap of 1 allows. Large outgoing
weights raise the effective learning rate of the layers below, and a channel with small outputs would need very large
ones."""

COARSE = (1.0, 1 / 4, 1 / 16, 1 / 64)
"""Shares of the cap that are tried first, until one is worse than the one before, which lowers the loss; then the
neighbours of the best, a factor of two away, are tried. Without a cap they are shares of a cap of 1, and the amplitude
is doubled as long as the loss falls."""

MOST = 24
"""The most losses that are measured."""

Growth = tuple[Site, ChannelGrowth]
To = Callable[[float], None]


@dataclass(frozen=True)
class AmplitudeChoice:
    """What `choose_amplitudes` found."""

    growths: tuple[Growth, ...]  # the sites and proposals, as given
    units: tuple[float, ...]  # per proposal, the amplitude at which its channels have strength 1 (`amplitude_cap`)
    strength: float  # that of the strongest new channel of every site, relative to the mean old one
    losses: dict[float, float]  # mean held-out loss for each strength tried, including 0
    cap: float  # the largest strength allowed; inf: no limit
    reason: str  # why this strength was chosen, one line

    @property
    def held_out(self) -> tuple[float, float]:
        """Held-out loss before and after."""
        return self.losses[0.0], self.losses[self.strength]


def choose_amplitudes(
    model: nn.Module,
    growths: Iterable[Growth],
    batches: Sequence[Batch],
    loss: Loss,
    strongest: float | int | None = CAP,
) -> AmplitudeChoice:
    """The amplitudes with the lowest loss on unseen samples: one strength for all sites of a round.

    So the search costs as many losses for a hundred sites as for one, and sees what their channels do together. 0 is
    among the candidates. The cap lets no new channel come out stronger than the old ones: without one, the amplitude
    that is best for the immediate loss can be a thousand times too strong for the training that follows. The losses are
    those of the model as it will be: it is grown for the search, and put back.

    Args:
        model: the model of the sites, or one with the same names; afterwards as before. Norm layers stay in the mode
            that they are in.
        growths: where and what, proposals that change no old weights. They are read one by one, each when the model has
            those before it, so that a generator can tell how much room is left.
        batches: held-out (inputs, targets) pairs, which the solver did not see.
        loss: loss(output, targets), averaged over the batch.
        strongest: of `amplitude_cap`; None: no cap, as in TINY's line search.

    Returns:
        The choice, with every loss that was measured.

    Raises:
        ArgumentValueError: no batches, or a proposal that changes old weights or has no channels.
        StatisticsError: the loss is not finite without the new channels.
    """
    if not batches:
        raise ArgumentValueError(
            "no held-out batches", expected="at least one (inputs, targets) pair", where="choose_amplitudes"
        )
    cap = math.inf if strongest is None else float(strongest)
    losses: dict[float, float] = {}
    with torch.no_grad(), _trials(model, growths) as (taken, units, grow_to):

        def measure(strength: float) -> None:
            if strength not in losses:
                grow_to(strength)
                losses[strength] = mean_loss(model, batches, loss)

        measure(0.0)
        if not math.isfinite(losses[0.0]):
            where = ", ".join(site.name for site, _ in taken)
            raise StatisticsError("the loss on the held-out batches is not finite", got=losses[0.0], where=where)
        if any(units):
            for strength in (share * min(cap, 1.0) for share in COARSE):
                measure(strength)
                if (best := _best(losses)) > strength:
                    break  # a still weaker start would be worse
            if best > 0:
                measure(best / 2)
                measure(min(2 * best, cap))
            while (best := _best(losses)) == max(losses) and best < cap and len(losses) < MOST:
                measure(min(2 * best, cap))
    best = _best(losses)
    reason = f"held-out loss {losses[0.0]:.4g} → {losses[best]:.4g}{', at the cap' if best == cap else ''}"
    if best == 0.0:
        reason = "no amplitude lowers the held-out loss: the channels start silent"
    return AmplitudeChoice(tuple(taken), tuple(units), best, losses, cap, reason)


def amplitude_cap(site: Site, growth: ChannelGrowth, strongest: float | int = CAP) -> float:
    """The largest γ at which no new channel is too strong beside the old ones.

    The strength of a channel is its size (`solvers.weights`: behind a norm layer what that gives, else ‖α‖) times ‖ω‖;
    the strongest new one gets at most `strongest` of the old ones' mean, and ‖ω‖ alone at most four times that share of
    theirs. It is 0 where the new or the old channels have no outgoing weights.
    """
    own = site.cap(growth)
    if own is not None:
        return strongest * own
    site, units = cast(GrowthSite, site), growth.channels // site.granularity
    new = norms_of(map(Tensor.double, growth.outgoing.values()), units, 1)
    old = norms_of([columns_of(site, path).double() for path in site.consumers], units_of(site), 1)
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
    fixed = growth.channels == 0 or growth.revised or growth.copied_from is not None
    if fixed or not isinstance(site, GrowthSite):
        return growth
    units = growth.channels // site.granularity
    silent = norms_of([each.double() for each in growth.incoming.values()], units) == 0
    return growth if bool(silent.any()) or not_homogeneous(site) else at_old_scale(site, growth)


@contextmanager
def _trials(model: nn.Module, growths: Iterable[Growth]) -> Iterator[tuple[list[Growth], list[float], To]]:
    """Inside, the model has new channels, silent first; gives them, their units, and what gives them a strength.

    The model grows twice, with silent channels and with those of strength 1; another strength lies on the line through
    both. Where a layer stores its weight otherwise (as a length and a direction), it grows anew each time.
    """
    journal = Journal(model, values=[*model.parameters(), *model.buffers()])
    taken: list[Growth] = []
    units: list[float] = []

    def tensors() -> list[Tensor]:
        return [each.detach() for each in (*model.parameters(), *model.buffers())]

    def grow_anew(strength: float) -> None:
        journal.restore()
        for (site, growth), unit in zip(taken, units, strict=True):
            grow(model, site, growth, amplitude=strength * unit)

    try:
        for site, growth in growths:
            if growth.revised or growth.copied_from is not None or not growth.channels:
                raise ArgumentValueError(
                    "a proposal without new channels, or one that changes old weights, has no amplitude of its own",
                    got=growth.reason or growth.method,
                    where=site.name,
                    fix="grow with amplitude 1",
                )
            own = site.of(model)
            own.check()
            units.append(amplitude_cap(own, growth, 1.0))
            taken.append((site, growth))
            grow(model, own, growth, amplitude=0.0)
        silent = [tensor.clone() for tensor in tensors()]
        grow_anew(1.0)
        pairs = zip(tensors(), silent, strict=True)
        lines = [(strong, start, strong - start) for strong, start in pairs if not torch.equal(strong, start)]
        straight = not any(bool(start[step != 0].any()) for _, start, step in lines)

        def grow_to(strength: float) -> None:
            if not straight:
                grow_anew(strength)
                return
            for tensor, start, step in lines:
                tensor.copy_(start + strength * step)
            refresh(model)

        yield taken, units, grow_to
    finally:
        journal.restore()


def mean_loss(model: nn.Module, batches: Sequence[Batch], loss: Loss) -> float:
    """Mean over some batches, dropout off; norm layers keep their mode, and all random numbers stay as they are."""
    total = 0.0
    with torch.no_grad(), undisturbed(model):
        for module in model.modules():
            if layers.is_dropout(module):
                module.eval()
        for inputs, targets in batches:
            arguments, keywords = example_arguments(inputs)
            total += float(loss(model(*arguments, **keywords), targets))
    return total / len(batches)


def _best(losses: dict[float, float]) -> float:
    """The amplitude of the lowest loss, the smallest where several have it; an undefined loss is worse than any."""
    return min(sorted(losses), key=lambda amplitude: (math.isnan(losses[amplitude]), losses[amplitude]))
