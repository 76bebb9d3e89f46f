"""The unfold and the offset path against the dense reference, on drawn geometries."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from growconv.convolution.geometry import Geometry
from growconv.statistics import spectra
from growconv.statistics.problem import PairProblem
from tests.statistics import cases

SCRATCH = st.sampled_from([1 << 28, 1 << 28, 30_000, 3_000, 100])


@settings(max_examples=220)
@given(cases.pairs(), SCRATCH, st.sampled_from([72, 72, 10, 6, 4]))
def test_all_paths_agree_in_float64(pair, scratch, longest):
    problem = cases.problem_of(pair)
    names = cases.statistics_of(problem)
    x, h, v = cases.tensors(problem)
    expected = cases.dense(problem, names, x, h, v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectra, "LONGEST_TRANSFORM", longest)  # small: maps are cut into tiles
        patch.setattr(spectra, "TILE_TRANSFORM", longest)
        cases.assert_equal(cases.by_offsets(problem, names, x, h, v, scratch), expected, 1e-10)
    cases.assert_equal(cases.unfolded(problem, names, x, h, v, scratch), expected, 1e-10)


@settings(max_examples=60)
@given(cases.pairs())
def test_float32_stays_within_its_precision(pair):
    problem = cases.problem_of(pair)
    names = cases.statistics_of(problem)
    x, h, v = cases.tensors(problem, dtype=torch.float32)
    expected = cases.dense(problem, names, x.double(), h.double(), v.double())
    cases.assert_equal(cases.by_offsets(problem, names, x, h, v), expected, 1e-4)
    cases.assert_equal(cases.unfolded(problem, names, x, h, v), expected, 1e-4)


def test_a_constant_background_sums_up_in_float32():
    """Equal products round alike: one long sum of them in float32 is wrong by 1e-4."""
    kernel = Geometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    problem = PairProblem(kernel, kernel, (), (14, 14), (14, 14), (8, 2, 8), False, False)
    x = 1.7 + 0.1 * F.dropout(torch.randn(250, 8, 14, 14).relu(), 0.8)
    h, v = torch.zeros(250, 2, 14, 14), torch.zeros(250, 8, 14, 14)
    expected = cases.by_offsets(problem, ("S",), x.double(), h.double(), v.double())
    cases.assert_equal(cases.by_offsets(problem, ("S",), x, h, v), expected, 3e-6)
