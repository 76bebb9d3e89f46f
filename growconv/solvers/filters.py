"""New filters of all producers of a site, by whole units, and coordinates in which they are searched for."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from growconv.network import layers
from growconv.network.layout import OUT
from growconv.network.site import GrowthSite
from growconv.solvers.weights import Weights, filters_of, flattened, from_rows, normal, norms_of, of_units, scaled_rows
from growconv.statistics.columns import columns
from growconv.statistics.samples import KeptSamples


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
        return norms_of(self.tensors, self.units)

    def at_norm(self, norm: float) -> "Filters":
        """Every unit scaled to one norm; a unit of zeros stays as it is."""
        own = self.norms
        return self.scaled(torch.where(own > 0, norm / torch.where(own > 0, own, 1.0), 1.0))


def random_filters(site: GrowthSite, channels: int, generator: torch.Generator | None) -> Filters:
    """Gaussian filters of variance 1 / fan-in for every producer, and biases of zero where it has one."""
    found: dict[str, Weights] = {}
    for path in site.producers:
        layer, like = site.layer(path), filters_of(site, path)
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


@dataclass(frozen=True)
class ProducerCoordinates:
    """One producer's filters, and the coordinates in which its patches have about the same size in every direction.

    Attributes:
        path: of the producer.
        shape: (in/groups, *kernel) of a filter.
        filters: filters of a unit.
        bias: whether the producer has one; it is the last entry.
        root: (a, a) damped G^(-1/2) of its patches: a filter is a row of parameters times it.
        inverse: G^(1/2).
    """

    path: str
    shape: tuple[int, ...]
    filters: int
    bias: bool
    root: Tensor
    inverse: Tensor

    @property
    def entries(self) -> int:
        """Weights of a filter, the bias included."""
        return math.prod(self.shape) + self.bias

    @property
    def size(self) -> int:
        """Parameters of a unit."""
        return self.filters * self.entries

    def rows(self, theta: Tensor) -> Float[Tensor, "filters a"]:
        """One row a filter from one a unit."""
        return theta.reshape(-1, self.entries)

    def unflatten(self, flat: Tensor) -> Weights:
        """Filters and biases from rows, one a filter."""
        return from_rows(flat, self.shape, self.bias)

    def embed(self, weight: Tensor, bias: Tensor | None) -> Float[Tensor, "k a"]:
        """Whitened rows of filters, one a filter."""
        return flattened(weight, bias).to(self.inverse) @ self.inverse


@dataclass(frozen=True)
class Coordinates:
    """Filters from a matrix of parameters, one row a unit, and back.

    Attributes:
        producers: the coordinates of each producer's filters.
        longest: largest norm of a unit's filters, biases included, over all producers: longer ones are shortened to it.
    """

    producers: Sequence[ProducerCoordinates]
    longest: float = math.inf

    def filters(self, theta: Float[Tensor, "k q"]) -> Filters:
        """The filters that parameters stand for; differentiable."""
        parts = theta.split([producer.size for producer in self.producers], 1)
        found = {w.path: w.unflatten(w.rows(part) @ w.root) for w, part in zip(self.producers, parts, strict=True)}
        filters = Filters(len(theta), found)
        return (
            filters
            if math.isinf(self.longest)
            else filters.scaled(self.longest / filters.norms.clamp_min(self.longest))
        )

    def encode(self, filters: Filters) -> Float[Tensor, "k q"]:
        """Parameters of filters; exact for those that are not too long."""
        return torch.cat([w.embed(*filters[w.path]).reshape(filters.units, -1) for w in self.producers], 1)


def whitened(samples: KeptSamples, damping: float) -> Coordinates:
    """Coordinates that whiten the patches of all producers of a site.

    The damping keeps directions that the data hardly uses short: together with early stopping it is the regulariser.

    Args:
        samples: of the site.
        damping: added to the eigenvalues of the patches' second moment, as a share of their mean.
    """
    site, producers, dtype = samples.site, [], samples.like.dtype
    for path in site.producers:
        layer = site.layer(path)
        gram = patch_gram(layer.module, [x for each in samples.passes for x in each.x[path]])
        count, shape = int(site.granularity * site.ratio(path, OUT)), layer.shape(OUT, 1)[1:]
        roots = (root.to(dtype) for root in damped_roots(gram, damping))
        producers.append(ProducerCoordinates(path, shape, count, layer.bias() is not None, *roots))
    return Coordinates(producers)


def damped_roots(gram: Float[Tensor, "a a"], damping: float) -> tuple[Float[Tensor, "a a"], Float[Tensor, "a a"]]:
    """G^(-1/2) and G^(1/2) in float64, with `damping` times their mean added to the eigenvalues."""
    values, vectors = torch.linalg.eigh(gram.double())
    floor = max(float(values.mean()) * damping, torch.finfo(torch.float32).tiny)
    size = (values.clamp_min(0) + floor).sqrt()
    return (vectors / size) @ vectors.mT, (vectors * size) @ vectors.mT


def patch_gram(module: nn.Module, inputs: Sequence[Tensor], positions: int = 100_000) -> Float[Tensor, "a a"]:
    """Second moment of a producer's patches per location, the constant entry of a bias last.

    Args:
        module: the producer; of one with groups, the mean over the groups.
        inputs: what it reads, batches of any size.
        positions: about as many patches are looked at; evenly spread samples are left out beyond.
    """
    layer = layers.weighted(module)
    one = columns(module, inputs[0][:1])
    wanted = max(1, positions // max(one.shape[1], 1))
    skip = max(1, sum(len(each) for each in inputs) // wanted)
    total, count = None, 0
    step = max(1, 2**24 // max(one.numel(), 1))
    for chunk in (chunk for each in inputs for chunk in each[::skip].split(step)):
        axis = layer.channel_axis(chunk.dim())
        for own in chunk.chunk(layer.groups, axis):
            patches = columns(module, own)
            if layer.bias() is not None:
                patches = torch.cat([patches, torch.ones_like(patches[:1])])
            product = (patches @ patches.mT).double()
            total = product if total is None else total + product
            count += patches.shape[1]
    return torch.as_tensor(total) / max(count, 1)
