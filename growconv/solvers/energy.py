"""The yardstick of every solver, through the real activation: captured energy and first-order decrease."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growconv.errors import SolverError, StatisticsError
from growconv.linalg import solve_psd
from growconv.network.proposal import ChannelGrowth
from growconv.network.remainder import added_outputs, apply_filters
from growconv.network.site import GrowthSite
from growconv.solvers.columns import columns, positions
from growconv.statistics import KeptSamples, PairStatistics, collect_statistics


class LinearisationWarning(UserWarning):
    """A method that takes the activation as linear was asked for channels behind one that is not 0 at 0."""


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
    kept = kept_samples(collected[site.name], "captured_energy")
    if statistics is not None and all(consumer.best_update is not None for consumer in statistics.consumers):
        updates = {consumer.consumer: consumer.apply_update for consumer in statistics.consumers}
        targets = {path: kept.v[path] - update(kept.h[path]) for path, update in updates.items()}
    else:
        targets = {path: _projected(model.get_submodule(path), kept.h[path], kept.v[path]) for path in site.consumers}
    agreement, size, energy = 0.0, 0.0, 0.0
    for index in _chunks(kept):
        for path, delta in _added(site, growth, kept.x, index).items():
            target = targets[path][index].double()
            agreement += float((target * delta).sum())
            size += float(delta.double().square().sum())
            energy += float(target.square().sum())
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
    if kept is not None:
        total = 0.0
        for index in _chunks(kept):
            for path, delta in _added(subject.growth_site, growth, kept.x, index).items():
                total += float((kept.v[path][index] * delta).sum(dtype=torch.float64))
        return total / len(kept)
    if subject.growth_site.closed_form is not None or any(consumer.N_raw is None for consumer in subject.consumers):
        return None
    weight, bias = growth.incoming[subject.producer], growth.incoming_bias.get(subject.producer)
    left = weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)
    total = 0.0
    for consumer in subject.consumers:
        raw = torch.as_tensor(consumer.N_raw)
        right = growth.outgoing[consumer.consumer].flatten(1).unflatten(1, (growth.channels, -1)).to(raw)
        total += float(torch.einsum("ka,abc,ckb->", left.to(raw), raw, right))
    return total


def linearisation_note(site: GrowthSite) -> str | None:
    """What the methods that take the activation as linear mean where it is not 0 at 0; None where it is.

    Args:
        site: where.
    """
    offset = value_at_zero(site)
    if offset is None or abs(offset) < 1e-12:
        return None
    return (
        f"what lies between producer and consumer is {offset:.3g} at 0: the closed-form methods see its linear part only, "
        f"so that a new channel also adds the constant {offset:.3g}·Σω, which their gains leave out; "
        "method='functional' sees it"
    )


def value_at_zero(site: GrowthSite) -> float | None:
    """What a new channel of zeros gives its consumers, the entry farthest from 0; None where it cannot be tried."""
    graph = site.spaces.graph
    new: dict[str, Any] = {}
    for path in site.producers:
        calls = []
        for node in site.spaces.bindings[(path, "writes", 0)].nodes:
            shape = list(graph.values[node])
            module = site.model.get_submodule(path)
            shape[0] = 1
            shape[-1 if isinstance(module, nn.Linear) else 1] = site.granularity
            calls.append(next(module.parameters()).new_zeros(shape))
        new[path] = calls[0] if len(calls) == 1 else tuple(calls)
    with torch.no_grad():
        try:
            read = site.between(new)
        except (SolverError, StatisticsError):
            return None
    values = [item for value in read.values() for item in (value if isinstance(value, tuple) else (value,))]
    return max((float(value.flatten()[value.abs().argmax()]) for value in values), key=abs, default=None)


def kept_samples(subject: PairStatistics, method: str) -> KeptSamples:
    """The samples that statistics hold.

    Args:
        subject: the statistics.
        method: who asks, for the message.

    Raises:
        StatisticsError: none were kept, or a layer of the site runs several times in one forward pass.
    """
    site = subject.growth_site
    if subject.samples_kept is None or len(subject.samples_kept) == 0:
        raise StatisticsError(
            f"{method!r} works on samples, and none were kept",
            where=site.name,
            fix="collect with keep_samples=2000, say",
        )
    for role, paths in (("writes", site.producers), ("reads", site.consumers)):
        for path in paths:
            calls = len(site.spaces.bindings[(path, role, 0)].nodes)
            if calls > 1:
                raise SolverError(
                    f"{method!r} takes layers that run once in a forward pass",
                    got=f"{calls} calls",
                    where=path,
                    fix="use method='random' or 'net2net' for this site",
                )
    return subject.samples_kept


def bottleneck(subject: PairStatistics) -> dict[str, Tensor]:
    """v⊥ of the kept samples per consumer: with the statistics' W* where it was collected, else with the samples' own.

    Args:
        subject: statistics with kept samples.
    """
    kept = kept_samples(subject, "v⊥")
    model = subject.growth_site.model
    return {
        consumer.consumer: kept.v_perp(consumer.consumer)
        if consumer.best_update is not None
        else _projected(model.get_submodule(consumer.consumer), kept.h[consumer.consumer], kept.v[consumer.consumer])
        for consumer in subject.consumers
    }


RIDGES = (1e-4, 1e-2, 1.0, 100.0, math.inf)
"""Ridges, in units of the design's mean eigenvalue, for an update that few samples determine; the last allows none."""


