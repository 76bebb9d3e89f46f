"""Enlarging and shrinking tensors along several axes at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor


@dataclass(frozen=True)
class Insertion:
    """New entries of one tensor along one axis; two that come to the same place are equal.

    Attributes:
        axis: the axis that gets longer.
        position: the old entry before which the new ones come; the axis' length for the end.
        count: number of new entries.
        values: the entries, shaped like the tensor but with `count` of them along the axis; None for zeros.
    """

    axis: int
    position: int
    count: int
    values: Tensor | None = field(default=None, compare=False)


@dataclass
class Change:
    """One tensor of the model that gets other entries.

    Attributes:
        path: module path and tensor name.
        tensor: the tensor as it is now.
        insertions: what comes in, where.
        removed: per axis the entries that go.
        revised: other values for the old entries, or None.
    """

    path: str
    tensor: Tensor
    insertions: list[Insertion] = field(default_factory=list)
    removed: dict[int, tuple[int, ...]] = field(default_factory=dict)
    revised: Tensor | None = None

    @property
    def resizes(self) -> bool:
        """Whether the tensor gets another shape."""
        return bool(self.insertions or self.removed)

    def resized(self, tensor: Tensor, fill: bool = True, axes: Sequence[bool] | None = None) -> Tensor:
        """A tensor of the old shape in the new one, new entries zero without `fill`.

        Args:
            axes: which axes a tensor of optimizer state shares with this one; None: all.
        """
        own = [each for each in self.insertions if axes is None or axes[each.axis]]
        if own:
            tensor = enlarge(tensor, own, fill)
        for axis, entries in self.removed.items():
            if axes is None or axes[axis]:
                tensor = without(tensor, axis, entries)
        return tensor


def enlarge(tensor: Tensor, insertions: Iterable[Insertion], fill: bool = True) -> Tensor:
    """A longer tensor of the same dtype, device and memory format, with the old entries in place.

    Positions count old entries. New entries are zero without `fill`, and where those of two axes meet.
    """
    longer, done = tensor, list[Insertion]()
    in_order = sorted(insertions, key=attrgetter("axis", "position"))
    for axis in range(tensor.dim()):
        own = [each for each in in_order if each.axis == axis]
        if not own:
            continue
        shape, counts = list(tensor.shape), [each.count for each in own]
        shape[axis] = sum(counts)
        block = tensor.new_zeros(shape)
        for each, entries in zip(own, block.split(counts, axis) if fill else (), strict=False):
            if each.values is not None:
                entries.copy_(each.values)
        new = (enlarge(block, done, fill=False) if done else block).split(counts, axis)
        old = longer.tensor_split([each.position for each in own], axis)
        longer = torch.cat([*chain.from_iterable(zip(old, new, strict=False)), old[-1]], axis)
        done += own
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
