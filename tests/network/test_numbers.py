"""Numbers that are tied, against the components of a graph."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components

from growconv.network.layout import OUT
from growconv.network.numbers import Numbers


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
