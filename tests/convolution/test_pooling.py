"""Poolings as convolutions: sizes against torch's own layers."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from growconv.convolution.geometry import Geometry

MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2), st.integers(1, 3), st.integers(3, 12), st.booleans())
def test_pool_sizes_are_torchs(kernel, stride, padding, dilation, size, ceil_mode):
    padding = min(padding, kernel // 2)
    if size + 2 * padding < dilation * (kernel - 1) + 1:
        return
    for axes, maker in MAX_POOLS.items():
        pool = maker(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
        expected = tuple(pool(torch.zeros(1, 1, *(size,) * axes)).shape[2:])
        assert Geometry.of(pool).output_size((size,) * axes) == expected
    for axes, maker in AVG_POOLS.items():
        if size < kernel:  # torch's avg_pool3d refuses what its padding would allow
            continue
        pool = maker(kernel, None, padding, ceil_mode=ceil_mode)
        expected = tuple(pool(torch.zeros(1, 1, *(size,) * axes)).shape[2:])
        assert Geometry.of(pool).output_size((size,) * axes) == expected
