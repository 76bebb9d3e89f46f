"""Correlations through the spectra of many tiles."""

import pytest

from growconv.statistics import spectra
from tests.statistics import cases


@pytest.mark.parametrize("tile", [6, 12, 72])
def test_larger_images_with_many_tiles(tile, monkeypatch):
    monkeypatch.setattr(spectra, "LONGEST_TRANSFORM", tile)
    monkeypatch.setattr(spectra, "TILE_TRANSFORM", tile)
    geometry = cases.Geometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    problem = cases.PairProblem(geometry, geometry, (), (31, 26), (31, 26), (2, 3, 2), True, True)
    x, h, v = cases.tensors(problem)
    names = cases.SUMS - {"S_full"}
    expected = cases.unfolded(problem, names, x, h, v)
    cases.assert_equal(cases.by_offsets(problem, names, x, h, v), expected, 1e-10)
