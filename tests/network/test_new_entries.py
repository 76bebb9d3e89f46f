"""Proposals of earlier widths, and revisions of old entries."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from growconv.errors import SurgeryError
from growconv.network.event import grow, shrink
from growconv.network.layout import IN, OUT, Layout, Run
from growconv.network.new_entries import positions_now
from growconv.network.plan import plan_growth, plan_removal
from growconv.network.site import GrowthSite
from tests.network import hand

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


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
