"""gradmax: gradients by autograd, dead channels and random directions."""

import pytest
import torch
from torch import nn

import growconv
from growconv.errors import ArgumentValueError, SolverError
from growconv.solvers import get_solver, gradmax, solve

from .pairs import collected, pair, squared_error, teacher_batches


def gradient_norm(model: nn.Sequential, batches: list, channels: int) -> float:
    """Norm of the loss gradient on the newest filters of conv1."""
    model.zero_grad()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    squared_error(model(x), y).backward()
    return float(model[0].weight.grad[-channels:].square().sum() + model[0].bias.grad[-channels:].square().sum()) ** 0.5


def test_no_other_outgoing_weights_of_that_norm_give_larger_gradients() -> None:
    model = pair()
    batches = teacher_batches(model, channels=3)
    site, stats = collected(model, batches, quantities={"N_raw"})
    growth = solve(stats, "gradmax", channels=2)
    omega = growth.outgoing["1"]
    assert not growth.alpha.any()
    assert not growth.alpha_bias.any()
    flat = omega.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat @ flat.mT, flat[0].square().sum() * torch.eye(2).double(), atol=1e-9, rtol=1e-6)
    before = model(batches[0][0])
    growconv.grow(model, site, growth)
    torch.testing.assert_close(model(batches[0][0]), before)
    best = gradient_norm(model, batches, 2)
    expected = float((growth.gains * flat.square().sum(1)).sum()) ** 0.5
    assert best == pytest.approx(expected, rel=1e-6)
    for seed in range(5):
        torch.manual_seed(seed)
        other = torch.linalg.qr(torch.randn(36, 2, dtype=torch.float64))[0].mT * flat[0].norm()
        with torch.no_grad():
            model[-1].weight[:, -2:] = other.view(2, 4, 3, 3).transpose(0, 1)
        assert gradient_norm(model, batches, 2) <= best * (1 + 1e-9)


@pytest.mark.parametrize("norm", [False, True])
def test_channels_that_relu_would_kill_are_lifted(norm: bool) -> None:
    def between(width: int) -> list[nn.Module]:
        return [*([nn.BatchNorm2d(width)] if norm else []), nn.ReLU(inplace=True)]

    model = pair(between=between)
    batches = teacher_batches(model, channels=3)
    site, stats = collected(model, batches, quantities={"N_raw"})
    growth = solve(stats, "gradmax", channels=2)
    before = model(batches[0][0]).detach()
    growconv.grow(model, site, growth)
    model.train()
    assert (model(batches[0][0]) - before).norm() < 0.05 * before.norm()
    x, y = batches[0]
    squared_error(model(x), y).backward()
    assert float(model[0].weight.grad[-2:].norm()) > 1e-3 * float(model[0].weight.grad[:-2].norm())


def test_channels_that_cannot_be_lifted_are_refused() -> None:
    model = pair(between=lambda _: [nn.ReLU()], bias=False)
    _, stats = collected(model, teacher_batches(model, channels=3), quantities={"N_raw"})
    with pytest.raises(SolverError, match="dead channels") as error:
        solve(stats, "gradmax", channels=2)
    assert "relu" in str(error.value)
    model = pair(between=lambda _: [nn.ReLU()])
    _, stats = collected(model, teacher_batches(model, channels=3), quantities={"N_raw"})
    with pytest.raises(SolverError, match="dead channels"):
        solve(stats, "gradmax", channels=2, lift=0.0)


@pytest.mark.filterwarnings("ignore::growconv.solvers.LinearisationWarning")  # softplus is not 0 at 0
@pytest.mark.parametrize("activation", [nn.LeakyReLU, nn.GELU, nn.SiLU, nn.SELU, nn.Tanh, nn.Softplus])
def test_activations_with_a_slope_at_zero_keep_filters_of_zero(activation: type[nn.Module]) -> None:
    model = pair(between=lambda _: [activation()])
    _, stats = collected(model, teacher_batches(model, channels=3), quantities={"N_raw"})
    growth = solve(stats, "gradmax", channels=2)
    assert not growth.alpha_bias.any()


def test_random_directions_have_the_same_norm_and_the_gradients_that_their_gains_tell() -> None:
    model = pair()
    batches = teacher_batches(model, channels=3)
    site, stats = collected(model, batches, quantities={"N_raw"})
    best = solve(stats, "gradmax", channels=2)
    growth = solve(stats, "gradmax", 2, generator=torch.Generator().manual_seed(0), directions="random")
    sizes = growth.omega.transpose(0, 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(sizes, best.omega.transpose(0, 1).flatten(1).norm(dim=1))
    assert not growth.alpha.any()
    assert growth.gains[0] >= growth.gains[1]
    assert growth.gains.sum() < best.gains.sum()
    growconv.grow(model, site, growth)
    expected = float((growth.gains * sizes.square()).sum()) ** 0.5
    assert gradient_norm(model, batches, 2) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ArgumentValueError, match="directions"):
        get_solver("gradmax", directions="other")


def test_fewer_directions_than_channels() -> None:
    N = torch.zeros(4, 2, 3)
    N[0, 0, 0], N[1, 1, 1] = 2.0, 1.0
    found = gradmax(N, 5)
    torch.testing.assert_close(found.gains, torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(found.omega[0, 0, 0].abs(), torch.tensor(1.0))
    assert gradmax(torch.zeros(4, 2, 3), 5).omega.shape == (0, 2, 3)
