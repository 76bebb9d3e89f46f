"""Other widths, tried on copies that only pretend to compute: literal sizes, sizes in attributes, whole groups."""

from collections.abc import Mapping, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.network import layers
from growconv.network.find import analyse, explain_sites, find_sites
from growconv.network.layout import IN, OUT, Run, SizeAttribute
from growconv.network.rehearsal import Verdict, Widening
from tests.network import between_layers, referee
from tests.network.hand import Net

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Split(nn.Module):
    """Parts of the sizes that an attribute has, each to a layer of its own; another has such a size by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.frames = [2, 3], 3
        self.a = nn.Conv2d(3, 5, 1)
        self.b, self.c, self.d = nn.Conv2d(2, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.a(x)).split(self.sizes, 1)
        y = torch.cat([self.b(first), self.c(second)], 1)
        return self.d(y.repeat(1, 1, self.frames, 1))


class Heads(nn.Module):
    """Attention over positions with as many channels a head as an attribute says."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)).view(len(x), self.width, -1).tanh().view(len(x), self.width, *x.shape[2:]))


class Part(nn.Module):
    """A quarter of the channels moves by one row; as many frames as the quarter has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = 2
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y.view(-1, self.frames, *y.shape[1:]).flatten(0, 1)
        part = y.shape[1] // 4
        return self.b(torch.cat([y[:, :part].roll(1, 2), y[:, part:]], 1))


def test_sizes_in_attributes_follow_the_widths() -> None:
    model = Split().double()
    sites = find_sites(model, X)
    assert [site.name for site in sites] == ["a -> b", "a -> c", "b -> d", "c -> d"]
    grown = referee.check(model, X, sites)
    assert grown.model.sizes == [3, 5]
    assert grown.model.frames == 3
    assert model.sizes == [2, 3]


def test_a_single_size_in_an_attribute_follows() -> None:
    model = Heads().double()
    (site,) = find_sites(model, X)
    assert site.layout.attributes == (SizeAttribute("", "width", None, {0: 1}),)
    assert referee.check(model, X, [site]).model.width == 7


class Checked(nn.Module):
    """Refuses another number of channels than an attribute tells."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.inside = nn.Conv2d(channels, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.channels:
            raise ValueError(f"{self.channels} channels are needed")
        return self.inside(x)


def test_an_attribute_that_code_compares_a_size_with_follows() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), Checked(4), nn.ReLU(), Checked(5), nn.ReLU(), nn.Conv2d(5, 2, 1)
    ).double()
    sites = find_sites(model, X)
    assert [site.name for site in sites] == ["0 -> 2.inside", "2.inside -> 4.inside", "4.inside -> 6"]
    grown = referee.check(model, X, sites).model
    assert [each.channels for each in (grown[2], grown[4])] == [grown[0].out_channels, grown[2].inside.out_channels]
    assert grown[2].channels > 4


class Cell(nn.Module):
    """A recurrent cell that tells how many channels its state has, and adds a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.state = 4
        self.update = nn.Conv2d(4 + 6, 4, 1)

    def forward(self, state: Tensor, context: Tensor) -> Tensor:
        return state + self.update(torch.cat([state, context], 1)).tanh()


class Recurrent(nn.Module):
    """The state of a cell is cut from the context by what the cell tells, as in RAFT; another has 6 by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell = Heads(), Cell()
        self.a, self.b = nn.Conv2d(2, 10, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.first(x))
        state, context = y.split([self.cell.state, y.shape[1] - self.cell.state], 1)
        for _ in range(2):
            state = self.cell(state, F.relu(context))
        return self.b(state)


def test_an_attribute_of_a_module_inside_follows() -> None:
    model = Recurrent().double()
    sites = find_sites(model, X)
    names = ["first.a -> first.b", "first.b -> a", "a + cell.update -> cell.update, b", "a -> cell.update"]
    assert [site.name for site in sites] == names
    grown = referee.check(model, X, sites).model
    assert (grown.first.width, grown.cell.state) == (7, 7)
    assert grown.a.out_channels == 7 + 7


