"""Numbers of channels, and which of them live and die together."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from growconv.network.companions import NONE, SPOILT, compact, narrowed, unrepeated
from growconv.network.layout import ENTRY, Key

Attribute = tuple[str, str, int | None]
"""A number that a module keeps: its path, the name, and the index where that is a list."""
Axes = tuple[tuple[Key, int], ...]
"""The axes that a class lies on, with its entries on each."""
Literals = dict[Attribute, list[int]]
"""Attributes that count entries: the numbers of those entries."""


class Numbers:
    """Numbers of channels and bare parameters' entries, and which of them live and die together.

    Args:
        strange: parameters by identity that are not of the model which is looked at, but of the one that it copies.

    Attributes:
        count: how many there are.
        blocked: numbers that cannot grow and why, in the order in which that was found.
        columns: per axis of consumers, followers and carried inputs, the number that each position was given.
        across: numbers of channels that a layer was given one by one, since it runs along another axis than they.
        used_outside: layers whose weights an operation outside of them read, and which.
        trained: layers that ran although gradients were asked for, and whether their weights got any in some pass.
        literals: attributes of modules on the way that tell a size which an operation was given.
        compared: the same for sizes of what modules were given, which their code may compare them with.
        cuts: what slices and splits of several channels took, one after the other.
        shapes: of bare parameters and buffers.
        calls: per layer how often it was called in the longest forward pass.
        outputs: tensors that the model gave, in all passes.
        order: paths of the layers in the order of their first call.
    """

    def __init__(self, strange: Iterable[Tensor] = ()) -> None:
        self.strange = {id(tensor) for tensor in strange}
        self.count = 0
        self.blocked: list[tuple[NDArray[np.int64], str]] = []
        self.across: dict[int, str] = {}
        self.used_outside: dict[str, str] = {}
        self.trained: dict[str, bool] = {}
        self.columns: dict[Key, NDArray[np.int64]] = {}
        self.calls: dict[str, int] = {}
        self.outputs = 0
        self.order: list[str] = []
        self.shapes: dict[str, torch.Size] = {}
        self.literals: Literals = {}
        self.compared: Literals = {}
        self.cuts: list[list[int]] = []
        self._first: dict[Key, tuple[int, int]] = {}
        self._ties: list[NDArray[np.int64]] = []
        self._loose: list[NDArray[np.int64]] = []
        self._roots = np.empty(0, dtype=np.int64)

    def fresh(self, key: Key, count: int) -> int:
        """The first of the numbers of an axis; those of the first time for one that was seen before."""
        if key not in self._first:
            self._first[key] = self.count, count
            self.count += count
        return self._first[key][0]

    def range_of(self, key: Key) -> range:
        """The numbers of an axis; empty for one that was not met."""
        first, count = self._first.get(key, (0, 0))
        return range(first, first + count)

    def tie(self, first: ArrayLike, second: ArrayLike, loosely: bool = False) -> None:
        """Let numbers live and die together, pair by pair.

        Args:
            loosely: what is computed of all of them stays as it is where each comes several times, as a mean: so they
                only depend on each other.
        """
        pairs = np.asarray([first, second], dtype=np.int64)
        if pairs.size:
            (self._loose if loosely else self._ties).append(pairs)

    def roots(self) -> NDArray[np.int64]:
        """Per number the lowest of all that are tied to it."""
        if self._ties or len(self._roots) < self.count:
            known = np.arange(self.count)
            known[: len(self._roots)] = self._roots
            self._roots, self._ties = _lowest(known, self._ties), []
        return self._roots

    def loose_roots(self) -> NDArray[np.int64]:
        """Per number the lowest of all that are tied to it, loosely or not."""
        return _lowest(self.roots().copy(), self._loose)

    def tied(self, companion: Tensor) -> Tensor:
        """A companion in which one number stands for all that are tied."""
        narrow = compact(companion)
        return torch.from_numpy(np.append(self.roots(), [SPOILT, NONE]))[narrow].expand(companion.shape)

    def unify(self, first: Tensor, second: Tensor, loosely: bool = False) -> None:
        """Tie the numbers of two companions of one shape, entry by entry."""
        first, second = unrepeated(*narrowed(first, second))
        both = (first != second) & (first >= 0) & (second >= 0)
        if bool(both.any()):
            keys = torch.unique(first[both] * self.count + second[both]).cpu().numpy()
            self.tie(keys // self.count, keys % self.count, loosely)

    def unify_along(self, axes: Sequence[int], companion: Tensor, loosely: bool = False) -> Tensor:
        """Tie the numbers along some axes of a companion; one of each is left there."""
        axes = [axis for axis in axes if companion.shape[axis] > 1]
        first = companion.amax(tuple(axes), keepdim=True) if axes else companion
        if axes:
            self.unify(first.expand_as(companion), companion, loosely)
        return first

    def block(self, companion: Tensor, reason: str) -> None:
        """Let the numbers of a companion not grow."""
        numbers = torch.unique(compact(companion)).cpu().numpy()
        numbers = numbers[numbers >= 0]
        if len(numbers):
            self.blocked.append((numbers, reason))

    def consume(self, key: Key, columns: Tensor) -> None:
        """Note what an axis was given: columns (positions, uses)."""
        new = self.unify_along([1], columns).flatten().cpu().numpy()
        if key in self.columns:
            length = min(len(new), len(self.columns[key]))
            old, new = self.columns[key][:length], new[:length]
            both = (old >= 0) & (new >= 0)
            self.tie(old[both], new[both])
            new = np.where(old >= 0, old, new)
        self.columns[key] = new

    def reasons(self) -> dict[int, str]:
        """Why classes that something produces are blocked, by root."""
        found: dict[int, str] = {}
        roots, produced = self.roots(), self._produced()
        for numbers, reason in self.blocked:
            own = roots[numbers]
            for root in np.unique(own[produced[own]]).tolist():
                found.setdefault(root, reason)
        return found

    def signatures(self) -> dict[Axes, NDArray[np.int64]]:
        """The roots of the classes that something produces, ascending, by the axes that they lie on."""
        roots, produced = np.append(self.roots(), NONE), self._produced()  # of the number -1 too
        parts = {key: roots[first : first + count] for key, (first, count) in self._first.items()}
        columns = {key: roots[np.maximum(numbers, NONE)] for key, numbers in self.columns.items()}
        met, axes = np.zeros(len(roots), dtype=np.int64), list[Axes]([()])  # per class which of the `axes`
        for key, part in (*parts.items(), *columns.items()):
            classes, counts = np.unique(part[produced[part]], return_counts=True)
            onward, which = np.unique((met[classes] << 32) + counts, return_inverse=True)
            met[classes] = which + len(axes)
            axes += [(*axes[each >> 32], (key, each % (1 << 32))) for each in onward.tolist()]
        order = np.argsort(met, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(met[order])) + 1)
        return {axes[met[own[0]]]: own for own in groups if met[own[0]]}

    def _produced(self) -> NDArray[np.bool_]:
        """Per number whether it is the root of what a layer gives or what fills up; bare tensors have many more."""
        found = np.zeros(self.count + 1, dtype=bool)  # the last is of NONE
        for (_, side), (first, count) in self._first.items():
            if side != ENTRY:
                found[self.roots()[first : first + count]] = True
        return found


def _lowest(labels: NDArray[np.int64], ties: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Per label the lowest that pairs (2, n) lead to: the components of a graph, by hooking and jumping."""
    pairs = np.concatenate([np.empty((2, 0), dtype=np.int64), *ties], 1)
    while True:
        first, second = labels[pairs]
        apart = first != second
        if not apart.any():
            return labels
        pairs, first, second = pairs[:, apart], first[apart], second[apart]
        np.minimum.at(labels, np.maximum(first, second), np.minimum(first, second))
        while (further := labels[labels]).tobytes() != labels.tobytes():
            labels = further
