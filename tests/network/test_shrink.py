"""shrink is the inverse of grow, and takes any channels out of any site."""

import pytest
import torch
from torch import nn

import growconv
from growconv.errors import SurgeryError
from growconv.network.graph import attribute
from growconv.network.site import find_sites
from tests.network import zoo


@pytest.mark.parametrize("name", [name for name in zoo.MODELS if name != "normalized"])
def test_shrinking_undoes_growing(name: str) -> None:
    model, example = zoo.build(name)
    optimizer = torch.optim.Adam(model.parameters())
    zoo.without_dropout(model)(example).square().sum().backward()
    optimizer.step()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    text = str(model)
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    sites = find_sites(model, example)
    for site in sites:
        width = site.width
        event = growconv.grow(model, site, zoo.random_growth(site, 3), 1.0, optimizer)
        back = growconv.shrink(model, site, range(width, site.width), optimizer)
        assert back.channels == -event.channels
        assert back.parameters_after == event.parameters_before
    assert str(model) == text
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(optimizer.state[p]["exp_avg"], m) for p, m in zip(model.parameters(), moments, strict=True))


@pytest.mark.parametrize("name", ["chain", "residual", "dense", "gated", "unet", "one_axis", "grouped", "ghost"])
def test_channels_that_nobody_reads_go_without_a_trace(name: str) -> None:
    model, example = zoo.build(name)
    for site in find_sites(model, example):
        removed = list(range(site.granularity))
        for path in site.consumers:
            module = model.get_submodule(path)
            axis = 0 if isinstance(module, nn.ConvTranspose2d) else 1
            entries = site.entries(path)[: len(removed) * site.ratio(path)]
            with torch.no_grad():
                module.weight.index_fill_(axis, torch.tensor(entries), 0.0)
        expected = model.eval()(example)
        if any(isinstance(attribute(model, path), nn.GroupNorm) for path in site.followers):
            continue
        growconv.shrink(model, site, removed)
        torch.testing.assert_close(model(example), expected, rtol=1e-10, atol=1e-10)


def test_what_stays_keeps_its_weights_and_state() -> None:
    model, example = zoo.build("residual")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(example).square().sum().backward()
    optimizer.step()
    weight, momentum = model.a1.weight.clone(), optimizer.state[model.a1.weight]["momentum_buffer"].clone()
    site = find_sites(model, example)[1]
    growconv.shrink(model, site, [0, 2], optimizer)
    assert torch.equal(model.a1.weight, weight[[1, 3]])
    assert torch.equal(optimizer.state[model.a1.weight]["momentum_buffer"], momentum[[1, 3]])
    assert (model.a1.out_channels, model.n1.num_features, model.a2.in_channels) == (2, 2, 2)


@pytest.mark.parametrize("channels", [[], [0, 1, 2, 3], [-1], [4], [9]])
def test_channels_that_cannot_be_removed(channels: list[int]) -> None:
    model, example = zoo.build("residual")
    site = find_sites(model, example)[1]
    with pytest.raises(SurgeryError, match="cannot be removed"):
        growconv.shrink(model, site, channels)
    assert site.width == 4


def test_half_a_group_cannot_be_removed() -> None:
    model, example = zoo.build("grouped")
    site = find_sites(model, example)[1]
    with pytest.raises(SurgeryError, match="whole groups"):
        growconv.shrink(model, site, [1, 2])
