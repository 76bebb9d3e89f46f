"""Enlarging and shrinking tensors along several axes at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Insertion:
    """New entries of one tensor along one axis.

    Attributes:
        axis: the axis that gets longer.
        position: the old entry before which the new ones come; the axis' length for the end.
        count: number of new entries.
    """

    axis: int
    position: int
    count: int


def enlarged_shape(shape: Sequence[int], insertions: Sequence[Insertion]) -> tuple[int, ...]:
    """The shape after all insertions."""
    added = [sum(each.count for each in insertions if each.axis == axis) for axis in range(len(shape))]
    return tuple(size + more for size, more in zip(shape, added, strict=True))


def enlarge(tensor: Tensor, insertions: Sequence[Insertion], values: Sequence[Tensor | None]) -> Tensor:
    """A longer tensor with the old entries in place.

    Args:
        tensor: the old tensor; its dtype, device and memory format are kept.
        insertions: what is put in where, at least one; positions count old entries.
        values: per insertion its entries, shaped like `tensor` but with `count` entries along the insertion's axis;
            None for zeros. Where new entries of two axes meet, the result is zero.

    Returns:
        A new tensor.
    """
    longer, done = tensor, list[Insertion]()
    for axis in range(tensor.dim()):
        own = [pair for pair in zip(insertions, values, strict=True) if pair[0].axis == axis]
        pieces, start = [], 0
        for each, value in sorted(own, key=lambda pair: pair[0].position):
            shape = (*tensor.shape[:axis], each.count, *tensor.shape[axis + 1 :])
            new = tensor.new_zeros(shape) if value is None else value.to(tensor).expand(shape)
            new = enlarge(new, done, [None] * len(done)) if done else new
            pieces += [longer.narrow(axis, start, each.position - start), new]
            start = each.position
        if own:
            longer = torch.cat([*pieces, longer.narrow(axis, start, tensor.shape[axis] - start)], axis)
        done += [each for each, _ in own]
    return keep_format(longer, tensor)


def keep_format(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the memory format of another one."""
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if like.dim() == dims and like.is_contiguous(memory_format=memory_format) and not like.is_contiguous():
            return tensor.contiguous(memory_format=memory_format)
    return tensor.contiguous()


def without(tensor: Tensor, axis: int, entries: Sequence[int]) -> Tensor:
    """The tensor without some entries of an axis."""
    gone = set(entries)
    kept = torch.tensor([e for e in range(tensor.shape[axis]) if e not in gone], device=tensor.device, dtype=torch.long)
    return keep_format(tensor.index_select(axis, kept), tensor)
