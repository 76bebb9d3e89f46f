"""Which sites are found, of which kind, and what is said of the other layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.errors import SiteError
from growconv.network.find import explain_sites, find_sites, site
from tests.network import referee, zoo
from tests.network.between_layers import CASES
from tests.network.hand import Net
from tests.network.refused import Refused

SITES = {
    "chain": [("a -> b", "pair", 1), ("b -> c", "linear", 1), ("c -> d", "linear", 1)],
    "residual": [
        ("stem + a2 -> a1, b1, short", "stream", 1),
        ("a1 -> a2", "pair", 1),
        ("b1 -> b2", "pair", 1),
        ("b2 + short -> head", "stream", 1),
    ],
    "padded_shortcut": [("a + c -> b, d", "stream", 1), ("b -> c", "pair", 1)],
    "dense": [("a + d -> b, 3 more", "stream", 1), ("b + d -> c, d, e", "stream", 1), ("c -> d", "concatenation", 1)],
    "gated": [("a + b + up -> b, down, c", "stream", 1), ("down -> up", "linear", 1)],
    "grouped": [("a -> b", "depthwise", 1), ("b -> c", "grouped", 2)],
    "ghost": [("primary -> head", "depthwise", 1)],
    "shared": [("a + twice -> twice, b", "stream", 1), ("b + c + d -> c, d, e", "stream", 1)],
    "unet": [
        ("a -> b, c", "concatenation", 1),
        ("b -> up", "transposed", 1),
        ("up -> c", "concatenation", 1),
        ("c -> out", "pair", 1),
    ],
    "channels_last": [("stem + down -> up, head", "stream", 4), ("up -> down", "linear", 1)],
    "one_axis": [("0 -> 4", "pair", 1), ("4 -> 7", "linear", 1)],
    "three_axes": [("0 -> 4", "pair", 1), ("4 -> 8", "linear", 1)],
    "normalized": [],  # a spectral norm would move old weights after a growth
    "perceptron": [("0 -> 4", "linear", 1), ("4 -> 6", "linear", 1)],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_treats_channels_alike_is_found_and_grows_exactly(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, example = referee.prepared(case.build()), torch.randn(case.shape, dtype=torch.float64)
    sites = find_sites(model, example)
    assert {each.name: each.granularity for each in sites} == case.sites
    grown = referee.check(model, example, sites)
    assert referee.untrained(grown, example) == []
    referee.check(model, example, sites, units=[max(each.width // each.granularity, 4) for each in sites])


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_site_of_a_model_is_found_and_grows_exactly(name: str) -> None:
    model, example = zoo.build(name)
    zoo.without_dropout(model)
    sites = find_sites(model, example)
    assert [(each.name, each.kind, each.granularity) for each in sites] == SITES[name]
    grown = referee.check(model, example, sites)
    assert referee.untrained(grown, example) == []
    again = find_sites(grown.model, example)
    assert [(each.name, each.width) for each in again] == [(each.name, each.width) for each in grown.sites]
    for old, new in zip(grown.sites, again, strict=True):
        assert all(old.entries(path) == new.entries(path) for path in old.consumers) or old.granularity > 1


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("output", "the model's output"),
        ("literal view", "literal size"),
        ("literal slice", "literal size"),
        ("softmax", "depend on each other"),
        ("input", "size of tensor"),
        ("fixed tensor", "size of tensor"),
        ("recurrent", "rnn|lstm"),
        ("gather", "literal size"),
        ("matrix", "multiplies its channels with each other"),
        ("sort", "depend on each other"),
    ],
)
def test_a_layer_that_cannot_grow_has_its_reason(how: str, reason: str) -> None:
    table = explain_sites(Refused(how), torch.randn(2, 3, 5, 5))
    row = next(row for row in table if row.path == "a")
    assert not row.growable
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(row.reason)
    assert str(row.reason) in str(table)


def test_attention_over_channels_says_which_layer_takes_them_one_after_the_other() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return m.b(y * m.eca(y.mean((2, 3)).unsqueeze(1)).sigmoid().view(len(x), -1, 1, 1))

    model = Net(forward, a=nn.Conv2d(3, 6, 1), eca=nn.Conv1d(1, 1, 3, padding=1), b=nn.Conv2d(6, 2, 1))
    table = {row.path: row.reason for row in explain_sites(model, torch.randn(2, 3, 5, 5))}
    assert table["a"] == "its channels depend on each other: eca takes them one after the other as its only input"


def test_maps_of_one_channel_with_a_bare_parameter_for_each_position_are_read_as_one_channel() -> None:
    model = Net(lambda m, x: m.b(m.place + m.a(x)), a=nn.Conv2d(3, 1, 1), b=nn.Conv2d(1, 4, 3))
    model.place = nn.Parameter(torch.randn(1, 1, 5, 5))
    assert "one after the other" not in str(explain_sites(model, torch.randn(2, 3, 5, 5))[0].reason)


def test_a_gate_that_a_layer_makes_along_another_axis_is_told() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        value, gate = m.a(x).chunk(2, -1)
        return m.b(value * m.mix(m.norm(gate).transpose(1, 2)).transpose(1, 2))

    model = Net(forward, a=nn.Linear(4, 12), norm=nn.LayerNorm(6), mix=nn.Linear(5, 5), b=nn.Linear(6, 3))
    table = {row.path: row.reason for row in explain_sites(model, torch.randn(2, 5, 4))}
    assert table["a"] == "mix reads it along another axis, and no other layer does"


@pytest.mark.parametrize("how", ["channel mean", "layer norm of maps", "rms norm"])
def test_channels_that_depend_on_each_other_grow_by_copies(how: str) -> None:
    model, example = referee.prepared(Refused(how)), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    (found,) = find_sites(model, example)
    assert found.copied
    assert found.granularity == found.width == 4
    referee.check(model, example, [found], units=[1])


def test_the_table_has_a_row_for_every_layer() -> None:
    model, example = zoo.build("residual")
    table = explain_sites(model, example)
    assert [row.path for row in table] == [
        name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    assert {row.path for row in table if not row.growable} == {"head"}
    assert next(row for row in table if row.path == "head").reads == ("b2 + short -> head",)
    assert table[0].layer == "Conv2d 3 -> 4, 3x3"


def test_layers_that_are_never_called_are_told() -> None:
    model, example = zoo.build("chain")
    model.spare = nn.Conv2d(9, 2, 1)
    row = next(row for row in explain_sites(model, example) if row.path == "spare")
    assert row.reason == "none of the examples calls it"


@pytest.mark.parametrize(
    ("producers", "consumers", "says"),
    [
        ("a", "nowhere", "nowhere: this is no convolution or linear layer"),
        ("norm", "b", "norm: this is no convolution or linear layer"),
        ("a", "c", "expected: a -> b"),
        ("b", "a", "expected: b -> c"),
        ("d", "a", "the model's output"),
        (("a", "b"), "c", "do not make up a site"),
    ],
)
def test_layers_that_make_no_site(producers: str, consumers: str, says: str) -> None:
    model, example = zoo.build("chain")
    with pytest.raises(SiteError, match=says):
        site(model, producers, consumers, example_input=example)
