"""From factors to a proposal, the last step that every method on statistics shares: weights, scale, signs, decrease."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from growconv.errors import ArgumentTypeError, ArgumentValueError, SolverError, StatisticsError
from growconv.linalg import fix_signs, require_finite
from growconv.network import layers
from growconv.network.proposal import ChannelGrowth
from growconv.network.seats import Inserted, Moments
from growconv.network.site import Activation, Other
from growconv.solvers.base import Request
from growconv.solvers.weights import (
    Filters,
    at_old_scale,
    entries_of,
    filters_of,
    not_homogeneous,
    old_filters,
    scaled,
    silent_outgoing,
)
from growconv.statistics.pair import PairStatistics
from growconv.statistics.samples import KeptPass, KeptSamples, Maps

NOT_TAKEN = 8
"""Further singular values that a proposal shows beside those it takes."""
NOTHING_TO_GAIN = "nothing to gain: no new channel would lower the loss to first order (N is zero)"
DESIGN_ENTRIES = 2**22
"""Entries of what a consumer multiplies its columns with that are held at once."""


def require_statistics(subject: PairStatistics, name: str) -> list[Tensor]:
    """A statistic of each consumer, in their order.

    Raises:
        StatisticsError: it was not collected, is empty or not finite: of which consumer, and how to collect it.
    """
    found = []
    for consumer in subject.consumers:
        value, where = getattr(consumer, name), f"{subject.growth_site.name}, consumer {consumer.consumer}"
        if subject.samples < 1:
            fix = "run at least one batch with a backward pass inside the collector"
            raise StatisticsError("the statistics have zero samples", got=subject.samples, where=where, fix=fix)
        if value is None:
            fix = f"collect with quantities={{'{name}', ...}}, or solver.reads"
            raise StatisticsError(f"the statistic {name} was not collected", where=where, fix=fix)
        if not bool(torch.isfinite(value).all()):
            raise StatisticsError(
                f"the statistic {name} is not finite",
                got=f"{int((~torch.isfinite(value)).sum())} entries infinite or undefined",
                where=where,
                fix="look for an overflow in the loss, or lower the loss scale",
            )
        found.append(value)
    return found


def require_samples(subject: PairStatistics, what: str, least: int = 1) -> KeptSamples:
    """The kept samples, at least `least` of them; else an error for `what` that says how to keep them."""
    kept = subject.samples_kept
    if kept is None or len(kept) < least:
        raise StatisticsError(
            f"{what} needs kept samples",
            expected=f"at least {least}",
            got="none" if kept is None else len(kept),
            where=subject.site,
            fix="collect with keep_samples=512, say, on a model whose own forward is called",
        )
    return kept


def require_moments(channels: int, N: Tensor, **squares: Tensor) -> None:
    """Refuse what a method on bare tensors cannot work with: N is a matrix or more, the second moments are square.

    Raises:
        ArgumentTypeError: channels that are no integer, or numbers of half precision, integers or complex ones.
        ArgumentValueError: fewer than one channel, other shapes, several dtypes, or entries that are not finite.
    """
    if isinstance(channels, bool) or not isinstance(channels, int):
        raise ArgumentTypeError("channels is not an integer", expected="e.g. 8", got=repr(channels), where="channels")
    if channels < 1:
        raise ArgumentValueError("at least one channel is needed", expected="≥ 1", got=channels, where="channels")
    for name, tensor in {**squares, "N": N}.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ArgumentTypeError(
                "second moments need single or double precision",
                expected="torch.float32 or torch.float64",
                got=tensor.dtype,
                where=name,
                fix=f"sum them in float32 at least; {name}.float() if they were",
            )
        square = name in squares
        if (tensor.dim() != 2 or tensor.shape[0] != tensor.shape[1]) if square else tensor.dim() < 2:
            raise ArgumentValueError(
                f"{name} has an invalid shape",
                expected="a square matrix" if square else "a matrix (a, columns), or a tensor (a, b, c)",
                got=tuple(tensor.shape),
                where=name,
            )
        if (tensor.dtype, tensor.device) != (N.dtype, N.device):
            raise ArgumentValueError(
                f"{name} and N have different dtypes or devices",
                expected=f"{N.dtype} on {N.device}",
                got=f"{tensor.dtype} on {tensor.device}",
                where=name,
            )
        require_finite(**{name: tensor})


def shortfall(found: int, requested: int, what: str) -> str | None:
    """Why there are fewer channels than asked for; None where there are not."""
    if found >= requested:
        return None
    if found == 0:
        return NOTHING_TO_GAIN
    return f"asked for {requested}, got {found}: {what} has no more directions above the relative threshold"


def assemble(
    request: Request,
    method: str,
    left: Float[Tensor, "k a"],
    right: Float[Tensor, "k columns"],
    gains: Float[Tensor, " k"],
    reason: str | None = None,
    signs: bool = False,
) -> ChannelGrowth:
    """A proposal from the factors of Θ = Σ_k left_k ⊗ right_k.

    Args:
        request: with statistics of the site. Their `patch_mean` and `patch_gram`, where they were collected, give the
            norm layer behind the producer its moments; the kept samples the signs and the expected decrease.
        left: (k, a), the new filters of all producers, each with its bias last where it has one.
        right: (k, columns), the weights (b, c2) of one consumer after the other, in the order of `subject.consumers`.
        reason: why there are fewer than asked for.
        signs: choose the sign of each channel on the kept samples, where there are any; else it is fixed.
    """
    subject, site, channels = request.subject, request.site, len(left)
    if channels:
        left, right = fix_signs(left, right)
    parts = left.to(filters_of(site, site.producers[0])).split([entries_of(site, path) for path in site.producers], 1)
    filters = Filters(site, channels // site.granularity, dict(zip(site.producers, parts, strict=True)))
    outgoing, start = {}, 0
    for path in site.consumers:
        weight, ratio = filters_of(site, path), int(site.ratio(path))
        end = start + len(weight) * ratio * math.prod(weight.shape[2:])
        own = right[:, start:end].unflatten(1, (-1, len(weight)))
        # (k, b, c) to (c, k·ratio, *kernel): a flattening consumer has its grid where a convolution has its kernel.
        shape = (len(weight), channels * ratio, *weight.shape[2:])
        outgoing[path], start = own.permute(2, 0, 1).reshape(shape).to(weight).contiguous(), end
    norms = norm_moments(subject, filters)
    growth = filters.proposed(method, outgoing, gains.detach(), requested=request.number, reason=reason, norms=norms)
    if channels and not_homogeneous(site) and bool((left != 0).any(1).all()):
        # The linear theory leaves the channels' scale open, a curved activation does not: that of the old channels is
        # one at which it works, and at which the gradients on the outgoing weights are of the usual size.
        growth = at_old_scale(site, growth)
    if channels and signs and subject.samples_kept is not None:
        return choose_signs(subject, growth)
    steps = [step for route in site.routes for step in route.steps]
    curved = any(isinstance(step, Activation | Other) or not getattr(step, "average", True) for step in steps)
    if curved and subject.samples_kept is None:
        return growth
    return replace(growth, expected_decrease=expected_decrease(subject, growth))


def empty(request: Request, method: str, reason: str) -> ChannelGrowth:
    """A proposal of no channels, with the reason."""
    none, outgoing = old_filters(request.site).picked([]), silent_outgoing(request.site, 0)
    return none.proposed(method, outgoing, requested=request.number, reason=reason, expected_decrease=0.0)


def norm_moments(subject: PairStatistics, filters: Filters) -> dict[str, Moments]:
    """Mean and variance of the new channels' own values before the norm layers that directly follow the producers.

    The moments are linear and quadratic in the filters: mean αᵀE[U], variance αᵀE[UUᵀ]α − mean². Those behind several
    producers are measured on the kept samples.
    """
    site, norms = subject.growth_site.measured, {}
    firsts = {route.norm: layers.norm(site.model.get_submodule(route.norm)) for route in site.routes if route.norm}
    if len(site.producers) > 1 and firsts and bool((filters.matrix != 0).any()):
        found = require_samples(subject, "a norm layer").moments(*filters.weights)
        return {path: found[path] for path, norm in firsts.items() if not norm.by_sample}
    if subject.patch_mean is None or subject.patch_gram is None or filters.units == 0:
        return {}
    (left,) = (rows.to(subject.patch_mean) for rows in filters.rows.values())
    mean = left @ subject.patch_mean
    variance = (torch.einsum("ka,ad,kd->k", left, subject.patch_gram, left) - mean.square()).clamp_min(0)
    for path, norm in firsts.items():
        # where it depends on the signs of the whole group, it is measured once they are chosen
        if not norm.by_sample or subject.samples_kept is None:
            norms[path] = norm.pooled(mean, variance)
    return norms


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
    kept, total = subject.samples_kept, 0.0
    if kept is not None and len(kept):
        for piece, added in added_outputs(kept, growth):
            for delta, wanted in piece.beside_v(added):
                total += float((wanted * delta).sum(dtype=torch.float64))
        return total / len(kept)
    if not subject.growth_site.closed_form or any(each.N_raw is None for each in subject.consumers):
        return None
    rows = []
    for path in subject.growth_site.producers:
        bias = growth.incoming_bias.get(path)
        rows += [growth.incoming[path].flatten(1), *([] if bias is None else [bias[:, None]])]
    left = torch.cat(rows, 1)
    for each in subject.consumers:
        raw = torch.as_tensor(each.N_raw)
        right = growth.outgoing[each.consumer].flatten(1).unflatten(1, (growth.channels, -1)).to(raw)
        total += float(torch.einsum("ka,abc,ckb->", left.to(raw), raw, right))
    return total


@torch.no_grad()
def added_outputs(kept: KeptSamples, growth: ChannelGrowth) -> Iterator[tuple[KeptPass, Maps]]:
    """What new channels at amplitude 1 add to each consumer's output, per call, piece by piece of the samples."""
    first, inserted = kept.passes[0], inserted_by(growth, kept)
    entries = sum(each.numel() for maps in (first.x, first.v) for calls in maps.values() for each in calls)
    for piece in kept.pieces(entries // max(first.samples, 1), 2**25):
        yield piece, piece.added(piece.read(growth.incoming, growth.incoming_bias, inserted), growth.outgoing)


def inserted_by(growth: ChannelGrowth, kept: KeptSamples, measured: bool = False) -> Inserted:
    """What surgery will put in between for a proposal; `measured`: also moments of norm layers that it has none for."""
    copied = growth.copied_from
    if copied is not None and bool((copied < 0).any()):
        raise SolverError(
            "a proposal of new channels and halves of old ones has no δz: it changes old weights",
            got=growth.method,
            where=kept.site.name,
            fix="compare the loss before and after growing",
        )
    units = None if copied is None else copied[:: kept.site.granularity] // kept.site.granularity
    found = kept.moments(growth.incoming, growth.incoming_bias) if measured else {}
    return Inserted({**found, **growth.norms}, growth.norm_scale, growth.carried, units)


@torch.no_grad()
def choose_signs(subject: PairStatistics, growth: ChannelGrowth) -> ChannelGrowth:
    """Of (α, ω) and (−α, −ω) take per channel the one that captures more through the real activation.

    The linear theory cannot tell them apart; behind ReLU one of them may be dead on most samples. The share captured is
    max(⟨v⊥, δz⟩, 0)²/‖δz‖²: nothing where ⟨v⊥, δz⟩ < 0, since channels enter with a positive amplitude. The moments of
    norm layers that were not known before are measured.
    """
    kept = require_samples(subject, growth.method)
    turned, projected = -growth.gains.new_ones(growth.channels), kept.projected()
    both = [(each, inserted_by(each, projected, measured=True)) for each in (growth, scaled(growth, turned, turned))]
    captured = torch.zeros(2, growth.channels, dtype=torch.float64, device=kept.like.device)
    energy, entries = torch.zeros_like(captured), 0
    for path, weight in growth.outgoing.items():
        for each in projected.passes[0].v[path]:
            entries += each[:1].numel() * weight[0].numel() // len(weight)  # locations times columns
    for piece in projected.pieces(entries, DESIGN_ENTRIES):
        pulled: Maps = {}
        for index, (each, inserted) in enumerate(both):
            read = piece.read(each.incoming, each.incoming_bias, inserted)
            pulled = pulled or pulled_back(piece, read, growth.outgoing)
            sign = 1 - 2 * index  # ω turned turns what is pulled back
            for found in agreements(piece, read, pulled, growth.channels):
                captured[index] += sign * found.sum(0)
            energy[index] += _energies(piece, read, growth.outgoing, growth.channels)
    scores = captured.clamp_min(0).square() / energy.clamp_min(torch.finfo(energy.dtype).tiny)
    flip = scores[1] > scores[0] * (1 + 1e-6)  # an exact tie, as behind a linear activation, keeps the fixed sign
    signs = torch.where(flip, -1.0, 1.0)
    chosen = scaled(growth, signs, signs)
    chosen = replace(chosen, norms={**kept.moments(chosen.incoming, chosen.incoming_bias), **chosen.norms})
    return replace(chosen, expected_decrease=expected_decrease(subject, chosen))


def pulled_back(piece: KeptPass, read: Maps, outgoing: Mapping[str, Tensor]) -> Maps:
    """∂⟨v, δz⟩/∂(what the consumers read of the new channels), which does not depend on what they read."""
    with torch.enable_grad():
        calls, layout = tree_flatten(read)
        leaves = [each.detach().requires_grad_() for each in calls]
        total = piece.agreement(piece.added(tree_unflatten(leaves, layout), outgoing))
        return tree_unflatten(torch.autograd.grad(total, leaves), layout)


def agreements(piece: KeptPass, read: Maps, pulled: Maps, channels: int) -> list[Float[Tensor, "rows k"]]:
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
