"""Correlations of two stacks of maps: along whole diagonals of some axes, at pairs of locations of the others."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from growconv.statistics import spectra
from growconv.statistics.offsets import Diagonal, Pair

SPECTRA_BYTES = 16 * 2**20
"""Spectra made at a time, about: memory that stays in the cache and with the process is not paged in again."""
SPECTRAL = 2.0
"""Price of a multiply-add of a transform or of a product of spectra, in those of a large product."""
SEVERAL_CALLS = 6e6
"""Price of the calls that spectra take, whatever their size."""
FEW_CALLS = 1.5e6
"""Price of the calls that one product takes."""
MOVE = 30.0
"""Price of an entry that is moved."""


def split_phases(maps: Float[Tensor, "n c *size"], steps: Sequence[int]) -> Float[Tensor, "n c *phases_and_size"]:
    """Interleaved maps (n, c, *steps, *coarse), entry [..., phase, j] at location step·j + phase, zeros past the end.

    Args:
        maps: feature maps.
        steps: one per axis; all 1 leaves a view.
    """
    axes = len(steps)
    sides: list[int] = []
    for size, step in zip(reversed(maps.shape[2:]), reversed(steps), strict=True):
        sides += [0, -size % step]
    padded = F.pad(maps, sides) if any(sides) else maps
    shape = list(padded.shape[:2])
    for size, step in zip(padded.shape[2:], steps, strict=True):
        shape += [size // step, step]
    view = padded.view(shape) if padded.is_contiguous() else padded.reshape(shape)
    return view.permute(0, 1, *range(3, 3 + 2 * axes, 2), *range(2, 2 + 2 * axes, 2))


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

    def of(self, maps: Tensor, dim: int, side: int) -> Tensor:
        """Maps with (groups, locations) in place of a dimension; a view where groups are even runs."""
        locations, size = self.locations[side], self.size(side)
        first, step = locations[0], locations[size] - locations[0] if self.groups > 1 else size
        runs = tuple(first + group * step + place for group in range(self.groups) for place in range(size))
        if locations == runs and step > 0:
            span = (self.groups - 1) * step + size
            return maps.narrow(dim, first, span).unfold(dim, size, step).movedim(-1, dim + 1)
        where = torch.tensor(locations, dtype=torch.long, device=maps.device)
        return maps.index_select(dim, where).unflatten(dim, (self.groups, size))


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


class Known:
    """Cuts and spectra of some samples' maps, which are kept as long as a strip is still to read them.

    Args:
        strips: those that do.
    """

    def __init__(self, strips: Iterable["Strip"]) -> None:
        self._uses = Counter(cut for strip in strips for cut in strip.cuts)
        self._made: dict[Hashable, Tensor] = {}

    def take(self, cut: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What a strip reads, made where no other has done so."""
        made = self._made.pop(cut, None)
        made = make() if made is None else made
        self._uses[cut] -= 1
        if self._uses[cut]:
            self._made[cut] = made
        return made


