"""Correlations of two stacks of maps through their spectra, by matrix products alone.

Maps of 8 to 72 locations an axis are too small for a fast Fourier transform to pay: a product with the few waves takes
half its time, leaves the frequencies in the order that the products need, and need not round lengths up.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LONGEST_TRANSFORM = 48
"""Maps that need a longer transform are cut into tiles; a map that meets itself only beyond twice as much, since whole
it is transformed once, and tiles of both sides differ."""
TILE_TRANSFORM = 32
"""Length of a tile's transform, about."""
PRODUCT_BYTES = 2 * 2**20
"""Products of some frequencies that are held at a time: they stay in the cache."""


@dataclass(frozen=True)
class Tiling:
    """How two maps are cut for their spectra, by axis.

    Attributes:
        lengths: length F of the transform.
        tile: locations of the second map in a tile; the first map's tile has the span of the offsets more.
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


def plan_tiling(sizes: Sequence[tuple[int, int]], reach: Sequence[tuple[int, int]], alike: bool = False) -> Tiling:
    """The shortest transforms that keep the offsets apart, or tiles.

    Args:
        sizes: locations of the first and of the second map, by axis.
        reach: lowest and highest offset, by axis.
        alike: whether a map meets itself.
    """
    longest = 2 * LONGEST_TRANSFORM if alike else LONGEST_TRANSFORM
    lengths, tile, tiles, lowest = [], [], [], []
    for (first, second), (low, high) in zip(sizes, reach, strict=True):
        whole = max(first - low, second + high, first, second)
        low = min(low, 0)  # tiles of the first map begin before those of the second
        span = max(high, 0) - low
        count = 1 if whole <= longest else math.ceil(second / max(1, TILE_TRANSFORM - span))
        tile.append(math.ceil(second / count))
        lengths.append(whole if count == 1 else tile[-1] + span)
        lowest.append(0 if count == 1 else low)
        tiles.append(count)
    return Tiling(tuple(lengths), tuple(tile), tuple(tiles), tuple(lowest))


def cut_tiles(maps: Float[Tensor, "g n c *size"], tiling: Tiling, first: bool) -> Tensor:
    """Tiles (g, n·tiles, c, *width); those of the first map reach over their neighbours."""
    if tiling.parts == 1:
        return maps
    axes = len(tiling.lengths)
    sides: list[int] = []
    widths = []
    for axis in reversed(range(axes)):
        size, tile, count = maps.shape[3 + axis], tiling.tile[axis], tiling.tiles[axis]
        if count == 1:
            sides += [0, 0]
            widths.insert(0, size)
            continue
        width = tiling.lengths[axis] if first else tile
        low = -tiling.lowest[axis] if first else 0
        sides += [low, (count - 1) * tile + width - low - size]
        widths.insert(0, width)
    view = F.pad(maps, sides)
    for axis in range(axes):
        view = view.unfold(3 + axis, widths[axis], max(1, tiling.tile[axis] if tiling.tiles[axis] > 1 else 1))
    # (g, n, c, *tiles, *width) to (g, n, *tiles, c, *width)
    return view.movedim(2, 2 + axes).flatten(1, 1 + axes)


@lru_cache(maxsize=64)
def _waves(length: int, size: int, half: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a transform multiplies real and imaginary parts with: (2·frequencies, size) each, real rows first of two."""
    frequencies = np.arange(length // 2 + 1 if half else length)
    angles = np.outer(frequencies, np.arange(size)) % length * (2 * np.pi / length)
    cos, sin = np.cos(angles), np.sin(angles)
    pair = np.stack([cos, -sin], axis=1), np.stack([sin, cos], axis=1)
    real, imaginary = (torch.from_numpy(each.reshape(-1, size)).to(device, dtype) for each in pair)
    return real, imaginary


def spectrum(maps: Float[Tensor, "g n c *size"], tiling: Tiling) -> Float[Tensor, "g f 2 n c"]:
    """Fourier transform of real maps, frequencies first, real and imaginary parts apart.

    Args:
        maps: in g groups.
        tiling: has the lengths of the transform. Frequencies run over the last axis slowest, of which half are enough.
    """
    groups, samples, channels, *sizes = maps.shape
    like = maps.dtype, maps.device
    real, _ = _waves(tiling.lengths[-1], sizes[-1], True, *like)
    value = torch.bmm(real.expand(groups, -1, -1), maps.reshape(groups, -1, sizes[-1]).mT)
    count = real.shape[0] // 2
    for axis in reversed(range(len(sizes) - 1)):
        real, imaginary = _waves(tiling.lengths[axis], sizes[axis], False, *like)
        parts = value.view(groups * count, 2, -1, sizes[axis])
        value = torch.bmm(real.expand(groups * count, -1, -1), parts[:, 0].mT)
        value.baddbmm_(imaginary.expand(groups * count, -1, -1), parts[:, 1].mT)
        count *= tiling.lengths[axis]
    return value.view(groups, count, 2, samples, channels)


def inverse(tiling: Tiling, offsets: Sequence[tuple[int, ...]]) -> Float[Tensor, "2 o f"]:
    """What real and imaginary parts of a cross spectrum are multiplied with for the correlation at each offset.

    Args:
        offsets: one for each axis in each tuple.
    """
    angles = np.zeros((len(offsets), 1))
    weights = np.ones(1)
    for axis in reversed(range(len(tiling.lengths))):
        length, last = tiling.lengths[axis], axis == len(tiling.lengths) - 1
        frequencies = np.arange(length // 2 + 1 if last else length)
        lags = np.array([offset[axis] - tiling.lowest[axis] for offset in offsets])
        turns = np.outer(lags, frequencies) % length * (2 * np.pi / length)
        angles = (angles[:, :, None] + turns[:, None, :]).reshape(len(offsets), -1)
        twice = 1 + ((frequencies > 0) & (2 * frequencies < length)) if last else np.ones(length)
        weights = np.outer(weights, twice / length).ravel()
    return torch.from_numpy(np.stack([weights * np.cos(angles), -weights * np.sin(angles)]))


def correlate(
    first: Float[Tensor, "g f 2 n c"],
    second: Float[Tensor, "g f 2 n d"],
    inverse: Float[Tensor, "2 o f"],
    product_bytes: int,
) -> Float[Tensor, "o g c d"]:
    """Σ over samples and locations j of first[j + offset]·second[j] from the maps' spectra.

    Args:
        first: spectrum.
        second: spectrum; the same tensor where a map meets itself, which saves a quarter.
        inverse: of the offsets.
        product_bytes: bound on the products that are held at a time.
    """
    groups, count, _, _, channels = first.shape
    same, others = second is first, second.shape[-1]
    at_once = max(1, min(PRODUCT_BYTES, product_bytes) // (2 * channels * others * first.element_size()))
    together = max(1, at_once // count)  # groups; frequencies are cut only where one group is too large
    result = first.new_zeros(groups, inverse.shape[1], channels * others)
    odd = torch.zeros_like(result) if same else result
    for start in range(0, groups, together):
        part = slice(start, start + together)
        a, b = (each[part].flatten(0, 1) for each in (first, second))
        own, own_odd = result[part], odd[part]
        waves = inverse[:, None].expand(-1, len(own), -1, -1)
        # all are cut before the turns, which are many and short: even a view has its price
        factors = [a.flatten(1, 2).mT, b.flatten(1, 2), a[:, 1].mT, b[:, 0], *(() if same else (a[:, 0].mT, b[:, 1]))]
        turns = zip(*(each.split(at_once) for each in factors), strict=True)
        for wave, odd_wave, turn in zip(waves[0].split(at_once, 2), waves[1].split(at_once, 2), turns, strict=True):
            real, imaginary = torch.bmm(turn[0], turn[1]), torch.bmm(turn[2], turn[3])
            if not same:
                imaginary.baddbmm_(turn[4], turn[5], alpha=-1)
            own.baddbmm_(wave, real.view(len(own), -1, channels * others))
            own_odd.baddbmm_(odd_wave, imaginary.view(len(own), -1, channels * others))
    shape = (groups, inverse.shape[1], channels, others)
    if same:  # the imaginary part is its product less the transposed one
        return (result.view(shape) + odd.view(shape) - odd.view(shape).mT).transpose(0, 1)
    return result.view(shape).transpose(0, 1)


def multiply_adds(tiling: Tiling, sizes: Sequence[int], channels: int) -> float:
    """Multiply-adds of a sample's spectrum.

    Args:
        sizes: locations of the map, by axis.
        channels: its channels.
    """
    widths = [min(size, length) for size, length in zip(sizes, tiling.lengths, strict=True)]
    count = tiling.lengths[-1] // 2 + 1
    total = 2.0 * count * math.prod(widths)
    for axis in reversed(range(len(sizes) - 1)):
        count *= tiling.lengths[axis]
        total += 4 * count * math.prod(widths[: axis + 1])
    return total * tiling.parts * channels


def grid(offsets: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """All combinations of the axes' offsets, the last axis fastest."""
    return tuple(itertools.product(*offsets))
