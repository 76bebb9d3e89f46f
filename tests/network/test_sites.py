"""Which sites are found, of which kind, and what is said of the other layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growconv
from growconv.network.routes import Activation, AdaptivePool, Depthwise, Flatten, Norm, Pool
from growconv.network.site import find_sites
from tests.network import zoo

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
    "ghost": [("primary -> head", "concatenation", 1)],
    "shared": [
        ("a + twice -> twice, b", "stream", 1),
        ("b + c + d -> c, d, e", "stream", 1),
    ],
    "unet": [
        ("a -> b, c", "concatenation", 1),
        ("b -> up", "transposed", 1),
        ("up -> c", "concatenation", 1),
        ("c -> out", "pair", 1),
    ],
    "channels_last": [("up -> down", "linear", 1)],
    "one_axis": [("0 -> 4", "pair", 1), ("4 -> 7", "linear", 1)],
    "three_axes": [("0 -> 4", "pair", 1), ("4 -> 8", "linear", 1)],
    "normalized": [("0 -> 2", "pair", 1), ("2 -> 4", "transposed", 1), ("4 -> 6", "transposed", 1)],
    "perceptron": [("0 -> 4", "linear", 1), ("4 -> 6", "linear", 1)],
}  # fmt: skip


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_site_of_a_model_is_found(name: str) -> None:
    model, example = zoo.build(name)
    assert [(site.name, site.kind, site.granularity) for site in find_sites(model, example)] == SITES[name]


@pytest.mark.parametrize("name", zoo.MODELS)
def test_finding_sites_changes_nothing(name: str) -> None:
    model, example = zoo.build(name)
    model.train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    find_sites(model, example)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_routes_name_the_steps_in_order() -> None:
    model, example = zoo.build("chain")
    first, second, third = (site.routes[0].steps for site in find_sites(model, example))
    assert [type(step) for step in first] == [Norm, Activation, Pool]
    assert [type(step) for step in second] == [Activation, Pool, Flatten]
    assert second[1].average
    assert second[1].geometry.stride == (1, 1)
    assert second[2].grid == (2, 2)
    assert third == (Activation("tanh"),)


def test_a_composite_activation_is_one_step() -> None:
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y * F.relu6(y + 3) / 6)

    (site,) = find_sites(Swish(), torch.zeros(1, 1, 2, 2))
    assert site.closed_form is None
    assert site.routes[0].local
    assert all(isinstance(step, Activation) for step in site.routes[0].steps)


@pytest.mark.parametrize(
    ("name", "site", "closed"),
    [
        ("chain", "a -> b", True),
        ("chain", "b -> c", True),
        ("residual", "stem + a2 -> a1, b1, short", False),
        ("unet", "a -> b, c", True),
        ("unet", "b -> up", False),
        ("grouped", "a -> b", True),
        ("grouped", "b -> c", False),
        ("dense", "c -> d", False),
    ],
)
def test_closed_form_is_refused_with_a_reason(name: str, site: str, closed: bool) -> None:
    model, example = zoo.build(name)
    found = next(each for each in find_sites(model, example) if each.name == site)
    assert (found.closed_form is None) == closed
    if not closed:
        assert found.closed_form in str(found)


def test_depthwise_step_has_its_geometry() -> None:
    model, example = zoo.build("grouped")
    steps = find_sites(model, example)[0].routes[0].steps
    depthwise = next(step for step in steps if isinstance(step, Depthwise))
    assert depthwise.path == "dw"
    assert depthwise.geometry.padding == ((1, 1), (1, 1))


def test_global_mean_is_pooling_and_flattening() -> None:
    model, example = zoo.build("residual")
    route = find_sites(model, example)[-1].routes[0]
    assert [type(step) for step in route.steps] == [Activation, AdaptivePool, Flatten]


class Refused(nn.Module):
    """One layer whose output cannot grow, each time for another reason."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(2 if how in ("slice", "chunk") else 4, 2, 1)
        self.norm = nn.LayerNorm([4, 5, 5]) if how == "layer norm" else nn.GroupNorm(2, 4)
        self.recurrent = nn.LSTM(4, 4) if how == "recurrent" else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.how == "shuffle":
            n, c, h, w = y.shape
            y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        if self.how == "literal view":
            y = y.view(-1, 4, 25).view(-1, 4, 5, 5)
        if self.how == "slice":
            y = y[:, 1:3]
        if self.how == "chunk":
            y = y.chunk(2, dim=1)[0]
        if self.how == "dynamic slice":
            y = torch.cat([y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]], 1)
        if self.how == "softmax":
            y = y.softmax(1)
        if self.how == "input":
            y = y + torch.cat([x, x[:, :1]], 1)
        if self.how == "output":
            return y
        if self.how == "mean":
            y = y - y.mean(1, keepdim=True)
        if self.how == "layer norm":
            y = self.norm(y)
        if self.how == "functional layer norm":
            y = nn.functional.layer_norm(y.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)
        if self.how == "recurrent":
            y = self.recurrent(y.flatten(2).permute(2, 0, 1))[0].permute(1, 2, 0).unflatten(2, (5, 5))
        if self.how == "gather":
            y = y[:, torch.tensor([3, 2, 1, 0])]
        if self.how == "matrix":
            y = torch.einsum("nchw,cd->ndhw", y, torch.eye(4))
        return self.b(y)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("shuffle", "channel shuffle"),
        ("literal view", "literal size 4"),
        ("slice", "slice of its channels"),
        ("chunk", "chunk"),
        ("dynamic slice", "slice of its channels"),
        ("softmax", "mixes all channels"),
        ("input", "tied to the model's input x"),
        ("output", "the model's output"),
        ("mean", "reduces over the channels"),
        ("layer norm", "LayerNorm"),
        ("functional layer norm", "layer_norm mixes all channels"),
        ("recurrent", "LSTM"),
        ("gather", "indexed by a tensor"),
        ("matrix", "einsum"),
    ],
)
def test_a_layer_that_cannot_grow_has_its_reason(how: str, reason: str) -> None:
    table = growconv.explain_sites(Refused(how), torch.randn(2, 3, 5, 5))
    row = next(row for row in table if row.path == "a")
    assert not row.growable
    assert row.reason is not None
    assert reason in row.reason
    assert row.reason.split()[0] in str(table)


