"""A site is data: it serves every model of its names, is copied with its model, and its widths are the model's."""

import copy
import pickle

import pytest
import torch

from growconv.errors import SiteError
from growconv.network.event import grow, shrink
from growconv.network.find import find_sites, site
from tests.network import referee, zoo


def test_sites_named_by_hand() -> None:
    model, example = zoo.build("chain")
    assert site(model, "a", "b", example_input=example).name == "a -> b"
    flat = site(model, "b", "c", example_input=example)
    assert flat.ratio("c") == 4
    model, example = zoo.build("residual")
    assert site(model, ("stem", "a2"), ("b1", "a1", "short"), example_input=example).kind == "stream"


def test_a_site_serves_any_model_of_the_same_names() -> None:
    model, example = zoo.build("grouped")
    sites = find_sites(model, example)
    twin, _ = zoo.build("grouped", seed=1)
    first, other = referee.check(model, example, sites), referee.check(twin, example, [each.of(twin) for each in sites])
    assert [each.width for each in first.sites] == [each.width for each in other.sites]
    assert [each.width for each in sites] == [4, 6]
    assert sites[0].of(None) is sites[0].of(model) is sites[0]
    wrong, _ = zoo.build("residual")
    with pytest.raises(SiteError, match="no such layer"):
        sites[0].of(wrong).check()
    with pytest.raises(SiteError, match=r"no such layer|not have the width"):
        grow(wrong, sites[0], zoo.random_growth(sites[0], 2))


def test_copies_and_pickles_grow() -> None:
    model, example = zoo.build("dense")
    expected = model.eval()(example)
    sites = find_sites(model, example)
    for twin, found in (copy.deepcopy((model, sites)), pickle.loads(pickle.dumps((model, sites)))):
        assert all(each.model is twin for each in found)
        for each in found:
            grow(twin, each, zoo.random_growth(each, 2), 0.0)
        torch.testing.assert_close(twin(example), expected, rtol=1e-10, atol=1e-10)
        assert [each.width for each in found] == [6, 5, 4]
    assert [each.width for each in sites] == [4, 3, 2]


def test_widths_stay_true_while_neighbours_grow_and_shrink() -> None:
    model, example = zoo.build("dense")
    expected, sites = model.eval()(example), find_sites(model, example)
    for each in sites:
        grow(model, each, zoo.random_growth(each, 2), 0.0)
    assert [each.width for each in sites] == [each.width for each in find_sites(model, example)] == [6, 5, 4]
    for each in sites:
        shrink(model, each, range(each.width - 2, each.width))
    torch.testing.assert_close(model(example), expected, rtol=1e-10, atol=1e-10)
