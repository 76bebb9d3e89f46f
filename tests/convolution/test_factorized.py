"""CP and Tucker convolutions: implementations agree, decompositions hold, state and gradients are whole."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import growconv
from growconv.convolution.cp import cp_rank
from growconv.convolution.tucker import tucker_ranks
from growconv.errors import ArgumentTypeError, ArgumentValueError, GeometryError

CP = {1: growconv.CPConv1d, 2: growconv.CPConv2d, 3: growconv.CPConv3d}


TUCKER = {1: growconv.TuckerConv1d, 2: growconv.TuckerConv2d, 3: growconv.TuckerConv3d}


CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


ALL = [*CP.values(), *TUCKER.values()]


@st.composite
def layers(draw):
    axes = draw(st.integers(1, 3))
    kind = draw(st.sampled_from([CP, TUCKER]))[axes]

    def per_axis(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "replicate"]))
    settings = (per_axis(1, 3), per_axis(1, 2), per_axis(0, 2), per_axis(1, 2), 1, draw(st.booleans()), mode)
    return kind, settings, tuple(draw(st.integers(5, 7)) for _ in range(axes))


@given(layers())
def test_every_implementation_is_the_convolution_with_the_same_kernel(case):
    kind, settings, size = case
    layer = kind(3, 4, *settings, rank=2).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = layer.to_conv()(x)
    for implementation in layer.implementations:
        layer.implementation = implementation
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer(x[0]), expected[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ALL)
def test_single_precision_agrees_to_1e_5(kind):
    torch.manual_seed(0)
    layer = kind(8, 8, 3, padding="same")
    x = torch.randn(2, 8, *[6] * layer.axes)
    expected = layer(x)
    for implementation in layer.implementations:
        layer.implementation = implementation
        assert (layer(x) - expected).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_uneven_same_padding():
    layer = growconv.CPConv2d(3, 4, (4, 3), padding="same", dilation=(1, 2), rank=3).double()
    x = torch.randn(1, 3, 7, 6, dtype=torch.float64)
    for implementation in layer.implementations:
        layer.implementation = implementation
        torch.testing.assert_close(layer(x), layer.to_conv()(x))


@pytest.mark.parametrize("kind", [growconv.CPConv2d, growconv.TuckerConv2d])
def test_gradients_reach_every_factor(kind):
    torch.manual_seed(0)
    layer = kind(3, 4, (3, 2), padding=1, rank=2).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    factors = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
    for implementation in layer.implementations:
        layer.implementation = implementation
        layer.zero_grad()
        layer(x).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())
        assert torch.autograd.gradcheck(
            lambda *values: torch.func.functional_call(layer, dict(zip(factors, values, strict=True)), (x,)),
            tuple(factors.values()),
        )


@pytest.mark.parametrize("kind", ALL)
def test_from_conv_keeps_what_a_convolution_is(kind):
    conv = CONVS[kind.axes](4, 6, 2, stride=2, padding=1, dilation=2, bias=False, padding_mode="circular").double()
    conv.weight.requires_grad_(False)
    conv.eval()
    layer = kind.from_conv(conv, rank=2, iterations=1000)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not layer.training
    back = layer.to_conv()
    error = (back.weight.detach() - conv.weight).norm() / conv.weight.norm()
    for name in ("stride", "padding", "dilation", "kernel_size", "padding_mode", "bias", "in_channels"):
        assert getattr(back, name) == getattr(conv, name), name
    assert back.weight.dtype == torch.float64
    assert layer.fit.error == pytest.approx(float(error), rel=1e-6)


@pytest.mark.parametrize("kind", ALL)
def test_a_layer_without_a_decomposition_is_a_new_one_of_the_same_shape(kind):
    conv = CONVS[kind.axes](4, 6, 2, stride=2, padding=1, padding_mode="circular").eval()
    torch.manual_seed(5)
    layer = kind.from_conv(conv, rank=2, decompose_weights=False)
    torch.manual_seed(5)
    new = kind(4, 6, 2, stride=2, padding=1, padding_mode="circular", rank=2)
    assert layer.fit is None
    assert all(torch.equal(mine, other) for mine, other in zip(layer.factors(), new.factors(), strict=True))
    assert torch.equal(layer.bias, conv.bias)
    assert layer(torch.randn(1, 4, *[5] * kind.axes)).shape == conv(torch.randn(1, 4, *[5] * kind.axes)).shape


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("bias", [None, torch.arange(4.0, dtype=torch.float64)])
def test_a_layer_of_given_factors_is_the_convolution_with_their_kernel(axes, bias):
    taps, letters = (2, 3, 2)[:axes], "xyz"[:axes]
    x = torch.randn(2, 3, *[6] * axes, dtype=torch.float64)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    factors = [torch.randn(size, 5, dtype=torch.float64) for size in (4, 3, *taps)]
    kernel = torch.einsum(",".join(f"{letter}r" for letter in "oi" + letters) + "->oi" + letters, *factors)
    layer = CP[axes].from_factors(factors, bias, stride=2, padding=1, implementation="mobilenet")
    torch.testing.assert_close(layer(x), convolve(x, kernel, bias, stride=2, padding=1))
    core, outputs, inputs = (torch.randn(size, dtype=torch.float64) for size in ((2, 3, *taps), (4, 2), (3, 3)))
    kernel = torch.einsum(f"pq{letters},op,iq->oi{letters}", core, outputs, inputs)
    tucker = growconv.TuckerConv.from_factors([core, outputs, inputs], bias, dilation=2)
    torch.testing.assert_close(tucker(x), convolve(x, kernel, bias, dilation=2))
    core.zero_()
    assert tucker.core.any()  # the factors were copied


def test_factors_that_make_no_layer_are_refused():
    good = [torch.randn(4, 2), torch.randn(3, 2), torch.randn(3, 2), torch.randn(3, 2)]
    core = [torch.randn(2, 2, 3, 3), torch.randn(4, 2), torch.randn(3, 2)]
    for kind, factors in (
        (growconv.CPConv2d, []),
        (growconv.CPConv2d, good[:3]),
        (growconv.CPConv, good[:2]),
        (growconv.CPConv2d, [torch.randn(4, 1), *good[1:]]),
        (growconv.CPConv2d, [good[0].double(), *good[1:]]),
        (growconv.CPConv2d, core),
        (growconv.TuckerConv2d, good),
        (growconv.TuckerConv2d, [torch.randn(2, 1, 3, 3), *core[1:]]),
        (growconv.TuckerConv1d, core),
    ):
        with pytest.raises(ArgumentValueError, match="do not form a kernel of this class"):
            kind.from_factors(factors)
    with pytest.raises(ArgumentValueError, match="bias"):
        growconv.CPConv2d.from_factors(good, torch.zeros(3))


@pytest.mark.parametrize(("general", "kinds"), [(growconv.CPConv, CP), (growconv.TuckerConv, TUCKER)])
def test_one_class_for_every_order(general, kinds):
    for axes, kind in kinds.items():
        layer, own = (each(3, 4, (2,) * axes, padding=1, rank=2) for each in (general, kind))
        own.load_state_dict(layer.state_dict())
        x = torch.randn(2, 3, *[5] * axes)
        assert torch.equal(layer(x), own(x))
        assert torch.equal(copy.deepcopy(layer)(x), own(x))
        decomposed = general.from_conv(layer.to_conv(), rank=2)
        assert decomposed.fit.error < 1e-4
        assert decomposed.axes == axes
    for kernel_size in (3, (3, 3, 3, 3), ()):
        with pytest.raises(GeometryError, match="how many axes"):
            general(3, 4, kernel_size, rank=2)
    with pytest.raises(ArgumentTypeError, match=r"nn\.Conv1d or nn\.Conv2d or nn\.Conv3d"):
        general.from_conv(nn.Linear(3, 4))


def test_parameters_of_a_copy_are_its_own():
    layer = growconv.CPConv2d(3, 4, 3, rank=2)
    conv = layer.to_conv()
    with torch.no_grad():
        conv.bias.zero_()
        conv.weight.zero_()
    assert layer.bias.any()
    assert layer.weight.any()


@pytest.mark.parametrize("kind", ALL)
def test_state_dicts_load_across_implementations(kind):
    layer, other = (kind(3, 4, 2, rank=2, implementation=name) for name in ("factorized", "reconstructed"))
    assert list(layer.state_dict()) == list(other.state_dict())
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 3, *[4] * layer.axes)
    torch.testing.assert_close(other(x), layer(x))
    before = [id(parameter) for parameter in layer.parameters()]
    layer(x).sum().backward()
    _ = layer.weight
    assert before == [id(parameter) for parameter in layer.parameters()]
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("kind", [growconv.CPConv2d, growconv.TuckerConv2d])
def test_random_start_has_the_spread_of_a_convolution(kind):
    torch.manual_seed(0)
    spread = torch.stack([kind(64, 64, 3).weight.detach().var() for _ in range(3)]).mean()
    assert float(spread) == pytest.approx(1 / (3 * 64 * 9), rel=0.3)


@pytest.mark.parametrize(
    ("arguments", "settings", "error"),
    [
        ((4, 4, 3), {"groups": 2}, ArgumentValueError),
        ((0, 4, 3), {}, ArgumentValueError),
        ((4, 4, (3, 3, 3)), {}, GeometryError),
        ((4, 4, 0), {}, GeometryError),
        ((4, 4, 3), {"stride": 0}, GeometryError),
        ((4, 4, 3), {"padding": -1}, GeometryError),
        ((4, 4, 3), {"padding": "same", "stride": 2}, GeometryError),
        ((4, 4, 3), {"padding_mode": "mirror"}, GeometryError),
        ((4, 4, 3), {"implementation": "fast"}, ArgumentValueError),
    ],
)
def test_impossible_layers(arguments, settings, error):
    with pytest.raises(error):
        growconv.CPConv2d(*arguments, rank=2, **settings)


@pytest.mark.parametrize("module", [nn.Conv1d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Linear(4, 4)])
def test_from_conv_refuses_other_layers(module):
    with pytest.raises(ArgumentTypeError, match=r"nn\.Conv2d"):
        growconv.CPConv2d.from_conv(module)


def test_from_conv_refuses_groups_and_broken_weights():
    with pytest.raises(ArgumentValueError, match="groups"):
        growconv.CPConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=2))
    conv = nn.Conv2d(4, 4, 3)
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(ArgumentValueError, match="finite"):
        growconv.CPConv2d.from_conv(conv)


def test_prints_itself():
    text = repr(growconv.CPConv2d(3, 4, 3, padding=1, rank=2, bias=False))
    assert "rank=2" in text
    assert "padding=(1, 1)" in text
    assert "bias=False" in text


def test_ranks_by_share_keep_the_number_of_parameters():
    shape = (128, 64, 3, 3)
    full = 128 * 64 * 9
    assert cp_rank(shape, "same") == full // (128 + 64 + 6)
    assert cp_rank(shape, 0.25) == int(0.25 * full / 198)
    for share in (0.1, 0.25, 1.0):
        outputs, inputs = tucker_ranks(shape, share)
        assert 0.9 * share * full < 128 * outputs + 64 * inputs + outputs * inputs * 9 <= share * full
    assert cp_rank((4, 4, 1), 0.001) == 1
    layer = growconv.CPConv2d(64, 64, 3, bias=False)
    assert layer.rank == 275
    assert sum(parameter.numel() for parameter in layer.parameters()) <= 64 * 64 * 9


@pytest.mark.parametrize("rank", [0, -1, 97, "full", float("nan"), 0.0, -0.5, 5.0, (2, 2), True, "2"])
def test_impossible_cp_ranks(rank):
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match=r"rank|share"):
        growconv.CPConv2d(12, 8, (3, 4), rank=rank)
    assert growconv.CPConv2d(12, 8, (3, 4), rank=96).rank == 96


@pytest.mark.parametrize("rank", [0, (3, 0), (9, 3), (3, 13), (3,), (1, 2, 3), -2, 3.5])
def test_impossible_tucker_ranks(rank):
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match="rank"):
        growconv.TuckerConv2d(12, 8, 3, rank=rank)
