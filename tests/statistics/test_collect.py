"""The model after `collect_statistics` is as before, and losses that cannot be used are refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import growconv
from growconv.errors import StatisticsError
from growconv.statistics import StatisticsCollector, collect_statistics
from tests.statistics.test_collector import X, Y, hooks, network, site_of


def test_dropout_norms_buffers_and_gradients_are_left_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(5, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    F.cross_entropy(model(X), Y).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    site = site_of(model)
    runs = [
        collect_statistics(model, site, iter([(X, Y)]), F.cross_entropy, scratch_bytes=s)[site.name]
        for s in (1, 1 << 28)
    ]
    torch.testing.assert_close(runs[0].N, runs[1].N, rtol=1e-3, atol=1e-5)  # dropout would differ between passes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert model[3].training
    assert model[1].training


def test_a_loss_that_never_reaches_the_pair():
    model = network()
    site = site_of(model)
    with StatisticsCollector(model, site) as collector:
        model(X)
    with pytest.raises(StatisticsError, match="zero samples"):
        _ = collector.statistics
    with pytest.raises(StatisticsError, match="does not depend"):
        collect_statistics(model, site, [(X, Y)], lambda z, y: torch.zeros(()))
    with pytest.raises(StatisticsError, match="zero samples"):
        collect_statistics(model, site, [], F.cross_entropy)
    with pytest.raises(StatisticsError, match="one number"):
        collect_statistics(model, site, [(X, Y)], lambda z, y: F.cross_entropy(z, y, reduction="none"))
    assert hooks(model) == 0


def test_what_lies_in_front_of_the_sites_records_nothing():
    torch.manual_seed(0)
    body, recorded = nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)), []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), body, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    model[0].bias.requires_grad_(False)
    asked, x = [each.requires_grad for each in model.parameters()], X.double()
    site = growconv.site(model, "1.0", "1.2", example_input=x[:2])
    model[0].register_forward_hook(lambda _module, _args, output: recorded.append(output.requires_grad))
    options = {"quantities": ("S", "N", "M", "samples"), "keep_samples": 5}
    found = collect_statistics(model, site, [(x, Y)] * 2, F.cross_entropy, **options)[site.name]
    with pytest.raises(StatisticsError):
        collect_statistics(model, site, [(x, Y)], lambda output, _: output, **options)
    assert recorded == [False] * 3
    assert [each.requires_grad for each in model.parameters()] == asked
    with StatisticsCollector(model, site, **options) as collector:
        for _ in range(2):
            F.cross_entropy(model(x), Y).backward()
    assert recorded[3:] == [True] * 2
    expected = collector.statistics[site.name]
    for name in ("S", "N", "M"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(found.samples_kept.v["1.2"], expected.samples_kept.v["1.2"])
