"""Layouts against a list of owners: sizes, positions and places at any width."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growconv.errors import SiteError
from growconv.network.layout import IN, OUT, Layout, Run, Sizes, Torn, owners_of, runs_of

KEY = ("b", IN)


@st.composite
def drawn_runs(draw: st.DrawFn) -> tuple[list[tuple], list[int]]:
    """An axis of any runs of two spaces, and their units."""
    runs, slots = [], [0, 0]
    for _ in range(draw(st.integers(1, 5))):
        space, outer = draw(st.sampled_from([None, 0, 1])), draw(st.integers(1, 3))
        if space is None:
            runs.append((None, outer))
            continue
        inner = draw(st.integers(1, 3))
        own = draw(st.permutations(range(slots[space], slots[space] + outer * inner)))
        runs.append((space, outer, inner, tuple(own)))
        slots[space] += outer * inner
    return runs, [draw(st.integers(1, 4)), draw(st.integers(1, 4))]


@settings(max_examples=100, deadline=None)
@given(drawn_runs(), st.integers(1, 3))
def test_new_units_come_where_the_layout_of_the_new_width_has_them(
    drawn: tuple[list[tuple], list[int]], more: int
) -> None:
    runs, units = tuple(Run(*each) for each in drawn[0]), drawn[1]
    layout = Layout({KEY: runs, ("a", OUT): (Run(0, 1),), ("e", OUT): (Run(1, 1),)}, (1, 1), {})
    sizes = {key: len(owners_of(runs, units)) for key, runs in layout.axes.items()}
    assert [layout.units(space, Sizes(sizes.__getitem__)) for space in (0, 1)] == units
    old = [tuple(owner) for owner in owners_of(runs, units).tolist()]
    for space in (0, 1):
        if not layout.per_unit(KEY, space):
            continue
        per_unit = layout.per_unit(KEY, space)
        expected = [tuple(o) for o in owners_of(runs, [u + more * (s == space) for s, u in enumerate(units)]).tolist()]
        grown = list(old)
        places = layout.places(KEY, {space: more}, Sizes(sizes.__getitem__))
        for place in sorted(places, key=lambda place: -place.position):
            new = [(space, units[space] + entry // per_unit, entry % per_unit) for entry in place.entries]
            grown[place.position : place.position] = new
        assert grown == expected
        entries = layout.entries(KEY, space, Sizes(sizes.__getitem__))
        assert [old[at] for at in entries] == [
            (space, u, slot) for u in range(units[space]) for slot in range(per_unit)
        ]


def test_an_axis_that_holds_no_whole_units_is_an_error() -> None:
    layout = Layout({KEY: (Run(0, 2, 1, (0, 1)),)}, (1,), {})
    with pytest.raises(SiteError, match="whole channels"):
        layout.units(0, Sizes(lambda _: 5))
    with pytest.raises(SiteError, match="no layer tells"):
        Layout({KEY: (Run(0, 1), Run(1, 1))}, (1, 1), {}).units(0, Sizes(lambda _: 5))


def test_runs_are_laid_out_in_order() -> None:
    runs = (Run(None, 1), Run(0, 2, 2, (0, 1, 2, 3)))
    found = owners_of(runs, [2])
    assert np.array_equal(found[:, 1], [-1, 0, 0, 1, 1, 0, 0, 1, 1])
    assert np.array_equal(found[:, 2], [-1, 0, 1, 0, 1, 2, 3, 2, 3])


@given(st.lists(st.tuples(st.sampled_from([None, 0, 1]), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4))
def test_runs_are_read_off_their_own_positions(drawn: list[tuple[int | None, int, int]]) -> None:
    slots, written = [0, 0], []
    for space, outer, inner in drawn:
        if space is None:
            written.append(Run(None, outer))
            continue
        count = outer * inner
        written.append(Run(space, outer, inner, tuple(range(slots[space], slots[space] + count))))
        slots[space] += count
    units, entries = [4, 3], [max(each, 1) for each in slots]
    owners = owners_of(written, units)
    blocks = np.where(owners[:, :1] < 0, -1, [[0, 0, 0]])[:, 0]
    found = runs_of(np.column_stack([owners[:, 0], owners[:, 1], blocks]), units, entries)
    read = owners_of(found, units)
    assert np.array_equal(read[:, :2], owners[:, :2])
    assert sorted(map(tuple, read[read[:, 0] >= 0].tolist())) == sorted(map(tuple, owners[owners[:, 0] >= 0].tolist()))


def test_positions_in_no_order_are_torn() -> None:
    with pytest.raises(Torn) as caught:
        runs_of(np.array([[0, 0, 0], [0, 2, 0], [0, 1, 0], [0, 3, 0]]), [4], [1])
    assert caught.value.space == 0
