"""Adapters against a plain forward pass: the grown layer is the old one plus what its new filters compute."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from growconv.errors import SurgeryError
from growconv.network import layers
from growconv.network.layout import ENTRY, GROUP_IN, GROUP_OUT, IN, OUT, Layout, Place, Run, Sizes
from growconv.network.optimizer import exchange
from growconv.network.plan import Plan
from tests.network import hand

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


KINDS = {
    (False, 1): nn.Conv1d, (False, 2): nn.Conv2d, (False, 3): nn.Conv3d,
    (True, 1): nn.ConvTranspose1d, (True, 2): nn.ConvTranspose2d, (True, 3): nn.ConvTranspose3d,
}  # fmt: skip


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Module:
    """A convolution of any kind and geometry, in float64."""
    axes, transposed, groups = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.integers(1, 3))
    geometry = {
        "kernel_size": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 1)),
        "dilation": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
    }
    if not transposed:
        geometry["padding_mode"] = draw(st.sampled_from(["zeros", "circular", "replicate"]))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 99)))
    module = KINDS[transposed, axes](inputs, outputs, groups=groups, **geometry).double()
    norm = draw(st.sampled_from([None, None, nn.utils.parametrizations.weight_norm, nn.utils.weight_norm]))
    return module if norm is None else norm(module, dim=draw(st.integers(0, 1)))


def example(module: nn.Module, channels: int) -> Tensor:
    return torch.randn(2, channels, *[7] * len(module.kernel_size), dtype=torch.float64)


def enlarged(module: nn.Module, parts: list, added: dict[str, int]) -> nn.Module:
    """A copy of a layer with new entries."""
    model = nn.ModuleDict({"layer": copy.deepcopy(module) if "weight" in module._parameters else module})
    exchange(model, (plan := planned(model, parts, added)).changes, plan.attributes, ())
    return model["layer"]


def planned(model: nn.ModuleDict, parts: list, added: dict[str, int]) -> Plan:
    """What new entries of a layer change."""
    plan = Plan(model)
    for name, insertion in parts:
        plan.change(f"layer.{name}").insertions.append(insertion)
    plan.lengthen(layers.adapter(model["layer"]), "layer", added)
    return plan


def shares(groups: int, size: int, units: int) -> list[Place]:
    """Units of one channel in every group."""
    key = ("layer", OUT)
    layout = Layout({key: (Run(0, groups, 1, tuple(range(groups))),)}, (groups,), {})
    return layout.places(key, {0: units}, Sizes(lambda _: groups * size))


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.integers(1, 2))
def test_new_outputs_are_those_of_their_filters(module: nn.Module, units: int) -> None:
    layer = layers.weighted(module)
    groups, inputs, outputs = layer.groups, layer.size(IN), layer.size(OUT)
    x = example(module, inputs)
    filters, bias, expected = layer.filters().detach(), layer.bias(), module(x).detach()
    new = torch.randn(layer.shape(OUT, units * groups), dtype=torch.float64)
    new_bias = torch.randn(units * groups, dtype=torch.float64)
    parts = layer.insertions(OUT, shares(groups, outputs // groups, units), {"weight": new, "bias": new_bias})
    alone = layer.apply(x, new.unflatten(0, (units, groups)).transpose(0, 1).flatten(0, 1), None)
    grown = enlarged(module, parts, {OUT: units * groups})
    y = grown(x).unflatten(1, (groups, -1))
    size = outputs // groups
    torch.testing.assert_close(y[:, :, :size].flatten(1, 2), expected, rtol=1e-9, atol=1e-9)
    shift = new_bias.unflatten(0, (units, groups)).T[..., *[None] * (x.dim() - 2)] if bias is not None else 0
    torch.testing.assert_close(y[:, :, size:], alone.unflatten(1, (groups, units)) + shift, rtol=1e-9, atol=1e-9)
    assert layers.size(grown, OUT) == outputs + units * groups
    assert filters.shape == (outputs, inputs // groups, *module.kernel_size)


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.integers(1, 2))
def test_new_inputs_add_what_their_columns_compute(module: nn.Module, units: int) -> None:
    layer = layers.weighted(module)
    groups, inputs, outputs = layer.groups, layer.size(IN), layer.size(OUT)
    x, more = example(module, inputs), example(module, groups * units)
    expected = module(x).detach()
    columns = torch.randn(layer.shape(IN, units * groups), dtype=torch.float64)
    added = layer.apply(more.unflatten(1, (units, groups)).transpose(1, 2).flatten(1, 2), columns, None)
    parts = layer.insertions(IN, shares(groups, inputs // groups, units), {"weight": columns})
    model = nn.ModuleDict({"layer": module})
    plan = planned(model, parts, {IN: units * groups})
    both = layer.revised(lambda name: plan.change(f"layer.{name}"))
    assert {change.path for change in plan.changes if change.revised is not None} == {f"layer.{name}" for name in both}
    exchange(model, plan.changes, plan.attributes, ())
    grouped = torch.cat([x.unflatten(1, (groups, -1)), more.unflatten(1, (units, groups)).transpose(1, 2)], 2)
    torch.testing.assert_close(model["layer"](grouped.flatten(1, 2)), expected + added, rtol=1e-9, atol=1e-9)
    assert layers.size(module, IN) == inputs + units * groups
    assert outputs == layers.size(module, OUT)


@settings(max_examples=30, deadline=None)
@given(st.booleans(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 2))
def test_new_groups_stand_beside_the_old_ones(
    transposed: bool, inputs: int, outputs: int, groups: int, units: int
) -> None:
    module = KINDS[transposed, 2](inputs * groups, outputs * groups, 3, groups=groups).double()
    layer = layers.weighted(module)
    old, new = example(module, inputs * groups), example(module, inputs * units)
    expected = module(old).detach()
    filters = torch.randn(layer.shape(GROUP_OUT, outputs * units), dtype=torch.float64)
    places_in = [Place(inputs * groups, tuple(range(inputs * units)))]
    places_out = [Place(outputs * groups, tuple(range(outputs * units)))]
    alone = layer.apply(new, filters, None, groups=units)
    parts = layer.insertions(GROUP_IN, places_in, {"weight": filters}, places_out)
    parts += layer.insertions(GROUP_OUT, places_out, {"weight": filters})
    grown = enlarged(module, parts, {GROUP_IN: inputs * units, GROUP_OUT: outputs * units})
    both = torch.cat([expected, alone], 1)
    torch.testing.assert_close(grown(torch.cat([old, new], 1)), both, rtol=1e-9, atol=1e-9)
    assert grown.groups == groups + units


@settings(max_examples=40, deadline=None)
@given(convolutions())
def test_a_layer_with_its_own_weights_is_itself(module: nn.Module) -> None:
    layer = layers.weighted(module)
    x = example(module, layer.size(IN))
    torch.testing.assert_close(layer.apply(x, layer.filters(), layer.bias()), module(x), rtol=1e-9, atol=1e-9)
    assert layer.channel_axis(x.dim()) == 1
    assert layers.adapter(module).problem() is None


def test_apply_is_differentiable_and_uses_the_layers_own_forward() -> None:
    module = hand.Standardised(3, 4, 3).double()
    layer = layers.weighted(module)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    weight = torch.randn(7, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    y = layer.apply(x, weight, None)
    standardised = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
    gain = torch.cat([module.gain, module.gain.mean(0, keepdim=True).expand(3, 1, 1, 1)])
    torch.testing.assert_close(y, nn.functional.conv2d(x, gain * standardised))
    y.sum().backward()
    assert weight.grad is not None
    assert module.weight.shape == (4, 3, 3, 3)


def test_masks_of_weights_stay_what_they_are_at_every_tap() -> None:
    class Causal(nn.Conv1d):
        def __init__(self) -> None:
            super().__init__(3, 4, 3)
            self.register_buffer("mask", torch.tensor([1.0, 0.5, 0.0]).expand(4, 3, 3).clone())

    module = Causal()
    for side, new in ((OUT, (2, 3, 3)), (IN, (4, 2, 3))):
        parts = layers.weighted(module).insertions(side, [Place(3, (0, 1))], {"weight": torch.randn(new)})
        (values,) = (each.values for name, each in parts if name == "mask")
        torch.testing.assert_close(values.expand(new), module.mask[:1, :1].expand(new))


def test_groups_that_do_not_fit_are_refused() -> None:
    layer = layers.weighted(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(SurgeryError, match="every group"):
        layer.insertions(IN, [Place(4, (0,))], {})
    with pytest.raises(SurgeryError, match="groups come as a whole"):
        layer.counts({GROUP_IN: 3, GROUP_OUT: 2})
    with pytest.raises(SurgeryError, match="lose the same"):
        layer.slots(IN)[0].positions([0], 4)
    with pytest.raises(SurgeryError, match="whole groups"):
        layers.adapter(nn.GroupNorm(2, 4)).counts({ENTRY: 1})
