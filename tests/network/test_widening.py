"""Sizes in attributes that follow the widths, and what the search for them costs."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.network.find import explain_sites, find_sites
from growconv.network.layout import SizeAttribute
from growconv.network.rehearsal import Rehearsal, Verdict
from tests.network import referee
from tests.network.cut import Halves, Split

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


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


class Named(nn.Module):
    """Keeps the number of its outputs, which is that of its inputs too, and uses it nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = 6
        self.inside = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


def test_an_attribute_that_nothing_uses_stays_where_others_follow() -> None:
    model = nn.Sequential(Heads(), nn.Conv2d(2, 6, 1), nn.ReLU(), Named(), nn.ReLU(), nn.Conv2d(6, 2, 1)).double()
    sites = find_sites(model, X)
    assert [(each.path, each.name) for each in sites[0].layout.attributes] == [("0", "width")]
    grown = referee.check(model, X, sites).model
    assert (grown[0].width, grown[3].outputs) == (7, 6)


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
    attempt = Rehearsal.of
    monkeypatch.setattr(Rehearsal, "of", lambda *given: verdicts.append(attempt(*given)) or verdicts[-1])
    model = referee.prepared(model)
    sites = find_sites(model, x)
    assert [(site.copied, site.width) for site in sites] == [(True, 4), (True, 6), (True, 5)]
    assert [len(verdict.reasons) > 0 for verdict in verdicts] == [True, True, False]
    referee.check(model, x, sites, units=[1, 1, 1])


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


def test_an_error_of_the_code_itself_is_blamed_on_the_channels_around_it() -> None:
    """However many places raise one: the search does not run out of patience with all the other layers."""
    model = nn.Sequential(*(Halves(literal=True) for _ in range(8))).double()
    table = explain_sites(model, X)
    for number in range(8):
        a, b, c = (next(row for row in table if row.path == f"{number}.{name}") for name in "abc")
        assert "too many values to unpack" in str(a.reason)
        assert b.growable
        assert c.growable or number == 7


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
    found, rehearse = list[int](), Rehearsal.of

    def noted(self: Rehearsal, live: Sequence[int]) -> Verdict:
        found.append(len(live))
        return rehearse(self, live)

    monkeypatch.setattr(Rehearsal, "of", noted)
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
