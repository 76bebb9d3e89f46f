"""From factors to weights: the last step that every method on statistics shares."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.errors import ArgumentTypeError, ArgumentValueError, StatisticsError
from growconv.linalg import fix_signs
from growconv.network import layers
from growconv.network.proposal import ChannelGrowth
from growconv.network.routes import Activation, Other
from growconv.network.site import GrowthSite
from growconv.solvers.base import Request
from growconv.solvers.energy import choose_signs, expected_decrease, require_samples
from growconv.solvers.weights import at_old_scale, bias_of, filters_of, from_rows, homogeneous
from growconv.statistics.pair import PairStatistics

NOT_TAKEN = 8
"""Further singular values that a proposal shows beside those it takes."""
NOTHING_TO_GAIN = "nothing to gain: no new channel would lower the loss to first order (N is zero)"


def require_statistics(subject: PairStatistics, *names: str) -> tuple[list[Tensor], ...]:
    """Statistics of every consumer; refuses those that were not collected, are empty or not finite.

    Args:
        *names: attributes of every consumer that must be there.

    Returns:
        Per name the statistic of each consumer, in their order.

    Raises:
        StatisticsError: which statistic of which site, and how to collect it.
    """
    where = subject.growth_site.name
    if subject.samples < 1:
        raise StatisticsError(
            "the statistics have zero samples",
            got=f"{subject.samples} samples",
            where=where,
            fix="run at least one batch with a backward pass inside the collector",
        )
    found: tuple[list[Tensor], ...] = tuple([] for _ in names)
    for consumer in subject.consumers:
        for values, name in zip(found, names, strict=True):
            value = getattr(consumer, name)
            if value is None:
                raise StatisticsError(
                    f"the statistic {name} was not collected",
                    where=f"{where}, consumer {consumer.consumer}",
                    fix=f"collect with quantities={{'{name}', ...}}, or solver.reads",
                )
            if not bool(torch.isfinite(value).all()):
                raise StatisticsError(
                    f"the statistic {name} is not finite",
                    got=f"{int((~torch.isfinite(value)).sum())} entries infinite or undefined",
                    where=f"{where}, consumer {consumer.consumer}",
                    fix="look for an overflow in the loss, or lower the loss scale",
                )
            values.append(value)
    return found


def require_moments(channels: int, N: Tensor, **squares: Tensor) -> None:
    """Refuse what a method on bare tensors cannot work with; finite entries are not looked at.

    Args:
        channels: how many are wanted.
        N: correlation, a matrix or more with the patch entries first.
        **squares: second moments by name, which are to be square.

    Raises:
        ArgumentTypeError: channels that are no integer, or numbers of half precision, integers or complex ones.
        ArgumentValueError: fewer than one channel, shapes that are not as said, or tensors of several dtypes.
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
        method: name of the solver.
        left: (k, a), the new filters of all producers, each with its bias last where it has one.
        right: (k, columns), the weights (b, c2) of one consumer after the other, in the order of `subject.consumers`.
        gains: (k,) captured energy.
        reason: why there are fewer than asked for.
        signs: choose the sign of each channel on the kept samples, where there are any.

    Returns:
        The proposal, its signs fixed or chosen.
    """
    subject, site, channels = request.subject, request.site, len(left)
    if channels:
        left, right = fix_signs(left, right)
    incoming, biases = filters_in(site, left)
    outgoing, start = {}, 0
    for path in site.consumers:
        weight, ratio = filters_of(site, path), int(site.ratio(path))
        end = start + len(weight) * ratio * math.prod(weight.shape[2:])
        own = right[:, start:end].unflatten(1, (-1, len(weight)))
        # (k, b, c) to (c, k·ratio, *kernel): a flattening consumer has its grid where a convolution has its kernel.
        shape = (len(weight), channels * ratio, *weight.shape[2:])
        outgoing[path], start = own.permute(2, 0, 1).reshape(shape).to(weight).contiguous(), end
    growth = ChannelGrowth(
        site=site.name,
        method=method,
        incoming=incoming,
        incoming_bias=biases,
        outgoing=outgoing,
        gains=gains.detach(),
        requested=request.number,
        reason=reason,
        norms=norm_moments(subject, left, incoming, biases),
    )
    if channels and not homogeneous(site) and bool((left != 0).any(1).all()):
        # The linear theory leaves the channels' scale open, a curved activation does not: that of the old channels is
        # one at which it works, and at which the gradients on the outgoing weights are of the usual size.
        growth = at_old_scale(site, growth)
    if channels and signs and subject.samples_kept is not None:
        return choose_signs(subject, growth)
    return replace(growth, expected_decrease=_decrease(subject, growth))


def filters_in(site: GrowthSite, left: Float[Tensor, "k a"]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Filters and biases of every producer, from rows that have one producer after the other, its bias last."""
    incoming, biases, start = {}, {}, 0
    for path in site.producers:
        kernel, has_bias = filters_of(site, path), bias_of(site, path) is not None
        end = start + kernel[0].numel() + has_bias
        incoming[path], bias = from_rows(left[:, start:end].to(kernel), kernel.shape[1:], has_bias)
        if bias is not None:
            biases[path] = bias
        start = end
    return incoming, biases


