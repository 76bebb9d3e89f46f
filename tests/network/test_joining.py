"""Spaces that only grow together."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.network.analysis import analyse
from growconv.network.find import explain_sites, find_sites
from growconv.network.layout import OUT
from growconv.network.widening import Widening
from tests.network import between_layers, referee
from tests.network.cut import Halves, Split
from tests.network.hand import Net

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Focal(nn.Module):
    """A normalised stream; what it gates inside of a block has as many channels, since the code says so."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.end = nn.Linear(3, 4), nn.Linear(4, 2)
        self.norm, self.into = nn.LayerNorm(4), nn.Linear(4, 9)
        self.mix, self.back = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x.flatten(2).transpose(1, 2))
        query, context, gate = self.into(self.norm(y)).split([y.shape[-1], y.shape[-1], 1], -1)
        return self.end(y + self.back(query * self.mix(F.gelu(context) * gate)))


def test_a_stream_and_what_its_blocks_cut_to_its_width_are_copied_together() -> None:
    model = referee.prepared(Focal())
    (found,) = find_sites(model, X)
    assert found.copied
    assert found.granularity == found.width == 4
    assert set(found.producers) == {"start", "into", "mix", "back"}
    grown = referee.check(model, X, [found], units=[1])
    assert grown.model.into.out_features == 17
    assert grown.model.norm.normalized_shape == (8,)


def test_a_space_that_leads_one_and_follows_another_is_joined_once() -> None:
    """As in PVT v2, where both are told in one rehearsal."""
    model = nn.Sequential(*[nn.Conv2d(4, 4, 1) for _ in range(4)]).double()
    found = analyse(model, torch.randn(1, 4, 5, 5, dtype=torch.float64), rehearse=False)
    widening = Widening(model, [], found.numbers, list(found.spaces))
    first, second, third = widening.spaces
    assert widening.joining.copied({0: 1, 1: 2})
    assert widening.spaces[1:] == [third]
    assert widening.spaces[0].counts.keys() == first.counts.keys() | second.counts.keys()


def test_halves_that_a_split_needs_equal_grow_together() -> None:
    """The halves of one layer go different ways, as in YOLOv8's C2f."""

    def forward(m: Net, x: Tensor) -> Tensor:
        first, second = m.a(x).chunk(2, 1)
        return m.c(torch.cat([first, second + m.b(second)], 1))

    model = Net(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(8, 2, 1)).double()
    (site,) = find_sites(model, X)
    assert (site.name, site.width, site.granularity) == ("a + b -> b, c", 4, 1)
    assert site.ratio("a", OUT) == site.ratio("c") == 2
    referee.check(model, X, [site])


def test_units_of_a_joint_space_and_the_channels_that_are_too_many_for_them() -> None:
    """Of 10 channels 2 are too many for units of 4; each of their layers gets as many new ones as the others."""
    model = between_layers.shuffled_units().double()
    (site,) = find_sites(model, X)
    assert (site.width, site.granularity) == (8, 4)
    assert {path: site.ratio(path, OUT) for path in site.producers} == dict.fromkeys(site.producers, 1)
    assert {path: site.ratio(path) for path in site.consumers} == {"unit0": 1, "unit1": 1, "c": 2}
    grown = referee.check(model, X, [site], units=[3]).model
    assert [(each.width, each.granularity) for each in find_sites(grown, X)] == [(20, 4)]


@pytest.mark.parametrize(("units", "channels"), [(1, 8), (2, 8)])
def test_halves_of_a_power_of_two_are_joined_with_what_meets_them_behind(units: int, channels: int) -> None:
    """The last layer's channels form a run as they are, but fall into halves like the others once there are more."""
    model = between_layers.shuffled_units(units, channels).double()
    (site,) = find_sites(model, X)
    assert len(site.producers) == units + 2
    assert (site.width, site.granularity) == (channels, 2**units)
    referee.check(model, X, [site], units=[3])


@pytest.mark.parametrize(("units", "channels"), [(4, 14), (4, 10), (5, 12)])
def test_a_unit_of_more_channels_than_there_are_is_no_site(units: int, channels: int) -> None:
    """Also where there are too few for every way through the units to have some; with enough it grows by such units."""
    table = explain_sites(between_layers.shuffled_units(units, channels).double(), X)
    reasons = {row.path: row.reason for row in table}
    assert not any(row.growable for row in table)
    assert reasons.pop("c") == "it is the model's output"
    text = f"its channels only grow together, in units of {2**units} or more, and are too few for one"
    assert set(reasons.values()) == {text}
    wider = between_layers.shuffled_units(units, 3 * 2**units).double()
    (site,) = find_sites(wider, X)
    assert site.granularity == 2**units
    referee.check(wider, X, [site], units=[1])


def test_parts_whose_sizes_follow_stay_sites_of_their_own() -> None:
    class Halves(Split):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = [2, 2]
            self.a, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 4, 1)

    model = Halves().double()
    sites = find_sites(model, X)
    assert [site.name for site in sites] == ["a -> b", "a -> c", "b -> d", "c -> d"]
    assert referee.check(model, X, sites).model.sizes == [3, 4]


class Chunks(nn.Module):
    """As in Res2Net: parts of one layer's outputs, each of which goes through a layer of its own.

    Args:
        first: whether these layers read their part alone; else also what the one before gives.
    """

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.width = first, 3
        self.a, self.d = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 2, 1)
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = F.relu(self.a(x)).split(self.width, 1)
        found = list[Tensor]()
        for conv, part in zip(self.convs, parts[:3], strict=True):
            found.append(conv(part + found[-1] if found and not self.first else part))
        return self.d(torch.cat([*found, parts[3]], 1))


@pytest.mark.parametrize("first", [True, False])
def test_parts_of_one_size_that_an_attribute_tells_grow_together(first: bool) -> None:
    model = Chunks(first).double()
    sites = find_sites(model, X)
    joint = sites[0]
    assert (joint.ratio("a", OUT), joint.granularity, joint.width) == (4, 1, 3)
    assert {path for site in sites for path in site.producers} == {"a", "convs.0", "convs.1", "convs.2"}
    assert referee.check(model, X, sites, units=[2] * len(sites)).model.width == 5


def test_halves_of_a_number_in_an_attribute_grow_together() -> None:
    model = Halves(literal=False).double()
    sites = find_sites(model, X)
    assert [(site.name, site.ratio(site.producers[0], OUT)) for site in sites] == [("a -> b, c", 2), ("b -> c", 1)]
    assert referee.check(model, X, sites, units=[2, 1]).model.channels == 12
