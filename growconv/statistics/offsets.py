"""What a statistic consists of: whole diagonals (offsets) of two maps, corrected by single pairs of locations.

Along one axis a statistic is, for each combination of taps, a sum over pairs (ρ, σ) of locations of two maps. Away from
the border all pairs of a combination lie on one diagonal ρ − σ = const, and many combinations share a diagonal. So a
statistic is a sum of whole diagonals, less the few pairs at the border that a combination lacks. On several axes it is
the product of both descriptions. Strides come in as phases: a map with step s between outputs is s
interleaved maps.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from growconv.convolution.geometry import Geometry

MAPS = {"S": "xx", "S_full": "xx", "patch_gram": "xx", "N_raw": "xv", "P": "xh", "S2": "hh", "M": "hv"}
"""The two maps of each statistic: x read by the producer, h read by the consumer, v wanted of the consumer's output."""

Diagonal = tuple[int, int, int]
Pair = tuple[int, int]


@dataclass(frozen=True)
class AxisProblem:
    """One axis of a pair of convolutions.

    Attributes:
        first: the producer's geometry on this axis: taps, stride, dilation, low and high padding.
        second: the consumer's.
        sizes: locations of x, h and v.
    """

    first: Geometry
    second: Geometry
    sizes: tuple[int, int, int]

    def size(self, which: str) -> int:
        """Locations of a map."""
        return self.sizes["xhv".index(which)]

    def step(self, which: str) -> int:
        """Locations of a map between neighbouring outputs of the consumer."""
        return {"x": self.first.stride[0] * self.second.stride[0], "h": self.second.stride[0], "v": 1}[which]


@dataclass(frozen=True)
class AxisFeatures:
    """Diagonals and single pairs of one axis, and how each statistic is made of them.

    Attributes:
        diagonals: (phase of the first map, phase of the second, offset) each: all ρ = s·j + phase, σ = s'·(j − offset)
            + phase'.
        singles: pairs (ρ, σ).
        weights: per statistic its integer coefficients (combinations of taps, diagonals + singles).
        shapes: per statistic the taps whose combinations are the rows of its coefficients, e.g. (3, 3) for (t, t').
    """

    diagonals: tuple[Diagonal, ...]
    singles: tuple[Pair, ...]
    weights: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]


@lru_cache(maxsize=512)
def axis_features(axis: AxisProblem, maps: str, statistics: tuple[str, ...]) -> AxisFeatures:
    """Describe statistics of two maps along one axis.

    Args:
        maps: "xx", "xv", "xh", "hh" or "hv".
        statistics: names of statistics of these two maps.

    Returns:
        Their shared diagonals and singles. For two equal maps both are closed under exchanging the maps.
    """
    reads = _Reads(axis)
    diagonals: dict[Diagonal, int] = {}
    singles: dict[Pair, int] = {}
    rows: dict[str, list[dict[Diagonal | Pair, int]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    steps = axis.step(maps[0]), axis.step(maps[1])
    sizes = axis.size(maps[0]), axis.size(maps[1])
    for name in statistics:
        shapes[name], combinations = reads.combinations(name)
        rows[name] = [_decompose(pairs, steps, sizes) for pairs in combinations]
        for row in rows[name]:
            for feature in row:
                known = diagonals if len(feature) == 3 else singles
                known.setdefault(feature, len(known))  # pyright: ignore[reportArgumentType]
    weights = {}
    for name, decomposed in rows.items():
        matrix = np.zeros((len(decomposed), len(diagonals) + len(singles)), dtype=np.int64)
        for number, row in enumerate(decomposed):
            for feature, coefficient in row.items():
                column = diagonals[feature] if len(feature) == 3 else len(diagonals) + singles[feature]
                matrix[number, column] = coefficient
        weights[name] = matrix
    return AxisFeatures(tuple(diagonals), tuple(singles), weights, shapes)


class _Reads:
    """The location of each map that each combination of taps reads for each output, −1 for none."""

    def __init__(self, axis: AxisProblem) -> None:
        self.h = np.array(axis.second.reads(0, axis.sizes[1])).T  # (b, m)
        self.v = np.arange(axis.sizes[2])
        self.u = np.array(axis.first.reads(0, axis.sizes[0])).T  # (t, l)

    @property
    def x(self) -> np.ndarray:
        """(t, b, m): what the producer reads for the hidden location that the consumer reads."""
        return np.where(self.h >= 0, self.u[:, self.h], -1)

    def combinations(self, name: str) -> tuple[tuple[int, ...], list[np.ndarray]]:
        """Taps of a statistic, and per combination of them its pairs (ρ, σ) as rows."""
        h, u = self.h, self.u
        t, e = u.shape[0], h.shape[0]
        if name == "patch_gram":
            return (t, t), [_pairs(u[i], u[j]) for i in range(t) for j in range(t)]
        if name == "S2":
            return (e, e), [_pairs(h[i], h[j]) for i in range(e) for j in range(e)]
        if name == "M":
            return (e,), [_pairs(h[i], self.v) for i in range(e)]
        x, b = self.x, e
        if name == "S":
            return (t, t), [_pairs(x[i], x[j]) for i in range(t) for j in range(t)]
        if name == "N_raw":
            return (t, b), [_pairs(x[i, j], self.v) for i in range(t) for j in range(b)]
        flat = x.reshape(t * b, -1)
        if name == "P":
            return (t, b, e), [_pairs(row, h[k]) for row in flat for k in range(e)]
        return (t, b, t, b), [_pairs(row, other) for row in flat for other in flat]


def _pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    both = (first >= 0) & (second >= 0)
    return np.stack([first[both], second[both]], axis=1)


def _decompose(pairs: np.ndarray, steps: tuple[int, int], sizes: tuple[int, int]) -> dict[Diagonal | Pair, int]:
    """A multiset of pairs as coefficients of whole diagonals and of single pairs, which mend the diagonals."""
    result: dict[Diagonal | Pair, int] = {}
    if not len(pairs):
        return result
    row, other = pairs[:, 0], pairs[:, 1]
    keys = np.stack([row % steps[0], other % steps[1], row // steps[0] - other // steps[1]], axis=1)
    for key in np.unique(keys, axis=0):
        phase, other_phase, offset = (int(entry) for entry in key)
        inside = pairs[(keys == key).all(axis=1)]
        # position j along the diagonal; ρ = step·j + phase, σ = step'·(j − offset) + phase'
        low = max(0, offset)
        high = min((sizes[0] - 1 - phase) // steps[0], (sizes[1] - 1 - other_phase) // steps[1] + offset)
        counts = np.bincount(inside[:, 0] // steps[0] - low, minlength=high - low + 1)
        occurrences = np.bincount(counts)
        usual = int(np.flatnonzero(occurrences == occurrences.max())[-1])
        if usual:
            result[phase, other_phase, offset] = usual
        for position in np.flatnonzero(counts != usual):
            j = int(position) + low
            pair = steps[0] * j + phase, steps[1] * (j - offset) + other_phase
            result[pair] = int(counts[position]) - usual
    return result
