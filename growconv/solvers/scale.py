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

from growconv.network import layers
from growconv.network.layout import ENTRY
from growconv.network.proposal import ChannelGrowth
from growconv.network.routes import Activation, Norm, Other
from growconv.network.site import GrowthSite
from growconv.solvers.existing import filter_norms, norms_of, scaled_columns, scaled_rows, units_of

FASTER = 1 / 8
"""What new channels behind a norm layer may add to how fast the layer that reads them learns. That grows with the sum
of the channels' squared sizes: twice the channels at full size learn twice as fast at once, and the loss of the next
steps suffers."""


def homogeneous(site: GrowthSite) -> bool:
    """Whether what lies between producers and consumers takes a positive factor through: f(sx) = s·f(x)."""
    return not_homogeneous(site) is None


def not_homogeneous(site: GrowthSite) -> str | None:
    """The first thing in between through which a positive factor does not pass; None where it passes through all.

    Norm layers count with their transparent entries: a batch norm passes, one with the statistics of a sample does not.
    """
    for route in site.routes:
        if route.problem:
            return route.problem
        for step in route.steps:
            if isinstance(step, Other) or (isinstance(step, Activation) and not step.homogeneous):
                return f"{step.name} lies in between"
            if isinstance(step, Norm) and layers.norm(site.model.get_submodule(step.path)).by_sample:
                return f"{step.path} normalises every sample by itself"
    return None if site.routes else "nothing is known of what lies in between"


def scaling_norms(site: GrowthSite) -> list[str]:
    """The norm layers with weights, one on every route, that say how large a channel comes out; [] where none do."""
    paths: list[str] = []
    for route in site.routes:
        norms = [step.path for step in route.steps if isinstance(step, Norm)]
        if len(norms) != 1 or getattr(site.model.get_submodule(norms[0]), "weight", None) is None:
            return []
        paths.append(norms[0])
    return list(dict.fromkeys(paths))


def old_sizes(site: GrowthSite) -> Float[Tensor, " units"]:
    """How large each old channel comes out: √(weight² + bias²) of its norm layers, or the norm of its filters.

    The first is the root mean square behind a norm layer that normalises over the batch, averaged over several.
    """
    paths = scaling_norms(site)
    if not paths:
        return filter_norms(site, site.model).double()
    squares = []
    for path in paths:
        module = site.model.get_submodule(path)
        index = site.entries(path, ENTRY)
        parts = (getattr(module, name) for name in ("weight", "bias"))
        square = sum(part.detach().double()[index].square() for part in parts if isinstance(part, Tensor))
        squares.append(torch.as_tensor(square).unflatten(0, (units_of(site), -1)).mean(1))
    return torch.stack(squares).mean(0).sqrt()


def old_steepness(site: GrowthSite) -> Float[Tensor, " units"]:
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
            factors.append(slope[site.entries(path, ENTRY)].unflatten(0, (units_of(site), -1)).mean(1))
    return norms * torch.stack(factors).mean(0) if factors else norms


def new_sizes(site: GrowthSite, growth: ChannelGrowth) -> Float[Tensor, " units"]:
    """How large each new unit comes out, in the sense of `old_sizes`."""
    paths, norms = scaling_norms(site), _norms(site, growth)
    if not paths:
        return norms
    squares = []
    for path in paths:
        ones = norms.new_ones(len(norms))
        mean, variance = growth.norms.get(path, (torch.zeros_like(ones), ones))
        square = mean.to(ones).square() + variance.to(ones) + float(getattr(site.model.get_submodule(path), "eps", 0.0))
        squares.append(square.unflatten(0, (len(norms), -1)).mean(1))
    size = torch.stack(squares).mean(0).sqrt()
    scale = growth.norm_scale
    return size if scale is None else size * scale.to(size).unflatten(0, (len(size), -1)).mean(1)


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
    norms = _norms(site, growth)
    factor = filter_norms(site, site.model).double().mean().to(norms) / norms
    changed = replace(
        growth,
        incoming={path: scaled_rows(weight, factor) for path, weight in growth.incoming.items()},
        incoming_bias={path: scaled_rows(bias, factor) for path, bias in growth.incoming_bias.items()},
        norms={
            path: (scaled_rows(mean, factor), scaled_rows(variance, factor.square()))
            for path, (mean, variance) in growth.norms.items()
        },
    )
    typical = float(old_sizes(site).mean()) * min(1.0, math.sqrt(FASTER * site.width / growth.channels))
    if scaling_norms(site) and typical > 0:
        scale = typical / new_sizes(site, changed)
        like = next(iter(growth.incoming.values()))
        each = scale.repeat_interleave(site.granularity)
        changed = replace(
            changed, norm_scale=(each if growth.norm_scale is None else each * growth.norm_scale).to(like)
        )
        factor = factor * scale
    return replace(changed, outgoing={p: scaled_columns(w, 1 / factor) for p, w in growth.outgoing.items()})


def _norms(site: GrowthSite, growth: ChannelGrowth) -> Float[Tensor, " units"]:
    """Norm of each new unit's incoming weights, biases included, over all producers."""
    incoming = {path: weight.double() for path, weight in growth.incoming.items()}
    biases = {path: bias.double() for path, bias in growth.incoming_bias.items()}
    return norms_of(incoming, biases, growth.channels // site.granularity)
