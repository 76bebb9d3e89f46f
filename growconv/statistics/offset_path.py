"""The offset path: every statistic from correlations of maps at a few offsets, and thin strips along the border."""

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from growconv.statistics.correlation import Known, Strip, along_axis, blocks_of
from growconv.statistics.offsets import MAPS, AxisFeatures, AxisProblem, axis_features
from growconv.statistics.problem import PairProblem
from growconv.statistics.sums import Totals

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

    def count(self, axis: int, kind: str) -> int:
        """Number of features of a kind on an axis: diagonals "d" or singles "s"."""
        features = self.features[axis]
        return len(features.diagonals if kind == "d" else features.singles)

    def coarse(self, axis: int) -> tuple[int, int]:
        """Locations of one phase of both maps on an axis."""
        first, second = (
            -(-self.axes[axis].size(which) // step) for which, step in zip(self.maps, self.steps[axis], strict=True)
        )
        return first, second

    @cached_property
    def kinds(self) -> list[str]:
        """Whether each axis takes its diagonals or its singles: all combinations that are not empty."""
        return [
            "".join(kinds)
            for kinds in itertools.product("ds", repeat=len(self.axes))
            if all(self.count(axis, kind) for axis, kind in enumerate(kinds))
        ]

    @cached_property
    def strips(self) -> dict[str, list[Strip]]:
        """What is to be multiplied, by kinds of the axes."""
        found = {}
        for kinds in self.kinds:
            pairs = [axis for axis, kind in enumerate(kinds) if kind == "s"]
            diagonals = {axis: self.features[axis].diagonals for axis, kind in enumerate(kinds) if kind == "d"}
            steps = {axis: self.steps[axis] for axis in diagonals}
            sizes = {axis: self.coarse(axis) for axis in diagonals}
            found[kinds] = [
                Strip(dict(zip(pairs, blocks, strict=True)), diagonals, steps, sizes, self.maps)
                for blocks in itertools.product(*(blocks_of(self.features[axis].singles) for axis in pairs))
            ]
        return found


class OffsetPath:
    """Sums of some statistics of one pair of layers at one image size.

    Args:
        problem: the pair; its grid must not change in between, and its paddings must be zeros.
        statistics: names among S, S_full, patch_gram, N_raw, P, S2 and M.
        scratch_bytes: bound on temporary memory.
    """

    def __init__(self, problem: PairProblem, statistics: Iterable[str], scratch_bytes: int) -> None:
        self.problem = problem
        self.scratch_bytes = scratch_bytes
        wanted: dict[str, list[str]] = {}
        for name in sorted(statistics):
            wanted.setdefault(MAPS[name], []).append(name)
        axes = axis_problems(problem)
        self.correlations = {maps: Correlation(axes, maps, tuple(names)) for maps, names in wanted.items()}
        self.channels = dict(zip("xhv", problem.channels, strict=True))

    def add(self, totals: Totals, x: Tensor, h: Tensor, v: Tensor) -> None:
        """Add a batch to the sums of correlations.

        Args:
            totals: sums so far.
            x: input of the producer (n, C0, *size).
            h: input of the consumer (n, C1, *grid).
            v: desired change of the consumer's output (n, C2, *out).
        """
        together: dict[int, dict[str, Strip]] = {}  # by the number of parts that the batch is taken in
        for name, strip in self._strips():
            at_once = strip.samples_at_once(self._channels(strip), x.element_size(), self.scratch_bytes)
            together.setdefault(math.ceil(len(x) / at_once), {})[name] = strip
        for parts, strips in together.items():
            for part in zip(*(maps.tensor_split(parts) for maps in (x, h, v)), strict=True):
                maps, known = dict(zip("xhv", part, strict=True)), Known(strips.values())
                for name, strip in strips.items():
                    first, second = (maps[which] for which in strip.maps)
                    totals.add(name, strip.products(first, second, self.scratch_bytes, known))

    def _strips(self) -> Iterator[tuple[str, Strip]]:
        """All that is multiplied, each with the name of its sum."""
        for correlation in self.correlations.values():
            for kinds, strips in correlation.strips.items():
                yield from ((f"{correlation.maps}:{kinds}:{number}", strip) for number, strip in enumerate(strips))

    def _channels(self, strip: Strip) -> tuple[int, int]:
        first, second = strip.maps
        return self.channels[first], self.channels[second]

    def cost(self, samples: int) -> float:
        """Price of a batch, in multiply-adds of a large product."""
        return sum((strip.cost(self._channels(strip), samples) for _, strip in self._strips()), 0.0)

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
        axes = len(correlation.axes)
        empty = [correlation.count(axis, "d") for axis in range(axes)]
        found = {"d" * axes: like.new_zeros(*empty, c, d, dtype=torch.float64)}
        for kinds, strips in correlation.strips.items():
            counts = [correlation.count(axis, kind) for axis, kind in enumerate(kinds)]
            found[kinds] = like.new_zeros(*counts, c, d, dtype=torch.float64)
            for number, strip in enumerate(strips):
                key = f"{correlation.maps}:{kinds}:{number}"
                if key in totals:
                    strip.enter(found[kinds], totals[key])
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
