"""Enlarging a tensor equals building it entry by entry; taking entries away undoes it."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as draw

from growconv.network.tensors import Insertion, enlarge, keep_format, without


def old_entry(index: tuple[int, ...], insertions: list[Insertion]) -> list[int | None]:
    """For each axis the old entry that lies at an index of the long tensor; None: a new one."""
    found: list[int | None] = []
    for axis, place in enumerate(index):
        own = sorted((each for each in insertions if each.axis == axis), key=lambda each: each.position)
        passed, entry = 0, place
        for each in own:
            if place < each.position + passed:
                break
            if place < each.position + passed + each.count:
                entry = -1
                break
            passed += each.count
        found.append(None if entry < 0 else place - passed)
    return found


@draw.composite
def cases(sample: Any) -> tuple[torch.Tensor, list[Insertion]]:
    shape = sample(draw.lists(draw.integers(1, 4), min_size=1, max_size=4))
    axes = sample(draw.lists(draw.integers(0, len(shape) - 1), min_size=1, max_size=3))
    places: set[tuple[int, int]] = {(axis, sample(draw.integers(0, shape[axis]))) for axis in axes}
    insertions = [Insertion(axis, position, sample(draw.integers(1, 3))) for axis, position in sorted(places)]
    return torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape), sample(draw.permutations(insertions))


@given(cases())
def test_old_entries_keep_their_order_and_new_ones_are_zero(case: tuple[torch.Tensor, list[Insertion]]) -> None:
    tensor, insertions = case
    longer = enlarge(tensor, insertions)
    for axis, size in enumerate(tensor.shape):
        assert longer.shape[axis] == size + sum(each.count for each in insertions if each.axis == axis)
    for index in itertools.product(*(range(size) for size in longer.shape)):
        old = old_entry(index, insertions)
        assert longer[index] == (0 if None in old else tensor[tuple(entry for entry in old if entry is not None)])
    for axis in range(tensor.dim()):
        places = range(longer.shape[axis])
        new = [p for p in places if None in old_entry((0,) * axis + (p,), insertions)[axis:]]
        longer = without(longer, axis, new)
    assert torch.equal(longer, tensor)


def test_values_come_between_and_meet_in_zeros() -> None:
    tensor, rows, columns = torch.ones(2, 2), torch.full((1, 2), 2.0), torch.full((2, 1), 3.0)
    both = enlarge(tensor, [Insertion(0, 1, 1, rows), Insertion(1, 2, 1, columns)])
    assert both.tolist() == [[1, 1, 3], [2, 2, 0], [1, 1, 3]]
    assert enlarge(tensor, [Insertion(0, 1, 1, rows)], fill=False).tolist() == [[1, 1], [0, 0], [1, 1]]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtype_and_memory_format_stay(memory_format: torch.memory_format) -> None:
    tensor = torch.ones(2, 3, 4, 4, dtype=torch.float64).to(memory_format=memory_format)
    for result in (
        enlarge(tensor, [Insertion(0, 0, 2), Insertion(1, 3, 1)]),
        enlarge(tensor, [Insertion(1, 3, 1, torch.ones(2, 1, 4, 4))]),
        without(tensor, 1, [0]),
        keep_format(torch.ones(1, 2, 3, 3, dtype=torch.float64), tensor),
    ):
        assert result.is_contiguous(memory_format=memory_format)
        assert result.dtype == torch.float64
