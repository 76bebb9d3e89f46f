"""New filters of all producers of a site, and what is done to whole channels of them."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Filters = dict[str, tuple[Tensor, Tensor | None]]
"""Per producer the new filters (K, in, *kernel) and biases (K,), None for a producer without one."""


def count_of(filters: Filters) -> int:
    """Number of channels K."""
    return next(iter(filters.values()))[0].shape[0]


def flattened(weight: Tensor, bias: Tensor | None) -> Float[Tensor, "k a"]:
    """Filters as rows, the bias last."""
    return weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)


def each(filters: Filters, change: Callable[[Tensor], Tensor]) -> Filters:
    """The same function applied to all weights and biases."""
    return {path: (change(weight), None if bias is None else change(bias)) for path, (weight, bias) in filters.items()}


def picked(filters: Filters, channels: Sequence[int]) -> Filters:
    """Some of the channels, in the order given."""
    index = list(channels)
    return each(filters, lambda tensor: tensor[index])


def joined(parts: Sequence[Filters]) -> Filters:
    """Channels of several proposals, one after the other."""
    result: Filters = {}
    for path in parts[0]:
        biases = [bias for part in parts if (bias := part[path][1]) is not None]
        result[path] = (torch.cat([part[path][0] for part in parts]), torch.cat(biases) if biases else None)
    return result


def scaled(filters: Filters, factor: Float[Tensor, " k"]) -> Filters:
    """Every channel times a number."""
    return each(filters, lambda tensor: tensor * factor.to(tensor).view(-1, *[1] * (tensor.dim() - 1)))


def norms(filters: Filters) -> Float[Tensor, " k"]:
    """Norm of every channel's filters, biases included, over all producers."""
    squares = [flattened(weight, bias).square().sum(1) for weight, bias in filters.values()]
    return torch.stack(squares).sum(0).sqrt()


def at_norm(filters: Filters, norm: float) -> Filters:
    """Every channel scaled to one norm; a channel of zeros stays as it is."""
    own = norms(filters)
    return scaled(filters, torch.where(own > 0, norm / torch.where(own > 0, own, 1.0), 1.0))


def in_blocks(order: Sequence[int], size: int) -> list[int]:
    """Indices of channels from indices of whole groups."""
    return [group * size + member for group in order for member in range(size)]
