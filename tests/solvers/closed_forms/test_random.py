"""random: He-scaled filters that change nothing at first."""

import pytest
import torch
from torch import nn

import growconv
from growconv.errors import ArgumentValueError
from growconv.solvers import get_solver, solve

from .pairs import pair


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
    with pytest.raises(ArgumentValueError, match=next(iter(options))):
        get_solver(method, **options)
