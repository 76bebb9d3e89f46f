"""splitting: the splitting matrix against autograd's Hessian, its lowest eigenvector, and the loss after a split."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from growconv.errors import ArgumentValueError
from growconv.network.event import grow
from growconv.network.find import find_sites
from growconv.solvers import solve
from growconv.solvers.splitting import lowest_eigenpairs, splitting_matrices


@given(count=st.integers(1, 4), size=st.integers(1, 8), rank=st.integers(0, 8), seed=st.integers(0, 99))
def test_lowest_eigenpairs_equal_a_full_decomposition(count, size, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(count, size, min(rank, size), generator=generator, dtype=torch.float64)
    signs = torch.randn(count, 1, min(rank, size), generator=generator, dtype=torch.float64)
    matrices = (draw * signs) @ draw.mT
    start = torch.randn(count, size, generator=generator, dtype=torch.float64)
    values, vectors = lowest_eigenpairs(lambda v: torch.einsum("cab,cb->ca", matrices, v), start, iterations=size)
    expected = torch.linalg.eigvalsh(matrices)[:, 0]
    scale = matrices.abs().max().clamp_min(1)
    torch.testing.assert_close(values, expected, atol=1e-8 * scale.item(), rtol=0)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(count, dtype=torch.float64))
    images = torch.einsum("cab,cb->ca", matrices, vectors)
    assert (images - values[:, None] * vectors).abs().max() < 1e-5 * scale


def test_a_large_matrix_needs_few_products():
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(2, 300, 300, generator=generator, dtype=torch.float64)
    matrices = draw + draw.mT
    spike = torch.nn.functional.normalize(torch.randn(2, 300, generator=generator, dtype=torch.float64), dim=1)
    matrices = matrices - 80 * spike[:, :, None] * spike[:, None, :]
    start = torch.randn(2, 300, generator=generator, dtype=torch.float64)
    values, vectors = lowest_eigenpairs(lambda v: torch.einsum("cab,cb->ca", matrices, v), start)
    expected = torch.linalg.eigh(matrices)
    torch.testing.assert_close(values, expected.eigenvalues[:, 0], rtol=1e-4, atol=0)
    assert ((vectors * expected.eigenvectors[:, :, 0]).sum(1).abs() > 0.999).all()


class SmoothKinks(TorchFunctionMode):
    """Inside, ReLU has the curvature of a softplus."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("relu", "relu_"):
            scale = self.width * args[0].detach().square().mean().sqrt()
            return functional.softplus(args[0] / scale, threshold=50) * scale
        return func(*args, **(kwargs or {}))


def split_hessian(model, x, y, channel, smoothing):
    """∇²_θθ of the loss by one filter and bias at fixed output gradient: the splitting matrix, by autograd alone."""
    producer, consumer = model[0], next(m for m in list(model)[1:] if isinstance(m, torch.nn.Conv2d))
    between = model[1 : list(model).index(consumer)]
    z = consumer(between(producer(x))).detach().requires_grad_()
    loss = functional.cross_entropy(model[list(model).index(consumer) + 1 :](z), y)
    (gradient,) = torch.autograd.grad(loss, z)

    def objective(theta):
        weight, bias = (
            producer.weight.detach().clone(),
            None if producer.bias is None else producer.bias.detach().clone(),
        )
        weight[channel] = theta[: weight[0].numel()].view_as(weight[0])
        if bias is not None:
            bias[channel] = theta[-1]
        with SmoothKinks(smoothing):
            return (consumer(between(functional.conv2d(x, weight, bias, padding=1))) * gradient).sum()

    theta = producer.weight[channel].flatten()
    theta = theta if producer.bias is None else torch.cat([theta, producer.bias[channel : channel + 1]])
    return torch.autograd.functional.hessian(objective, theta.detach())


@pytest.mark.parametrize("name", ["relu", "no bias", "norm", "tanh", "gelu and pooling"])
def test_products_are_those_of_the_splitting_matrices(make, collect, name):
    model, x, y = make(name)
    model.eval()
    statistics = collect(model, x, y, {"samples"})
    product, theta = splitting_matrices(statistics.samples_kept, smoothing=0.25)
    vectors = torch.randn(theta.shape, dtype=torch.float64)
    found = product(vectors)
    for channel in range(4):
        hessian = split_hessian(model, x, y, channel, 0.25)
        torch.testing.assert_close(found[channel], hessian @ vectors[channel], rtol=1e-6, atol=1e-10)


