"""Norms: one that is the identity on its moments."""

import pytest
import torch
from torch import nn

from growconv.network import layers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_a_transparent_norm_is_the_identity_on_its_moments() -> None:
    for norm, shape in ((nn.BatchNorm2d(3), (2, 3, 4, 4)), (nn.BatchNorm1d(3), (5, 3))):
        mean, variance = torch.randn(3), torch.rand(3)
        for name, value in layers.norm(norm).transparent(mean, variance).items():
            getattr(norm, name).data.copy_(value)
        x = torch.randn(shape)
        torch.testing.assert_close(norm.eval()(x), x)
