"""From factors to weights: the last step that every method on statistics shares."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from growconv.errors import ArgumentTypeError, ArgumentValueError, StatisticsError
from growconv.linalg import fix_signs
from growconv.network import layers
from growconv.network.proposal import ChannelGrowth
from growconv.network.routes import Activation, Norm, Other
from growconv.network.site import GrowthSite
from growconv.solvers.energy import choose_signs, expected_decrease, require_samples
from growconv.solvers.request import Request
from growconv.solvers.weights import at_old_scale, bias_of, filters_of, homogeneous
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
    for consumer in subject.consumers:
        for name in names:
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
    return tuple([getattr(consumer, name) for consumer in subject.consumers] for name in names)


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
    rights: Sequence[Tensor],
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
        rights: per consumer (k, b, c2), in the order of `subject.consumers`.
        gains: (k,) captured energy.
        reason: why there are fewer than asked for.
        signs: choose the sign of each channel on the kept samples, where there are any.

    Returns:
        The proposal, its signs fixed or chosen.
    """
    subject, model, channels = request.subject, request.model, left.shape[0]
    if channels:
        left, joined = fix_signs(left, torch.cat([right.flatten(1) for right in rights], 1))
        parts = joined.split([right[0].numel() for right in rights], 1)
        rights = [part.reshape(right.shape) for part, right in zip(parts, rights, strict=True)]
    incoming, biases = filters_in(subject.growth_site, model, left)
    outgoing = {}
    for consumer, right in zip(subject.consumers, rights, strict=True):
        weight = filters_of(model, consumer.consumer)
        # (k, b, c) to (c, k·ratio, *kernel): a flattening consumer has its grid where a convolution has its kernel.
        entries_per_channel = int(subject.growth_site.ratio(consumer.consumer))
        shape = (right.shape[2], channels * entries_per_channel, *weight.shape[2:])
        outgoing[consumer.consumer] = right.permute(2, 0, 1).reshape(shape).to(weight).contiguous()
    growth = ChannelGrowth(
        site=subject.growth_site.name,
        method=method,
        incoming=incoming,
        incoming_bias=biases,
        outgoing=outgoing,
        gains=gains.detach(),
        requested=request.number,
        reason=reason,
        norms=norm_moments(subject, left, incoming, biases),
    )
    if channels and not homogeneous(subject.growth_site) and bool((left != 0).any(1).all()):
        # The linear theory leaves the channels' scale open, a curved activation does not: that of the old channels is
        # one at which it works, and at which the gradients on the outgoing weights are of the usual size.
        growth = at_old_scale(subject.growth_site, growth)
    if channels and signs and subject.samples_kept is not None:
        return choose_signs(subject, growth)
    return replace(growth, expected_decrease=_decrease(subject, growth))


def filters_in(
    site: GrowthSite, model: nn.Module, left: Float[Tensor, "k a"]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Filters and biases of every producer, from rows that have one producer after the other, its bias last."""
    incoming, biases, start = {}, {}, 0
    for path in site.producers:
        kernel, end = filters_of(model, path), start + entries_of(model, path)
        own = left[:, start:end].to(kernel)
        incoming[path] = own[:, : kernel[0].numel()].reshape(len(left), *kernel.shape[1:]).contiguous()
        if own.shape[1] > kernel[0].numel():
            biases[path] = own[:, -1].contiguous()
        start = end
    return incoming, biases


def entries_of(model: nn.Module, path: str) -> int:
    """Entries of a producer's patches, the constant one of a bias included."""
    return filters_of(model, path)[0].numel() + (bias_of(model, path) is not None)


def mean_gram(request: Request, grams: Sequence[Tensor]) -> Float[Tensor, "a a"]:
    """One S for all consumers: that of each producer averaged over the consumers that read it, c of them.

    The consumers' forms add up; entry (a, a') of the sum is divided by √(c_a·c_a'), which keeps it positive.
    """
    counts, routes = [], request.site.routes
    for path in request.site.producers:
        counts += [sum(route.producer == path for route in routes)] * entries_of(request.model, path)
    root = torch.tensor(counts).to(grams[0]).sqrt()
    return torch.stack(list(grams)).sum(0) / (root[:, None] * root)


def empty(request: Request, method: str, reason: str) -> ChannelGrowth:
    """A proposal of no channels, with the reason."""
    subject, model = request.subject, request.model
    kernel = filters_of(model, request.site.producers[0])
    left = kernel.new_zeros(0, sum(entries_of(model, path) for path in request.site.producers))
    rights = [kernel.new_zeros(0, 1, consumer.outgoing_shape[0]) for consumer in subject.consumers]
    return assemble(request, method, left, rights, kernel.new_zeros(0), reason)


def norm_moments(
    subject: PairStatistics,
    left: Float[Tensor, "k a"],
    incoming: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of the new channels' own values before the norm layers that directly follow the producers.

    The moments are linear and quadratic in the filters: mean αᵀE[U], variance αᵀE[UUᵀ]α − mean². Those behind several
    producers are measured on the kept samples.
    """
    site = subject.growth_site
    firsts = {step.path for route in site.routes for step in route.steps[:1] if isinstance(step, Norm)}
    if len(site.producers) > 1 and firsts and bool((left != 0).any()):
        like, found = next(iter(incoming.values())), require_samples(subject, "a norm layer").moments(incoming, biases)
        by_sample = {path for path in firsts if layers.norm(site.model.get_submodule(path)).by_sample}
        return {path: (found[path][0].to(like), found[path][1].to(like)) for path in firsts - by_sample}
    if subject.patch_mean is None or subject.patch_gram is None or left.shape[0] == 0:
        return {}
    mean = left @ subject.patch_mean
    variance = (torch.einsum("ka,ad,kd->k", left, subject.patch_gram, left) - mean.square()).clamp_min(0)
    norms = {}
    for route in site.routes:
        first = next(iter(route.steps), None)
        if isinstance(first, Norm):
            norm = layers.norm(site.model.get_submodule(first.path))
            if norm.by_sample and subject.samples_kept is not None:
                continue  # depends on the signs of the whole group: measured once they are chosen
            weight = filters_of(site.model, route.producer)
            pooled = norm.pooled(mean, variance)
            norms[first.path] = (pooled[0].to(weight), pooled[1].to(weight))
    return norms


def _decrease(subject: PairStatistics, growth: ChannelGrowth) -> float | None:
    """The expected decrease where the statistics tell it: on samples, or where all that lies between is linear."""
    steps = [step for route in subject.growth_site.routes for step in route.steps]
    curved = any(isinstance(step, (Activation, Other)) or not getattr(step, "average", True) for step in steps)
    return None if curved and subject.samples_kept is None else expected_decrease(subject, growth)
