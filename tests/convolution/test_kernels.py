"""Composition of convolutions: kernel, geometry, borders, matrices; average pooling commutes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import growconv
from growconv.convolution.geometry import Geometry
from growconv.convolution.kernels import compose_convs, composite_matrix, exact_locations
from growconv.errors import ArgumentTypeError, GeometryError

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


@st.composite
def pairs(draw):
    axes = draw(st.integers(1, 3))

    def per_axis(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    g1, g2 = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    first = CONVS[axes](4, 8, per_axis(1, 3), per_axis(1, 2), per_axis(0, 1), per_axis(1, 2), g1, draw(st.booleans()))
    second = CONVS[axes](8, 4, per_axis(1, 3), per_axis(1, 2), per_axis(0, 1), per_axis(1, 2), g2, draw(st.booleans()))
    size = tuple(draw(st.integers(5, 13 if axes == 1 else 11 if axes == 2 else 6)) for _ in range(axes))
    return first.double(), second.double(), size


@given(pairs())
def test_composite_is_the_pair_away_from_hidden_padding(case):
    first, second, size = case
    x = torch.randn(2, 4, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        expected = second(first(x))
    except RuntimeError:
        return
    conv = compose_convs(first, second)
    assert not set(conv.parameters()) & {*first.parameters(), *second.parameters()}
    sizes = growconv.composite_size(
        first.kernel_size, second.kernel_size, first.stride, first.dilation, second.dilation
    )
    assert Geometry.of(conv).effective_size == sizes
    got = conv(x)
    assert got.shape == expected.shape
    exact = exact_locations(first, second, size)
    assert exact.shape == expected.shape[2:]
    torch.testing.assert_close(got[..., exact], expected[..., exact], rtol=0, atol=1e-12)
    if not any(second.padding):
        assert exact.all()
    if expected[0].numel() < 2000 and x[0].numel() < 2000:
        matrix, offset = composite_matrix(first, second, size)
        torch.testing.assert_close(x.flatten(1) @ matrix.T + offset, expected.flatten(1), rtol=0, atol=1e-12)


def test_borders_differ_with_hidden_padding_and_only_there():
    first, second = nn.Conv2d(2, 3, 3, padding=1).double(), nn.Conv2d(3, 2, 3, padding=1).double()
    x = torch.randn(1, 2, 7, 7, dtype=torch.float64)
    difference = (compose_convs(first, second)(x) - second(first(x))).abs().amax((0, 1))
    exact = exact_locations(first, second, (7, 7))
    assert difference[exact].max() < 1e-12
    assert difference[~exact].min() > 1e-6
    assert exact.sum() == 25
    matrix, offset = composite_matrix(first, second, (7, 7), sparse=True)
    torch.testing.assert_close((matrix @ x.flatten()) + offset, second(first(x)).flatten())


def test_compose_kernels_is_the_sum_over_hidden_channels():
    first, second = torch.randn(6, 5, 3, 5, dtype=torch.float64), torch.randn(7, 6, 5, 3, dtype=torch.float64)
    kernel = growconv.compose_kernels(first, second)
    slow = torch.zeros(7, 5, 7, 7, dtype=torch.float64)
    for r in range(5):
        for s in range(3):
            slow[:, :, r : r + 3, s : s + 5] += torch.einsum("ck,kiuv->ciuv", second[:, :, r, s], first)
    torch.testing.assert_close(kernel, slow)
    x = torch.randn(2, 5, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(F.conv2d(F.conv2d(x, first), second), F.conv2d(x, kernel))


def test_compose_kernels_is_differentiable():
    first = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    second = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: growconv.compose_kernels(a, b, first_stride=2), (first, second))


def test_composite_size():
    assert growconv.composite_size(3, 5) == 7
    assert growconv.composite_size((3, 5), (5, 3)) == (7, 7)
    assert growconv.composite_size(3, 3, first_stride=2, first_dilation=2, second_dilation=3) == 5 + 2 * 6
    with pytest.raises(GeometryError):
        growconv.composite_size(0, 3)


def test_padding_mode_of_the_first_is_kept():
    first, second = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").double(), nn.Conv2d(3, 2, 2).double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(compose_convs(first, second)(x), second(first(x)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_pairs_without_a_single_convolution_are_refused():
    with pytest.raises(GeometryError, match="does not read what the first"):
        compose_convs(nn.Conv2d(2, 3, 3), nn.Conv2d(4, 2, 3))
    with pytest.raises(ArgumentTypeError):
        compose_convs(nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 2, 3))
    with pytest.raises(ArgumentTypeError):
        compose_convs(nn.Conv2d(2, 3, 3), nn.Conv1d(3, 2, 3))
    with pytest.raises(GeometryError, match="pads like this pair"):
        compose_convs(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(GeometryError, match="both sides"):
        compose_convs(nn.Conv2d(2, 3, 2, padding="same"), nn.Conv2d(3, 2, 3))
    with pytest.raises(GeometryError, match="does not read"):
        growconv.compose_kernels(torch.randn(3, 2, 3, 3), torch.randn(2, 4, 3, 3))
    with pytest.raises(GeometryError, match="one to three axes"):
        growconv.compose_kernels(torch.randn(3, 2, 3, 3), torch.randn(2, 3, 3))


@given(st.integers(1, 3), st.booleans(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 1))
def test_average_pooling_commutes(axes, pool_first, window, stride, dilation, padding):
    padding = min(padding, window // 2)
    conv = CONVS[axes](2, 4, 2, dilation=dilation, groups=2, stride=2 if pool_first else 1).double()
    pool = POOLS[axes](window, stride, padding)
    if not pool_first:
        conv = CONVS[axes](2, 4, 2, dilation=dilation, padding=padding).double()
        pool = POOLS[axes](window, stride)
    first, second = (pool, conv) if pool_first else (conv, pool)
    x = torch.randn(2, 2, *[11] * axes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    new_first, new_second = growconv.commute_average_pool(first, second)
    assert isinstance(new_first, type(second))
    expected = second(first(x))
    torch.testing.assert_close(new_second(new_first(x)), expected, rtol=0, atol=1e-12)
    moved = new_first if pool_first else new_second
    assert moved.weight is conv.weight


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (nn.Conv2d(2, 2, 3), nn.AvgPool2d(2, padding=1), "second layer pads"),
        (nn.Conv2d(2, 2, 3, stride=2), nn.AvgPool2d(2), "dilated"),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), nn.Conv2d(2, 2, 3), "leaves padding out"),
        (nn.AvgPool2d(3, ceil_mode=True), nn.Conv2d(2, 2, 3), "rounds its size up"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.AvgPool2d(2), "only pad with zeros"),
        (nn.Conv2d(2, 2, 5, padding=2), nn.AvgPool2d(2), "half its window"),
        (nn.AvgPool1d(3), nn.Conv2d(2, 2, 3), "numbers of axes"),
    ],
)
def test_where_pooling_does_not_commute(first, second, words):
    with pytest.raises(GeometryError, match=words):
        growconv.commute_average_pool(first, second)


def test_max_pooling_is_refused():
    with pytest.raises(ArgumentTypeError, match="average pooling"):
        growconv.commute_average_pool(nn.MaxPool2d(2), nn.Conv2d(2, 2, 3))
