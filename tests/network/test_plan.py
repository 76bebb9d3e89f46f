"""Plans: copies, bare parameters, tied weights, sizes in attributes."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from growconv.network.event import GrowthHistory, grow, shrink
from growconv.network.find import find_sites
from growconv.network.layout import ENTRY, IN, OUT, Layout, Run, SizeAttribute
from growconv.network.new_entries import NewEntries
from growconv.network.optimizer import exchange
from growconv.network.plan import Growing, plan_entries, plan_growth, plan_removal, plan_size, tied_weights, together
from growconv.network.proof import silent_growth
from growconv.network.proposal import ChannelGrowth
from tests.network import hand

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_bare_parameters_get_the_mean_or_what_is_proposed_or_a_copy() -> None:
    model, example, site = hand.build("stream")
    old = model.scale.detach().clone()
    grow(model, site, hand.growth(site, 2), 0.0)
    torch.testing.assert_close(model.scale[:, 4:], old.mean().expand(1, 2, 1, 1))
    given = replace(hand.growth(site, 1), entries={"scale": torch.full((1, 1, 1, 1), 3.0)})
    grow(model, site, given, 0.0)
    assert float(model.scale.detach()[0, 6]) == 3.0
    grow(model, site, replace(hand.growth(site, 2), copied_from=torch.tensor([3, 1])), 0.0)
    assert torch.equal(model.scale[0, 7:], old[0, [3, 1]])
    model(example)


@pytest.mark.parametrize(
    "name", ["pair", "depthwise", "glu", "concatenation", "whole groups", "whole groups transposed"]
)
def test_copies_are_the_same_function_with_half_of_each_consumers_weights(name: str) -> None:
    model, example, site = hand.build(name)
    model.eval()
    expected = model(example)
    channels = list(range(site.granularity)) if site.granularity > 1 else [1, 3]
    first, second = model.a, model.b
    rows = [
        entry
        for c in channels
        for entry in site.entries("a", OUT)[int(c * site.ratio("a", OUT)) :][: int(site.ratio("a", OUT))]
    ]
    per_unit = int(site.ratio("b", IN) * site.granularity)
    units = [c // site.granularity for c in channels[:: site.granularity]]
    columns = [entry for u in units for entry in site.entries("b", IN)[u * per_unit : (u + 1) * per_unit]]
    half = second.weight.detach().clone()
    half[:, columns] /= 2
    growth = ChannelGrowth(
        site.name,
        "net2net",
        incoming={"a": first.weight.detach()[rows]},
        incoming_bias={"a": first.bias.detach()[rows]},
        outgoing={"b": half[:, columns]},
        gains=torch.zeros(len(channels)),
        revised={"b.weight": half},
        copied_from=torch.tensor(channels),
        units=site.units,
    )
    grow(model, site, growth)
    torch.testing.assert_close(model(example), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", hand.SITES)
def test_plans_change_nothing_and_predict_sizes(name: str) -> None:
    model, _, site = hand.build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    growth = hand.growth(site, 3)
    plan = plan_growth(site, growth)
    assert plan.added_parameters() == plan_size(site, growth.channels) > 0
    gone = plan_removal(site, range(site.granularity)).added_parameters()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    event = shrink(model, site, range(site.granularity))
    assert event.parameters_after - event.parameters_before == gone < 0


def test_two_sites_in_one_plan_are_what_two_plans_give() -> None:
    """A chain with weight norm: the middle layer gets new outputs from one site and new inputs from the other."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), weight_norm(nn.Conv2d(4, 5, 3)), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1)]
    model, example = nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
    expected, one_by_one = model(example), copy.deepcopy(model)
    sites = find_sites(model, example)
    assert len(sites) == 2
    sizes = sites[0].sizes
    new = {site.space: NewEntries(site, silent_growth(site, 2), 1.0, sizes) for site in sites}

    def values(path: str, side: str, growing: Growing) -> Mapping[str, Tensor]:
        return together([new[site.space](path, side) for site, _ in growing], 1 if side == IN else 0)

    both = plan_entries([(site, 2) for site in sites], values, sizes)
    for site in sites:
        grow(one_by_one, site.of(one_by_one), silent_growth(site.of(one_by_one), 2))
    exchange(model, both.changes, both.attributes, ())
    shapes = {name: value.shape for name, value in one_by_one.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert (layers[2].in_channels, layers[2].out_channels, layers[3].num_features) == (6, 7, 7)
    torch.testing.assert_close(model(example), expected, rtol=1e-5, atol=1e-6)


def test_a_weight_that_encodes_and_decodes_is_tied() -> None:
    encoder, decoder = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3)
    decoder.weight = encoder.weight
    model = hand.Net(lambda m, x: m.b(m.a(x)), a=encoder, b=decoder)
    site = hand.site(model, {("a", OUT): hand.PLAIN, ("b", IN): hand.PLAIN})
    assert "different parts" in str(tied_weights(site))
    head = hand.Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(3, 4), b=nn.Linear(4, 2), other=nn.Linear(3, 4))
    head.other.weight = head.a.weight
    site = hand.site(head, {("a", OUT): hand.PLAIN, ("b", IN): hand.PLAIN})
    assert "one weight" in str(tied_weights(site))
    functional = hand.Net(lambda m, x: F.linear(m.a(x), m.a.weight.T), a=nn.Linear(3, 4))
    site = hand.site(functional, {("a", OUT): hand.PLAIN, ("a.weight", ENTRY): hand.PLAIN}, dims={"a.weight": 0})
    assert "different parts" in str(tied_weights(site))
    for name in hand.SITES:
        assert tied_weights(hand.build(name)[2]) is None, name