def _projected(module: nn.Module, h: Tensor, v: Tensor) -> Tensor:
    """V less the best that a change of the layer's own weights can give on these samples.

    With fewer than four rows an entry, the plain least-squares update would explain noise, in the end all of v: a ridge
    chosen by cross-validation then keeps it to what carries over to other samples.
    """
    total = _own_equations(module, h, v)
    rows, entries = total.rows, total.gram.shape[0]
    if rows >= 4 * entries or len(h) < 2:
        weights = solve_psd(total.gram, total.cross)
    else:
        half = len(h) // 2
        first = _own_equations(module, h[:half], v[:half])
        second = Equations(total.gram - first.gram, total.cross - first.cross, rows - first.rows)
        unit = float(total.gram.diagonal().mean()) / rows

        def left_over(ridge: float) -> float:
            pairs = ((first, second), (second, first))
            return sum(other.loss(own.ridged(ridge * unit * own.rows)) for own, other in pairs)

        weights = total.ridged(min(RIDGES, key=left_over) * unit * rows)
    weights = weights.to(h).mT
    has_bias = getattr(module, "bias", None) is not None
    kernel = tuple(getattr(module, "kernel_size", ()))
    weight = (weights[:, :-1] if has_bias else weights).reshape(weights.shape[0], -1, *kernel).contiguous()
    bias = weights[:, -1] if has_bias else None
    return v - torch.cat([apply_filters(module, values, weight, bias) for values in h.split(_step(module, h))])


@dataclass(frozen=True)
class Equations:
    """Normal equations of a layer's own update: gram (d, d), cross (d, c), and the number of rows that they sum."""

    gram: Tensor
    cross: Tensor
    rows: int

    def ridged(self, ridge: float) -> Tensor:
        """The solution with a ridge; zeros for an infinite one."""
        if math.isinf(ridge):
            return torch.zeros_like(self.cross)
        lifted = self.gram.clone()
        lifted.diagonal().add_(ridge)
        return solve_psd(lifted, self.cross)

    def loss(self, weights: Tensor) -> float:
        """‖v − H·weights‖², less ‖v‖²."""
        return float((weights * (self.gram @ weights - 2 * self.cross)).sum())


def _own_equations(module: nn.Module, h: Tensor, v: Tensor) -> Equations:
    gram: Any = 0
    cross: Any = 0
    rows, step = 0, _step(module, h)
    for values, wanted in zip(h.split(step), v.split(step), strict=True):
        design = columns(module, values)
        if getattr(module, "bias", None) is not None:
            design = torch.cat([design, torch.ones_like(design[:1])])
        gram = gram + (design @ design.mT).double()
        cross = cross + (design @ positions(module, wanted).mT).double()
        rows += design.shape[1]
    return Equations(gram, cross, rows)


def _step(module: nn.Module, h: Tensor) -> int:
    """Samples whose columns fit into the scratch memory."""
    return max(1, 2**22 // max(1, columns(module, h[:1]).numel()))


def _chunks(kept: KeptSamples) -> list[slice]:
    entries = sum(tensor[0].numel() for tensor in (*kept.x.values(), *kept.v.values()))
    step = max(1, 2**25 // max(1, entries))
    return [slice(start, start + step) for start in range(0, len(kept), step)]


def _added(site: GrowthSite, growth: ChannelGrowth, inputs: dict[str, Tensor], index: slice) -> dict[str, Any]:
    with torch.no_grad():
        return added_outputs(site, growth, {path: tensor[index] for path, tensor in inputs.items()})
