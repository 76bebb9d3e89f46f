"""Bad input is refused with one clear error, and nothing has changed."""

import dataclasses
import inspect

import pytest
import torch
from torch import nn

import growconv
from growconv.errors import ArgumentTypeError, ArgumentValueError, SiteError, SurgeryError
from growconv.network.find import find_sites
from tests.network import zoo


@pytest.fixture
def case():
    """A model, one of its pairs, a proposal, and a check that nothing of the model has changed."""
    model, example = zoo.build("residual")
    site = find_sites(model, example)[1]
    growth = zoo.random_growth(site, 3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = list(model.parameters())
    text = str(model)
    yield model, site, growth
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert str(model) == text


def changed(growth, **fields):
    return dataclasses.replace(growth, **fields)


PROPOSALS = {
    "another site": (lambda g: changed(g, site="x -> y"), "for another site"),
    "wrong filters": (lambda g: changed(g, incoming={"a1": torch.zeros(3, 5, 3, 3)}), "incoming weights of a1"),
    "wrong kernel": (lambda g: changed(g, incoming={"a1": torch.zeros(3, 4, 5, 5)}), "incoming weights of a1"),
    "wrong columns": (lambda g: changed(g, outgoing={"a2": torch.zeros(4, 2, 3, 3)}), "outgoing weights of a2"),
    "no columns": (lambda g: changed(g, outgoing={}), "no outgoing weights"),
    "no filters": (lambda g: changed(g, incoming={}), "no incoming weights"),
    "a stranger": (lambda g: changed(g, outgoing={**g.outgoing, "b1": torch.zeros(1)}), "not part of the site"),
    "a needless bias": (lambda g: changed(g, incoming_bias={"a1": torch.zeros(3)}), "without one"),
    "not finite": (lambda g: changed(g, outgoing={"a2": torch.full((4, 3, 3, 3), float("nan"))}), "no finite numbers"),
    "negative variance": (lambda g: changed(g, norms={"n1": (torch.zeros(3), -torch.ones(3))}), "variance is negative"),
    "short norms": (lambda g: changed(g, norms={"n1": (torch.zeros(2), torch.ones(2))}), "mean for n1"),
    "copies of nothing": (lambda g: changed(g, copied_from=torch.tensor([0, 1, 9])), "one old channel per new one"),
    "unknown revision": (lambda g: changed(g, revised={"a1.nothing": torch.zeros(1)}), "does not exist"),
    "wrong revision": (lambda g: changed(g, revised={"a1.weight": torch.zeros(1, 1, 1, 1)}), "new values of a1.weight"),
    "no channels": (
        lambda g: changed(
            g, gains=torch.zeros(0), incoming={"a1": torch.zeros(0, 4, 3, 3)}, outgoing={"a2": torch.zeros(4, 0, 3, 3)}
        ),
        "cannot be added",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROPOSALS)
def test_a_proposal_that_does_not_fit(case, name: str) -> None:
    model, site, growth = case
    spoil, says = PROPOSALS[name]
    with pytest.raises(SurgeryError, match=says):
        growconv.grow(model, site, spoil(growth))


def test_a_layer_with_a_bias_needs_one(case) -> None:
    model, _ = zoo.build("chain")
    site = find_sites(model, torch.zeros(1, 3, 14, 14).double())[0]
    growth = changed(zoo.random_growth(site, 2), incoming_bias={})
    with pytest.raises(SurgeryError, match="no incoming bias"):
        growconv.grow(model, site, growth)


@pytest.mark.parametrize("amplitude", [float("nan"), float("inf")])
def test_an_amplitude_that_is_not_finite(case, amplitude: float) -> None:
    model, site, growth = case
    with pytest.raises(ArgumentValueError, match="finite"):
        growconv.grow(model, site, growth, amplitude)


def test_things_that_are_not_what_they_should_be(case) -> None:
    model, site, growth = case
    grow = inspect.unwrap(growconv.grow)  # without the types that the tests check at run time
    for arguments in (
        (model, "a1 -> a2", growth),
        (model, site, {"a1": 1}),
        (model, site, growth, "much"),
        (3, site, growth),
    ):
        with pytest.raises(ArgumentTypeError):
            grow(*arguments)


def test_a_site_of_a_model_of_other_names(case) -> None:
    _, site, growth = case
    other, _ = zoo.build("chain")
    with pytest.raises(SiteError, match="no such layer"):
        growconv.grow(other, site, growth)


def test_a_module_that_was_replaced_by_another_kind() -> None:
    model, example = zoo.build("residual")
    site = find_sites(model, example)[1]
    growth = zoo.random_growth(site, 1)
    model.a2 = nn.Identity()
    with pytest.raises(SiteError, match="no such layer") as caught:
        growconv.grow(model, site, growth)
    assert "a2" in str(caught.value)


def test_a_module_that_was_replaced_by_a_wider_one() -> None:
    model, example = zoo.build("residual")
    site = find_sites(model, example)[1]
    growth = zoo.random_growth(site, 1)
    model.a2 = nn.Conv2d(7, 4, 3, padding=1).double()
    with pytest.raises(SiteError, match="width") as caught:
        growconv.grow(model, site, growth)
    assert "a2" in str(caught.value)


def test_a_layer_that_was_frozen_later(case) -> None:
    model, site, growth = case
    model.a2.weight.requires_grad_(False)
    with pytest.raises(SiteError, match="frozen"):
        growconv.grow(model, site, growth)


def test_groups_grow_as_a_whole() -> None:
    model, example = zoo.build("grouped")
    site = find_sites(model, example)[1]
    assert site.growable_channels(3) == 4
    growth = zoo.random_growth(site, 3)
    assert growth.channels == 4
    with pytest.raises(SurgeryError, match="multiple of 2"):
        growconv.grow(model, site, growth.subset([0, 1, 2]))


def test_statistics_older_than_a_removal_do_not_fit() -> None:
    model, example = zoo.build("residual")
    sites = find_sites(model, example)
    growth = zoo.random_growth(sites[1], 2)
    growconv.shrink(model, sites[0], [0])
    with pytest.raises(SurgeryError, match="taken away since"):
        growconv.grow(model, sites[1], growth)


def test_layers_that_are_not_initialized_or_quantized_are_no_sites() -> None:
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1))
    nn.utils.parametrize.register_parametrization(model[1], "weight", Double())
    rows = {row.path: row for row in growconv.explain_sites(model, torch.zeros(1, 1, 2, 2))}
    assert "Double" in str(rows["0"].reason)
    assert "Double" in str(rows["1"].reason)
