"""Costs against torch's FLOP counter and counted padding."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import growconv
from growconv.convolution.cost import multiplications_per_output
from growconv.convolution.geometry import Geometry
from growconv.convolution.unfold import tap_multiplicities
from growconv.errors import ArgumentTypeError, ArgumentValueError, GeometryError

CASES = [
    (nn.Conv2d(3, 8, 3, padding=1, stride=2), (9, 10)),
    (nn.Conv2d(4, 8, (3, 1), dilation=2, bias=False), (9, 10)),
    (nn.Conv1d(4, 8, 3, padding=2), (9,)),
    (nn.Conv3d(2, 2, 2, padding=(1, 0, 1)), (4, 5, 6)),
]
CASES += [
    (kind(6, 5, (3, 2), padding=1, stride=(2, 1), rank=4, implementation=name), (8, 9))
    for kind in (growconv.CPConv2d, growconv.TuckerConv2d)
    for name in kind.implementations
]


def counted(layer, size, batch):
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(batch, layer.in_channels, *size))
    return counter.get_total_flops()


@pytest.mark.parametrize(("layer", "size"), CASES, ids=str)
def test_flops_are_those_of_torch(layer, size):
    assert growconv.conv_cost(layer, size, batch=3).flops == counted(layer, size, 3)


def test_depthwise_and_grouped():
    layer = nn.Conv2d(4, 8, 3, groups=4, padding=1)
    assert growconv.conv_cost(layer, (5, 6)).flops == counted(layer, (5, 6), 1)


def test_padding_is_counted_against_the_mask_tensor():
    layer = nn.Conv2d(3, 5, 3, padding=(2, 1), stride=(1, 2), dilation=(2, 1))
    cost = growconv.conv_cost(layer, (6, 7), batch=2)
    real = int(tap_multiplicities((6, 7), Geometry.of(layer)).sum())
    assert cost.multiplications - cost.padding_multiplications == 2 * 3 * 5 * real
    assert growconv.conv_cost(nn.Conv2d(3, 5, 3), (6, 7)).padding_multiplications == 0


def test_additions():
    with_bias = growconv.conv_cost(nn.Conv2d(3, 5, 3), (6, 7))
    without = growconv.conv_cost(nn.Conv2d(3, 5, 3, bias=False), (6, 7))
    outputs = 5 * 4 * 5
    assert with_bias.additions == with_bias.multiplications  # one bias makes up for the first product
    assert without.additions == without.multiplications - outputs
    assert (with_bias + without).additions == with_bias.additions + without.additions


def test_cost_scales_as_the_docs_say():
    base = growconv.conv_cost(nn.Conv2d(16, 32, 3, padding=1), (16, 16))
    assert growconv.conv_cost(nn.Conv2d(32, 32, 3, padding=1), (16, 16)).flops == 2 * base.flops
    assert growconv.conv_cost(nn.Conv2d(16, 32, 3, padding=1, stride=2), (16, 16)).flops == base.flops // 4
    assert growconv.conv_cost(nn.Conv2d(16, 32, 3), (16, 16)).flops == base.flops * 14 * 14 // 256


@pytest.mark.parametrize(
    ("layer", "size", "batch", "error"),
    [
        (nn.Linear(3, 4), (5, 5), 1, ArgumentTypeError),
        (nn.Conv2d(3, 4, 3), (2, 5), 1, GeometryError),
        (nn.Conv2d(3, 4, 3), (5,), 1, GeometryError),
        (nn.Conv2d(3, 4, 3), (5, 5), 0, ArgumentValueError),
    ],
)
def test_impossible_questions(layer, size, batch, error):
    with pytest.raises(error):
        growconv.conv_cost(layer, size, batch)


@pytest.mark.parametrize("name", growconv.CPConv2d.implementations)
def test_multiplications_per_output(name):
    layer = growconv.CPConv2d(6, 5, 3, padding=1, stride=2, rank=4, implementation=name)
    cost = growconv.conv_cost(layer, (8, 8))
    built = 5 * 6 * 9 * 4 if name == "reconstructed" else 0
    expected = cost.flops / 2 - built
    assert multiplications_per_output(layer) * 4 * 4 == pytest.approx(expected)
