"""Correlations of two stacks of maps: at given offsets, by one product each or through their spectra, and at pairs."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from growconv.statistics.offsets import Pair


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


def shifted_products(
    first: Float[Tensor, "k c n *size"],
    second: Float[Tensor, "k d n *other"],
    offsets: Sequence[tuple[int, ...]],
) -> Float[Tensor, "o k c d"]:
    """Σ over samples and positions j of first[j + offset]·second[j]: one matrix product per offset.

    The maps are flattened with zeros between rows and samples that are as wide as the largest offset, so that a shift
    of the flattened index is a shift of the maps.

    Args:
        first: maps, channels c, in k independent groups.
        second: maps, channels d.
        offsets: one tuple per correlation, an entry per axis.
    """
    axes = first.dim() - 3
    sizes = [max(a, b) for a, b in zip(first.shape[3:], second.shape[3:], strict=True)]
    gaps = [max(abs(offset[axis]) for offset in offsets) for axis in range(axes)]
    common = [size + gap for size, gap in zip(sizes, gaps, strict=True)]

    def flat(maps: Tensor) -> Tensor:
        sides: list[int] = []
        for have, want in zip(reversed(maps.shape[3:]), reversed(common), strict=True):
            sides += [0, want - have]
        padded = F.pad(maps, sides) if any(sides) else maps
        return padded.reshape(*maps.shape[:2], -1)

    a, b = flat(first), flat(second)
    length = a.shape[2]
    result = a.new_empty(len(offsets), a.shape[0], a.shape[1], b.shape[1])
    strides = [math.prod(common[axis + 1 :]) for axis in range(axes)]
    for number, offset in enumerate(offsets):
        shift = sum(step * stride for step, stride in zip(offset, strides, strict=True))
        moved = a[:, :, max(shift, 0) : length + min(shift, 0)]
        still = b[:, :, max(-shift, 0) : length - max(shift, 0)]
        torch.bmm(moved, still.transpose(1, 2), out=result[number])
    return result


@dataclass(frozen=True)
class Tiling:
    """How maps are cut for their spectra on each axis.

    Attributes:
        lengths: length F of the transform.
        tile: locations of the second map per tile; the first map's tile has the offsets' span more.
        tiles: number of tiles.
        lowest: offset that the transform's lag 0 stands for; 0 where there is one tile.
    """

    lengths: tuple[int, ...]
    tile: tuple[int, ...]
    tiles: tuple[int, ...]
    lowest: tuple[int, ...]

    @property
    def frequencies(self) -> int:
        """Number of independent frequencies of real maps."""
        return math.prod(self.lengths[:-1]) * (self.lengths[-1] // 2 + 1)

    @property
    def parts(self) -> int:
        """Number of tiles of a map."""
        return math.prod(self.tiles)


def fast_length(least: int) -> int:
    """The next even length whose prime factors are 2, 3 and 5."""
    length = least + least % 2
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 2


def plan_tiling(
    sizes: Sequence[int], lowest: Sequence[int], highest: Sequence[int], longest: int, cut_to: int
) -> Tiling:
    """Transform lengths for maps of some size and the offsets between them.

    Args:
        sizes: locations per axis, of the larger map.
        lowest: smallest offset per axis.
        highest: largest offset per axis.
        longest: length of a transform above which maps are cut into tiles.
        cut_to: length of a tile's transform, about.
    """
    lengths, tile, tiles, origin = [], [], [], []
    for size, low, high in zip(sizes, lowest, highest, strict=True):
        whole = fast_length(size + max(-low, high, 0))
        span = high - low
        count = 1 if whole <= longest else math.ceil(size / max(1, cut_to - span))
        if count == 1:
            lengths.append(whole)
            tile.append(size)
            origin.append(0)
        else:
            tile.append(math.ceil(size / count))
            lengths.append(fast_length(tile[-1] + span))
            origin.append(low)
        tiles.append(count)
    return Tiling(tuple(lengths), tuple(tile), tuple(tiles), tuple(origin))


def spectrum(maps: Float[Tensor, "n c *size"], tiling: Tiling, halo: bool) -> Complex[Tensor, "f c i"]:
    """Fourier transform of maps, frequencies first: (frequencies, channels, samples·tiles), complex.

    Args:
        maps: real maps.
        tiling: how they are cut.
        halo: whether tiles reach over their neighbours, as the first map of a correlation needs.
    """
    axes = len(tiling.lengths)
    maps = _tiles(maps, tiling, halo) if tiling.parts > 1 else maps.transpose(0, 1)
    transformed = torch.fft.rfftn(maps, s=tiling.lengths, dim=tuple(range(-axes, 0)))
    flat = transformed.reshape(maps.shape[0] * maps.shape[1], -1)
    return flat.T.contiguous().view(-1, maps.shape[0], maps.shape[1])


def _tiles(maps: Tensor, tiling: Tiling, halo: bool) -> Tensor:
    """(channels, samples·tiles, *tile)."""
    axes = len(tiling.lengths)
    sides: list[int] = []
    widths = []
    for axis in reversed(range(axes)):
        size, tile, count = maps.shape[2 + axis], tiling.tile[axis], tiling.tiles[axis]
        single = count == 1
        width = size if single else (tiling.lengths[axis] if halo else tile)
        low = -tiling.lowest[axis] if halo and not single else 0
        high = 0 if single else (count - 1) * tile + width - low - size
        sides += [low, high]
        widths.insert(0, width)
    view = F.pad(maps, sides)
    for axis in range(axes):
        step = tiling.tile[axis] if tiling.tiles[axis] > 1 else 1
        view = view.unfold(2 + axis, widths[axis], step)
    # (n, c, *tiles, *width) to (c, n, *tiles, *width)
    return view.transpose(0, 1).flatten(1, 1 + axes)


def spectral_products(products: Tensor, tiling: Tiling, offsets: Sequence[Sequence[int]]) -> Float[Tensor, "o c d"]:
    """Correlations at a grid of offsets from the cross spectrum: a Fourier sum per axis, of the wanted offsets only.

    Args:
        products: cross spectrum Σ_i F_i(ω)·conj(G_i(ω)), (frequencies, c, d), complex.
        tiling: of the spectra.
        offsets: the offsets per axis; the result has all their combinations, row-major.
    """
    lengths = tiling.lengths
    halves = [*lengths[:-1], lengths[-1] // 2 + 1]
    value = products.reshape(*halves, -1)
    for axis, wanted in enumerate(offsets):
        lags = torch.tensor([offset - tiling.lowest[axis] for offset in wanted], device=products.device)
        frequencies = torch.arange(halves[axis], device=products.device)
        turns = (lags[:, None] * frequencies % lengths[axis]).double() * (2 * math.pi / lengths[axis])
        weights = torch.polar(torch.full_like(turns, 1 / lengths[axis]), turns)
        if axis == len(lengths) - 1:
            inner = (frequencies > 0) & (frequencies < lengths[axis] / 2)
            weights = weights * (1 + inner.double())
        weights = weights.to(products.dtype)
        done = math.prod(len(part) for part in offsets[:axis])
        value = torch.matmul(weights, value.reshape(done, halves[axis], -1))
    return value.real.reshape(-1, *products.shape[1:])


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
