"""What every adapter tells: sizes, sides, and why a layer cannot be enlarged."""

import pytest
import torch
from torch import nn

from growconv.convolution.cp import CPConv2d
from growconv.errors import SiteError
from growconv.network import layers
from growconv.network.layout import ENTRY, GROUP_IN, GROUP_OUT, IN, OUT

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LazyConv2d(3, 3), "not initialized"),
        (nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), "power iteration"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), "power iteration"),
        (nn.utils.parametrizations.orthogonal(nn.Linear(3, 4)), "_Orthogonal"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4), dim=None), "as a whole"),
        (CPConv2d(3, 4, 3, rank=2), "grow in rank"),
    ],
)
def test_what_cannot_be_enlarged_says_why(module: nn.Module, reason: str) -> None:
    assert reason in str(layers.adapter(module).problem())


def test_a_tensor_that_nobody_knows_is_a_problem() -> None:
    module = nn.Conv2d(3, 4, 3)
    module.table = nn.Parameter(torch.zeros(3, 7))
    assert "table" in str(layers.adapter(module).problem())


def test_sizes_and_sides() -> None:
    conv, linear, norm = nn.Conv2d(4, 6, 3, groups=2), nn.Linear(3, 5), nn.GroupNorm(2, 4)
    assert [layers.size(conv, side) for side in (OUT, IN, GROUP_OUT, GROUP_IN)] == [6, 4, 6, 4]
    assert [layers.size(linear, side) for side in (OUT, IN)] == [5, 3]
    assert layers.size(norm, ENTRY) == 4
    assert layers.norm(norm).groups(6) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert layers.norm(nn.BatchNorm2d(4)).groups(4) == []
    assert (layers.has_side(linear, GROUP_IN), layers.has_side(nn.PReLU(), ENTRY), layers.has_side(3, OUT)) == (
        False,
    ) * 3
    assert layers.is_norm(nn.PReLU(3))
    assert not layers.is_norm(nn.LayerNorm(3))
    assert layers.is_transposed(nn.ConvTranspose1d(2, 2, 1))
    assert (layers.groups_of(conv), layers.groups_of(norm)) == (2, 1)
    assert (
        layers.channel_axis(linear, 3),
        layers.channel_axis(conv, 3),
        layers.channel_axis(nn.BatchNorm1d(3), 2),
    ) == (2, 0, 1)
    assert layers.described(torch.zeros(2, 3)) == "tensor (2, 3)"
    assert layers.described(linear).startswith("Linear(")
    with pytest.raises(SiteError, match="no layer of the kind"):
        layers.size(nn.ReLU(), OUT)
    with pytest.raises(SiteError, match="no such side"):
        layers.size(norm, OUT)
