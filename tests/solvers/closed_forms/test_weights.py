"""Filters of a site by whole units, and how large new ones come out beside the old ones."""

from typing import Any

import pytest
import torch
from torch import nn

import growconv
from growconv.solvers import solve, tiny
from growconv.solvers.weights import old_filters
from tests.solvers.closed_forms.test_assembly import SAMPLED

from .pairs import collected, pair, teacher_batches


@pytest.mark.parametrize("activation", [nn.Tanh, nn.SELU, nn.ReLU])
@pytest.mark.parametrize("method", ["tiny", "exact"])
def test_filters_behind_a_curved_activation_are_as_large_as_the_old_ones(activation: Any, method: str) -> None:
    model = pair(between=lambda _: [activation()])
    _, stats = collected(model, teacher_batches(model, channels=4, noise=0.3), quantities=SAMPLED, keep_samples=48)
    growth = solve(stats, method, channels=3)
    old = torch.cat([model[0].weight.flatten(1), model[0].bias[:, None]], 1).norm(dim=1).mean()
    norms = torch.cat([growth.alpha.flatten(1), growth.alpha_bias[:, None]], 1).norm(dim=1)
    scaled = torch.allclose(norms, old.expand(3), rtol=1e-9)
    assert scaled == (activation is not nn.ReLU)
    if method == "tiny":
        bare = tiny(stats.S, stats.N, channels=3)
        strength = norms * growth.omega.transpose(0, 1).flatten(1).norm(dim=1)
        expected = bare.alpha.norm(dim=1) * bare.omega.flatten(1).norm(dim=1)
        torch.testing.assert_close(strength, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_filters_are_rows_by_units_and_go_back_to_weights(bias: bool) -> None:
    model = pair(c1=4, bias=bias, between=lambda width: [nn.GroupNorm(2, width)])
    (site,) = growconv.find_sites(model, torch.randn(1, 3, 6, 6).double())
    old, weight = old_filters(site), model[0].weight.detach()
    assert (site.granularity, old.units, old.matrix.shape) == (2, 2, (2, 2 * (27 + bias)))
    filters, biases = old.from_matrix(old.matrix).weights
    torch.testing.assert_close(filters["0"], weight)
    assert set(biases) == ({"0"} if bias else set())
    filters, biases = old.picked([1, 0, 1]).weights
    order = [2, 3, 0, 1, 2, 3]
    torch.testing.assert_close(filters["0"], weight[order])
    if bias:
        torch.testing.assert_close(biases["0"], model[0].bias.detach()[order])
    torch.testing.assert_close(old.at_norm(3.0).norms, torch.full((2,), 3.0).double())