@dataclass(frozen=True)
class Strip:
    """Correlations along whole diagonals of some axes, at the pairs of one block on each of the others.

    Attributes:
        blocks: by axis, where it has pairs.
        diagonals: by axis, where it has diagonals.
        steps: by axis of diagonals, the steps of both maps.
        sizes: by axis of diagonals, the locations of one phase of both maps.
        maps: names of the two maps, such as "xv".
    """

    blocks: dict[int, Block]
    diagonals: dict[int, tuple[Diagonal, ...]]
    steps: dict[int, tuple[int, int]]
    sizes: dict[int, tuple[int, int]]
    maps: str

    @cached_property
    def alike(self) -> bool:
        """Whether the map meets itself, cut alike: what is correlated is then the same twice."""
        return self.maps[0] == self.maps[1] and all(
            each.locations[0] == each.locations[1] for each in self.blocks.values()
        )

    @cached_property
    def transformed(self) -> list[int]:
        """Axes of several offsets; the locations of the others are like further samples."""
        return [axis for axis, found in self.diagonals.items() if any(offset for _, _, offset in found)]

    @cached_property
    def phases(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Phases that occur, of the first and of the second map: one for each axis of diagonals."""
        first, second = (
            list(itertools.product(*(sorted({each[side] for each in found}) for found in self.diagonals.values())))
            for side in (0, 1)
        )
        return first, second

    @cached_property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """Offsets to be summed; half of them where a map meets itself: the others exchange its channels."""
        found = spectra.grid([sorted({offset for _, _, offset in self.diagonals[axis]}) for axis in self.transformed])
        return tuple(each for each in found if each >= (0,) * len(each)) if self.alike else found

    def products(self, first: Tensor, second: Tensor, scratch_bytes: int, known: Known) -> Tensor:
        """(offsets, groups, phases·locations·c, phases·locations·d), summed over samples.

        Args:
            first: maps (n, c, *size).
            second: maps (n, d, *other).
            scratch_bytes: bound on temporary memory.
            known: what strips make of the maps of these samples.
        """
        left = known.take(self.cuts[0], lambda: self._factor(first, 0))
        right = known.take(self.cuts[1], lambda: self._factor(second, 1))
        if not self.transformed:
            return torch.bmm(left.mT, right).unsqueeze(0)
        return spectra.correlate(left, right, self._inverse.to(left), scratch_bytes // 2)

    def _factor(self, maps: Tensor, side: int) -> Tensor:
        """What products take of a map: it is cut, and transformed where it has offsets."""
        cut = self._cut(maps, side)
        if not self.transformed:
            return cut
        return spectra.spectrum(spectra.cut_tiles(cut, self.tiling, side == 0), self.tiling)

    @cached_property
    def cuts(self) -> tuple[Hashable, Hashable]:
        """Of both maps all that their cuts and spectra depend on."""
        tilings = [None, None]
        if self.transformed:
            tilings = [self.tiling.lengths if self.tiling.parts == 1 else (side, self.tiling) for side in (0, 1)]
        first, second = (
            (
                self.maps[side],
                tuple((axis, self.steps[axis][side], min(self.sizes[axis])) for axis in self.diagonals),
                tuple(self.phases[side]),
                tuple((axis, block.locations[side], block.groups) for axis, block in self.blocks.items()),
                tuple(self.transformed),
                tilings[side],
            )
            for side in (0, 1)
        )
        return first, second

    @cached_property
    def tiling(self) -> spectra.Tiling:
        """How the transformed axes are cut."""
        offsets = [[offset for _, _, offset in self.diagonals[axis]] for axis in self.transformed]
        reach = [(min(each), max(each)) for each in offsets]
        return spectra.plan_tiling([self.sizes[axis] for axis in self.transformed], reach, self.alike)

    @cached_property
    def _inverse(self) -> Tensor:
        return spectra.inverse(self.tiling, self.offsets)

    def _cut(self, maps: Tensor, side: int) -> Tensor:
        """(groups, n·locations of axes without offsets, phases·locations·c, *size of transformed axes).

        Without transformed axes the last dimension is the channels'.
        """
        axes = maps.dim() - 2
        steps = [self.steps[axis][side] if axis in self.steps else 1 for axis in range(axes)]
        view = split_phases(maps, steps)  # (n, c, *phases, *coarse)
        for axis, found in self.diagonals.items():
            phases = sorted({each[side] for each in found})
            if phases != list(range(steps[axis])):
                view = view.index_select(2 + axis, torch.tensor(phases, device=maps.device))
            if axis not in self.transformed:
                view = view.narrow(2 + axes + axis, 0, min(self.sizes[axis]))
        for place, (axis, block) in enumerate(self.blocks.items()):
            view = block.of(view, 2 + axes + axis + place, side)
        starts, at = {}, 2 + axes
        for axis in range(axes):
            starts[axis] = at
            at += 1 + (axis in self.blocks)
        folded = [starts[axis] for axis in self.diagonals if axis not in self.transformed]
        groups = [starts[axis] for axis in self.blocks]
        order = [*groups, 0, *folded, *range(2, 2 + axes), *(each + 1 for each in groups), 1]
        cut = view.permute(*order, *(starts[axis] for axis in self.transformed))
        count, rows = len(groups), len(groups) + 1 + len(folded)
        shape = [math.prod(part) for part in (cut.shape[:count], cut.shape[count:rows], cut.shape[rows : len(order)])]
        return cut.reshape(*shape, *cut.shape[len(order) :])

    def samples_at_once(self, channels: tuple[int, int], itemsize: int, scratch_bytes: int) -> int:
        """How many samples to take together: enough for large products, as far as their spectra stay small.

        Args:
            channels: of both maps.
            itemsize: bytes of an entry.
            scratch_bytes: bound on temporary memory.
        """
        spectral = 2 * self.tiling.frequencies * self.tiling.parts if self.transformed else 1
        entries = spectral * self._folded * self._groups * sum(self._stacked(channels))
        enough = max(8, max(self._stacked(channels)) // 4)
        most = scratch_bytes // 2 // (itemsize * entries)
        return max(1, min(max(enough, SPECTRA_BYTES // (itemsize * entries)), most))

    @property
    def _groups(self) -> int:
        return math.prod(block.groups for block in self.blocks.values())

    @property
    def _folded(self) -> int:
        """Locations on the axes without offsets."""
        return math.prod(min(size) for axis, size in self.sizes.items() if axis not in self.transformed)

    def _stacked(self, channels: tuple[int, int]) -> list[int]:
        """Channels of both maps with their phases and the locations of a block stacked."""
        return [
            count * len(self.phases[side]) * math.prod(block.size(side) for block in self.blocks.values())
            for side, count in enumerate(channels)
        ]

    def cost(self, channels: tuple[int, int], samples: int) -> float:
        """Price for a batch, in multiply-adds of a large product.

        Args:
            channels: of both maps.
            samples: of the batch.
        """
        first, second = self._stacked(channels)
        rows = samples * self._folded
        products = float(rows * first * second)
        if not self.transformed:
            return FEW_CALLS + self._groups * (products + MOVE * rows * (first + (0 if self.alike else second)))
        frequencies = self.tiling.frequencies
        products *= (3 if self.alike else 4) * frequencies * self.tiling.parts
        transforms = 0.0
        for side, count in enumerate((first,) if self.alike else (first, second)):
            own = [self.sizes[axis][side] for axis in self.transformed]
            transforms += rows * spectra.multiply_adds(self.tiling, own, count)
        inverse = 2.0 * frequencies * len(self.offsets) * first * second
        return SEVERAL_CALLS + SPECTRAL * self._groups * (products + transforms + inverse)

    def enter(self, result: Tensor, products: Tensor) -> None:
        """Put summed products where they belong.

        Args:
            result: (features of each axis ..., c, d).
            products: as `products` gives them.
        """
        places = {offset: row for row, offset in enumerate(self.offsets)}
        phases = [list(enumerate(each)) for each in self.phases]
        by_phase = products.unflatten(3, (len(phases[1]), -1)).unflatten(2, (len(phases[0]), -1))
        for (p, phase), (q, other) in itertools.product(*phases):
            features: dict[int, list[int]] = {}
            offsets: list[list[int]] = []
            for (axis, diagonals), pair in zip(self.diagonals.items(), zip(phase, other, strict=True), strict=True):
                meant = [(index, each[2]) for index, each in enumerate(diagonals) if each[:2] == pair]
                features[axis] = [index for index, _ in meant]
                if axis in self.transformed:
                    offsets.append([offset for _, offset in meant])
            if not all(features.values()):
                continue
            wanted = spectra.grid(offsets)
            turned = [each not in places for each in wanted]  # the same products with the maps exchanged
            rows = [
                places[tuple(-e for e in each) if turn else each] for each, turn in zip(wanted, turned, strict=True)
            ]
            where = torch.tensor(rows, device=products.device)
            value = by_phase[:, :, p, :, q].index_select(0, where)
            if any(turned):
                flags = torch.tensor(turned, device=products.device).view(-1, 1, 1, 1)
                value = torch.where(flags, by_phase[:, :, q, :, p].index_select(0, where).mT, value)
            self._enter_pair(result, value, features)

    def _enter_pair(self, result: Tensor, value: Tensor, features: dict[int, list[int]]) -> None:
        """Enter what two phases have: (offsets, groups, locations·c, locations·d)."""
        first, second = result.shape[-2:]
        blocks, count, start = list(self.blocks.values()), len(self.blocks), len(self.diagonals)
        counts = [len(indices) for indices in features.values()]
        sizes = [[block.size(side) for block in blocks] for side in (0, 1)]
        groups = [block.groups for block in blocks]
        value = value.reshape(*counts, *groups, *sizes[0], first, *sizes[1], second)
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
        features |= {axis: list(block.features) for axis, block in self.blocks.items()}
        index = np.ix_(*(features[axis] for axis in range(len(axes))))
        result[tuple(torch.from_numpy(part).to(result.device) for part in index)] = value


def along_axis(matrix: Float[Tensor, "rows columns"], value: Tensor, axis: int) -> Tensor:
    """Multiply one axis of a tensor by a matrix.

    Args:
        matrix: (rows, columns).
        value: with `columns` entries on the axis.
        axis: which one; it has `rows` entries in the result.
    """
    moved = value.movedim(axis, 0)
    product = matrix @ moved.flatten(1)
    return product.view(matrix.shape[0], *moved.shape[1:]).movedim(0, axis)