def test_the_channels_with_the_most_negative_curvature_split_along_it(make, collect):
    model, x, y = make("tanh")
    statistics = collect(model, x, y, {"samples"})
    spectra = [torch.linalg.eigh(split_hessian(model, x, y, channel, 0.25)) for channel in range(4)]
    lowest = torch.stack([spectrum.eigenvalues[0] for spectrum in spectra])
    old = torch.cat([model[0].weight.flatten(1), model[0].bias[:, None]], 1).detach()
    growth = solve(statistics, "splitting", 2, step=0.05, iterations=28, tolerance=0.0)
    torch.testing.assert_close(growth.gains, -lowest.sort().values[:2], rtol=1e-5, atol=0)
    assert growth.copied_from.tolist() == lowest.argsort()[:2].tolist()
    norm = old.norm(dim=1)
    for index, channel in enumerate(growth.copied_from.tolist()):
        child = torch.cat([growth.alpha[index].flatten(), growth.alpha_bias[index : index + 1]])
        move = (child - old[channel]) / (0.05 * norm[channel])
        assert move.norm() == pytest.approx(1)
        assert abs(move @ spectra[channel].eigenvectors[:, 0]) == pytest.approx(1, abs=1e-4)


def test_auto_splits_every_channel_that_is_not_stable_by_a_step_of_a_given_length(make, collect):
    model, x, y = make("tanh")
    statistics = collect(model, x, y, {"samples"})
    lowest = [torch.linalg.eigvalsh(split_hessian(model, x, y, channel, 0.25))[0] for channel in range(4)]
    growth = solve(statistics, "splitting", "auto", step=0.01, relative=False, iterations=28)
    assert growth.channels == sum(float(value) < -1e-7 * max(map(abs, lowest)) for value in lowest) > 0
    moved = torch.cat([growth.alpha.flatten(1), growth.alpha_bias[:, None]], 1)
    old = torch.cat([model[0].weight.flatten(1), model[0].bias[:, None]], 1)[growth.copied_from]
    torch.testing.assert_close((moved - old).norm(dim=1), torch.full((growth.channels,), 0.01, dtype=torch.float64))


def test_the_loss_falls_as_predicted_to_second_order(make, collect):
    model, x, y = make("tanh")
    statistics = collect(model, x, y, {"samples"})
    before = functional.cross_entropy(model(x), y).item()
    growth = solve(statistics, "splitting", 1, step=0.02, iterations=28)
    grow(model, statistics.growth_site, growth)
    decrease = before - functional.cross_entropy(model(x), y).item()
    assert growth.expected_decrease > 0
    assert decrease == pytest.approx(growth.expected_decrease, rel=0.05)


def test_outgoing_weights_are_halved_and_the_function_is_the_mean_of_both_halves(make, collect):
    model, x, y = make("norm")
    model.eval()
    statistics = collect(model, x, y, {"samples"})
    before, old_out = model(x), model[3].weight.detach().clone()
    growth = solve(statistics, "splitting", 2, step=1e-4)
    grow(model, statistics.growth_site, growth)
    assert (model(x) - before).abs().max() < 1e-6
    copied = growth.copied_from
    torch.testing.assert_close(model[3].weight[:, copied].detach(), old_out[:, copied] / 2)
    torch.testing.assert_close(model[3].weight[:, 4:].detach(), old_out[:, copied] / 2)
    torch.testing.assert_close(model[1].running_mean[4:], model[1].running_mean[copied])


@pytest.mark.parametrize("name", ["relu", "fan", "linear"])
def test_kinks_of_piecewise_linear_activations_are_seen(make, collect, name):
    model, x, y = make(name)
    growth = solve(collect(model, x, y, {"samples"}), "splitting", 1)
    assert growth.channels == 1
    assert growth.gains[0] > 0


def test_stable_channels_stay_whole(make, collect):
    model, x, y = make("tanh")
    model[1] = torch.nn.Identity()
    statistics = collect(model, x, y, {"samples"}, site=find_sites(model, x)[0])
    growth = solve(statistics, "splitting", 3)
    assert growth.channels == 0
    assert "splitting-stable" in growth.reason
    assert not growth.revised


@pytest.mark.parametrize("name", ["group norm", "residual", "fan"])
def test_every_kind_of_site_splits(make, collect, name):
    model, x, y = make(name)
    model.eval()
    before = model(x)
    statistics = collect(model, x, y, {"samples"})
    growth = solve(statistics, "splitting", 2, step=1e-5)
    assert growth.channels == 2
    grow(model, statistics.growth_site, growth)
    assert (model(x) - before).abs().max() < 1e-5


def test_impossible_steps_are_named(make):
    model, x, _ = make("relu")
    with pytest.raises(ArgumentValueError, match="step"):
        solve(find_sites(model, x)[0], "splitting", 2, step=0.0)
