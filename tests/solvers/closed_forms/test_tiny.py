"""tiny against its own definition, GroMo, and bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from growconv.errors import ArgumentValueError, SolverError, StatisticsError
from growconv.solvers import solve, tiny

from .pairs import added, collected, desire, pair, silent, squared_error, teacher_batches


def problem(
    a: int = 7, b: int = 3, c: int = 4, rank: int | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(a, rank or 3 * a, generator=generator, dtype=torch.float64)
    return root @ root.mT, root @ torch.randn(root.shape[1], b * c, generator=generator, dtype=torch.float64).view(
        -1, b * c
    )


def theta(channels: object) -> torch.Tensor:
    return torch.einsum("ka,kbc->abc", channels.alpha, channels.omega)


@settings(max_examples=25)
@given(k=st.integers(1, 9), rank=st.sampled_from([None, 4]), seed=st.integers(0, 50))
def test_equals_its_definition(k: int, rank: int | None, seed: int) -> None:
    S, N = problem(rank=rank, seed=seed)
    values, vectors = torch.linalg.eigh(S)
    kept = values > 1e-6 * values[-1]
    root = vectors[:, kept] @ torch.diag(values[kept].rsqrt()) @ vectors[:, kept].mT
    u, sigma, w = torch.linalg.svd(root @ N, full_matrices=False)
    expected = (root @ u[:, :k]) @ torch.diag(sigma[:k]) @ w[:k]
    found = tiny(S, N.view(7, 3, 4), channels=k)
    assert len(found.gains) == min(k, rank or 7)
    torch.testing.assert_close(theta(found).flatten(1), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.gains, sigma[: len(found.gains)].square(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        torch.einsum("ka,ad,kd->k", found.alpha, S, found.alpha), found.omega.flatten(1).square().sum(1)
    )


@pytest.mark.parametrize("k", [1, 3, 7])
def test_equals_gromo(k: int) -> None:
    tools = pytest.importorskip("gromo.utils.tools", reason="the bench extra is not installed")
    S, N = problem()
    alpha, omega, sigma = tools.compute_optimal_added_parameters(S, N, maximum_added_neurons=k)
    found = tiny(S, N.view(7, 3, 4), channels=k)
    torch.testing.assert_close(theta(found).flatten(1), alpha.mT @ omega.mT, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.gains, sigma.square())


def test_no_other_rank_k_does_better_on_the_reduced_objective() -> None:
    S, N = problem()
    best = theta(tiny(S, N.view(7, 3, 4), channels=2)).flatten(1)

    def objective(t: torch.Tensor) -> torch.Tensor:
        return (t * (S @ t)).sum() - 2 * (N * t).sum()

    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        left = torch.randn(7, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        right = torch.randn(2, 12, generator=generator, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([left, right], max_iter=60, line_search_fn="strong_wolfe")

        def closure(
            left: torch.Tensor = left, right: torch.Tensor = right, o: torch.optim.LBFGS = optimizer
        ) -> torch.Tensor:
            o.zero_grad()
            value = objective(left @ right)
            value.backward()
            return value

        optimizer.step(closure)
        assert objective(best) <= objective((left @ right).detach()) + 1e-9


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e6])
def test_the_scale_of_the_loss_does_not_cost_channels(scale: float) -> None:
    S, N = problem()
    plain, scaled = tiny(S, N.view(7, 3, 4), 5), tiny(S, scale * N.view(7, 3, 4), 5)
    assert len(scaled.gains) == 5
    torch.testing.assert_close(theta(scaled), scale * theta(plain))


def test_one_tap_is_solved_exactly() -> None:
    model = silent(pair(second=1, padding=0, bias=False))
    batches = teacher_batches(model, channels=3)
    _, stats = collected(model, batches)
    growth = solve(stats, "tiny", channels=3)
    x, wanted = desire(model, batches)
    assert (wanted - added(model, growth, x)).norm() < 1e-5 * wanted.norm()
    assert float(growth.gains.sum()) == pytest.approx(stats.bottleneck_energy, rel=1e-6)


def test_a_linear_layer_is_solved_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 5)).double()
    x, extra = torch.randn(60, 6).double(), torch.randn(6, 2).double() @ torch.randn(2, 5).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
        batches = [(x, model(x) + x @ extra)]
    _, stats = collected(model, batches)
    growth = solve(stats, "tiny", channels=2)
    assert (growth.alpha.shape, growth.omega.shape) == ((2, 6), (5, 2))
    assert float(growth.gains.sum()) == pytest.approx(stats.bottleneck_energy, rel=1e-6)
    assert solve(stats, "tiny", channels=4).channels == 2


def test_more_channels_than_there_are_directions_come_with_a_reason() -> None:
    model = silent(pair(second=1, padding=0, bias=False))
    _, stats = collected(model, teacher_batches(model, channels=2))
    growth = solve(stats, "tiny", channels=4)
    assert growth.channels == 2
    assert growth.requested == 4
    assert "asked for 4, got 2" in str(growth)


def test_nothing_to_gain_grows_nothing() -> None:
    model = pair()
    x = torch.randn(9, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        _, stats = collected(model, [(x, model(x))])
    for method in ("tiny", "gradmax"):
        growth = solve(stats, method, channels=4)
        assert growth.channels == 0
        assert "nothing to gain" in str(growth.reason)
        assert growth.alpha.shape == (0, 3, 3, 3)
        assert growth.omega.shape == (4, 0, 3, 3)


def test_dead_inputs_and_a_constant_patch_do_no_harm() -> None:
    model = pair()
    x = torch.zeros(12, 3, 6, 6, dtype=torch.float64)
    x[:, 0] = torch.randn(12, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        y = model(x) + torch.randn(12, 4, 6, 6, dtype=torch.float64)
    _, stats = collected(model, [(x, y)])
    growth = solve(stats, "tiny", channels=8)
    assert growth.channels == 8
    assert math.isfinite(float(growth.alpha.norm() + growth.omega.norm()))
    assert float(growth.alpha[:, 1:].abs().max()) < 1e-6 * float(growth.alpha.abs().max())


def test_shrinkage_goes_from_whitening_to_the_plain_gradient() -> None:
    model = pair()
    _, stats = collected(model, teacher_batches(model, channels=3, noise=0.5))
    plain = solve(stats, "tiny", channels=2)
    torch.testing.assert_close(
        solve(stats, "tiny", channels=2, shrinkage=1e-12).alpha, plain.alpha, rtol=1e-6, atol=1e-8
    )
    full = solve(stats, "tiny", channels=2, shrinkage=1.0)
    left = torch.cat([full.alpha.flatten(1), full.alpha_bias[:, None]], 1)
    u = torch.linalg.svd(stats.N.flatten(1))[0][:, :2]
    torch.testing.assert_close((u.mT @ torch.nn.functional.normalize(left, dim=1).mT).abs(), torch.eye(2).double())
    assert solve(stats, "tiny", channels=2, shrinkage="auto").channels == 2


@pytest.mark.parametrize(
    ("S", "N", "channels", "message"),
    [
        (torch.eye(3), torch.ones(4, 1, 1), 1, "do not belong together"),
        (torch.eye(3), torch.ones(3, 1, 1), 0, "at least one channel"),
        (torch.eye(3) * float("nan"), torch.ones(3, 1, 1), 1, "not finite"),
        (torch.eye(3), torch.full((3, 1, 1), float("inf")), 1, "not finite"),
        (-torch.eye(3) + 0.5, torch.ones(3, 1, 1), 1, "no negative eigenvalues"),
    ],
)
def test_bad_tensors(S: torch.Tensor, N: torch.Tensor, channels: int, message: str) -> None:
    with pytest.raises(ArgumentValueError, match=message):
        tiny(S, N, channels)


def test_statistics_that_were_not_collected_or_are_broken() -> None:
    model = pair()
    batches = teacher_batches(model, channels=2)
    _, stats = collected(model, batches, quantities={"N_raw"})
    with pytest.raises(StatisticsError, match="S was not collected"):
        solve(stats, "tiny", channels=2)
    _, stats = collected(model, batches)
    stats.consumers[0].moments["S"][0, 0] = float("nan")
    with pytest.raises(StatisticsError, match="statistic S is not finite"):
        solve(stats, "tiny", channels=2)


@pytest.mark.parametrize("channels", [0, -3, True])
def test_impossible_numbers_of_channels(channels: object) -> None:
    model = pair()
    _, stats = collected(model, teacher_batches(model, channels=2))
    with pytest.raises(SolverError, match="number of new channels is invalid"):
        solve(stats, "tiny", channels=channels)


def test_sums_and_means_of_the_loss_give_the_same_channels() -> None:
    model = pair()
    batches = teacher_batches(model, channels=3, noise=0.1)
    _, mean = collected(model, batches)
    _, total = collected(model, batches, loss=lambda o, t: squared_error(o, t) * len(o), reduction="sum")
    torch.testing.assert_close(solve(mean, "tiny", 3).alpha, solve(total, "tiny", 3).alpha)
