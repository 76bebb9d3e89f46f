"""The search: gradient against autograd through the solve, weights against least squares, order against brute force."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growconv.solvers.fitting import (
    Objective,
    Samples,
    best_outgoing,
    captured_share,
    greedy_order,
    minimize,
    normal_equations,
)
from growconv.solvers.parametrization import Separable, Whitened, patch_gram
from growconv.solvers.rank_one import outer_product, rank_one_factors, rank_one_least_squares


def problem(
    activation=torch.tanh, samples: int = 12, seed: int = 0, bias: bool = True
) -> tuple[Samples, nn.Conv2d, nn.Conv2d]:
    torch.manual_seed(seed)
    producer = nn.Conv2d(2, 1, 3, padding=1, bias=bias).double()
    consumer = nn.Conv2d(1, 3, (3, 2), stride=(1, 2), padding=1).double()
    x = torch.randn(samples, 2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        h = producer(x)
        v = torch.randn_like(consumer(h))
    given = Samples({"w": x}, {"r": v}, {"r": h}, {"w": producer}, {"r": consumer}, lambda new: {"r": activation(new["w"])})
    return given, producer, consumer


def coordinates(samples: Samples, damping: float = 0.1) -> Whitened:
    grams = {"w": patch_gram(samples.producers["w"], samples.inputs["w"])}
    return Whitened(grams, samples.producers, damping, torch.float64)


def test_gradient_is_that_of_the_projected_loss() -> None:
    samples, _, _ = problem()
    whitened = coordinates(samples)
    theta = torch.randn(2, whitened.size, dtype=torch.float64)
    point = Objective(samples, whitened, ridge=1e-13)(theta)

    def slow(theta: Tensor) -> Tensor:
        weight, bias = whitened.filters(theta)["w"]
        h = torch.tanh(F.conv2d(samples.inputs["w"], weight, bias, padding=1))
        design = F.unfold(F.pad(h, (1, 1, 1, 1)), (3, 2), stride=(1, 2)).transpose(0, 1).flatten(1)
        target = samples.targets["r"].transpose(0, 1).flatten(1)
        solution = torch.linalg.lstsq(design.mT, target.mT).solution
        return (design.mT @ solution - target.mT).square().sum() / target.square().sum() - 1

    variable = theta.clone().requires_grad_()
    loss = slow(variable)
    (gradient,) = torch.autograd.grad(loss, variable)
    assert point.loss == pytest.approx(float(loss.detach()), rel=1e-9)
    torch.testing.assert_close(point.gradient, gradient, rtol=1e-6, atol=1e-10)


def test_outgoing_weights_leave_a_residual_orthogonal_to_what_is_read() -> None:
    samples, _, consumer = problem(torch.relu)
    filters = {"w": (torch.randn(3, 2, 3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64))}
    equations = normal_equations(samples, filters)
    outgoing = best_outgoing(equations, samples.consumers, samples.targets["r"], False, 1e-14)
    variable = outgoing["r"].clone().requires_grad_()
    h = samples.read(filters)["r"]
    loss = (samples.targets["r"] - F.conv2d(h, variable, stride=consumer.stride, padding=consumer.padding)).square().sum()
    (gradient,) = torch.autograd.grad(loss, variable)
    assert float(gradient.abs().max()) < 1e-8


def test_a_channel_that_is_never_read_gets_no_weight() -> None:
    samples, _, _ = problem(torch.relu)
    filters = {"w": (torch.zeros(2, 2, 3, 3, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64))}
    outgoing = best_outgoing(normal_equations(samples, filters), samples.consumers, samples.targets["r"], False, 1e-6)
    assert bool(torch.isfinite(outgoing["r"]).all())
    assert float(outgoing["r"][:, 1].abs().max()) == 0.0
    assert float(outgoing["r"][:, 0].abs().max()) > 0.0


def test_captured_share_is_what_the_best_single_scale_takes_away() -> None:
    samples, _, _ = problem(torch.relu)
    filters = {"w": (torch.randn(2, 2, 3, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64))}
    outgoing = {"r": torch.randn(3, 2, 3, 2, dtype=torch.float64)}
    delta, target = samples.added(filters, outgoing)["r"], samples.targets["r"]
    scale = float((delta * target).sum() / delta.square().sum())
    if scale < 0:
        outgoing, delta = {"r": -outgoing["r"]}, -delta
        scale = -scale
    left = float((target - scale * delta).square().sum() / target.square().sum())
    assert captured_share(samples, filters, outgoing) == pytest.approx(1 - left, rel=1e-10)
    assert captured_share(samples, filters, {"r": -outgoing["r"]}) == 0.0


@pytest.mark.parametrize("activation", [torch.relu, F.leaky_relu, F.gelu, F.silu, F.selu, torch.tanh])
def test_the_search_never_loses_ground(activation) -> None:
    samples, _, _ = problem(activation, samples=40)
    whitened = coordinates(samples)
    start = torch.nn.functional.normalize(torch.randn(2, whitened.size, dtype=torch.float64), dim=1)
    found = minimize(Objective(samples, whitened), samples, start, iterations=12, patience=20)
    fitted = [fit for fit, _ in found.history]
    assert fitted == sorted(fitted)
    assert fitted[-1] > 1.2 * fitted[0]
    assert found.held_out == pytest.approx(max(share for _, share in found.history))


def test_the_search_stops_where_held_out_samples_gain_nothing() -> None:
    samples, _, _ = problem(torch.relu, samples=6)
    other, _, _ = problem(torch.relu, samples=60, seed=1)  # nothing in common: all that is fitted is noise
    whitened = coordinates(samples)
    start = torch.randn(4, whitened.size, dtype=torch.float64)
    found = minimize(Objective(samples, whitened), other, start, iterations=100, patience=3)
    assert found.iterations < 60
    assert found.held_out >= found.history[-1][1]


def test_whitened_coordinates_come_back() -> None:
    samples, _, _ = problem()
    whitened = coordinates(samples, 1e-3)
    theta = torch.randn(4, whitened.size, dtype=torch.float64)
    torch.testing.assert_close(whitened.encode(whitened.filters(theta)), theta)


def test_patches_are_white_in_the_coordinates() -> None:
    samples, _, _ = problem(samples=200)
    whitened = coordinates(samples, 1e-9)
    theta = torch.eye(whitened.size, dtype=torch.float64)
    weight, bias = whitened.filters(theta)["w"]
    outputs = F.conv2d(samples.inputs["w"], weight, bias, padding=1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(outputs @ outputs.mT / outputs.shape[1], theta, rtol=1e-5, atol=1e-5)


def test_greedy_order_against_brute_force() -> None:
    samples, _, _ = problem(torch.relu, samples=30)
    filters = {"w": (torch.randn(4, 2, 3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64))}
    equations = normal_equations(samples, filters)
    order, gains = greedy_order(equations, 4, ridge=1e-13)

    def captured(chosen: list[int]) -> float:
        some = normal_equations(samples, {"w": (filters["w"][0][chosen], filters["w"][1][chosen])})["r"]
        return float((some.cross * torch.linalg.solve(some.gram, some.cross)).sum())

    assert sorted(order) == [0, 1, 2, 3]
    for count in range(4):
        best = max(captured([*order[:count], other]) for other in set(range(4)) - set(order[:count]))
        assert captured(order[: count + 1]) == pytest.approx(best, rel=1e-8)
    assert float(gains.sum()) == pytest.approx(captured([0, 1, 2, 3]), rel=1e-8)
    assert all(first >= second for first, second in itertools.pairwise(gains.tolist()))


def test_equal_channels_share_one_gain() -> None:
    samples, _, _ = problem(torch.relu, samples=30)
    weight, bias = torch.randn(1, 2, 3, 3, dtype=torch.float64), torch.randn(1, dtype=torch.float64)
    order, gains = greedy_order(normal_equations(samples, {"w": (weight.repeat(3, 1, 1, 1), bias.repeat(3))}), 3)
    assert sorted(order) == [0, 1, 2]
    assert float(gains[1:].abs().max()) < 1e-4 * float(gains[0])


def test_rank_one_factors_find_planted_ones() -> None:
    factors = [torch.randn(3, size, dtype=torch.float64) for size in (4, 3, 5)]
    planted = outer_product(factors)
    torch.testing.assert_close(outer_product(rank_one_factors(planted)), planted)


def test_rank_one_least_squares() -> None:
    design = torch.randn(200, 2 * 6, dtype=torch.float64)
    planted = outer_product([torch.randn(2, size, dtype=torch.float64) for size in (3, 2, 3)])  # (k, c, row, column)
    target = torch.einsum("pkb,kcb->pc", design.view(200, 2, 6), planted.flatten(2))
    start = planted + 0.3 * torch.randn_like(planted)
    found = rank_one_least_squares(design.mT @ design, design.mT @ target, start, sweeps=60)
    torch.testing.assert_close(found, planted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_separable_filters_and_kernels_are_of_rank_one(bias: bool) -> None:
    samples, _, _ = problem(torch.relu, samples=40, bias=bias)
    separable = Separable(coordinates(samples))
    start = separable.encode({"w": (torch.randn(2, 2, 3, 3).double(), torch.zeros(2).double() if bias else None)})
    objective = Objective(samples, separable, separable=True)
    found = minimize(objective, samples, start, iterations=10, patience=20)
    assert found.history[-1][0] > found.history[0][0] > 0
    weight = separable.filters(found.point.theta)["w"][0]
    for kernel in (*weight, *found.point.outgoing["r"].transpose(0, 1)):
        for axis in range(3):
            values = torch.linalg.svdvals(kernel.movedim(axis, 0).flatten(1))
            assert float(values[1:].max()) < 1e-9 * float(values[0])
