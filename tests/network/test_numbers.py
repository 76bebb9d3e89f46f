"""Numbers that are tied, against the components of a graph."""

from unittest import mock

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

from growconv.network import numbers as numbers_module
from growconv.network.layout import OUT
from growconv.network.numbers import Numbers, unrepeated


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_ties_are_the_components_of_a_graph(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    count, pairs = drawn
    numbers, tight, graph = Numbers(), np.zeros((count, count)), np.zeros((count, count))
    numbers.fresh(("a", OUT), count)
    for at, (first, second) in enumerate(pairs):
        loosely = at % 4 == 1
        numbers.tie([first], [second], loosely)
        (graph if loosely else tight)[first, second] = 1
        if at % 3 == 0:
            numbers.roots()  # what is known already is built upon
    for found, ties in ((numbers.roots(), tight), (numbers.loose_roots(), tight + graph)):
        labels = connected_components(ties, directed=False)[1].tolist()
        assert found.tolist() == [labels.index(label) for label in labels]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 2**16))
def test_what_repeats_itself_is_left_out_and_no_pair_is_lost(shape: list[int], kinds: int, seed: int) -> None:
    """Companions whose entries are alike along most of every axis."""
    draw = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(-1, kinds, shape, generator=draw) for _ in range(2))
    for axis, size in enumerate(shape):
        rows = torch.randint(0, size, (1,), generator=draw) * (torch.arange(size) > size // 3)
        first, second = (each.index_select(axis, rows) for each in (first, second))

    def pairs(companions: tuple[torch.Tensor, torch.Tensor]) -> set[tuple[int, int]]:
        return set(zip(*(each.flatten().tolist() for each in companions), strict=True))

    with mock.patch.object(numbers_module, "MANY", 0):
        thin = unrepeated(first, second)
    assert pairs(thin) == pairs((first, second))
    assert thin[0].shape == thin[1].shape
    assert all(new <= old for new, old in zip(thin[0].shape, shape, strict=True))
    assert first.numel() < 40 or thin[0].numel() < first.numel()
