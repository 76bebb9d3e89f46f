"""Plans: proposals of earlier widths, revisions, copies, bare parameters, tied weights, sizes in attributes."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from growconv.errors import SurgeryError
from growconv.network.event import GrowthHistory, grow, shrink
from growconv.network.find import find_sites
from growconv.network.layout import ENTRY, IN, OUT, Layout, Run, SizeAttribute
from growconv.network.optimizer import exchange
from growconv.network.plan import plan_growth, plan_growths, plan_removal, plan_size, positions_now, tied_weights
from growconv.network.proof import silent_growth
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite
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
    together = plan_growths([(site, silent_growth(site, 2)) for site in sites])
    for site in sites:
        grow(one_by_one, site.of(one_by_one), silent_growth(site.of(one_by_one), 2))
    exchange(model, together.changes, together.attributes, ())
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


# ------------------------------------------------------------------------------------------ proposals of other widths


def chain() -> tuple[hand.Net, Tensor, list[GrowthSite]]:
    """Three convolutions in a row: two sites, the middle layer is in both; the first is concatenated with the input."""

    def forward(m: hand.Net, x: Tensor) -> Tensor:
        y = torch.cat([x, F.relu(m.a(x)), F.relu(m.e(x))], 1)
        return m.c(F.relu(m.b(y)))

    torch.manual_seed(0)
    model = hand.Net(
        forward, a=nn.Conv2d(2, 3, 3, padding=1), e=nn.Conv2d(2, 2, 1), b=nn.Conv2d(7, 4, 3), c=nn.Conv2d(4, 2, 1)
    ).double()
    axes = {
        ("a", OUT): (Run(0, 1),),
        ("e", OUT): (Run(1, 1),),
        ("b", IN): (Run(None, 2), Run(0, 1), Run(1, 1)),
        ("b", OUT): (Run(2, 1),),
        ("c", IN): (Run(2, 1),),
    }
    sites = [hand.site(model, axes, space, (1, 1, 1)) for space in range(3)]
    return model, torch.randn(2, 2, 6, 6, dtype=torch.float64), sites


@settings(max_examples=25, deadline=None)
@given(st.permutations([0, 1, 2]), st.lists(st.integers(1, 3), min_size=3, max_size=3), st.floats(0.0, 1.0))
def test_proposals_solved_together_are_applied_in_any_order(
    order: list[int], counts: list[int], amplitude: float
) -> None:
    model, example, sites = chain()
    growths = [hand.growth(site, count, seed) for seed, (site, count) in enumerate(zip(sites, counts, strict=True))]
    first = model.b.weight.detach().clone()
    for index in order:
        grow(model, sites[index], growths[index], amplitude)
    p, q, r = counts
    old_in = [0, 1, 2, 3, 4, 5 + p, 6 + p]
    weight = model.b.weight.detach()
    assert torch.equal(weight[:4, old_in], first)
    assert torch.equal(weight[4:, old_in], growths[2].incoming["b"])
    assert weight[4:, [*range(5, 5 + p), *range(7 + p, 7 + p + q)]].abs().max() == 0
    torch.testing.assert_close(weight[:4, 5 : 5 + p], amplitude * growths[0].outgoing["b"])
    torch.testing.assert_close(weight[:4, 7 + p :], amplitude * growths[1].outgoing["b"])
    assert [site.width for site in sites] == [3 + p, 2 + q, 4 + r]
    model(example)


def test_without_recorded_widths_only_what_is_certain_is_filled() -> None:
    model, _, sites = chain()
    growths = [replace(hand.growth(site, 1), units={}) for site in sites]
    grow(model, sites[2], growths[2])
    grow(model, sites[0], growths[0])  # b's outputs are one space: no doubt
    assert torch.equal(model.b.weight[:4, 5:6], growths[0].outgoing["b"])
    assert model.b.weight[4:, 5:6].abs().max() == 0
    before = model.b.weight.clone()
    with pytest.raises(SurgeryError, match="wrong shape"):  # a or e may have grown: two answers
        grow(model, sites[2], growths[2])
    assert torch.equal(model.b.weight, before)


def test_a_neighbour_that_shrank_is_an_error_that_names_it() -> None:
    model, _, sites = chain()
    growth = hand.growth(sites[2], 1)
    shrink(model, sites[0], [1])
    with pytest.raises(SurgeryError, match="taken away") as error:
        grow(model, sites[2], growth)
    assert "units of a" in str(error.value)
    assert model.b.out_channels == 4


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_positions_now_are_those_of_the_same_entries(data: st.DataObject) -> None:
    runs, slots = [], {None: 0, 0: 0, 1: 0}
    for _ in range(data.draw(st.integers(1, 4))):
        space = data.draw(st.sampled_from([None, 0, 1]))
        outer, inner = data.draw(st.integers(1, 3)), 1 if space is None else data.draw(st.integers(1, 3))
        runs.append(Run(space, outer, inner, tuple(range(slots[space], slots[space] + outer * inner))))
        slots[space] += outer * inner
    if not any(run.space == 0 for run in runs):
        runs.append(Run(0, 1))
    layout = Layout({("b", IN): tuple(runs), ("a", OUT): (Run(0, 1),), ("e", OUT): (Run(1, 1),)}, (1, 1), {})
    then = {0: data.draw(st.integers(1, 3)), 1: data.draw(st.integers(1, 3))}
    now = {space: units + data.draw(st.integers(0, 2)) for space, units in then.items()}
    lengths = {
        key: [sum(run.length(units) for run in found) for units in (then, now)] for key, found in layout.axes.items()
    }
    model = nn.Module()
    model.a, model.e = nn.Linear(1, now[0]), nn.Linear(1, now[1])
    model.b = nn.Linear(lengths["b", IN][1], 1)
    site = hand.site(model, dict(layout.axes), channels=(1, 1))
    found = positions_now(site, ("b", IN), lengths["b", IN][0], then, "weights")
    assert found == sorted(set(found))
    new = {place for space in (0, 1) for place in range(lengths["b", IN][1])} - set(found)
    grown = sum((now[s] - then[s]) * layout.per_unit(("b", IN), s) for s in (0, 1))
    assert len(new) == grown


def test_revisions_of_earlier_widths_leave_newer_channels_alone() -> None:
    model, _, sites = chain()
    growth = hand.growth(sites[2], 1)
    revision = torch.randn(4, 7, 3, 3, dtype=torch.float64)
    growth = replace(growth, revised={"b.weight": revision, "c.bias": torch.ones(2)})
    grow(model, sites[0], hand.growth(sites[0], 2, seed=5))
    newer = model.b.weight[:4, 5:7].clone()
    grow(model, sites[2], growth)
    assert torch.equal(model.b.weight[:4, 5:7], newer)
    assert torch.equal(model.b.weight[:4, [0, 1, 2, 3, 4, 7, 8]], revision)
    assert torch.equal(model.c.bias, torch.ones(2, dtype=torch.float64))


def test_revisions_that_cannot_be_made_are_refused() -> None:
    _, _, site = hand.build("weight norm")
    for revised, message in [
        ({"a.weight": torch.zeros(4, 3, 3, 3)}, "computed from others"),
        ({"nowhere.weight": torch.zeros(1)}, "does not exist"),
        ({"a.bias": torch.zeros(9)}, "wrong shape"),
        ({"a.bias": torch.full((4,), torch.nan)}, "finite"),
    ]:
        with pytest.raises(SurgeryError, match=message):
            plan_growth(site, replace(hand.growth(site, 1), revised=revised))


def test_whole_units_are_asked_for() -> None:
    _, _, site = hand.build("whole groups")
    growth = hand.growth(site, 1)
    with pytest.raises(SurgeryError, match="whole groups"):
        plan_removal(site, [1, 2])
    odd = replace(growth, gains=torch.zeros(3))
    with pytest.raises(SurgeryError, match="cannot be added") as error:
        plan_growth(site, odd)
    assert "ask for 4 channels" in str(error.value)
