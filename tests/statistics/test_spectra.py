"""Correlations through spectra against sums location by location."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growconv.statistics import spectra


def by_location(first, second, offset):
    """Σ over samples and locations j of first[j + offset]·second[j]."""
    total = torch.zeros(first.shape[1], second.shape[1], dtype=first.dtype)
    for place in itertools.product(*(range(size) for size in second.shape[2:])):
        other = tuple(j + o for j, o in zip(place, offset, strict=True))
        if all(0 <= j < size for j, size in zip(other, first.shape[2:], strict=True)):
            total += first[(slice(None), slice(None), *other)].T @ second[(slice(None), slice(None), *place)]
    return total


@st.composite
def correlations(draw):
    axes = draw(st.integers(1, 3))
    sizes = [(draw(st.integers(1, 7)), draw(st.integers(1, 7))) for _ in range(axes)]
    offsets = [sorted(draw(st.sets(st.integers(-3, 3), min_size=1, max_size=3))) for _ in range(axes)]
    return sizes, offsets


@settings(max_examples=60)
@given(correlations(), st.sampled_from([48, 6, 4]), st.sampled_from([1 << 20, 1]))
def test_offsets_of_two_maps(drawn, longest, product_bytes):
    sizes, offsets = drawn
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 3, 2, *(a for a, _ in sizes), dtype=torch.float64, generator=generator)
    second = torch.randn(2, 3, 4, *(b for _, b in sizes), dtype=torch.float64, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectra, "LONGEST_TRANSFORM", longest)  # small: maps are cut into tiles
        patch.setattr(spectra, "TILE_TRANSFORM", longest)
        tiling = spectra.plan_tiling(sizes, [(each[0], each[-1]) for each in offsets])
    wanted = spectra.grid(offsets)
    left, right = (
        spectra.spectrum(spectra.cut_tiles(maps, tiling, own), tiling) for maps, own in ((first, True), (second, False))
    )
    inverse = spectra.inverse(tiling, wanted)
    found = spectra.correlate(left, right, inverse, product_bytes)
    for number, offset in enumerate(wanted):
        for group in (0, 1):
            torch.testing.assert_close(found[number, group], by_location(first[group], second[group], offset))


def test_a_map_with_itself_takes_the_shorter_way():
    maps = torch.randn(1, 5, 3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tiling = spectra.plan_tiling([(6, 6), (4, 4)], [(-2, 2), (-1, 1)])
    wanted = spectra.grid([[-2, 0, 1], [-1, 0, 1]])
    spectrum = spectra.spectrum(maps, tiling)
    inverse = spectra.inverse(tiling, wanted)
    for number, found in enumerate(spectra.correlate(spectrum, spectrum, inverse, 1 << 20)):
        torch.testing.assert_close(found[0], by_location(maps[0], maps[0], wanted[number]))