def entries_of(site: GrowthSite, path: str) -> int:
    """Entries of a producer's patches, the constant one of a bias included."""
    return filters_of(site, path)[0].numel() + (bias_of(site, path) is not None)


def mean_gram(request: Request, grams: Sequence[Tensor]) -> Float[Tensor, "a a"]:
    """One S for all consumers: that of each producer averaged over the consumers that read it, c of them.

    The consumers' forms add up; entry (a, a') of the sum is divided by √(c_a·c_a'), which keeps it positive.
    """
    counts, producers = [], [route.producer for route in request.site.routes]
    for path in request.site.producers:
        counts += [producers.count(path)] * entries_of(request.site, path)
    root = torch.tensor(counts).to(grams[0]).sqrt()
    return torch.stack(list(grams)).sum(0) / (root[:, None] * root)


def empty(request: Request, method: str, reason: str) -> ChannelGrowth:
    """A proposal of no channels, with the reason."""
    like = filters_of(request.site, request.site.producers[0])
    left = like.new_zeros(0, sum(entries_of(request.site, path) for path in request.site.producers))
    return assemble(request, method, left, like.new_zeros(0, 0), like.new_zeros(0), reason)


def norm_moments(
    subject: PairStatistics, left: Float[Tensor, "k a"], incoming: Mapping[str, Tensor], biases: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of the new channels' own values before the norm layers that directly follow the producers.

    The moments are linear and quadratic in the filters: mean αᵀE[U], variance αᵀE[UUᵀ]α − mean². Those behind several
    producers are measured on the kept samples.
    """
    site, norms = subject.growth_site, {}
    firsts = {route.norm: layers.norm(site.model.get_submodule(route.norm)) for route in site.routes if route.norm}
    if len(site.producers) > 1 and firsts and bool((left != 0).any()):
        like, found = next(iter(incoming.values())), require_samples(subject, "a norm layer").moments(incoming, biases)
        for path, norm in firsts.items():
            if not norm.by_sample:
                norms[path] = (found[path][0].to(like), found[path][1].to(like))
        return norms
    if subject.patch_mean is None or subject.patch_gram is None or len(left) == 0:
        return {}
    mean = left @ subject.patch_mean
    variance = (torch.einsum("ka,ad,kd->k", left, subject.patch_gram, left) - mean.square()).clamp_min(0)
    weight = next(iter(incoming.values()))
    for path, norm in firsts.items():
        # where it depends on the signs of the whole group, it is measured once they are chosen
        if not norm.by_sample or subject.samples_kept is None:
            pooled = norm.pooled(mean, variance)
            norms[path] = (pooled[0].to(weight), pooled[1].to(weight))
    return norms


def _decrease(subject: PairStatistics, growth: ChannelGrowth) -> float | None:
    """The expected decrease where the statistics tell it: on samples, or where all that lies between is linear."""
    steps = [step for route in subject.growth_site.routes for step in route.steps]
    curved = any(isinstance(step, (Activation, Other)) or not getattr(step, "average", True) for step in steps)
    return None if curved and subject.samples_kept is None else expected_decrease(subject, growth)
