"""A site's weights in one layout for every kind of layer, and the scale of new channels relative to the old ones.

Weights are filters (out, in/groups, *kernel) for every kind of layer. A site grows by whole *units* (`granularity`
channels each, mostly one); norms and scales are those of units.

α and ω leave one number per channel open: a factor on α can be divided out of ω. Training does depend on it: a channel
ten times smaller than its neighbours passes ten times smaller gradients to the layer that reads it, and one behind a
norm layer stays small until the norm's weight has grown. So new channels are given the scale of the old ones.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.network import layers
from growconv.network.layout import ENTRY, IN, OUT
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import Activation, Depthwise, GrowthSite, Norm, Other

FASTER = 1 / 8
"""What new channels behind a norm layer may add to how fast the layer that reads them learns. That grows with the sum
of the channels' squared sizes: twice the channels at full size learn twice as fast at once, and the loss of the next
steps suffers."""


def filters_of(site: GrowthSite, path: str) -> Tensor:
    """Filters (out, in/groups, *kernel) of a layer, detached.

    At least in float32: that is what methods compute in, and `solve` brings proposals back to the model's precision.
    """
    filters = site.layer(path).filters().detach()
    return filters.to(torch.promote_types(filters.dtype, torch.float32))


def bias_of(site: GrowthSite, path: str) -> Tensor | None:
    """Bias of a layer, detached and at least in float32; None where it has none."""
    bias = site.layer(path).bias()
    return None if bias is None else bias.detach().to(torch.promote_types(bias.dtype, torch.float32))


def entries_of(site: GrowthSite, path: str) -> int:
    """Entries of a producer's patches, the constant one of a bias included."""
    return filters_of(site, path)[0].numel() + (bias_of(site, path) is not None)


def units_of(site: GrowthSite) -> int:
    """Units that the site has now."""
    return site.width // site.granularity


@dataclass(frozen=True, eq=False)
class Filters:
    """Filters of all producers of a site, its own or new ones.

    Attributes:
        site: the site.
        units: how many units they are for; every producer has the same number of filters for each.
        rows: per producer one row a filter, unit by unit: its weights flattened, its bias last where there is one.
    """

    site: GrowthSite
    units: int
    rows: dict[str, Tensor]

    @property
    def like(self) -> Tensor:
        """A tensor of their dtype and device."""
        return next(iter(self.rows.values()))

    @property
    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Filters (entries, in/groups, *kernel) by producer, and biases (entries,) of those that have one."""
        filters, biases = {}, {}
        for path, rows in self.rows.items():
            layer = self.site.layer(path)
            shape = layer.shape(OUT, len(rows))
            filters[path] = rows[:, : math.prod(shape[1:])].reshape(shape).contiguous()
            if layer.bias() is not None:
                biases[path] = rows[:, -1].contiguous()
        return filters, biases

    @property
    def matrix(self) -> Float[Tensor, "units q"]:
        """One row a unit: all its filters, one producer after the other."""
        return torch.cat([rows.reshape(self.units, -1) for rows in self.rows.values()], 1)

    def from_matrix(self, matrix: Float[Tensor, "k q"]) -> "Filters":
        """The inverse of `matrix`, for any number of units."""
        parts = matrix.split([rows.numel() // self.units for rows in self.rows.values()], 1)
        found = {p: part.reshape(-1, rows.shape[1]) for (p, rows), part in zip(self.rows.items(), parts, strict=True)}
        return Filters(self.site, len(matrix), found)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Filters":
        """The same function applied to all rows."""
        return replace(self, rows={path: change(rows) for path, rows in self.rows.items()})

    def picked(self, units: Sequence[int]) -> "Filters":
        """Some of the units, in the order given."""
        found = self.each(lambda rows: rows[of_units(units, len(rows) // self.units)])
        return replace(found, units=len(units))

    def scaled(self, factor: Float[Tensor, " units"]) -> "Filters":
        """Every unit times a number."""
        return self.each(lambda rows: scaled_units(rows, factor))

    @property
    def norms(self) -> Float[Tensor, " units"]:
        """Norm of every unit's filters, biases included, over all producers."""
        return norms_of(self.rows.values(), self.units)

    def at_norm(self, norm: float) -> "Filters":
        """Every unit scaled to one norm; a unit of zeros stays as it is."""
        own = self.norms
        return self.scaled(torch.where(own > 0, norm / torch.where(own > 0, own, 1.0), 1.0))

    def proposed(
        self, method: str, outgoing: dict[str, Tensor], gains: Tensor | None = None, **others: Any
    ) -> ChannelGrowth:
        """A proposal of these filters; the arguments are fields of `ChannelGrowth`, and no gains are zeros."""
        filters, biases = self.weights
        gains = self.like.new_zeros(self.units * self.site.granularity) if gains is None else gains
        return ChannelGrowth(self.site.name, method, filters, outgoing, gains, biases, **others)


