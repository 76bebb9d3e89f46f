"""The offset path: every statistic from correlations of maps at a few offsets, and thin strips along the border."""

import itertools
import math
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from growconv.convolution.geometry import Geometry
from growconv.statistics.correlation import (
    Strip,
    Tiling,
    along_axis,
    blocks_of,
    plan_tiling,
    spectral_products,
    spectrum,
    split_phases,
)
from growconv.statistics.offsets import MAPS, AxisFeatures, AxisProblem, axis_features
from growconv.statistics.problem import PairProblem
from growconv.statistics.sums import Totals
from growconv.statistics.unfolded import weight_gradient

LONGEST_TRANSFORM = 72
"""Longer maps are cut into tiles before their Fourier transform."""
TILE_TRANSFORM = 36
"""Length of a tile's transform, about: more tiles of fewer frequencies make larger products of each frequency."""
SPECTRA_BYTES = 8 * 2**20
"""Spectra made at a time, about: memory that stays in the cache and with the process is not paged in again."""
SPECTRAL_PRODUCT = 1.5
"""Price of one multiply-add of a complex product of small matrices, in those of a convolution."""
SPECTRAL_INVERSE = 24.0
"""Price of one complex entry of the sums of products, for one offset of the first axis."""
PRODUCT = 2.0
"""Price of one multiply-add of a product per offset or along the border."""
TRANSFORM = 450.0
"""Price of one complex entry of a Fourier transform, moving it included."""
EXACT_TERMS = 2048
"""Products that a weight gradient sums in the maps' own precision. It adds them one by one: 50 000 equal ones, as a
constant background has them, are wrong by 1e-4 of their sum in float32."""

LAYOUTS: dict[str, tuple[tuple[str | int, ...], ...]] = {
    "S": (("p", 0), ("q", 1)),
    "patch_gram": (("p", 0), ("q", 1)),
    "S_full": (("p", 0, 1), ("q", 2, 3)),
    "N_raw": (("p", 0), (1,), ("q",)),
    "P": (("p", 0), (1,), ("q", 2)),
    "S2": (("p", 0), ("q", 1)),
    "M": (("p", 0), ("q",)),
}
"""Axes of each statistic: channels p and q of its two maps, and positions of its taps in AxisFeatures.shapes."""


def axis_problems(problem: PairProblem) -> tuple[AxisProblem, ...]:
    """The axes of a pair of layers, each on its own."""
    return tuple(
        AxisProblem(problem.first.along(axis), problem.second.along(axis), sizes)
        for axis, sizes in enumerate(zip(problem.input_size, problem.hidden_size, problem.output_size, strict=True))
    )


