"""Products of two maps at some pairs of locations on some axes and along whole diagonals of the others."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from growconv.statistics.correlation import shifted_products, split_phases
from growconv.statistics.offsets import Pair

DENSE_BLOCK = 2
"""Products per wanted one up to which all locations of a block are multiplied with all."""


@dataclass(frozen=True)
class Block:
    """Pairs of locations of one axis, in groups of equal size: within a group all locations meet in one product.

    Attributes:
        locations: of the first and of the second map, group after group.
        groups: how many groups.
        features: which of the pairs these are.
        places: where each stands in (groups, locations of the first, locations of the second), flattened.
    """

    locations: tuple[tuple[int, ...], tuple[int, ...]]
    groups: int
    features: tuple[int, ...]
    places: tuple[int, ...]

    def size(self, side: int) -> int:
        """Locations of one map in a group."""
        return len(self.locations[side]) // self.groups


def blocks_of(pairs: Sequence[Pair]) -> list[Block]:
    """Pairs that share locations together, groups of one shape side by side.

    Args:
        pairs: (ρ, σ) each.
    """
    shapes: dict[tuple[int, int], list[tuple[list[int], list[int], list[int]]]] = {}
    for rows, columns, features in _components(pairs):
        shapes.setdefault((len(rows), len(columns)), []).append((rows, columns, features))
    found = []
    for (height, width), groups in shapes.items():
        places = [
            (number * height + rows.index(pairs[feature][0])) * width + columns.index(pairs[feature][1])
            for number, (rows, columns, features) in enumerate(groups)
            for feature in features
        ]
        first, second, features = (tuple(entry for group in groups for entry in group[part]) for part in range(3))
        found.append(Block((first, second), len(groups), features, tuple(places)))
    return found


def _components(pairs: Sequence[Pair]) -> list[tuple[list[int], list[int], list[int]]]:
    """(locations of the first map, of the second, pairs) that hang together; pair by pair where few of all meet."""
    parts: list[tuple[set[int], set[int], list[int]]] = []
    for number, (row, column) in enumerate(pairs):
        joined = ({row}, {column}, [number])
        for part in [part for part in parts if row in part[0] or column in part[1]]:
            joined = (joined[0] | part[0], joined[1] | part[1], joined[2] + part[2])
            parts.remove(part)
        parts.append(joined)
    found = []
    for rows, columns, features in parts:
        if len(rows) * len(columns) <= DENSE_BLOCK * len(features):
            found.append((sorted(rows), sorted(columns), features))
        else:
            found += [([pairs[feature][0]], [pairs[feature][1]], [feature]) for feature in features]
    return found


@dataclass(frozen=True)
class Strip:
    """Products along whole diagonals of some axes, at the pairs of one block on each of the others.

    Attributes:
        blocks: by axis, where it has pairs.
        diagonals: by axis, where it has diagonals: (phase of the first map, of the second), indices, offsets.
        steps: by axis of diagonals, the steps of both maps.
    """

    blocks: dict[int, Block]
    diagonals: dict[int, tuple[tuple[int, int], list[int], list[int]]]
    steps: dict[int, tuple[int, int]]

    def products(self, first: Tensor, second: Tensor) -> Tensor:
        """(offsets, groups, locations·c, locations·d), summed over samples.

        Args:
            first: maps (n, c, *size).
            second: maps (n, d, *other).
        """
        offsets = list(itertools.product(*(offsets for _, _, offsets in self.diagonals.values())))
        left = self._cut(first, 0)
        right = left if second is first and self._alike else self._cut(second, 1)
        return shifted_products(left, right, offsets)

    @property
    def _alike(self) -> bool:
        return all(each.locations[0] == each.locations[1] for each in self.blocks.values()) and all(
            phases[0] == phases[1] for phases, _, _ in self.diagonals.values()
        )

    def _cut(self, maps: Tensor, side: int) -> Tensor:
        """(groups, locations·c, n, *size of the other axes), one phase of these."""
        axes = maps.dim() - 2
        for axis, block in self.blocks.items():
            where = torch.tensor(block.locations[side], dtype=torch.long, device=maps.device)
            maps = maps.index_select(2 + axis, where)
        if self.diagonals:
            steps = [self.steps[axis][side] if axis in self.steps else 1 for axis in range(axes)]
            phases = [self.diagonals[axis][0][side] if axis in self.diagonals else 0 for axis in range(axes)]
            if math.prod(steps) > 1:
                maps = split_phases(maps, steps)[(slice(None), slice(None), *phases)]
        for place, axis in enumerate(self.blocks):
            maps = maps.unflatten(2 + axis + place, (self.blocks[axis].groups, -1))
        # (n, c, axes ..., with two for each axis of pairs) to (groups ..., locations ..., c, n, other axes ...)
        starts, at = {}, 2
        for axis in range(axes):
            starts[axis] = at
            at += 1 + (axis in self.blocks)
        order = [starts[axis] for axis in self.blocks] + [starts[axis] + 1 for axis in self.blocks] + [1, 0]
        order += [starts[axis] for axis in self.diagonals]
        cut = maps.permute(order)
        groups = math.prod(block.groups for block in self.blocks.values())
        size = math.prod(block.size(side) for block in self.blocks.values())
        return cut.reshape(groups, size * maps.shape[1], maps.shape[0], *cut.shape[2 + 2 * len(self.blocks) :])

    def enter(self, result: Tensor, products: Tensor) -> None:
        """Put summed products where they belong.

        Args:
            result: (features of each axis ..., c, d).
            products: as `products` gives them.
        """
        first, second = result.shape[-2:]
        blocks, diagonals = list(self.blocks.values()), list(self.diagonals.values())
        counts = [len(indices) for _, indices, _ in diagonals]
        sizes = [[block.size(side) for block in blocks] for side in (0, 1)]
        groups = [block.groups for block in blocks]
        value = products.view(*counts, *groups, *sizes[0], first, *sizes[1], second)
        start, count = len(counts), len(blocks)
        order = list(range(start))
        for number in range(count):
            order += [start + number, start + count + number, start + 2 * count + 1 + number]
        value = value.permute(*order, start + 2 * count, start + 3 * count + 1)
        shape = [group * a * b for group, a, b in zip(groups, *sizes, strict=True)]
        value = value.reshape(*counts, *shape, first, second)
        for number, block in enumerate(blocks):
            places = torch.tensor(block.places, dtype=torch.long, device=value.device)
            value = value.index_select(start + number, places)
        axes = [*self.diagonals, *self.blocks]
        value = value.permute(*(axes.index(axis) for axis in range(len(axes))), len(axes), len(axes) + 1)
        features = {axis: indices for axis, (_, indices, _) in self.diagonals.items()}
        features |= {axis: list(block.features) for axis, block in self.blocks.items()}
        index = np.ix_(*(features[axis] for axis in range(len(axes))))
        result[tuple(torch.from_numpy(part).to(result.device) for part in index)] = value
