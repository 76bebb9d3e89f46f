"""Output sizes, paddings and reads against torch's own layers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from growconv.convolution.geometry import Geometry
from growconv.convolution.toeplitz import toeplitz_matrix
from growconv.errors import ArgumentTypeError, GeometryError

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


@st.composite
def convolutions(draw):
    axes = draw(st.sampled_from([1, 2, 2, 3]))
    largest = {1: 7, 2: 5, 3: 3}[axes]
    kernel = tuple(draw(st.integers(1, largest)) for _ in range(axes))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(axes))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    if max(stride) == 1 and draw(st.booleans()):
        padding = draw(st.sampled_from(["same", "valid"]))
    else:
        padding = tuple(draw(st.integers(0, k)) for k in kernel)
    conv = CONVS[axes](1, 1, kernel, stride, padding, dilation, bias=False, padding_mode=mode)
    size = tuple(d * (k - 1) + 1 + draw(st.integers(0, 3)) for k, d in zip(kernel, dilation, strict=True))
    return conv, size


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(convolutions())
def test_output_size_is_torchs(case):
    conv, size = case
    try:
        expected = tuple(conv(torch.zeros(1, 1, *size)).shape[2:])
    except RuntimeError:
        with pytest.raises(GeometryError):
            Geometry.of(conv).output_size(size)
        return
    geometry = Geometry.of(conv)
    assert geometry.output_size(size) == expected
    assert geometry.axes == len(size)
    assert geometry.taps == conv.weight[0, 0].numel()


def test_effective_size_same_padding_and_identity_tap():
    geometry = Geometry.of(nn.Conv2d(1, 1, (3, 4), dilation=(2, 3), padding="same"))
    assert geometry.effective_size == (5, 10)
    assert geometry.padding == ((2, 2), (4, 5))
    assert Geometry.of(nn.Conv2d(1, 1, 3, padding=1)).identity_tap == (1, 1)
    assert Geometry.of(nn.Conv2d(1, 1, 5, stride=2, padding=2)).identity_tap == (2, 2)
    assert Geometry.of(nn.Conv1d(1, 1, 4)).identity_tap == (1,)


def test_linear_layers_are_convolutions():
    assert Geometry.of(nn.Linear(3, 4)).output_size((7,)) == (7,)
    assert Geometry.covering((4, 5)).output_size((4, 5)) == (1, 1)


@pytest.mark.parametrize(
    ("module", "error"),
    [
        (nn.ConvTranspose2d(1, 1, 3), GeometryError),
        (nn.ReLU(), ArgumentTypeError),
        (nn.BatchNorm2d(3), ArgumentTypeError),
    ],
)
def test_other_layers_are_refused(module, error):
    with pytest.raises(error, match=type(module).__name__):
        Geometry.of(module)


@pytest.mark.parametrize(
    "arguments",
    [
        ((), (), (), ()),
        ((3,), (1, 1), (1,), ((0, 0),)),
        ((0,), (1,), (1,), ((0, 0),)),
        ((3,), (0,), (1,), ((0, 0),)),
        ((3,), (1,), (0,), ((0, 0),)),
        ((3,), (1,), (1,), ((0, -1),)),
    ],
)
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(GeometryError):
        Geometry(*arguments)


def test_unknown_padding_mode_is_named():
    with pytest.raises(GeometryError, match="mirror"):
        Geometry((3,), (1,), (1,), ((1, 1),), "mirror")


@pytest.mark.parametrize("size", [(2, 9), (9, 2), (0, 9), (9,), (9, 9, 9)])
def test_images_that_do_not_fit_are_refused(size):
    with pytest.raises(GeometryError):
        Geometry.of(nn.Conv2d(1, 1, 3)).output_size(size)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"input_size": (2, 2)}, "does not fit"),
        ({"input_size": (5, 5, 5)}, "input_size has 3 entries"),
        ({"input_size": (5, 5), "stride": 0}, "stride"),
        ({"input_size": (5, 5), "padding": "full"}, "this named padding"),
        ({"input_size": (5, 5), "padding": (1, 1, 1)}, "padding"),
        ({"input_size": (5, 5), "groups": 3}, "groups"),
    ],
)
def test_impossible_geometries_are_named(settings, words):
    with pytest.raises(GeometryError, match=words):
        toeplitz_matrix(torch.randn(4, 2, 3, 3), **settings)


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