def test_the_table_has_a_row_for_every_layer() -> None:
    model, example = zoo.build("residual")
    table = growconv.explain_sites(model, example)
    assert [row.path for row in table] == [
        name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    assert {row.path for row in table if not row.growable} == {"head"}
    assert "6 of 7 layers can grow" in str(table)
    assert next(row for row in table if row.path == "head").reads == ("b2 + short -> head",)


def test_unused_layers_and_frozen_layers_are_told_apart() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1))
    model[0].weight.requires_grad_(False)
    model[2].spare = nn.Linear(2, 2)
    reasons = {row.path: row.reason for row in growconv.explain_sites(model, torch.zeros(1, 1, 3, 3))}
    assert "frozen" in str(reasons["0"])
    assert reasons["1"] is None
    assert "is inside 2" in str(reasons["2.spare"])


def test_widths_stay_true_while_neighbours_grow() -> None:
    model, example = zoo.build("dense")
    sites = find_sites(model, example)
    for site in sites:
        growconv.grow(model, site, zoo.random_growth(site, 2), 0.0)
    assert [site.width for site in sites] == [6, 5, 4]
    again = find_sites(model, example)
    assert [site.width for site in again] == [6, 5, 4]
    for old, new in zip(sites, again, strict=True):
        for path in old.consumers:
            assert old.entries(path) == new.entries(path)


def test_layers_that_are_never_called_are_told() -> None:
    model, example = zoo.build("chain")
    model.spare = nn.Conv2d(2, 2, 1)
    row = next(row for row in growconv.explain_sites(model, example) if row.path == "spare")
    assert row.reason == "the forward pass does not call it"


def test_constants_and_new_tensors() -> None:
    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(3, 2, 1)
            self.offset = torch.ones(3, 1, 1)  # no buffer

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y = y + torch.zeros(1, y.shape[1], 1, 1)
            return self.c(F.relu(self.b(F.relu(y)) + self.offset))

    model = Constants()
    names = set(vars(model))
    rows = {row.path: row for row in growconv.explain_sites(model, torch.zeros(1, 1, 2, 2))}
    assert set(vars(model)) == names
    assert rows["a"].growable
    assert "fixed tensor" in str(rows["b"].reason)
    site = find_sites(model, torch.zeros(1, 1, 2, 2))[0]
    growconv.grow(model, site, zoo.random_growth(site, 2), 0.0)
    assert model(torch.zeros(1, 1, 2, 2)).shape == (1, 2, 2, 2)
