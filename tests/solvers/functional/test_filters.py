"""How large the filters come out, beside the old ones."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import growconv
from growconv.solvers import solve
from tests.solvers.functional.test_fitting import coordinates, inputs, problem
from tests.solvers.functional.test_functional import kept, seed, student_and_data

pytestmark = pytest.mark.filterwarnings("ignore::growconv.solvers.FewSamplesWarning")


def test_filters_have_the_norm_of_the_old_ones_where_the_activation_is_homogeneous() -> None:
    student, batches, _ = student_and_data("relu")
    (site,) = growconv.find_sites(student, batches[0][0][:1])
    growth = solve(kept(student, site, batches), "functional", 2, iterations=3, generator=seed())
    assert growth.alpha_bias is not None
    norms = torch.cat([growth.alpha.flatten(1), growth.alpha_bias[:, None]], 1).norm(dim=1)
    old = torch.cat([student[0].weight.flatten(1), student[0].bias[:, None]], 1).norm(dim=1).mean().detach()
    torch.testing.assert_close(norms, old.expand(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", [True, False])
def test_filters_behind_a_curved_activation_are_no_steeper_than_the_old_ones(norm: bool) -> None:
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.SELU(), nn.Conv2d(4, 5, 3)
    )
    x, y = torch.randn(96, 3, 8, 8), torch.randn(96, 5, 6, 6)
    conv, bn = student[0], student[1]
    if isinstance(bn, nn.BatchNorm2d):
        nn.init.uniform_(bn.weight, 0.5, 3.0)
    student(3 * x)
    (site,) = growconv.find_sites(student.eval(), x[:1])
    growth = solve(kept(student, site, [(x, y)], F.mse_loss), "functional", 3, iterations=4, generator=seed())
    fused = fuse_conv_bn_eval(conv, bn) if norm else conv
    slope = (fused.weight.flatten(1).norm(dim=1) / conv.weight.flatten(1).norm(dim=1)).detach()
    own = torch.cat([conv.weight.flatten(1), conv.bias[:, None]], 1).norm(dim=1).detach()
    assert growth.alpha_bias is not None
    norms = torch.cat([growth.alpha.flatten(1), growth.alpha_bias[:, None]], 1).norm(dim=1)
    assert float(norms.max()) <= float((slope * own).mean()) * (1 + 1e-5)


def test_whitened_coordinates_come_back() -> None:
    fit, _ = problem()
    space, size = coordinates(fit, 1e-3)
    theta = torch.randn(4, size, dtype=torch.float64)
    torch.testing.assert_close(space.encode(space.filters(theta)), theta)


def test_patches_are_white_in_the_coordinates() -> None:
    fit, _ = problem(samples=200)
    space, size = coordinates(fit, 1e-9)
    theta = torch.eye(size, dtype=torch.float64)
    weight, bias = space.filters(theta)["w"]
    outputs = F.conv2d(inputs(fit), weight, bias, padding=1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(outputs @ outputs.mT / outputs.shape[1], theta, rtol=1e-5, atol=1e-5)
