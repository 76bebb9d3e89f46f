"""A layer is its weights times the columns, for every kind of layer and geometry."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from growconv.statistics.columns import columns, positions


def check(module: nn.Module, x: torch.Tensor) -> None:
    module, x = module.double(), x.double()
    transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    weight = module.weight.transpose(0, 1) if transposed else module.weight
    product = weight.flatten(1) @ columns(module, x)
    torch.testing.assert_close(product, positions(module, module(x)), rtol=1e-10, atol=1e-12)


@settings(max_examples=40)
@given(
    axes=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
)
def test_convolution(axes: int, kernel: int, stride: int, padding: int, dilation: int, mode: str) -> None:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    module = layer(2, 3, kernel, stride, padding, dilation, bias=False, padding_mode=mode)
    check(module, torch.randn(2, 2, *[6, 5, 7][:axes]))


@settings(max_examples=40)
@given(
    axes=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    extra=st.integers(0, 2),
)
def test_transposed_convolution(axes: int, kernel: int, stride: int, padding: int, dilation: int, extra: int) -> None:
    extra = min(extra, max(stride, dilation) - 1)
    size = [4, 3, 3][:axes]
    if min(size) * stride - stride + dilation * (kernel - 1) + extra + 1 - 2 * padding < 1:
        padding = 0
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    check(layer(2, 3, kernel, stride, padding, extra, bias=False, dilation=dilation), torch.randn(2, 2, *size))


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)])
def test_linear(shape: tuple[int, ...]) -> None:
    check(nn.Linear(4, 3, bias=False), torch.randn(shape))


def test_same_padding() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch copies its input for an even kernel
        check(nn.Conv2d(2, 3, (3, 4), padding="same", bias=False), torch.randn(2, 2, 6, 5))
