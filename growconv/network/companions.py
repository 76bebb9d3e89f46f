"""Companions: for every tensor of a forward pass, the numbers of the channels that its entries belong to.

A companion has the shape of its tensor. Most are constant along most axes; there they have stride 0, which keeps them
small, and what is done with them is done at that small size.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

NONE, SPOILT = -1, -2
"""Of an entry that belongs to no channel; of one that comes from an operation which failed."""
MANY = 1 << 14
"""Entries of a companion from which on it is worth while to look for repetitions."""


class Companions:
    """The companions of the tensors of one forward pass.

    Args:
        begin: makes that of a tensor which no operation has given.
    """

    def __init__(self, begin: Callable[[Tensor], Tensor]) -> None:
        self._begin = begin
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # holding a tensor keeps its identity from others

    def of(self, tensor: Tensor) -> Tensor:
        """The numbers of a tensor's entries."""
        if id(tensor) not in self._known:
            self._known[id(tensor)] = tensor, self._begin(tensor)
        return self._known[id(tensor)][1]

    def put(self, tensor: Tensor, companion: Tensor) -> None:
        """Give a tensor its companion, or one that broadcasts to it."""
        if companion.shape != tensor.shape:
            companion = companion.expand(tensor.shape)
        self._known[id(tensor)] = tensor, companion

    def among(self, values: Iterable[object]) -> list[Tensor]:
        """The companions of those values that are tensors which were met."""
        return [self._known[id(each)][1] for each in values if id(each) in self._known]


def compact(companion: Tensor, keep: Sequence[int] = ()) -> Tensor:
    """The companion with every axis along which it is constant by stride 0 cut to one entry, but for those to keep."""
    strides = companion.stride()
    if 0 not in strides:
        return companion
    lengths = enumerate(zip(companion.shape, strides, strict=True))
    shape = [size if stride or axis in keep else min(size, 1) for axis, (size, stride) in lengths]
    return companion.as_strided(shape, strides)


def narrowed(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two companions of one shape, axes along which both are constant cut to one entry."""
    for axis in range(first.dim()):
        if first.shape[axis] > 1 and first.stride(axis) == 0 and second.stride(axis) == 0:
            first, second = first.narrow(axis, 0, 1), second.narrow(axis, 0, 1)
    return first, second


def unrepeated(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of two companions of one shape, with what repeats itself along an axis left out: tokens behind another.

    Small ones are returned as they are.
    """
    for axis in range(first.dim()) if first.numel() > MANY else ():
        count = first.shape[axis] - 1
        if count > 1:
            ahead = [(each.narrow(axis, 1, count), each.narrow(axis, 0, count)) for each in (first, second)]
            new = (ahead[0][0] != ahead[0][1]) | (ahead[1][0] != ahead[1][1])
            kept = 1 + new.movedim(axis, 0).reshape(count, -1).any(1).nonzero().flatten()
            if 2 * len(kept) < count:
                kept = torch.cat([kept.new_zeros(1), kept])
                first, second = (each.index_select(axis, kept) for each in (first, second))
    return first, second


def numbers_in(companions: Iterable[Tensor]) -> set[int]:
    """Every number in some companions, SPOILT among them, but not NONE."""
    return {number for each in companions for number in torch.unique(compact(each)).tolist()} - {NONE}


def has_numbers(companion: Tensor) -> bool:
    """Whether some entry belongs to a channel."""
    return bool((compact(companion) >= 0).any())


def varies(companion: Tensor, axis: int) -> bool:
    """Whether numbers differ along an axis."""
    if companion.shape[axis] < 2 or companion.stride(axis) == 0:
        return False
    narrow = compact(companion, keep=(axis,))
    return bool((narrow != narrow.narrow(axis, 0, 1)).any())


def along(companion: Tensor, axis: int) -> list[int]:
    """The numbers along one axis, at the first entry of the others."""
    for other in range(companion.dim()):
        if other != axis and companion.shape[other] > 1:
            companion = companion.narrow(other, 0, 1)
    return companion.flatten().tolist()


def several(numbers: Sequence[int]) -> bool:
    """Whether they are of more than one channel."""
    return max(numbers, default=NONE) >= 0 and len(set(numbers)) > 1


def has_memory(tensor: Tensor) -> bool:
    """Whether each entry of a tensor or companion has memory of its own, so that it can be written to."""
    return not any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of one shape can be expanded to another."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))
