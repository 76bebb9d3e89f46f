"""Networks drawn at random: whatever is found grows exactly, whatever is not has a reason, and nothing else happens."""

import copy
import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growconv.network.analysis import analyse
from growconv.network.find import explain_sites, find_sites, rows_of
from tests.network import drawn, referee

EVERYTHING_GROWS = (
    "conv",
    "conv",
    "conv",
    "norm",
    "activation",
    "scale",
    "pool",
    "grid",
    "softmax",
    "standard",
    "between",
)
"""Steps after which every channel that is read can grow."""


def compare(seed: int, steps: int, kinds: tuple[str, ...] = drawn.KINDS) -> None:
    model, example = drawn.build(seed, steps, kinds)
    model = referee.prepared(model)
    found = analyse(model, example)
    assert all(row.growable != bool(row.reason) for row in rows_of(found))
    sites = found.sites
    draw = random.Random(seed)
    grown = referee.check(model, example, sites, [draw.randint(1, 5) for _ in sites] or [1])
    assert referee.untrained(grown, example) == []


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(2, 10))
def test_whatever_is_found_grows_exactly(seed: int, steps: int) -> None:
    compare(seed, steps)


@pytest.mark.long
@settings(max_examples=1500)
@given(st.integers(0, 10**6), st.integers(2, 20))
def test_whatever_is_found_grows_exactly_in_many_networks(seed: int, steps: int) -> None:
    compare(seed, steps)


@settings(max_examples=5)
@given(st.integers(0, 10**6), st.integers(3, 10))
def test_every_layer_that_is_read_grows_where_nothing_stands_in_the_way(seed: int, steps: int) -> None:
    model, example = drawn.build(seed, steps, EVERYTHING_GROWS)
    reasons = {row.path: row.reason for row in explain_sites(referee.prepared(model), example) if not row.growable}
    assert reasons.pop("head") == "it is the model's output"
    assert set(reasons.values()) <= {"no layer reads it"}


@settings(max_examples=3)
@given(st.integers(0, 10**6))
def test_sites_of_a_grown_network_are_those_that_it_had(seed: int) -> None:
    model, example = drawn.build(seed, 8, EVERYTHING_GROWS)
    grown = referee.grow_all(referee.prepared(model), find_sites(model, example))
    again = find_sites(grown.model, example)
    assert [(each.name, each.width) for each in again] == [(each.name, each.width) for each in grown.sites]
    for old, new in zip(grown.sites, again, strict=True):
        assert [old.entries(path) for path in old.consumers] == [new.entries(path) for path in new.consumers]


def test_copies_of_a_drawn_network_have_its_sites() -> None:
    model, example = drawn.build(3, 10)
    model = referee.prepared(model)
    sites = find_sites(model, example)
    twin, others = copy.deepcopy((model, sites))
    assert [each.name for each in find_sites(twin, example)] == [each.name for each in others]
    assert all(each.model is twin for each in others)
    alone = pickle.loads(pickle.dumps([each.layout for each in sites]))
    assert alone == [each.layout for each in sites]
    assert torch.equal(twin(example), model(example))
