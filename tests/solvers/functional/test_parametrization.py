"""Coordinates of filters: whitened, and of rank one."""

import pytest
import torch
from torch.nn import functional as F

from growconv.solvers.fitting import (
    Objective,
    Search,
)
from growconv.solvers.parametrization import Separable
from tests.solvers.functional.test_fitting import coordinates, inputs, of, problem


def test_whitened_coordinates_come_back() -> None:
    fit, _ = problem()
    whitened = coordinates(fit, 1e-3)
    theta = torch.randn(4, whitened.size, dtype=torch.float64)
    torch.testing.assert_close(whitened.encode(whitened.filters(theta)), theta)


def test_patches_are_white_in_the_coordinates() -> None:
    fit, _ = problem(samples=200)
    whitened = coordinates(fit, 1e-9)
    theta = torch.eye(whitened.size, dtype=torch.float64)
    weight, bias = whitened.filters(theta)["w"]
    outputs = F.conv2d(inputs(fit), weight, bias, padding=1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(outputs @ outputs.mT / outputs.shape[1], theta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_separable_filters_and_kernels_are_of_rank_one(bias: bool) -> None:
    fit, _ = problem(torch.relu, samples=40, bias=bias)
    separable = Separable(coordinates(fit))
    start = separable.encode(of(torch.randn(2, 2, 3, 3).double(), torch.zeros(2).double() if bias else None))
    objective = Objective(fit, separable, separable=True)
    found = Search(objective, fit, start, patience=20).run(10)
    assert found.history[-1][0] > found.history[0][0] > 0
    weight = separable.filters(found.best.theta)["w"][0]
    for kernel in (*weight, *found.best.outgoing["r"].transpose(0, 1)):
        for axis in range(3):
            values = torch.linalg.svdvals(kernel.movedim(axis, 0).flatten(1))
            assert float(values[1:].max()) < 1e-9 * float(values[0])
