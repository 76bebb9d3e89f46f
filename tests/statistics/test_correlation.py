"""Strips along a border against sums pair by pair of locations."""

import pytest
import torch

from growconv.statistics import spectra
from growconv.statistics.correlation import Known, Strip, blocks_of
from tests.statistics import cases
from tests.statistics.test_spectra import by_location

PAIRS = ((0, 0), (0, 1), (1, 0), (1, 1), (8, 8))


@pytest.mark.parametrize("symmetric", [True, False])
def test_pairs_of_rows_and_diagonals_of_columns(symmetric):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, 2, 9, 7, dtype=torch.float64, generator=generator)
    second = first if symmetric else torch.randn(3, 4, 9, 7, dtype=torch.float64, generator=generator)
    diagonals = tuple((0, 0, offset) for offset in (-2, -1, 0, 1, 2))
    found = torch.zeros(len(PAIRS), len(diagonals), 2, second.shape[1], dtype=torch.float64)
    for block in blocks_of(PAIRS):
        strip = Strip({0: block}, {1: diagonals}, {1: (1, 1)}, {1: (7, 7)}, "xx" if symmetric else "xv")
        strip.enter(found, strip.products(first, second, 1 << 20, Known([strip])))
    for pair, (row, other) in enumerate(PAIRS):
        for diagonal, (_, _, offset) in enumerate(diagonals):
            expected = by_location(first[:, :, row], second[:, :, other], (offset,))
            torch.testing.assert_close(found[pair, diagonal], expected)


def test_phases_of_a_stride():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 2, 9, dtype=torch.float64, generator=generator)
    diagonals = tuple((p, q, o) for p in (0, 1) for q in (0, 1) for o in (-1, 0, 1))
    found = torch.zeros(len(diagonals), 2, 2, dtype=torch.float64)
    strip = Strip({}, {0: diagonals}, {0: (2, 2)}, {0: (5, 5)}, "xx")
    strip.enter(found, strip.products(maps, maps, 1 << 20, Known([strip])))
    for number, (phase, other, offset) in enumerate(diagonals):
        torch.testing.assert_close(found[number], by_location(maps[:, :, phase::2], maps[:, :, other::2], (offset,)))


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


def test_a_map_is_transformed_once_for_all_that_reads_it(monkeypatch):
    transformed, spectrum = [], spectra.spectrum

    def counted(maps, tiling):
        transformed.append(maps.shape[2:])
        return spectrum(maps, tiling)

    monkeypatch.setattr(spectra, "spectrum", counted)
    geometry = cases.Geometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    problem = cases.PairProblem(geometry, geometry, (), (9, 9), (9, 9), (2, 3, 4), False, False)
    x, h, v = cases.tensors(problem)
    names = frozenset({"S", "N_raw"})
    found = cases.by_offsets(problem, names, x, h, v)  # in two batches
    assert transformed.count(torch.Size([2, 9, 9])) == 2  # x meets itself and v
    assert transformed.count(torch.Size([4, 9, 9])) == 2
    cases.assert_equal(found, cases.unfolded(problem, names, x, h, v), 1e-10)
