"""Coordinates in which new filters are searched for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from growconv.network import layers
from growconv.network.layout import OUT
from growconv.solvers.filters import Filters, Weights, flattened
from growconv.statistics.columns import columns
from growconv.statistics.samples import KeptSamples


@runtime_checkable
class Parametrization(Protocol):
    """From a matrix of parameters, one row a unit, to filters and back."""

    producers: list["ProducerCoordinates"]

    def filters(self, theta: Float[Tensor, "k q"]) -> Filters:
        """The filters that parameters stand for; differentiable."""
        ...

    def encode(self, filters: Filters) -> Float[Tensor, "k q"]:
        """Parameters of given filters, or of the nearest ones that can be reached."""
        ...


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
        weight = flat[:, : math.prod(self.shape)].reshape(-1, *self.shape).contiguous()
        return weight, flat[:, -1] if self.bias else None

    def embed(self, weight: Tensor, bias: Tensor | None) -> Float[Tensor, "k a"]:
        """Whitened rows of filters, one a filter."""
        return flattened(weight, bias).to(self.inverse) @ self.inverse


class Whitened:
    """Any filters, in coordinates that whiten the producers' patches.

    The damping keeps directions that the data hardly uses short: together with early stopping it is the regulariser.

    Args:
        grams: per producer the second moment of its patches per location, the constant entry of a bias last.
        producers: per producer the layer, for its shapes, and how many filters of it a unit has.
        damping: added to the eigenvalues, as a share of their mean.
        dtype: of the parameters.
    """

    def __init__(
        self,
        grams: Mapping[str, Tensor],
        producers: Mapping[str, tuple[nn.Module, int]],
        damping: float = 0.1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.producers = []
        for path, (module, count) in producers.items():
            gram = grams[path].double()
            values, vectors = torch.linalg.eigh(gram)
            floor = max(float(values.mean()) * damping, torch.finfo(torch.float32).tiny)
            size = (values.clamp_min(0) + floor).sqrt()
            root, inverse = (vectors / size) @ vectors.mT, (vectors * size) @ vectors.mT
            layer = layers.weighted(module)
            shape, has_bias = layer.shape(OUT, 1)[1:], layer.bias() is not None
            self.producers.append(ProducerCoordinates(path, shape, count, has_bias, root.to(dtype), inverse.to(dtype)))

    @property
    def size(self) -> int:
        """Parameters per unit."""
        return sum(producer.size for producer in self.producers)

    def filters(self, theta: Tensor) -> Filters:
        """See `Parametrization.filters`."""
        parts = theta.split([producer.size for producer in self.producers], 1)
        found = {w.path: w.unflatten(w.rows(part) @ w.root) for w, part in zip(self.producers, parts, strict=True)}
        return Filters(len(theta), found)

    def encode(self, filters: Filters) -> Tensor:
        """See `Parametrization.encode`; exact."""
        return torch.cat([w.embed(*filters[w.path]).reshape(filters.units, -1) for w in self.producers], 1)


class Bounded:
    """Filters no longer than a bound, in the coordinates of another parametrization; longer ones are shortened to it.

    Args:
        longest: largest norm of a channel's filters, biases included, over all producers.
    """

    def __init__(self, inner: Parametrization, longest: float) -> None:
        self.inner = inner
        self.producers = inner.producers
        self.longest = longest

    def filters(self, theta: Tensor) -> Filters:
        """See `Parametrization.filters`."""
        filters = self.inner.filters(theta)
        return filters.scaled(self.longest / filters.norms.clamp_min(self.longest))

    def encode(self, filters: Filters) -> Tensor:
        """See `Parametrization.encode`."""
        return self.inner.encode(filters)


def whitened(samples: KeptSamples, damping: float) -> Whitened:
    """Coordinates that whiten the patches of all producers of a site.

    Args:
        samples: of the site.
        damping: see `Whitened`.
    """
    site, grams, modules = samples.site, {}, {}
    for path in site.producers:
        module = site.model.get_submodule(path)
        grams[path] = patch_gram(module, [x for each in samples.passes for x in each.x[path]])
        modules[path] = (module, int(site.granularity * site.ratio(path, OUT)))
    return Whitened(grams, modules, damping, samples.like.dtype)


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