def test_producers_may_share_a_weight() -> None:
    model = hand.Net(
        lambda m, x: m.c(m.a(x) + m.b(x.flip(2))), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3), c=nn.Conv2d(4, 2, 1)
    ).double()
    model.b.weight = model.a.weight
    site = hand.site(model, {("a", OUT): hand.PLAIN, ("b", OUT): hand.PLAIN, ("c", IN): hand.PLAIN})
    assert tied_weights(site) is None
    example = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = model(example)
    growth = hand.growth(site, 2)
    grow(model, site, growth, 0.0)
    assert model.b.weight is model.a.weight
    assert torch.equal(model.a.weight[4:], growth.incoming["a"])
    assert torch.equal(model.b.bias[4:], growth.incoming_bias["b"])
    torch.testing.assert_close(model(example), expected, rtol=0, atol=1e-12)


class Splitting(nn.Module):
    """Code that keeps its sizes in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 1)
        self.sizes = [4, 2]
        self.shape = (4, 2)
        self.first = 4

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.a(x).split(self.sizes, 1)
        assert y.shape[1] == self.first == self.shape[0]
        return self.b(y) + self.c(z)


def test_sizes_in_attributes_follow_and_replay() -> None:
    model = Splitting().double()
    fresh = copy.deepcopy(model)
    example = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    attributes = (
        SizeAttribute("", "sizes", 0, {0: 1}),
        SizeAttribute("", "sizes", 1, {1: 1}),
        SizeAttribute("", "shape", 0, {0: 1}),
        SizeAttribute("", "first", None, {0: 1}),
    )
    axes = {("a", OUT): (Run(0, 1), Run(1, 1)), ("b", IN): (Run(0, 1),), ("c", IN): (Run(1, 1),)}
    sites = [
        replace(hand.site(model, axes, space, (1, 1)), layout=Layout(axes, (1, 1), {}, attributes)) for space in (0, 1)
    ]
    expected = model(example)
    events = [grow(model, site, hand.growth(site, 2 + index), 0.0) for index, site in enumerate(sites)]
    torch.testing.assert_close(model(example), expected, rtol=0, atol=1e-12)
    assert (model.sizes, model.shape, model.first) == ([6, 5], (6, 2), 6)
    events.append(shrink(model, sites[0], [0]))
    assert (model.sizes, model.shape, model.first) == ([5, 5], (5, 2), 5)
    GrowthHistory.from_json(GrowthHistory(events).to_json()).replay(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(example), model(example))
    assert (fresh.sizes, fresh.shape) == (model.sizes, model.shape)
