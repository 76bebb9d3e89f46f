"""Losses that run the model several times, batches as they are, and kept samples that never mix batches."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growconv
from growconv.errors import ArgumentTypeError, StatisticsError
from growconv.statistics import StatisticsCollector, collect_statistics


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 2, 3)).double()


def data(samples: int = 8, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def negative_gradient(model: nn.Sequential, value: Tensor) -> Tensor:
    """−∂L/∂(weight, bias) of the consumer as (d, c)."""
    weight, bias = torch.autograd.grad(value, [model[2].weight, model[2].bias])
    return -torch.cat([weight.flatten(1), bias[:, None]], 1).T


def contrastive(model: nn.Module, output: Tensor, other: Tensor) -> Tensor:
    return (output - model(other)).square().mean() + output.sin().mean() + F.softplus(model(other.flip(3))).mean()


@pytest.mark.parametrize("others", [8, 5])
@pytest.mark.parametrize("path", ["auto", "unfold", "dense"])
def test_all_forward_passes_of_a_loss_count(path: str, others: int) -> None:
    model, x, other = network(), data(), data(8, seed=1)
    (site,) = growconv.find_sites(model, x)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return contrastive(model, output, target) + model(target[:others]).square().mean()

    expected = negative_gradient(model, loss(model(x), other))
    by_function = collect_statistics(
        model, [site], [(x, other)], loss, quantities=("M", "samples"), keep_samples=8, path=path
    )
    with StatisticsCollector(model, [site], quantities=("M",), path=path) as collector:
        loss(model(x), other).backward()
    for found in (by_function[site.name], collector.statistics[site.name]):
        assert found.samples == 8
        torch.testing.assert_close(found.M, expected, rtol=1e-9, atol=1e-12)
    kept = by_function[site.name].samples_kept
    assert kept is not None
    assert len(kept) == 8
    assert len(kept.passes) == 4
    total = torch.zeros_like(expected)
    for each in kept.passes:
        (h,), (v,) = each.h["2"], each.v["2"]
        patches = F.unfold(h, 3)
        patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
        total += torch.einsum("idm,icm->dc", patches, v.flatten(2)) / len(kept)
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-12)


def test_a_predicted_decrease_through_several_passes_is_the_slope() -> None:
    model, x, other = network(), data(), data(8, seed=1)
    (site,) = growconv.find_sites(model, x)
    found = collect_statistics(
        model,
        [site],
        [(x, other)],
        lambda o, t: contrastive(model, o, t),
        quantities={"samples", "S", "N"},
        keep_samples=8,
    )
    for method in ("tiny", "functional", "firefly"):
        with pytest.warns() if method == "functional" else pytest.MonkeyPatch.context():
            growth = growconv.solve(found[site.name], method, 2)
        values = []
        for amplitude in (-1e-4, 1e-4):
            grown = network()
            grown.load_state_dict(model.state_dict())
            growconv.grow(grown, site, growth, amplitude=amplitude)
            values.append(float(contrastive(grown, grown(x), other).detach()))
        assert growth.expected_decrease == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-3)


def penalty(model: nn.Module, output: Tensor, x: Tensor) -> Tensor:
    inputs = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
    return output.mean() + slope.square().mean()


def penalty_on_weights(model: nn.Module, output: Tensor, _: Tensor) -> Tensor:
    slopes = torch.autograd.grad(output.sum(), list(model.parameters()), create_graph=True)
    return output.mean() + slopes[0].square().mean()


def own_backward(_: nn.Module, output: Tensor, __: Tensor) -> Tensor:
    loss = output.square().mean()
    loss.backward(retain_graph=True)
    return loss


def accumulating(model: nn.Module, output: Tensor, x: Tensor) -> Tensor:
    for part in x.split(2):
        (model(part).square().mean() / 4).backward()
    return output.mean()


@pytest.mark.parametrize("kind", [penalty, penalty_on_weights, own_backward, accumulating])
def test_losses_that_hold_a_gradient_are_refused_and_leave_no_trace(kind: Callable) -> None:
    model, x = network(), data()
    (site,) = growconv.find_sites(model, x)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return kind(model, output, target)

    with pytest.raises(StatisticsError, match="gradient is part"):
        collect_statistics(model, [site], [(x, x)], loss)
    scheduler = growconv.GrowthScheduler(model, None, [site], method="functional", amount=2)
    with pytest.raises(StatisticsError, match="gradient is part"):
        scheduler.grow([(x, x)] * 2, loss)
    assert model[0].out_channels == 4
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(x + torch.relu(self.b(x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["functional", "firefly", "senn", "splitting", "north", "net2net", "random"])
@pytest.mark.filterwarnings("ignore:.*fewer kept")
def test_half_precision_models(method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Stream().to(dtype), torch.randn(6, 3, 6, 6).to(dtype)
    (site,) = growconv.find_sites(model, x)
    reads = growconv.solvers.get_solver(method).reads
    subject = site
    if reads:
        options = {"quantities": reads, "keep_samples": 6}
        subject = collect_statistics(model, [site], [(x, None)], lambda o, _: o.float().square().mean(), **options)[
            site.name
        ]
        assert all(each.dtype == torch.float32 for each in subject.samples_kept.v.values())
    growth = growconv.solve(subject, method, 2)
    if growth.channels:
        growconv.grow(model, site, growth)
    assert model(x).dtype == dtype


def test_batches_of_other_forms() -> None:
    model, x = network(), data()
    (site,) = growconv.find_sites(model, x)

    def loss(output: Tensor, _: object) -> Tensor:
        return output.square().mean()

    expected = collect_statistics(model, [site], [(x, None)], loss)[site.name].S
    for batch in (x, (x,), [x, None]):
        assert torch.equal(collect_statistics(model, [site], [batch], loss)[site.name].S, expected)
    for batch, named in (((x, 1, 2), "sequence of 3"), ({"image": x, "label": 1}, "image, label"), ("x", "str")):
        with pytest.raises(ArgumentTypeError, match=named):
            collect_statistics(model, [site], [batch], loss)
    with torch.inference_mode(), pytest.raises(StatisticsError, match="inference mode"):
        collect_statistics(model, [site], [(x, None)], loss)