class Attending(nn.Module):
    """Queries, keys and values of a normalised stream, cut to its width; a second stream has nothing to do with it."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.between, self.end = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.norm, self.qkv, self.back = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x.flatten(2).transpose(1, 2))
        n, positions, width = y.shape
        q, k, v = self.qkv(self.norm(y)).reshape(n, positions, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = y + self.back(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(n, positions, width))
        return self.end(F.relu(self.between(y)))


def test_what_an_operation_takes_its_sizes_from_is_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the shape that a layer norm normalises follows whatever else fails."""
    verdicts: list[Verdict] = []
    attempt = Widening._attempt
    monkeypatch.setattr(Widening, "_attempt", lambda *given: verdicts.append(attempt(*given)) or verdicts[-1])
    table = {row.path: row for row in explain_sites(Attending().double(), X)}
    for path in ("start", "back"):
        assert "shape '[2, 36, 3, 2, 12]' is invalid" in str(table[path].reason)
    assert table["between"].site == "between -> end"
    assert all(len(verdict.reasons) <= 1 for verdict in verdicts)


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


class Stage(nn.Module):
    """A layer that takes the channels it was made for alone, and a block as in Focal."""

    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        self.given, self.embed = given, nn.Linear(given, width)
        self.norm, self.into = nn.LayerNorm(width), nn.Linear(width, 2 * width + 1)
        self.mix, self.back = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.given:
            raise ValueError("this is not the number of channels in the configuration")
        y = self.embed(x)
        query, context, gate = self.into(self.norm(y)).split([y.shape[-1], y.shape[-1], 1], -1)
        return y + self.back(query * self.mix(F.gelu(context) * gate))


def test_code_that_checks_its_widths_between_such_streams_takes_no_more_rehearsals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As FocalNet: once all attributes follow, all streams fail in one rehearsal, and are joined after it."""
    model = nn.Sequential(Stage(3, 4), Stage(4, 6), Stage(6, 5), nn.Linear(5, 2))
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    verdicts: list[Verdict] = []
    attempt = Widening._attempt
    monkeypatch.setattr(Widening, "_attempt", lambda *given: verdicts.append(attempt(*given)) or verdicts[-1])
    model = referee.prepared(model)
    sites = find_sites(model, x)
    assert [(site.copied, site.width) for site in sites] == [(True, 4), (True, 6), (True, 5)]
    assert [len(verdict.reasons) > 0 for verdict in verdicts] == [True, True, False]
    referee.check(model, x, sites, units=[1, 1, 1])


def test_a_space_that_leads_one_and_follows_another_is_joined_once() -> None:
    """As in PVT v2, where both are told in one rehearsal."""
    model = nn.Sequential(*[nn.Conv2d(4, 4, 1) for _ in range(4)]).double()
    found = analyse(model, torch.randn(1, 4, 5, 5, dtype=torch.float64), rehearse=False)
    widening = Widening(model, [], found.numbers, list(found.spaces))
    first, second, third = widening.spaces
    assert widening._join_copied({0: 1, 1: 2})
    assert widening.spaces[1:] == [third]
    assert widening.spaces[0].counts.keys() == first.counts.keys() | second.counts.keys()


def test_a_size_that_is_left_open_is_no_number_of_channels() -> None:
    """As in ConvNeXt V2: a shape in an attribute with one size to be inferred."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shape, self.channels, self.same = (1, -1, 1, 1), [6], [6]
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) * self.scale.view(self.shape)
            y = y.view(len(x), *self.channels, 36).tanh().view(len(x), *self.same, 36)
            return self.b(y.unflatten(2, (6, 6)))

    model = Scaled().double()
    (site,) = find_sites(model, X)
    grown = referee.check(model, X, [site], units=[2]).model
    assert (grown.shape, grown.channels, grown.same) == ((1, -1, 1, 1), [8], [8])