def old_filters(site: GrowthSite) -> Filters:
    """The filters of the site's own channels."""
    found = {}
    for path in site.producers:
        at, filters, bias = site.entries(path, OUT), filters_of(site, path).flatten(1), bias_of(site, path)
        found[path] = (filters if bias is None else torch.cat([filters, bias[:, None]], 1))[at]
    return Filters(site, units_of(site), found)


def random_filters(site: GrowthSite, channels: int, generator: torch.Generator | None) -> Filters:
    """Gaussian filters of variance 1 / fan-in for every producer, and biases of zero where it has one."""
    found = {}
    for path in site.producers:
        like = filters_of(site, path)[0].flatten()
        drawn = normal((int(channels * site.ratio(path, OUT)), len(like)), like, generator) / len(like) ** 0.5
        found[path] = drawn if bias_of(site, path) is None else torch.nn.functional.pad(drawn, (0, 1))
    return Filters(site, channels // site.granularity, found)


def filter_norms(site: GrowthSite) -> Float[Tensor, " units"]:
    """Norm of each old unit's incoming weights, biases included, over all producers."""
    return old_filters(site).norms


def columns_of(site: GrowthSite, path: str) -> Tensor:
    """A consumer's weights on the site's old channels, (out, units, entries, *kernel), detached.

    The entries are those of a unit within a group, for a grouped consumer those that the output's own group reads.
    """
    return filters_of(site, path)[_columns(site, path)].unflatten(1, (units_of(site), -1))


def with_scaled_columns(
    site: GrowthSite, path: str, factor: Float[Tensor, " units"], revised: Tensor | None = None
) -> Tensor:
    """A consumer's whole weight as it stores it, the columns on each old unit times a number.

    `revised` has other values of the stored weight, where the layer is a producer of the site too.
    """
    layer, at = site.layer(path), _columns(site, path)
    filters = (filters_of(site, path) if revised is None else layer.as_stored(revised)).clone()
    filters[at] = scaled_units(filters[at], factor, 1)
    return layer.as_stored(filters)


def _columns(site: GrowthSite, path: str) -> tuple[Tensor, Tensor]:
    """Index of a consumer's filters at the channels: per output the columns of those that its group reads."""
    layer, entries, columns = site.layer(path), torch.tensor(site.entries(path, IN)), []
    rows, inputs = layer.size(OUT) // layer.groups, layer.size(IN) // layer.groups
    for group in range(layer.groups):
        columns.append((entries[entries // inputs == group] % inputs).expand(rows, -1))
    return torch.arange(layer.size(OUT))[:, None], torch.cat(columns)


def outgoing_norms(site: GrowthSite) -> Float[Tensor, " units"]:
    """Norm of the weights on each old unit, over all consumers."""
    return norms_of((columns_of(site, path) for path in site.consumers), units_of(site), 1)


def norms_of(tensors: Iterable[Tensor], units: int, axis: int = 0) -> Float[Tensor, " units"]:
    """Norm of each unit's part of tensors that list entries unit by unit along an axis: 0, or 1 of outgoing weights."""
    return torch.cat([each.movedim(axis, 0).reshape(units, -1) for each in tensors], 1).norm(dim=1)


def scaled_units(weight: Tensor, factor: Float[Tensor, " units"], axis: int = 0) -> Tensor:
    """Weights with each unit's entries along an axis times a number: 0 of filters, 1 of outgoing weights."""
    each = factor.to(weight).repeat_interleave(weight.shape[axis] // max(len(factor), 1))
    return weight * each.view(-1, *[1] * (weight.dim() - 1 - axis))


def of_units(order: Sequence[int], size: int) -> list[int]:
    """Indices of rows or channels from indices of units that have `size` of them."""
    return [unit * size + member for unit in order for member in range(size)]


def silent_outgoing(site: GrowthSite, channels: int) -> dict[str, Tensor]:
    """Outgoing weights of zero, (out, K·ratio/groups, *kernel) per consumer."""
    found = {}
    for path in site.consumers:
        shape = site.layer(path).shape(IN, int(channels * site.ratio(path)))
        found[path] = filters_of(site, path).new_zeros(shape)
    return found


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers on the device of `like`, drawn where the generator lives: a seed means the same."""
    place = generator.device if generator is not None else torch.device("cpu")
    return torch.randn(shape, generator=generator, device=place, dtype=torch.float64).to(like)


def not_rewritable(site: GrowthSite, *paths: str) -> str | None:
    """Why old weights of some layers cannot be given other values; None where they can."""
    for path in paths:
        if not site.layer(path).rewritable:
            return f"the weight of {path} is computed from others, and the method gives old weights other values"
    return not_plain(site, *paths)


def not_plain(site: GrowthSite, *paths: str) -> str | None:
    """Which of some layers does not multiply with its weight as it is; None where all do."""
    for path in paths:
        if not site.layer(path).plain:
            return f"{path} has a forward of its own, which makes another weight of the stored one"
    return None


def not_homogeneous(site: GrowthSite, behind_norms: bool = False) -> str | None:
    """The first thing in between through which a positive factor does not pass, f(sx) = s·f(x); None: it passes all.

    Norm layers count with their transparent entries: a batch norm passes, one with the statistics of a sample does not.

    Args:
        behind_norms: look at old channels, and only behind the last norm of each route, which must have a scale.
    """
    for route in site.routes:
        if route.problem:
            return route.problem
        steps, last = route.steps, None
        for at, step in enumerate(route.steps if behind_norms else ()):
            if isinstance(step, Norm):
                steps, last = route.steps[at + 1 :], step.path
        if last is not None and getattr(site.model.get_submodule(last), "weight", None) is None:
            return f"{last} has no scale of its own"
        for step in steps:
            if isinstance(step, Other) or (isinstance(step, Activation) and not step.homogeneous):
                return f"{step.name} lies in between"
            if isinstance(step, Depthwise) and behind_norms:
                return f"{step.path} lies in between"
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
        return filter_norms(site).double()
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
    norms = filter_norms(site).double()
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


def scaled(
    growth: ChannelGrowth, factor: Float[Tensor, " units"], outgoing: Float[Tensor, " units"] | None = None
) -> ChannelGrowth:
    """A proposal with each unit's filters times a number, norms to match, and its outgoing weights times another."""
    incoming, biases, norms, columns = {}, {}, {}, growth.outgoing
    for path, weight in growth.incoming.items():
        incoming[path] = scaled_units(weight, factor)
    for path, bias in growth.incoming_bias.items():
        biases[path] = scaled_units(bias, factor)
    for path, (mean, variance) in growth.norms.items():
        norms[path] = (scaled_units(mean, factor), scaled_units(variance, factor.square()))
    if outgoing is not None:
        columns = {path: scaled_units(weight, outgoing, 1) for path, weight in columns.items()}
    return replace(growth, incoming=incoming, incoming_bias=biases, norms=norms, outgoing=columns)


def at_old_scale(site: GrowthSite, growth: ChannelGrowth) -> ChannelGrowth:
    """New filters at the mean norm of the old ones, new channels behind a norm layer at up to the old ones' mean size.

    Where they are more than an eighth as many as the old ones they come out smaller, so that the sum of their squared
    sizes is an eighth of that of the old ones. The outgoing weights change inversely, so where all that lies between is
    positively homogeneous the function stays. No filter of the proposal may be zero; behind norm layers whose weights
    are all zero channels keep their own scale.
    """
    norms = _norms(site, growth)
    factor = filter_norms(site).double().mean().to(norms) / norms
    changed = scaled(growth, factor)
    typical = float(old_sizes(site).mean()) * min(1.0, math.sqrt(FASTER * site.width / growth.channels))
    if scaling_norms(site) and typical > 0:
        scale = typical / new_sizes(site, changed)
        factor, each = factor * scale, scale.repeat_interleave(site.granularity)
        each = each if growth.norm_scale is None else each * growth.norm_scale
        changed = replace(changed, norm_scale=each.to(next(iter(growth.incoming.values()))))
    return replace(changed, outgoing={p: scaled_units(w, 1 / factor, 1) for p, w in growth.outgoing.items()})


def _norms(site: GrowthSite, growth: ChannelGrowth) -> Float[Tensor, " units"]:
    """Norm of each new unit's incoming weights, biases included, over all producers."""
    tensors = map(Tensor.double, (*growth.incoming.values(), *growth.incoming_bias.values()))
    return norms_of(tensors, growth.channels // site.granularity)
