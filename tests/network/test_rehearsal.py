"""Other widths, tried on copies that only pretend to compute: literal sizes, and what is to blame."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.network.analysis import analyse
from growconv.network.find import explain_sites, find_sites
from growconv.network.layout import IN, Run
from growconv.network.rehearsal import Rehearsal, Verdict
from tests.network import referee
from tests.network.hand import Net

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


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
    attempt = Rehearsal.of
    monkeypatch.setattr(Rehearsal, "of", lambda *given: verdicts.append(attempt(*given)) or verdicts[-1])
    table = {row.path: row for row in explain_sites(Attending().double(), X)}
    for path in ("start", "back"):
        assert "shape '[2, 36, 3, 2, 12]' is invalid" in str(table[path].reason)
    assert table["between"].site == "between -> end"
    assert all(len(verdict.reasons) <= 1 for verdict in verdicts)


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
