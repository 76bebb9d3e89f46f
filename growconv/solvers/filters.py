"""Filters: new filters of all producers of a site, and what is done to whole units of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from growconv.network import layers
from growconv.network.layout import OUT
from growconv.network.site import GrowthSite
from growconv.solvers.weights import filters_of, normal, norms_of, of_units, scaled_rows

Weights = tuple[Tensor, Tensor | None]
"""Filters (entries, in/groups, *kernel) and biases (entries,), None for a producer without one."""


@dataclass(frozen=True, eq=False)
class Filters:
    """New filters of all producers.

    Attributes:
        units: how many units they are for; every producer has the same number of filters for each.
        by_path: per producer its weights, unit by unit.
    """

    units: int
    by_path: dict[str, Weights]

    def __iter__(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Path, filters and biases of every producer."""
        for path, (weight, bias) in self.by_path.items():
            yield path, weight, bias

    def __getitem__(self, path: str) -> Weights:
        """The weights of a producer."""
        return self.by_path[path]

    @property
    def incoming(self) -> dict[str, Tensor]:
        """The filters by producer."""
        return {path: weight for path, weight, _ in self}

    @property
    def biases(self) -> dict[str, Tensor]:
        """The biases of the producers that have one."""
        return {path: bias for path, _, bias in self if bias is not None}

    @property
    def like(self) -> Tensor:
        """A tensor of their dtype and device."""
        return next(iter(self.by_path.values()))[0]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [each for _, weight, bias in self for each in (weight, bias) if each is not None]

    def each(self, change: Callable[[Tensor], Tensor], units: int | None = None) -> "Filters":
        """The same function applied to all weights and biases."""
        changed = {path: (change(weight), None if bias is None else change(bias)) for path, weight, bias in self}
        return Filters(self.units if units is None else units, changed)

    def picked(self, units: Sequence[int]) -> "Filters":
        """Some of the units, in the order given."""
        return self.each(lambda tensor: tensor[of_units(units, len(tensor) // self.units)], len(units))

    def scaled(self, factor: Float[Tensor, " units"]) -> "Filters":
        """Every unit times a number."""
        return self.each(lambda tensor: scaled_rows(tensor, factor))

    @property
    def norms(self) -> Float[Tensor, " units"]:
        """Norm of every unit's filters, biases included, over all producers."""
        return norms_of(self.incoming, self.biases, self.units)

    def at_norm(self, norm: float) -> "Filters":
        """Every unit scaled to one norm; a unit of zeros stays as it is."""
        own = self.norms
        return self.scaled(torch.where(own > 0, norm / torch.where(own > 0, own, 1.0), 1.0))


def flattened(weight: Tensor, bias: Tensor | None) -> Float[Tensor, "k a"]:
    """Filters as rows, the bias last."""
    return weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)


def random_filters(site: GrowthSite, model: nn.Module, channels: int, generator: torch.Generator | None) -> Filters:
    """Gaussian filters of variance 1 / fan-in for every producer, and biases of zero where it has one."""
    found: dict[str, Weights] = {}
    for path in site.producers:
        layer, like = layers.weighted(model.get_submodule(path)), filters_of(model, path)
        shape = layer.shape(OUT, int(channels * site.ratio(path, OUT)))
        weight = normal(shape, like, generator) / like[0].numel() ** 0.5
        found[path] = (weight, None if layer.bias() is None else like.new_zeros(shape[0]))
    return Filters(channels // site.granularity, found)


def joined(parts: Sequence[Filters]) -> Filters:
    """Units of several proposals, one after the other."""
    found: dict[str, Weights] = {}
    for path in parts[0].by_path:
        biases = [bias for part in parts if (bias := part[path][1]) is not None]
        found[path] = (torch.cat([part[path][0] for part in parts]), torch.cat(biases) if biases else None)
    return Filters(sum(part.units for part in parts), found)