def test_an_attribute_that_has_the_number_by_chance_stays() -> None:
    model = Part().double()
    (site,) = find_sites(model, X)
    assert site.layout.attributes == ()
    assert site.granularity == 4
    assert referee.check(model, X, [site], units=[3]).model.frames == 2


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda y: y.view(-1, 8, 36).view(-1, 8, 6, 6), "shape '[-1, 8, 36]' is invalid"),
        (lambda y: y[:, :8], "literal size"),
        (lambda y: y.view(len(y), 8, 6, 6), "shape '[2, 8, 6, 6]' is invalid"),
        (lambda y: y + torch.ones(8, 1, 1, dtype=y.dtype), "The size of tensor a"),
        (lambda y: torch.stack([y[:, index] for index in range(8)], 1), "literal size"),
    ],
)
def test_literal_sizes_are_told_in_the_words_of_the_code(operation: object, reason: str) -> None:
    model = Net(lambda m, x: m.b(operation(F.relu(m.a(x)))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1)).double()
    assert reason in str(explain_sites(model, X)[0].reason)


def test_the_mean_of_a_single_channel_is_told() -> None:
    model = Net(lambda m, x: m.b(m.a(x).mean(1, keepdim=True)), a=nn.Conv2d(3, 1, 1), b=nn.Conv2d(1, 2, 1)).double()
    assert explain_sites(model, X)[0].reason == "its channels depend on each other"


def test_channels_that_are_normalised_together_but_lie_in_several_groups_say_so() -> None:
    """A group of the norm that is new would move half of the channels of the last convolution to its other group."""
    for groups in (1, 2):
        layers = nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.Conv2d(8, 4, 1, groups=groups)
        row = explain_sites(nn.Sequential(*layers).double(), X)[0]
        part = "its channels depend on each other, and the groups of 2 part them"
        assert row.reason == (None if groups == 1 else part)


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


def test_groups_of_convolutions_get_equal_shares() -> None:
    model = Net(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
        a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 6, 1, groups=2), c=nn.Conv2d(6, 2, 1),
    ).double()  # fmt: skip
    assert not layers.in_whole_groups(model.b)
    assert layers.in_whole_groups(nn.Conv2d(8, 8, 1, groups=8))
    sites = find_sites(model, X)
    assert [(site.name, site.granularity) for site in sites] == [("a -> b", 2), ("b -> c", 2)]
    assert sites[0].layout.axes["b", IN] == (Run(0, 2, 1, (0, 1)),)
    referee.check(model, X, sites)


def test_presuming_lays_out_without_trying() -> None:
    model = Net(lambda m, x: m.b(m.a(x)[:, :8]), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1)).double()
    assert find_sites(model, X) == ()
    assert [site.name for site in find_sites(model, X, rehearse=False)] == ["a -> b"]


def test_a_shared_slope_beside_a_norm_over_all_channels_keeps_no_site_back() -> None:
    for middle in ([nn.GroupNorm(1, 4), nn.PReLU()], [nn.PReLU(), nn.GroupNorm(1, 4), nn.PReLU()]):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), *middle, nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)).double()
        sites = find_sites(model, X)
        assert [(site.producers, site.granularity) for site in sites] == [(("0",), 4), ((str(len(middle) + 1),), 1)]
        referee.check(model, X, sites)


def test_a_space_of_one_channel_is_laid_out_by_where_new_ones_arrive() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 1)
    ).double()
    found = analyse(model, X)
    assert found.layout.axes["3", IN] == (Run(0, 1, 16, tuple(range(16))),)
    referee.check(model, X, found.sites)
    last = Net(
        lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=nn.Conv2d(3, 1, 3), b=nn.Linear(16, 2)
    ).double()
    found = analyse(last, X)
    assert found.layout.axes["b", IN] == (Run(0, 16, 1, tuple(range(16))),)
    referee.check(last, X, found.sites)