class Correlation:
    """The correlations of two maps that some statistics need: features per axis, and sums over batches for each.

    Args:
        maps: the two maps, e.g. "xv".
        statistics: the statistics of these maps.
    """

    def __init__(self, axes: tuple[AxisProblem, ...], maps: str, statistics: tuple[str, ...]) -> None:
        self.axes = axes
        self.maps = maps
        self.statistics = statistics
        self.features: list[AxisFeatures] = [axis_features(axis, maps, statistics) for axis in axes]
        self.steps = [(axis.step(maps[0]), axis.step(maps[1])) for axis in axes]
        self.symmetric = maps[0] == maps[1]
        self._strips: dict[str, list[Strip]] = {}

    def key(self, kinds: str, strip: int | None = None) -> str:
        """Name of the sums where each axis takes its diagonals ("d") or its singles ("s"), or of one strip of them."""
        return f"{self.maps}:{kinds}" + ("" if strip is None else f":{strip}")

    @cached_property
    def border_kinds(self) -> list[str]:
        """Combinations of diagonals and singles with at least one axis of singles, empty ones left out."""
        return [
            "".join(kinds)
            for kinds in itertools.product("ds", repeat=len(self.axes))
            if "s" in kinds and all(self.count(axis, kind) for axis, kind in enumerate(kinds))
        ]

    def count(self, axis: int, kind: str) -> int:
        """Number of features of a kind on an axis."""
        features = self.features[axis]
        return len(features.diagonals if kind == "d" else features.singles)

    def offsets(self, axis: int) -> list[int]:
        """Offsets of the diagonals of an axis."""
        return [offset for _, _, offset in self.features[axis].diagonals] or [0]

    def chosen(self, axis: int, leading: int = 0) -> list[int]:
        """Diagonals to be summed: of the leading axis half where the maps are equal, `complete` gives the others."""
        diagonals = self.features[axis].diagonals
        if not self.symmetric or axis != leading:
            return list(range(len(diagonals)))
        return [
            index
            for index, (phase, other, offset) in enumerate(diagonals)
            if (offset, phase, other) >= (-offset, other, phase)
        ]

    def tap_places(self, axis: int) -> list[int]:
        """Chosen diagonals of an axis as the locations of the first map that location 0 of the second meets."""
        diagonals = (self.features[axis].diagonals[index] for index in self.chosen(axis))
        return [self.steps[axis][0] * offset + phase for phase, _, offset in diagonals]

    @cached_property
    def taps(self) -> list[tuple[int, int]]:
        """Lowest of `tap_places` and number of locations up to the highest, by axis."""
        places = [self.tap_places(axis) for axis in range(len(self.axes))]
        return [(min(each), max(each) - min(each) + 1) for each in places]

    @property
    def as_gradient(self) -> bool:
        """Whether the whole diagonals are the gradient of a convolution's weight: the second map has one phase."""
        return all(step == 1 for _, step in self.steps) and all(f.diagonals for f in self.features)

    def coarse_size(self, axis: int) -> int:
        """Locations of the larger map on an axis after its phases are split."""
        return max(
            -(-self.axes[axis].size(which) // step) for which, step in zip(self.maps, self.steps[axis], strict=True)
        )

    def phase_groups(self, axis: int, leading: int = 0) -> list[tuple[tuple[int, int], list[int], list[int]]]:
        """Chosen diagonals of an axis by their two phases: (phases, their indices, their offsets)."""
        groups: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        for index in self.chosen(axis, leading):
            phase, other, offset = self.features[axis].diagonals[index]
            indices, offsets = groups.setdefault((phase, other), ([], []))
            indices.append(index)
            offsets.append(offset)
        return [(phases, *members) for phases, members in groups.items()]

    def strips(self, kinds: str) -> list[Strip]:
        """What is to be multiplied where each axis takes its diagonals or its singles."""
        if kinds not in self._strips:
            pairs = [axis for axis, kind in enumerate(kinds) if kind == "s"]
            lines = [axis for axis, kind in enumerate(kinds) if kind == "d"]
            groups = [self.phase_groups(axis, lines[0]) for axis in lines]
            steps = {axis: self.steps[axis] for axis in lines}
            self._strips[kinds] = [
                Strip(dict(zip(pairs, blocks, strict=True)), dict(zip(lines, phases, strict=True)), steps)
                for blocks in itertools.product(*(blocks_of(self.features[axis].singles) for axis in pairs))
                for phases in itertools.product(*groups)
            ]
        return self._strips[kinds]

    def complete(self, kinds: str, value: Tensor) -> None:
        """Fill in the features that `strips` leave out: exchanging the maps transposes the channels.

        Args:
            kinds: whether each axis takes its diagonals or its singles.
            value: (features of each axis ..., c, d).
        """
        if not self.symmetric or "d" not in kinds:
            return
        leading, device = kinds.index("d"), value.device
        mirror = self.mirror(leading, "d")
        chosen = set(self.chosen(leading, leading))
        missing = [index for index in range(len(mirror)) if index not in chosen]
        found = value.index_select(leading, torch.tensor([mirror[index] for index in missing], device=device).long())
        for axis, kind in enumerate(kinds):
            if axis != leading:
                found = found.index_select(axis, torch.tensor(self.mirror(axis, kind), device=device).long())
        value.index_copy_(leading, torch.tensor(missing, device=device).long(), found.transpose(-1, -2))

    def mirror(self, axis: int, kind: str) -> list[int]:
        """For two equal maps: where each feature stands once the maps are exchanged."""
        features = self.features[axis]
        if kind == "d":
            place = {diagonal: index for index, diagonal in enumerate(features.diagonals)}
            return [place[other, phase, -offset] for phase, other, offset in features.diagonals]
        places = {pair: index for index, pair in enumerate(features.singles)}
        return [places[other, row] for row, other in features.singles]


class OffsetPath:
    """Sums of some statistics of one pair of layers at one image size.

    Args:
        problem: the pair; its grid must not change in between, and its paddings must be zeros.
        statistics: names among S, S_full, patch_gram, N_raw, P, S2 and M.
        scratch_bytes: bound on temporary memory.
        spectral: whether whole diagonals are taken through spectra; None: by cost.
    """

    def __init__(
        self, problem: PairProblem, statistics: Iterable[str], scratch_bytes: int, spectral: bool | None = None
    ) -> None:
        self.problem = problem
        self.scratch_bytes = scratch_bytes
        wanted: dict[str, list[str]] = {}
        for name in sorted(statistics):
            wanted.setdefault(MAPS[name], []).append(name)
        axes = axis_problems(problem)
        self.correlations = {maps: Correlation(axes, maps, tuple(names)) for maps, names in wanted.items()}
        self.channels = dict(zip("xhv", problem.channels, strict=True))
        self.forced_spectral = spectral
        self.spectral: list[Correlation] = []

    def add(self, totals: Totals, x: Tensor, h: Tensor, v: Tensor) -> None:
        """Add a batch to the sums of correlations.

        Args:
            totals: sums so far.
            x: input of the producer (n, C0, *size).
            h: input of the consumer (n, C1, *grid).
            v: desired change of the consumer's output (n, C2, *out).
        """
        maps = {"x": x, "h": h, "v": v}
        ways = {name: self._way(correlation, x.shape[0]) for name, correlation in self.correlations.items()}
        self.spectral = [correlation for name, correlation in self.correlations.items() if ways[name] == "spectral"]
        if self.spectral:
            self._add_spectral(totals, maps)
        for name, correlation in self.correlations.items():
            if ways[name] == "gradient":
                self._add_gradient(totals, correlation, maps)
            elif ways[name] == "products":
                self._add_products(totals, correlation, "d" * len(correlation.axes), maps)
            for kinds in correlation.border_kinds:
                self._add_products(totals, correlation, kinds, maps)

    # ------------------------------------------------------------------------------------ whole diagonals, by spectra

    def _way(self, correlation: Correlation, samples: int) -> str:
        """How the whole diagonals are summed: "spectral", "gradient" or "products"."""
        costs = self.whole_costs(correlation, samples)
        if self.forced_spectral is not None:
            if self.forced_spectral:
                return "spectral"
            del costs["spectral"]
        return min(costs, key=costs.__getitem__)

    def tiling_of(self, correlations: Iterable[Correlation]) -> Tiling:
        """How maps are cut for the spectra that some correlations share."""
        shared = list(correlations)
        axes = range(self.problem.first.axes)
        offsets = [[offset for c in shared for offset in c.offsets(axis)] for axis in axes]
        sizes = [max(c.coarse_size(axis) for c in shared) for axis in axes]
        return plan_tiling(
            sizes, [min(o) for o in offsets], [max(o) for o in offsets], LONGEST_TRANSFORM, TILE_TRANSFORM
        )

    def stacked(self, which: str) -> int:
        """Channels of a map with its phases stacked."""
        return self.channels[which] * math.prod(axis.step(which) for axis in axis_problems(self.problem))

    # ------------------------------------------------------------------------------------ cost

    def cost(self, correlation: Correlation, samples: int) -> float:
        """Price of a correlation for a batch, in multiply-adds of a large real product."""
        strips = sum(self._product_cost(correlation, kinds) for kinds in correlation.border_kinds)
        return samples * PRODUCT * strips + min(self.whole_costs(correlation, samples).values())

    def whole_costs(self, correlation: Correlation, samples: int) -> dict[str, float]:
        """Price of the whole diagonals for a batch, by each way."""
        first, second = (self.stacked(which) for which in correlation.maps)
        tiling = self.tiling_of([correlation])
        entries = tiling.frequencies * tiling.parts * samples
        inverse = SPECTRAL_INVERSE * first * second * len(correlation.chosen(0)) * tiling.frequencies
        spectral = SPECTRAL_PRODUCT * 4 * first * second * entries + TRANSFORM * entries * (first + second) + inverse
        costs = {"spectral": spectral}
        if correlation.as_gradient:
            channels = math.prod(self.channels[which] for which in correlation.maps)
            locations = math.prod(axis.size(correlation.maps[1]) for axis in correlation.axes)
            costs["gradient"] = channels * locations * samples * math.prod(taps for _, taps in correlation.taps)
        else:
            costs["products"] = PRODUCT * samples * self._product_cost(correlation, "d" * len(correlation.axes))
        return costs

    def _product_cost(self, correlation: Correlation, kinds: str) -> float:
        """Multiply-adds for one sample of one product per offset or single pair."""
        cost = float(math.prod(self.channels[which] for which in correlation.maps))
        for axis, kind in enumerate(kinds):
            cost *= len(correlation.chosen(axis, kinds.find("d"))) if kind == "d" else correlation.count(axis, kind)
            if kind == "d":
                cost *= correlation.coarse_size(axis) + max(abs(offset) for offset in correlation.offsets(axis))
        return cost

    def _add_spectral(self, totals: Totals, maps: dict[str, Tensor]) -> None:
        tiling = self.tiling_of(self.spectral)
        itemsize = 2 * maps["x"].element_size()
        roles = sorted({(c.maps[side], side == 0 and tiling.parts > 1) for c in self.spectral for side in (0, 1)})
        per_sample = 2 * itemsize * tiling.frequencies * tiling.parts * sum(self.stacked(which) for which, _ in roles)
        # Enough samples to pay for reading and writing the sums of products, which grow with the channels' square.
        enough = math.ceil(max(8, max(self.stacked(which) for which, _ in roles) / 4) / tiling.parts)
        samples = max(1, min(max(enough, SPECTRA_BYTES // per_sample), self.scratch_bytes // 2 // per_sample))
        sizes = {c.maps: self.stacked(c.maps[0]) * self.stacked(c.maps[1]) for c in self.spectral}
        summed = 2 * itemsize * tiling.frequencies * sum(sizes.values()) <= self.scratch_bytes
        products: dict[str, Tensor] = {}
        count = maps["x"].shape[0]
        for start in range(0, count, samples):
            chunk = slice(start, start + samples)
            spectra = {role: self._spectrum(maps[role[0]][chunk], tiling, *role) for role in roles}
            for correlation in self.spectral:
                first, second = correlation.maps
                f, g = spectra[first, tiling.parts > 1], spectra[second, False].mH
                if not summed:
                    totals.add(correlation.key("d" * len(tiling.lengths)), self._blockwise(correlation, tiling, f, g))
                elif correlation.maps in products:
                    products[correlation.maps].baddbmm_(f, g)
                else:
                    products[correlation.maps] = torch.bmm(f, g)
            del spectra
        for correlation in self.spectral if summed else ():
            value = products.pop(correlation.maps)
            totals.add(correlation.key("d" * len(tiling.lengths)), self._at_diagonals(correlation, tiling, value))

    def _spectrum(self, maps: Tensor, tiling: Tiling, which: str, halo: bool) -> Tensor:
        steps = [axis.step(which) for axis in axis_problems(self.problem)]
        if math.prod(steps) > 1:
            maps = split_phases(maps, steps).flatten(1, 1 + len(steps))
        return spectrum(maps, tiling, halo)

    def _blockwise(self, correlation: Correlation, tiling: Tiling, f: Tensor, g: Tensor) -> Tensor:
        """Correlations a few channels at a time, where the whole cross spectrum would not fit."""
        phases = f.shape[1] // self.channels[correlation.maps[0]]
        per_channel = 2 * f.element_size() * f.shape[0] * g.shape[2] * phases
        block = max(1, self.scratch_bytes // 2 // per_channel) * phases
        parts = [self._at_diagonals(correlation, tiling, torch.bmm(part, g)) for part in f.split(block, dim=1)]
        return torch.cat(parts, dim=-2)

    def _at_diagonals(self, correlation: Correlation, tiling: Tiling, products: Tensor) -> Tensor:
        """(diagonals of each axis ..., c, d) from a cross spectrum of maps with stacked phases."""
        axes = range(len(correlation.axes))
        chosen = [correlation.chosen(axis) for axis in axes]
        counts = [len(indices) for indices in chosen]
        steps = [math.prod(step[side] for step in correlation.steps) for side in (0, 1)]
        if 0 in counts:
            channels = (products.shape[1] // steps[0], products.shape[2] // steps[1])
            return products.real.new_zeros(*counts, *channels)
        if steps == [1, 1]:
            offsets = [[correlation.offsets(axis)[index] for index in chosen[axis]] for axis in axes]
            value = spectral_products(products, tiling, offsets)
            return value.view(*counts, *value.shape[1:])
        split = products.unflatten(2, (-1, steps[1])).unflatten(1, (-1, steps[0]))
        first, second = split.shape[1], split.shape[3]
        real = products.real.dtype
        result = torch.empty(*counts, first, second, dtype=real, device=products.device)
        for groups in itertools.product(*(correlation.phase_groups(axis) for axis in axes)):
            phases = [0, 0]
            for (step, other), ((phase, other_phase), _, _) in zip(correlation.steps, groups, strict=True):
                phases = [phases[0] * step + phase, phases[1] * other + other_phase]
            part = split[:, :, phases[0], :, phases[1]].contiguous()
            value = spectral_products(part, tiling, [offsets for _, _, offsets in groups])
            places = (
                [known.index(index) for index in indices] for known, (_, indices, _) in zip(chosen, groups, strict=True)
            )
            where = tuple(torch.from_numpy(part).to(result.device) for part in np.ix_(*places))
            result[where] = value.view(*(len(indices) for _, indices, _ in groups), first, second)
        return result

    # ---------------------------------------------------------------------------------- whole diagonals, by a gradient

    def _add_gradient(self, totals: Totals, correlation: Correlation, maps: dict[str, Tensor]) -> None:
        """Whole diagonals as the gradient of a convolution's weight with a tap for each."""
        first, second = (maps[which] for which in correlation.maps)
        samples = max(1, EXACT_TERMS // math.prod(second.shape[2:]))
        for part, other in zip(first.split(samples), second.split(samples), strict=True):
            totals.add(correlation.key("d" * len(correlation.axes)), self._gradient(correlation, part, other))

    def _gradient(self, correlation: Correlation, first: Tensor, second: Tensor) -> Tensor:
        kernel, sides = [], []
        for axis, (lowest, taps) in enumerate(correlation.taps):
            step = correlation.steps[axis][0]
            kernel.append(taps)
            sides.append((-lowest, step * (second.shape[2 + axis] - 1) + taps + lowest - first.shape[2 + axis]))
        ones = (1,) * len(kernel)
        geometry = Geometry(tuple(kernel), tuple(step for step, _ in correlation.steps), ones, ((0, 0),) * len(kernel))
        if all(low == high >= 0 for low, high in sides):
            value = weight_gradient(first, second, geometry, tuple(low for low, _ in sides))
        else:
            padded = F.pad(first, [side for pair in reversed(sides) for side in pair])
            value = weight_gradient(padded, second, geometry)
        value = value.view(value.shape[0], *kernel, value.shape[2]).movedim(0, -2)
        for axis, (lowest, taps) in enumerate(correlation.taps):
            wanted = [place - lowest for place in correlation.tap_places(axis)]
            if wanted != list(range(taps)):
                value = value.index_select(axis, torch.tensor(wanted, device=value.device))
        return value

    # ------------------------------------------------------------------------------------ strips, by products

    def _add_products(self, totals: Totals, correlation: Correlation, kinds: str, maps: dict[str, Tensor]) -> None:
        """Correlations where each axis takes its diagonals or its singles, by matrix products."""
        first, second = maps[correlation.maps[0]], maps[correlation.maps[1]]
        pairs = math.prod(correlation.count(axis, "s") for axis, kind in enumerate(kinds) if kind == "s")
        rest = math.prod(size for size, kind in zip(first.shape[2:], kinds, strict=True) if kind == "d")
        per_sample = 4 * pairs * rest * (first.shape[1] + second.shape[1]) * first.element_size()
        samples = max(1, self.scratch_bytes // max(1, per_sample))
        for number, strip in enumerate(correlation.strips(kinds)):
            for start in range(0, first.shape[0], samples):
                part = first[start : start + samples]
                other = part if second is first else second[start : start + samples]
                totals.add(correlation.key(kinds, number), strip.products(part, other))

    # ------------------------------------------------------------------------------------ statistics from correlations

    def expand(self, totals: Totals) -> dict[str, Tensor]:
        """Statistics from the sums of correlations, entries of the biases left out.

        Args:
            totals: what `add` has filled.
        """
        return {
            name: self.expand_one(totals, correlation, name)
            for correlation in self.correlations.values()
            for name in correlation.statistics
        }

    def expand_one(self, totals: Totals, correlation: Correlation, name: str) -> Tensor:
        """One statistic from the sums of its correlations."""
        axes = range(len(correlation.axes))
        sums = self.sums(totals, correlation)
        like = sums["d" * len(axes)]
        c, d = like.shape[-2:]
        weights = [torch.from_numpy(f.weights[name]).to(like) for f in correlation.features]
        shapes = [features.shapes[name] for features in correlation.features]
        taps = [math.prod(entries) for entries in zip(*shapes, strict=True)]
        order: list[int] = []
        sizes: list[int] = []
        tap_axes = [len(shape) for shape in shapes]
        starts = [sum(tap_axes[:axis]) for axis in axes]
        for group in LAYOUTS[name]:
            for entry in group:
                order += (
                    [sum(tap_axes) + "pq".index(entry)]
                    if isinstance(entry, str)
                    else [start + entry for start in starts]
                )
            sizes.append(math.prod({"p": c, "q": d}[e] if isinstance(e, str) else taps[e] for e in group))
        result = like.new_empty(sizes)
        entries = math.prod(len(f.diagonals) + len(f.singles) for f in correlation.features)
        block = max(1, self.scratch_bytes // (16 * d * max(entries, math.prod(taps))))
        rows = sizes[0] // c
        for start in range(0, c, block):
            end = min(start + block, c)
            value = self.features(sums, correlation, slice(start, end))
            for axis in axes:
                value = along_axis(weights[axis], value, axis)
            value = value.reshape(*(n for shape in shapes for n in shape), end - start, d).permute(order)
            result[start * rows : end * rows] = value.reshape(-1, *sizes[1:])
        return result

    def sums(self, totals: Totals, correlation: Correlation) -> dict[str, Tensor]:
        """Sums of all features by kinds of the axes: (features of each axis ..., c, d).

        Args:
            totals: what `add` has filled.
            correlation: one of `correlations`.
        """
        c, d = (self.channels[which] for which in correlation.maps)
        like = next((value for name, value in totals.items() if name.startswith(correlation.maps)), torch.zeros(()))
        found = {}
        for kinds in ["d" * len(correlation.axes), *correlation.border_kinds]:
            counts = [correlation.count(axis, kind) for axis, kind in enumerate(kinds)]
            found[kinds] = like.new_zeros(*counts, c, d, dtype=torch.float64)
            for number, strip in enumerate(correlation.strips(kinds)):
                if (key := correlation.key(kinds, number)) in totals:
                    strip.enter(found[kinds], totals[key])
            if correlation.key(kinds) in totals:
                chosen = torch.tensor(correlation.chosen(0), dtype=torch.long, device=like.device)
                found[kinds].index_add_(0, chosen, totals[correlation.key(kinds)])
            correlation.complete(kinds, found[kinds])
        return found

    @staticmethod
    def features(sums: dict[str, Tensor], correlation: Correlation, channels: slice) -> Tensor:
        """Sums of all features (diagonals and singles of each axis ..., c, d) for some channels of the first map."""
        axes = range(len(correlation.axes))
        counts = [correlation.count(axis, "d") + correlation.count(axis, "s") for axis in axes]
        everything = sums["d" * len(axes)][..., channels, :]
        value = everything.new_zeros(*counts, *everything.shape[-2:])
        for kinds, part in sums.items():
            where = tuple(
                slice(0, correlation.count(axis, "d")) if kind == "d" else slice(correlation.count(axis, "d"), None)
                for axis, kind in enumerate(kinds)
            )
            value[where] = part[..., channels, :]
        return value
