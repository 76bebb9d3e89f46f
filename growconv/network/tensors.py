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


def _indices(length: int, insertions: Sequence[Insertion]) -> tuple[list[int], list[list[int]]]:
    """Where the old entries of an axis go, and where those of each insertion do."""
    order = sorted(range(len(insertions)), key=lambda index: insertions[index].position)
    old: list[int] = []
    new: list[list[int]] = [[] for _ in insertions]
    target = 0
    for entry in range(length + 1):
        while order and insertions[order[0]].position == entry:
            index = order.pop(0)
            new[index] = list(range(target, target + insertions[index].count))
            target += insertions[index].count
        if entry < length:
            old.append(target)
            target += 1
    return old, new


def enlarge(tensor: Tensor, insertions: Sequence[Insertion], values: Sequence[Tensor | None]) -> Tensor:
    """A longer tensor with the old entries in place.

    Args:
        tensor: the old tensor; its dtype, device and memory format are kept.
        insertions: what is put in where; positions count old entries.
        values: per insertion its entries, shaped like `tensor` but with `count` entries along the insertion's axis;
            None for zeros. Where new entries of two axes meet, the result is zero, unless the values have the new
            length along the other axis.

    Returns:
        A new tensor.
    """
    if len({each.axis for each in insertions}) == 1:
        return keep_format(_along_one_axis(tensor, insertions, values), tensor)
    shape = enlarged_shape(tensor.shape, insertions)
    maps = {}
    for axis in range(tensor.dim()):
        own = [index for index, each in enumerate(insertions) if each.axis == axis]
        old, new = _indices(tensor.shape[axis], [insertions[index] for index in own])
        maps[axis] = (old, dict(zip(own, new, strict=True)))
    result = tensor.new_zeros(shape)
    grown = [axis for axis in range(tensor.dim()) if shape[axis] != tensor.shape[axis]]

    def place(block: Tensor, at: int | None, index: int | None) -> None:
        where: list[Tensor | slice] = [slice(None)] * tensor.dim()
        for axis in grown:
            old, new = maps[axis]
            entries = new[index] if axis == at and index is not None else old
            if axis != at and block.shape[axis] == shape[axis]:
                entries = list(range(shape[axis]))
            view = [1] * len(grown)
            view[grown.index(axis)] = len(entries)
            where[axis] = torch.tensor(entries, device=tensor.device, dtype=torch.long).view(view)
        _write(result, where, grown, block.to(result))

    place(tensor, None, None)
    for index, (each, value) in enumerate(zip(insertions, values, strict=True)):
        if value is not None:
            place(value, each.axis, index)
    return keep_format(result, tensor)


def _along_one_axis(tensor: Tensor, insertions: Sequence[Insertion], values: Sequence[Tensor | None]) -> Tensor:
    """The pieces of the tensor with what comes between them."""
    axis, shape, start = insertions[0].axis, list(tensor.shape), 0
    pieces = []
    for each, value in sorted(zip(insertions, values, strict=True), key=lambda pair: pair[0].position):
        pieces.append(tensor.narrow(axis, start, each.position - start))
        shape[axis], start = each.count, each.position
        pieces.append(tensor.new_zeros(shape) if value is None else value.to(tensor).expand(shape))
    return torch.cat([*pieces, tensor.narrow(axis, start, tensor.shape[axis] - start)], axis)


def _write(result: Tensor, where: list[Tensor | slice], grown: list[int], block: Tensor) -> None:
    """result[where] = block with one index tensor per grown axis."""
    if not grown:
        result.copy_(block)
        return
    order = [*grown, *[axis for axis in range(result.dim()) if axis not in grown]]
    moved = result.permute(order)
    moved[tuple(where[axis] for axis in grown)] = block.permute(order)


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
