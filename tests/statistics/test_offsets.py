"""Offsets of two kernels."""

import math

from growconv.statistics import offset_path
from tests.statistics import cases


def test_offsets_of_two_three_by_three_kernels_are_as_few_as_the_theory_says():
    geometry = cases.Geometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    problem = cases.PairProblem(geometry, geometry, (), (32, 32), (32, 32), (2, 2, 2), True, True)
    path = offset_path.OffsetPath(problem, cases.SUMS - {"S_full"}, 1 << 28)
    counts = {maps: _offsets(correlation) for maps, correlation in path.correlations.items()}
    assert counts == {"xx": 25, "xv": 25, "xh": 49, "hh": 25, "hv": 9}
    full = offset_path.OffsetPath(problem, {"S_full"}, 1 << 28).correlations["xx"]
    assert _offsets(full) == 81


def _offsets(correlation):
    return math.prod(len({offset for _, _, offset in axis.diagonals}) for axis in correlation.features)
