"""How large new filters come out beside the old ones."""

from typing import Any

import pytest
import torch
from torch import nn

from growconv.solvers import solve, tiny
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
