"""How large new channels come out, beside the old ones.

α and ω leave one number a channel open: what α is multiplied with, ω can be divided by. Training does not leave it
open: a channel that comes out ten times quieter than its neighbours passes ten times smaller gradients to the layer
that reads it, and one behind a norm layer stays quiet until the norm's weight has grown.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.network.proposal import ChannelGrowth
from growconv.network.routes import Activation, Norm, Other
from growconv.network.site import GrowthSite
from growconv.solvers.existing import filter_norms

FASTER = 1 / 8
"""What new channels behind a norm layer may add to how fast the layer that reads them learns. That grows with the sum
of the channels' squared sizes: twice the channels at full size learn twice as fast at once, and the loss of the next
steps suffers."""

HOMOGENEOUS = frozenset(
    {"ReLU", "LeakyReLU", "PReLU", "Identity", "relu", "relu_", "leaky_relu", "leaky_relu_", "prelu"}
)
"""Activations with σ(sx) = sσ(x) for every s > 0."""


def homogeneous(site: GrowthSite) -> bool:
    """Whether what lies between producers and consumers takes a positive factor through: f(sx) = s·f(x)."""
    steps = [step for route in site.routes for step in route.steps]
    return not any(
        isinstance(step, Other) or (isinstance(step, Activation) and step.name not in HOMOGENEOUS) for step in steps
    )


def scaling_norms(site: GrowthSite) -> list[str]:
    """The norm layers with weights, one on every route, that say how large a channel comes out; [] where none do."""
    paths: list[str] = []
    for route in site.routes:
        norms = [step.path for step in route.steps if isinstance(step, Norm)]
        if len(norms) != 1 or getattr(site.model.get_submodule(norms[0]), "weight", None) is None:
            return []
        paths.append(norms[0])
    return list(dict.fromkeys(paths))


def old_sizes(site: GrowthSite) -> Float[Tensor, " width"]:
    """How large each old channel comes out: √(weight² + bias²) of its norm layers, or the norm of its filters.

    The first is the root mean square behind a norm layer that normalises over the batch, averaged over several.
    """
    paths = scaling_norms(site)
    if not paths:
        return filter_norms(site, site.model).double()
    squares = []
    for path in paths:
        module = site.model.get_submodule(path)
        index = site.entries(path, "norm")
        parts = (getattr(module, name) for name in ("weight", "bias"))
        square = sum(part.detach().double()[index].square() for part in parts if isinstance(part, Tensor))
        squares.append(torch.as_tensor(square).unflatten(0, (site.width, -1)).mean(1))
    return torch.stack(squares).mean(0).sqrt()


def old_steepness(site: GrowthSite) -> Float[Tensor, " width"]:
    """Norm of each old channel's filters, times what a norm layer with running statistics multiplies them with.

    The steepest slope of the channel over its inputs. New channels come with transparent norms: theirs is ‖α‖.
    """
    norms = filter_norms(site, site.model).double()
    factors = []
    for path in scaling_norms(site):
        module = site.model.get_submodule(path)
        variance, weight = getattr(module, "running_var", None), module.weight
        if isinstance(variance, Tensor) and isinstance(weight, Tensor):
            slope = weight.detach().double().abs() / (variance.double() + getattr(module, "eps", 0.0)).sqrt()
            factors.append(slope[site.entries(path, "norm")].unflatten(0, (site.width, -1)).mean(1))
    return norms * torch.stack(factors).mean(0) if factors else norms


def new_sizes(site: GrowthSite, growth: ChannelGrowth) -> Float[Tensor, " k"]:
    """How large each new channel comes out, in the sense of `old_sizes`."""
    paths = scaling_norms(site)
    if not paths:
        return _norms(growth)
    squares = []
    for path in paths:
        ones = _norms(growth).new_ones(growth.channels)
        mean, variance = growth.norms.get(path, (torch.zeros_like(ones), ones))
        squares.append(mean.to(ones).square() + variance.to(ones) + getattr(site.model.get_submodule(path), "eps", 0.0))
    size = torch.stack(squares).mean(0).sqrt()
    return size if growth.norm_scale is None else size * growth.norm_scale.to(size)


def at_old_scale(site: GrowthSite, growth: ChannelGrowth) -> ChannelGrowth:
    """New filters at the mean norm of the old ones, new channels behind a norm layer at up to the old ones' mean size.

    Where they are more than an eighth as many as the old ones they come out smaller, so that the sum of their squared
    sizes is an eighth of that of the old ones. The outgoing weights change inversely, so where all that lies between is
    positively homogeneous the function stays.

    Args:
        site: where.
        growth: a proposal whose filters are not zero.

    Returns:
        The proposal at the old channels' scale; behind norm layers whose weights are all zero at its own.
    """
    norms = _norms(growth)
    factor = filter_norms(site, site.model).double().mean().to(norms) / norms
    changed = replace(
        growth,
        incoming={path: weight * _along(weight, factor, 0) for path, weight in growth.incoming.items()},
        incoming_bias={path: bias * factor.to(bias) for path, bias in growth.incoming_bias.items()},
        norms={
            path: (mean * factor.to(mean), variance * factor.to(variance).square())
            for path, (mean, variance) in growth.norms.items()
        },
    )
    typical = float(old_sizes(site).mean()) * min(1.0, math.sqrt(FASTER * site.width / growth.channels))
    if scaling_norms(site) and typical > 0:
        scale = typical / new_sizes(site, changed)
        like = next(iter(growth.incoming.values()))
        changed = replace(
            changed, norm_scale=(scale if growth.norm_scale is None else scale * growth.norm_scale).to(like)
        )
        factor = factor * scale

    def inverse(weight: Tensor) -> Tensor:
        blocks = weight.unflatten(1, (growth.channels, -1))
        return (blocks / _along(blocks, factor, 1)).flatten(1, 2)

    return replace(changed, outgoing={path: inverse(weight) for path, weight in growth.outgoing.items()})


def _norms(growth: ChannelGrowth) -> Float[Tensor, " k"]:
    """Norm of each new channel's incoming weights, biases included, over all producers."""
    square = sum(weight.double().flatten(1).square().sum(1) for weight in growth.incoming.values())
    return torch.as_tensor(square + sum(bias.double().square() for bias in growth.incoming_bias.values())).sqrt()


def _along(weight: Tensor, factor: Tensor, axis: int) -> Tensor:
    """A factor per channel, shaped to multiply a weight with the channels along an axis."""
    return factor.to(weight).view(*[1] * axis, -1, *[1] * (weight.dim() - axis - 1))
