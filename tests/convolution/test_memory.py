"""What would not fit into memory is told in bytes before it is allocated."""

import pytest
import torch
from torch import nn

import growconv
from growconv.convolution.memory import available_bytes
from growconv.convolution.toeplitz import toeplitz_matrix
from growconv.errors import GeometryError


def test_bytes_are_told_before_allocating():
    weight = torch.randn(64, 64, 3, 3)
    needed = (64 * 1022 * 1022) * (64 * 1024 * 1024) * 4
    with pytest.raises(GeometryError, match=f"{needed} bytes"):
        toeplitz_matrix(weight, (1024, 1024))
    with pytest.raises(GeometryError, match="sparse Toeplitz matrix"):
        toeplitz_matrix(torch.randn(1, 1, 1, 1).expand(4096, 4096, 1, 1), (1024, 1024), sparse=True)
    with pytest.raises(GeometryError, match=f"{224**4 * 9 * 4} bytes"):
        growconv.mask_tensor((224, 224), nn.Conv2d(1, 1, 3, padding=1))
    assert available_bytes() > 0
