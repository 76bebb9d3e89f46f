"""The search: gradient against autograd through the solve, weights against least squares, order against brute force."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growconv.network.between import region_of
from growconv.network.layout import IN, OUT
from growconv.network.tape import Tape
from growconv.solvers.energy import captured_share
from growconv.solvers.fitting import (
    Coordinates,
    Objective,
    Search,
    best_outgoing,
    greedy_order,
    normal_equations,
    whitened,
)
from growconv.solvers.weights import Filters
from growconv.statistics.samples import KeptBatch, KeptPass, KeptSamples
from tests.network import hand


def problem(
    activation=torch.tanh, samples: int = 12, seed: int = 0, bias: bool = True
) -> tuple[KeptSamples, nn.Conv2d]:
    torch.manual_seed(seed)
    producer = nn.Conv2d(2, 1, 3, padding=1, bias=bias).double()
    consumer = nn.Conv2d(1, 3, (3, 2), stride=(1, 2), padding=1).double()
    x = torch.randn(samples, 2, 5, 6, dtype=torch.float64)
    model = hand.Net(lambda m, x: m.r(activation(m.w(x))), w=producer, r=consumer)
    site = hand.site(model, {("w", OUT): hand.PLAIN, ("r", IN): hand.PLAIN})
    with torch.no_grad():
        with Tape(model) as tape:
            model(x)
        h = producer(x)
        v = torch.randn_like(consumer(h))
    kept = KeptPass({"w": (x,)}, {"r": (h,)}, {"r": (v,)}, region_of(tape, site))
    return KeptSamples(site, (KeptBatch(samples, (kept,)),), {}), consumer


def inputs(fit: KeptSamples) -> Tensor:
    return fit.passes[0].x["w"][0]


def targets(fit: KeptSamples) -> Tensor:
    return fit.passes[0].v["r"][0]


def of(fit: KeptSamples, weight: Tensor, bias: Tensor) -> Filters:
    return Filters(fit.site, len(weight), {"w": torch.cat([weight.flatten(1), bias[:, None]], 1)})


def coordinates(fit: KeptSamples, damping: float = 0.1) -> tuple[Coordinates, int]:
    """Whitened coordinates, and how many parameters a channel has in them."""
    found = whitened(fit, damping)
    return found, len(found.roots["w"])


def test_whitened_coordinates_come_back() -> None:
    fit, _ = problem()
    space, size = coordinates(fit, 1e-3)
    theta = torch.randn(4, size, dtype=torch.float64)
    torch.testing.assert_close(space.encode(space.filters(theta)), theta)


def test_patches_are_white_in_the_coordinates() -> None:
    fit, _ = problem(samples=200)
    space, size = coordinates(fit, 1e-9)
    theta = torch.eye(size, dtype=torch.float64)
    weights, biases = space.filters(theta).weights
    outputs = F.conv2d(inputs(fit), weights["w"], biases["w"], padding=1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(outputs @ outputs.mT / outputs.shape[1], theta, rtol=1e-5, atol=1e-5)


def test_gradient_is_that_of_the_projected_loss() -> None:
    fit, _ = problem()
    space, size = coordinates(fit)
    theta = torch.randn(2, size, dtype=torch.float64)
    point = Objective(fit, space, ridge=1e-13)(theta)

    def slow(theta: Tensor) -> Tensor:
        weights, biases = space.filters(theta).weights
        h = torch.tanh(F.conv2d(inputs(fit), weights["w"], biases["w"], padding=1))
        design = F.unfold(F.pad(h, (1, 1, 1, 1)), (3, 2), stride=(1, 2)).transpose(0, 1).flatten(1)
        target = targets(fit).transpose(0, 1).flatten(1)
        solution = torch.linalg.lstsq(design.mT, target.mT).solution
        return (design.mT @ solution - target.mT).square().sum() / target.square().sum() - 1

    variable = theta.clone().requires_grad_()
    loss = slow(variable)
    (gradient,) = torch.autograd.grad(loss, variable)
    assert point.loss == pytest.approx(float(loss.detach()), rel=1e-9)
    torch.testing.assert_close(point.gradient, gradient, rtol=1e-6, atol=1e-10)


def test_outgoing_weights_leave_a_residual_orthogonal_to_what_is_read() -> None:
    fit, consumer = problem(torch.relu)
    filters = of(fit, torch.randn(3, 2, 3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64))
    equations = normal_equations(fit, filters)
    outgoing = best_outgoing(equations, fit.site, targets(fit), 1e-14)
    variable = outgoing["r"].clone().requires_grad_()
    h = fit.passes[0].read(*filters.weights)["r"][0]
    loss = (targets(fit) - F.conv2d(h, variable, stride=consumer.stride, padding=consumer.padding)).square().sum()
    (gradient,) = torch.autograd.grad(loss, variable)
    assert float(gradient.abs().max()) < 1e-8


def test_a_channel_that_is_never_read_gets_no_weight() -> None:
    fit, _ = problem(torch.relu)
    filters = of(fit, torch.zeros(2, 2, 3, 3, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64))
    outgoing = best_outgoing(normal_equations(fit, filters), fit.site, targets(fit), 1e-6)
    assert bool(torch.isfinite(outgoing["r"]).all())
    assert float(outgoing["r"][:, 1].abs().max()) == 0.0
    assert float(outgoing["r"][:, 0].abs().max()) > 0.0


def test_captured_share_is_what_the_best_single_scale_takes_away() -> None:
    fit, _ = problem(torch.relu)
    filters = of(fit, torch.randn(2, 2, 3, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64))
    outgoing = {"r": torch.randn(3, 2, 3, 2, dtype=torch.float64)}
    (piece,) = fit.passes
    delta, target = piece.added(piece.read(*filters.weights), outgoing)["r"][0], targets(fit)
    scale = float((delta * target).sum() / delta.square().sum())
    if scale < 0:
        outgoing, delta = {"r": -outgoing["r"]}, -delta
        scale = -scale
    left = float((target - scale * delta).square().sum() / target.square().sum())
    assert captured_share(fit, [(piece, {"r": (delta,)})]) == pytest.approx(1 - left, rel=1e-10)
    assert captured_share(fit, [(piece, {"r": (-delta,)})]) == 0.0


@pytest.mark.parametrize("activation", [torch.relu, F.leaky_relu, F.gelu, F.silu, F.selu, torch.tanh])
def test_the_search_never_loses_ground(activation) -> None:
    fit, _ = problem(activation, samples=40)
    space, size = coordinates(fit)
    start = torch.nn.functional.normalize(torch.randn(2, size, dtype=torch.float64), dim=1)
    found = Search(Objective(fit, space), fit, start, patience=20).run(12)
    fitted = [share for share, _ in found.history]
    assert fitted == sorted(fitted)
    assert fitted[-1] > 1.2 * fitted[0]
    assert found.held_out == pytest.approx(max(share for _, share in found.history))


def test_the_search_stops_where_held_out_samples_gain_nothing() -> None:
    fit, _ = problem(torch.relu, samples=6)
    other, _ = problem(torch.relu, samples=60, seed=1)  # nothing in common: all that is fitted is noise
    space, size = coordinates(fit)
    start = torch.randn(4, size, dtype=torch.float64)
    found = Search(Objective(fit, space), other, start, patience=3).run(100)
    assert found.iterations < 60
    assert found.held_out >= found.history[-1][1]


def test_greedy_order_against_brute_force() -> None:
    fit, _ = problem(torch.relu, samples=30)
    filters = of(fit, torch.randn(4, 2, 3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64))
    equations = normal_equations(fit, filters)
    order, gains = greedy_order(equations, 4, ridge=1e-13)

    def captured(chosen: list[int]) -> float:
        some = normal_equations(fit, filters.picked(chosen))["r", 0]
        return float((some.cross * torch.linalg.solve(some.gram, some.cross)).sum())

    assert sorted(order) == [0, 1, 2, 3]
    for count in range(4):
        best = max(captured([*order[:count], other]) for other in set(range(4)) - set(order[:count]))
        assert captured(order[: count + 1]) == pytest.approx(best, rel=1e-8)
    assert float(gains.sum()) == pytest.approx(captured([0, 1, 2, 3]), rel=1e-8)
    assert all(first >= second for first, second in itertools.pairwise(gains.tolist()))


def test_equal_channels_share_one_gain() -> None:
    fit, _ = problem(torch.relu, samples=30)
    weight, bias = torch.randn(1, 2, 3, 3, dtype=torch.float64), torch.randn(1, dtype=torch.float64)
    order, gains = greedy_order(normal_equations(fit, of(fit, weight.repeat(3, 1, 1, 1), bias.repeat(3))), 3)
    assert sorted(order) == [0, 1, 2]
    assert float(gains[1:].abs().max()) < 1e-4 * float(gains[0])
