"""gradmax and random: gradients by autograd, dead channels, scales, and the registry."""

import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import growconv
from growconv.errors import ArgumentTypeError, SolverError
from growconv.network.proposal import ChannelGrowth
from growconv.solvers import SOLVERS, Solver, get_solver, gradmax, register, solve

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
    with pytest.raises(SolverError, match="unknown directions"):
        get_solver("gradmax", directions="other")


def test_fewer_directions_than_channels() -> None:
    N = torch.zeros(4, 2, 3)
    N[0, 0, 0], N[1, 1, 1] = 2.0, 1.0
    found = gradmax(N, 5)
    torch.testing.assert_close(found.gains, torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(found.omega[0, 0, 0].abs(), torch.tensor(1.0))
    assert gradmax(torch.zeros(4, 2, 3), 5).omega.shape == (0, 2, 3)


def test_random_channels_are_he_scaled_and_change_nothing() -> None:
    model = pair(c0=16, between=lambda width: [nn.BatchNorm2d(width), nn.ReLU()])
    site = growconv.find_sites(model, torch.randn(1, 16, 6, 6).double())[0]
    generator = torch.Generator().manual_seed(3)
    growth = growconv.solve(site, method="random", channels=200, model=model, generator=generator)
    again = solve(site, "random", 200, model, torch.Generator().manual_seed(3))
    torch.testing.assert_close(again.alpha, growth.alpha)
    assert float(growth.alpha.std()) == pytest.approx((2 / 144) ** 0.5, rel=0.05)
    assert not growth.omega.any()
    assert get_solver("random").function_preserving
    assert not get_solver("random", outgoing=0.5).function_preserving
    spoken = solve(site, "random", 8, model, generator, outgoing=0.5)
    old = model[-1].weight.transpose(0, 1).flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(spoken.omega.transpose(0, 1).flatten(1).norm(dim=1), 0.5 * old.expand(8))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("random", {"gain": 0.0}),
        ("random", {"outgoing": -1.0}),
        ("gradmax", {"outgoing": 0.0}),
        ("gradmax", {"lift": -1.0}),
    ],
)
def test_impossible_scales(method: str, options: dict) -> None:
    with pytest.raises(SolverError, match="impossible scales"):
        get_solver(method, **options)


def test_names_and_hyperparameters_are_checked_with_a_suggestion() -> None:
    with pytest.raises(SolverError, match="did you mean 'tiny'"):
        get_solver("tinny")
    with pytest.raises(SolverError, match="did you mean 'shrinkage'"):
        get_solver("tiny", shrinkige=0.1)
    with pytest.raises(SolverError, match="belong to the solver object"):
        get_solver(get_solver("tiny"), shrinkage=0.1)


def test_what_cannot_be_solved_is_named() -> None:
    model = pair()
    site = growconv.find_sites(model, torch.randn(1, 3, 6, 6).double())[0]
    with pytest.raises(SolverError, match="needs statistics"):
        solve(site, "tiny", 2)
    with pytest.raises(ArgumentTypeError, match="takes the statistics of a site"):
        inspect.unwrap(solve)(model, "tiny", 2)  # without the types that the tests check at run time
    with pytest.raises(SolverError, match="no measure by which to choose"):
        solve(site, "random", "auto")


def test_a_method_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growconv.solvers.base.SOLVERS", dict(SOLVERS))
    counter = itertools.count()

    @register("ones")
    @dataclass(frozen=True)
    class Ones(Solver):
        value: float = 1.0

        def solve(self, subject: Any, site: Any, channels: Any, model: Any, generator: Any = None) -> ChannelGrowth:
            next(counter)
            alpha = torch.full((channels, 3, 3, 3), self.value, dtype=torch.float64)
            return ChannelGrowth(
                site.name, self.name, {"0": alpha}, {"1": torch.zeros(4, channels, 3, 3)}, torch.zeros(channels)
            )

    model = pair(bias=False)
    site = growconv.find_sites(model, torch.randn(1, 3, 6, 6).double())[0]
    assert solve(site, "ones", 2, value=3.0).alpha.mean() == 3
    assert next(counter) == 1
    with pytest.raises(SolverError, match="not finite"):
        solve(site, "ones", 2, value=float("nan"))
    with pytest.raises(SolverError, match="is taken"):
        register("tiny")(Ones)