class Sliced(nn.Module):
    """As in timm's GhostNet: a slice that takes all channels, so that it is no operation until there are more."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 8
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.c(torch.cat([y, self.b(y)], 1)[:, : self.channels, :])


def test_a_size_that_a_slice_of_everything_is_told_follows() -> None:
    model = Sliced().double()
    (site,) = find_sites(model, X)
    assert (site.producers, site.granularity) == (("a",), 1)
    assert referee.check(model, X, [site], units=[3]).model.channels == 14


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


class Halves(nn.Module):
    """As in cross-stage networks: halves by a size that is worked out from an attribute, unpacked one by one."""

    def __init__(self, literal: bool) -> None:
        super().__init__()
        self.literal, self.channels = literal, 8
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.a(x)).split(4 if self.literal else self.channels // 2, 1)
        return self.c(torch.cat([first, self.b(second)], 1))


def test_halves_of_a_number_in_an_attribute_grow_together() -> None:
    model = Halves(literal=False).double()
    sites = find_sites(model, X)
    assert [(site.name, site.ratio(site.producers[0], OUT)) for site in sites] == [("a -> b, c", 2), ("b -> c", 1)]
    assert referee.check(model, X, sites, units=[2, 1]).model.channels == 12


def test_an_error_of_the_code_itself_is_blamed_on_the_channels_around_it() -> None:
    """However many places raise one: the search does not run out of patience with all the other layers."""
    model = nn.Sequential(*(Halves(literal=True) for _ in range(8))).double()
    table = explain_sites(model, X)
    for number in range(8):
        a, b, c = (next(row for row in table if row.path == f"{number}.{name}") for name in "abc")
        assert "too many values to unpack" in str(a.reason)
        assert b.growable
        assert c.growable or number == 7


def test_a_reshape_that_refuses_its_sizes_is_blamed_on_what_it_met() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y = m.b(y.transpose(1, 2).reshape(len(x), 6, 4, -1).tanh().transpose(1, 2))
        return m.d(F.relu(m.c(y)))

    model = Net(
        forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 3, 1), c=nn.Conv2d(3, 5, 1), d=nn.Conv2d(5, 2, 1)
    ).double()
    table = {row.path: row.reason for row in explain_sites(model, X)}
    assert "shape '[2, 6, 4, -1]' is invalid" in str(table["a"]) or "literal size" in str(table["a"])
    assert table["b"] is None
    assert table["c"] is None


class Attention(nn.Module):
    """A residual block of attention whose heads have a literal size."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_size = 3, 4
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.hidden, self.back = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.back(F.gelu(self.hidden(x)))


@pytest.fixture
def rehearsals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many spaces each rehearsal was of."""
    found, rehearse = list[int](), Widening._rehearse

    def noted(self: Widening, live: Sequence[int], more: Mapping[int, int]) -> Verdict:
        found.append(len(live))
        return rehearse(self, live, more)

    monkeypatch.setattr(Widening, "_rehearse", noted)
    return found


def test_blocks_that_fail_alike_take_no_more_rehearsals_than_a_few_of_them(rehearsals: list[int]) -> None:
    taken = []
    for blocks in (4, 8):
        model = nn.Sequential(*(Attention() for _ in range(blocks)), nn.Linear(12, 2)).double()
        rehearsals.clear()
        table = {row.path: row for row in explain_sites(model, torch.randn(2, 5, 12, dtype=torch.float64))}
        for number in range(blocks):
            assert f"(in {number}, where heads=3, head_size=4)" in str(table[f"{number}.qkv"].reason)
            assert table[f"{number}.hidden"].growable
        taken.append(len(rehearsals))
    assert taken[0] == taken[1]


def test_standardised_layers_of_one_tap_can_pretend() -> None:
    """The training mode of a batch norm refuses a single value, as timm's standardised convolutions would give it."""

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
            return F.conv2d(x, weight.reshape_as(self.weight), self.bias)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Standardised(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)).double()
    table = explain_sites(model, X)
    assert "2 makes something else of its weights" in str(table[0].reason)
    assert table[1].growable


def test_one_sample_is_no_batch_of_two_alike() -> None:
    """A batch norm of two equal values blows up the rounding error between them (ReXNet has thirteen in a row)."""
    given: list[Tensor] = []

    def forward(m: Net, x: Tensor) -> Tensor:
        given.append(x.detach().clone())
        return m.b(m.norm(m.a(x).mean((2, 3), keepdim=True)))

    model = Net(forward, a=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), b=nn.Conv2d(4, 2, 1)).double()
    assert len(find_sites(model, X[:1])) == 1
    pairs = [each for each in given if len(each) == 2 and each.any()]
    assert pairs
    assert not any(torch.equal(first, second) for first, second in pairs)
