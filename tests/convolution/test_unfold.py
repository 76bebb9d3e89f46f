"""Patches, mask tensor and multiplicities against torch's unfold and convolutions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

import growconv
from growconv.convolution.geometry import Geometry
from growconv.convolution.toeplitz import toeplitz_matrix
from growconv.convolution.unfold import available_bytes, fold, mask_tensor, tap_multiplicities, unfold
from growconv.errors import GeometryError
from tests.convolution.test_geometry import convolutions


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(convolutions())
def test_unfold_and_mask_tensor_reproduce_the_convolution(case):
    conv, size = case
    conv = type(conv)(
        2, 3, conv.kernel_size, conv.stride, conv.padding, conv.dilation, padding_mode=conv.padding_mode, bias=False
    ).double()
    geometry = Geometry.of(conv)
    x = torch.randn(2, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        expected = conv(x).flatten(2)
    except RuntimeError:
        return
    torch.testing.assert_close(conv.weight.flatten(1) @ unfold(x, geometry), expected)
    mask = mask_tensor(size, conv, dtype=torch.float64)
    through_mask = torch.einsum("cpb,mbl,ipl->icm", conv.weight.flatten(2), mask, x.flatten(2))
    torch.testing.assert_close(through_mask, expected)
    torch.testing.assert_close(tap_multiplicities(size, geometry, dtype=torch.float64).flatten(), mask.sum(dim=(0, 1)))


@given(convolutions())
def test_fold_is_the_adjoint_of_unfold(case):
    conv, size = case
    geometry = Geometry.of(conv)
    try:
        output = geometry.output_size(size)
    except GeometryError:
        return
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, *size, dtype=torch.float64, generator=generator)
    y = torch.randn(2, 2 * geometry.taps, torch.Size(output).numel(), dtype=torch.float64, generator=generator)
    torch.testing.assert_close((unfold(x, geometry) * y).sum(), (x * fold(y, geometry, size)).sum())


def test_rows_are_ordered_as_torch_has_them():
    x = torch.randn(2, 3, 9, 8)
    conv = nn.Conv2d(3, 4, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    expected = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    assert torch.equal(unfold(x, Geometry.of(conv)), expected)


def test_mask_tensor_holds_zeros_and_ones():
    mask = mask_tensor((5, 4), nn.Conv2d(1, 1, 3, padding=1))
    assert mask.shape == (20, 9, 20)
    assert mask.dtype == torch.get_default_dtype()
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.sum(dim=2).max() == 1  # a tap reads at most one location
    assert mask[0, 0].sum() == 0  # the corner's first tap lies in the padding


def test_channels_last_and_strided_inputs():
    geometry = Geometry.of(nn.Conv2d(3, 4, 3, padding=1))
    x = torch.randn(4, 3, 6, 7)
    assert torch.equal(unfold(x.to(memory_format=torch.channels_last), geometry), unfold(x, geometry))
    wide = torch.randn(4, 3, 6, 14)
    assert torch.equal(unfold(wide[..., ::2], geometry), unfold(wide[..., ::2].contiguous(), geometry))


def test_ceil_mode_windows_are_padded_with_zeros():
    pool = nn.AvgPool1d(3, stride=2, ceil_mode=True)
    patches = unfold(torch.arange(1.0, 7.0).view(1, 1, 6), Geometry.of(pool))
    assert patches[0].tolist() == [[1, 3, 5], [2, 4, 6], [3, 5, 0]]


def test_gradients_flow_through_unfold():
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: unfold(t, Geometry.of(nn.Conv2d(2, 1, 3, 2, 1))), (x,))


def test_kernel_larger_than_the_image_is_refused():
    with pytest.raises(GeometryError, match="does not fit"):
        mask_tensor((2, 2), nn.Conv2d(1, 1, 3))
    with pytest.raises(GeometryError, match="does not fit"):
        unfold(torch.zeros(1, 1, 2, 2), Geometry.of(nn.Conv2d(1, 1, 3)))


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
