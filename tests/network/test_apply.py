"""Growing keeps the function at amplitude 0, in eval and train mode, and is undone as a whole where it fails."""

import copy

import pytest
import torch

from growconv.network import layers
from growconv.network.apply import grow, shrink
from growconv.network.event import count_parameters
from growconv.network.layout import IN, OUT
from growconv.network.plan import plan_size
from tests.network import hand

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", hand.SITES)
def test_amplitude_zero_keeps_the_function_and_every_new_weight_trains(name: str, training: bool) -> None:
    model, example, site = hand.build(name)
    model.train(training)
    expected = copy.deepcopy(model)(example) if "hook" not in name else model(example)
    growth = hand.growth(site, 2)
    predicted = plan_size(site, growth.channels)
    event = grow(model, site, growth, 0.0)
    output = model(example)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    output.square().sum().backward()
    for path in site.consumers:
        layer = layers.weighted(model.get_submodule(path))
        new = site.entries(path)[-int(growth.channels * site.ratio(path)) :]
        weight = next(
            parameter for name, parameter in layer.module.named_parameters() if name.endswith(layer.slots(IN)[0].name)
        )
        axis = layer.slots(IN)[0].axis
        assert weight.grad is not None
        per_group = layer.size(IN) // layer.groups
        index = new if axis == 0 or layer.groups == 1 else sorted({entry % per_group for entry in new})
        if not layer.transposed:
            assert weight.grad.index_select(1, torch.tensor(index)).abs().max() > 0
    assert event.parameters_after - event.parameters_before == predicted > 0
    assert event.parameters_after == count_parameters(model)
    assert event.width_after == site.width == event.width_before + growth.channels
    site.check()


@pytest.mark.parametrize("name", hand.SITES)
def test_filters_are_those_proposed_and_old_ones_stay(name: str) -> None:
    model, _, site = hand.build(name)
    old = {
        path: layers.weighted(model.get_submodule(path)).filters().detach()
        for path in (*site.producers, *site.consumers)
    }
    before = {key: site.entries(*key) for key in site.axes}
    growth = hand.growth(site, 2)
    grow(model, site, growth, 0.7)
    for path in site.producers:
        layer = layers.weighted(model.get_submodule(path))
        new = site.entries(path, OUT)[len(before[path, OUT]) :]
        rows = layer.filters()[new][:, : growth.incoming[path].shape[1]]
        torch.testing.assert_close(rows, growth.incoming[path], rtol=1e-10, atol=1e-12)
        if layer.bias() is not None:
            torch.testing.assert_close(layer.bias()[new], growth.incoming_bias[path])
    for path in site.consumers:
        layer = layers.weighted(model.get_submodule(path))
        if layer.groups == 1:
            new = site.entries(path, IN)[len(before[path, IN]) :]
            columns = layer.filters()[: len(old[path]), new]
            torch.testing.assert_close(columns, 0.7 * growth.outgoing[path], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", hand.SITES)
def test_shrinking_takes_back_what_growing_put_in(name: str) -> None:
    model, example, site = hand.build(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model.eval()(example)
    growth = hand.growth(site, 2)
    width = site.width
    grow(model, site, growth, 0.0)
    shrink(model, site, range(width, site.width))
    assert site.width == width
    torch.testing.assert_close(model(example), expected, rtol=0, atol=1e-12)
    if "weight norm" not in name:
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
