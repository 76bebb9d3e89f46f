"""Whitened coordinates of filters."""

import torch
from torch.nn import functional as F

from tests.solvers.functional.test_fitting import coordinates, inputs, problem


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
