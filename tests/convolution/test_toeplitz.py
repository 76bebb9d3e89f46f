"""Toeplitz matrices, dense and sparse, and the unfolded and masked forms, against torch's convolutions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import growconv
from growconv.convolution.toeplitz import masked_conv, toeplitz_matrix, unfolded_conv
from growconv.errors import GeometryError

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@st.composite
def geometries(draw):
    axes = draw(st.integers(1, 3))

    def per_axis(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel, stride, dilation, padding = per_axis(1, 3), per_axis(1, 2), per_axis(1, 2), per_axis(0, 2)
    least = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = tuple(low + draw(st.integers(0, 3 if axes < 3 else 1)) for low in least)
    return kernel, size, {"stride": stride, "padding": padding, "dilation": dilation}


@given(geometries(), st.sampled_from([1, 2]))
def test_matrix_is_the_convolution(case, groups):
    kernel, size, settings = case
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 2 // groups, *kernel, dtype=torch.float64, generator=generator)
    x = torch.randn(2, 2, *size, dtype=torch.float64, generator=generator)
    expected = CONVS[len(size)](x, weight, groups=groups, **settings)
    matrix = toeplitz_matrix(weight, size, groups=groups, **settings)
    torch.testing.assert_close((x.flatten(1) @ matrix.T).view_as(expected), expected, rtol=0, atol=1e-12)
    sparse = toeplitz_matrix(weight, size, groups=groups, sparse=True, **settings)
    torch.testing.assert_close((sparse @ x.flatten(1).T).T.view_as(expected), expected, rtol=0, atol=1e-12)
    if groups == 1:
        for form in (unfolded_conv, masked_conv):
            torch.testing.assert_close(form(x, weight, **settings), expected, rtol=0, atol=1e-12)


def test_blocks_are_toeplitz():
    matrix = toeplitz_matrix(torch.randn(1, 1, 3, 3, dtype=torch.float64), (5, 6)).view(3, 4, 5, 6)
    assert torch.equal(matrix[1:, 1:, 1:, 1:], matrix[:-1, :-1, :-1, :-1])  # constant along both diagonals


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_add_up_in_their_columns(mode):
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode, bias=False).double()
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    for sparse in (False, True):
        matrix = toeplitz_matrix(conv.weight, (5, 4), padding=1, padding_mode=mode, sparse=sparse)
        torch.testing.assert_close((matrix @ x.flatten(1).T).T.view(2, 3, 5, 4), conv(x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_padding_by_name_and_by_sides():
    weight = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    expected = F.conv2d(x, weight, padding="same").flatten()
    torch.testing.assert_close(toeplitz_matrix(weight, (6, 6), padding="same") @ x.flatten(), expected)
    torch.testing.assert_close(toeplitz_matrix(weight, (6, 6), padding=((1, 2), (1, 1))) @ x.flatten(), expected)


def test_differentiable_in_the_weight():
    weight = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: toeplitz_matrix(w, (3, 3), padding=1), weight)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_adjoint_takes_a_gradient_back_to_the_kernel(groups, sparse):
    settings = {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "groups": groups}
    weight = torch.randn(4, 2 // groups, 3, 2, dtype=torch.float64, requires_grad=True)
    x, wanted = torch.randn(2, 2, 5, 6, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad((F.conv2d(x, weight, **settings) - wanted).pow(3).sum(), weight)
    settings |= {"padding_mode": "zeros", "sparse": sparse}
    matrix = toeplitz_matrix(weight.detach(), (5, 6), **settings).requires_grad_()
    (gradient,) = torch.autograd.grad((matrix @ x.flatten(1).T - wanted.flatten()[:, None]).pow(3).sum(), matrix)
    torch.testing.assert_close(growconv.toeplitz_adjoint(gradient, weight.shape, (5, 6), **settings), expected)


def test_the_adjoint_in_a_padding_mode_and_of_another_matrix():
    matrix = torch.randn(2 * 16, 16, dtype=torch.float64)
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    settings = {"padding": 1, "padding_mode": "reflect"}
    there = (matrix * toeplitz_matrix(weight, 4, **settings)).sum()
    assert (growconv.toeplitz_adjoint(matrix, (2, 1, 3, 3), 4, **settings) * weight).sum() == pytest.approx(there)
    with pytest.raises(GeometryError, match="does not belong to this convolution"):
        growconv.toeplitz_adjoint(matrix.T, (2, 1, 3, 3), 4, **settings)


def test_wrong_channels():
    with pytest.raises(GeometryError, match="input and kernel"):
        unfolded_conv(torch.randn(1, 3, 5, 5), torch.randn(4, 2, 3, 3))
