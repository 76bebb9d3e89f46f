"""Two convolutions with nothing in between are one convolution: its kernel, its geometry, and where the borders differ.

PyTorch's convolution is a correlation, so the composite kernel is the full convolution of the second kernel with the
first, summed over hidden channels. Hidden zero padding cuts the sum at the borders; `exact_locations` says where, and
`composite_matrix` is right there, too. Average pooling is a convolution, and convolutions commute.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from growconv.convolution.geometry import Geometry, PerAxis, per_axis
from growconv.convolution.toeplitz import regroup, toeplitz_matrix
from growconv.errors import ArgumentTypeError, GeometryError

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
AveragePool = nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d
CONVS: dict[int, type[Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def composite_size(
    first_size: PerAxis,
    second_size: PerAxis,
    first_stride: PerAxis = 1,
    first_dilation: PerAxis = 1,
    second_dilation: PerAxis = 1,
) -> Any:
    """Size of the composite kernel: e1 + s1·(e2 − 1) per axis, with effective sizes e = dilation·(k − 1) + 1.

    Args:
        first_size: kernel size of the first convolution; a number, or one per axis.
        second_size: of the second.
        first_stride: stride s1 of the first; the stride of the second does not matter.
        first_dilation: dilation of the first.
        second_dilation: dilation of the second.

    Returns:
        A number if both sizes are numbers, else a tuple.

    Example:
        >>> growconv.composite_size((3, 3), (5, 5))
        (7, 7)
    """
    settings = (first_size, second_size, first_stride, first_dilation, second_dilation)
    axes = next((len(size) for size in settings[:2] if not isinstance(size, int)), 1)
    first = per_axis(first_size, axes, "first_size", 1, "composite_size")
    second = per_axis(second_size, axes, "second_size", 1, "composite_size")
    steps = pair_steps(axes, first_stride, first_dilation, second_dilation, "composite_size")
    size = tuple(
        dilation * (taps1 - 1) + 1 + reach * (taps2 - 1)
        for taps1, taps2, dilation, reach in zip(first, second, *steps, strict=True)
    )
    return size[0] if all(isinstance(value, int) for value in settings) else size


def pair_steps(
    axes: int, first_stride: PerAxis, first_dilation: PerAxis, second_dilation: PerAxis, where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Per axis the distance between taps of the first convolution, and that between taps of the second in its input."""
    stride = per_axis(first_stride, axes, "first_stride", 1, where)
    inner = per_axis(first_dilation, axes, "first_dilation", 1, where)
    outer = per_axis(second_dilation, axes, "second_dilation", 1, where)
    return inner, tuple(step * dilation for step, dilation in zip(stride, outer, strict=True))


def compose_kernels(
    first: Float[Tensor, "hidden inputs *taps1"],
    second: Float[Tensor, "outputs hidden_per_group *taps2"],
    *,
    first_stride: PerAxis = 1,
    first_dilation: PerAxis = 1,
    second_dilation: PerAxis = 1,
    groups: int = 1,
) -> Float[Tensor, "outputs inputs *taps"]:
    """The one kernel of two convolutions: W[c,i,u] = Σ_k Σ_{d1·t1 + s1·d2·t2 = u} W2[c,k,t2] W1[k,i,t1].

    With it, ``conv(conv(x, first, stride=s1, dilation=d1), second, stride=s2, dilation=d2)`` is
    ``conv(x, W, stride=s1·s2)``, exactly wherever the hidden map is not zero-padded. `compose_convs` also handles bias,
    padding and different groups.

    Args:
        first: (C1, C0 / groups, *kernel_size).
        second: (C2, C1 / groups, *kernel_size).
        first_stride: stride s1 of the first convolution; the stride of the second does not change the kernel.
        first_dilation: dilation d1 of the first.
        second_dilation: dilation d2 of the second.
        groups: number of groups of both.

    Returns:
        (C2, C0 / groups, *composite size), with dilation 1: taps that no pair of taps reaches are zero.

    Raises:
        GeometryError: the hidden channels or the numbers of axes differ.

    Example:
        >>> growconv.compose_kernels(torch.randn(4, 3, 3, 3), torch.randn(8, 4, 3, 3)).shape
        torch.Size([8, 3, 5, 5])
    """
    axes = first.dim() - 2
    if axes not in _TRANSPOSED or second.dim() != first.dim():
        raise GeometryError(
            "two kernels on the same one to three axes are needed",
            got=f"{tuple(first.shape)} and {tuple(second.shape)}",
            where="compose_kernels",
        )
    if groups < 1 or first.shape[0] != second.shape[1] * groups or second.shape[0] % groups:
        raise GeometryError(
            "the second kernel does not read what the first one writes",
            expected=f"{first.shape[0]} hidden channels, in {groups} groups",
            got=f"{tuple(first.shape)} then {tuple(second.shape)}",
            where="compose_kernels",
        )
    inner, reach = pair_steps(axes, first_stride, first_dilation, second_dilation, "compose_kernels")
    # A transposed convolution of the first kernel (its inputs as samples) by the second one is the full convolution.
    blocks = second.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # (C1, C2 / groups, *taps2)
    composite = _TRANSPOSED[axes](first.transpose(0, 1), blocks, None, inner, 0, 0, groups, reach)
    return composite.transpose(0, 1)


def compose_convs(first: nn.Module, second: nn.Module) -> Conv:
    """One convolution for two with nothing in between: kernel, bias, stride, padding, dilation and groups.

    The stride is s1·s2, the padding p1 + s1·p2, the groups gcd(g1, g2); the dilation is the step of the grid on which
    all composite taps lie. The output has the size of the pair's output. If `second` has zero padding, outputs whose
    window reaches into it differ (`exact_locations`): there the pair reads zeros, but the composite reads what the
    first convolution would have computed.

    Args:
        first: nn.Conv1d, nn.Conv2d or nn.Conv3d.
        second: of the same kind, reading the first one's channels.

    Returns:
        A new convolution with its own parameters. It has a bias if one of the two has.

    Raises:
        GeometryError: channels that do not match, or padding that a single convolution cannot have: padding other than
            zeros in the second, or two kinds of padding or uneven sides in the pair.
        ArgumentTypeError: for other layers.

    Example:
        >>> growconv.compose_convs(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)).kernel_size
        (5, 5)
    """
    before, after = _checked_pair(first, second, "compose_convs")
    geometry1, geometry2 = Geometry.of(before), Geometry.of(after)
    padded1, padded2 = (any(low or high for low, high in each.padding) for each in (geometry1, geometry2))
    if padded2 and (geometry2.padding_mode != "zeros" or (padded1 and geometry1.padding_mode != "zeros")):
        raise GeometryError(
            "no single convolution pads like this pair",
            expected="zero padding in both, or none in the second",
            got=f"{geometry1.padding_mode} {geometry1.padding} then {geometry2.padding_mode} {geometry2.padding}",
            where="compose_convs",
            fix="use composite_matrix",
        )
    padding = [
        (low1 + step * low2, high1 + step * high2)
        for (low1, high1), (low2, high2), step in zip(
            geometry1.padding, geometry2.padding, geometry1.stride, strict=True
        )
    ]
    if any(low != high for low, high in padding):
        raise GeometryError(
            "nn.Conv pads both sides equally, but the composite of this pair does not",
            got=f"(low, high) per axis: {padding}",
            where="compose_convs",
            fix="pad the input yourself, or use compose_kernels",
        )
    groups = math.gcd(before.groups, after.groups)
    reach = [step * dilation for step, dilation in zip(geometry1.stride, geometry2.dilation, strict=True)]
    grid = [
        math.gcd(inner if taps1 > 1 else 0, outer if taps2 > 1 else 0) or 1
        for inner, outer, taps1, taps2 in zip(
            geometry1.dilation, reach, geometry1.kernel_size, geometry2.kernel_size, strict=True
        )
    ]
    weight = compose_kernels(
        regroup(before.weight.detach(), before.groups, groups),
        regroup(after.weight.detach(), after.groups, groups),
        first_stride=geometry1.stride,
        first_dilation=geometry1.dilation,
        second_dilation=geometry2.dilation,
        groups=groups,
    )
    weight = weight[(..., *(slice(None, None, step) for step in grid))]
    bias = None if after.bias is None else after.bias.detach()
    if before.bias is not None:  # b2 + Σ_k Σ_taps W2[c,k] b1[k]
        through = regroup(after.weight.detach(), after.groups).flatten(2).sum(2) @ before.bias.detach()
        bias = through if bias is None else bias + through
    return make_conv(
        weight,
        bias,
        tuple(s1 * s2 for s1, s2 in zip(geometry1.stride, geometry2.stride, strict=True)),
        tuple(low for low, _ in padding),
        tuple(grid),
        groups,
        geometry1.padding_mode if padded1 else "zeros",
    )


def make_conv(
    weight: Tensor,
    bias: Tensor | None,
    stride: PerAxis = 1,
    padding: PerAxis | str = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Conv:
    """A convolution with these weights (C2, C1 / groups, *kernel_size), on their device and with their dtype.

    Tensors are copied into new Parameters, Parameters are shared. The settings are those of `nn.Conv2d`.
    """
    settings: dict[str, Any] = {"groups": groups, "bias": bias is not None, "padding_mode": padding_mode}
    settings |= {"stride": stride, "padding": padding, "dilation": dilation, "device": "meta"}
    settings |= {"kernel_size": tuple(weight.shape[2:])}
    conv = CONVS[weight.dim() - 2](weight.shape[1] * groups, weight.shape[0], **settings)
    conv.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach().clone())
    if bias is not None:
        conv.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach().clone())
    return conv


def conv_pair(
    alpha: Float[Tensor, "k a"],
    omega: Float[Tensor, "channels *columns"],
    incoming_shape: Sequence[int],
    kernel_size: PerAxis,
    first: Mapping[str, Any] | None = None,
    second: Mapping[str, Any] | None = None,
) -> tuple[Conv, Conv]:
    """Two convolutions from bare factors: what the K channels of `growconv.solvers.tiny` or `exact` compute.

    Args:
        alpha: (K, A), filters of the first convolution; with one entry more per row, its biases.
        omega: (K, B, C2) or (K, B·C2), the second one's weights on each channel, tap by tap.
        incoming_shape: shape (C0, *kernel size) of the filters of the first, A entries in all.
        kernel_size: kernel size of the second, B taps in all; a number, or one per axis.
        first: further arguments of the first, as for `nn.Conv2d`: stride, padding, dilation, padding_mode.
        second: further arguments of the second.

    Returns:
        Convolutions C0 → K and K → C2, the second without a bias; `second(first(x))` is Σ_k Σ_ab X_ab α_ka ω_kbc.

    Raises:
        GeometryError: sizes that do not fit together.

    Example:
        >>> first, second = growconv.conv_pair(torch.randn(2, 28), torch.randn(2, 9, 5), (3, 3, 3), 3)
        >>> second(first(torch.zeros(1, 3, 8, 8))).shape
        torch.Size([1, 5, 4, 4])
    """
    where, axes = "conv_pair", len(incoming_shape) - 1
    if axes not in CONVS:
        raise GeometryError("filters (C0, *kernel size) have one to three axes", got=incoming_shape, where=where)
    entries, taps = math.prod(incoming_shape), per_axis(kernel_size, axes, "kernel_size", 1, where)
    channels, bias = len(alpha), alpha.shape[1] == entries + 1
    if alpha.shape[1] - bias != entries or len(omega) != channels or not channels or omega[0].numel() % math.prod(taps):
        raise GeometryError(
            "the factors do not fit the kernels",
            expected=f"alpha (K, {entries}) or (K, {entries + 1}), omega (K, {math.prod(taps)}, C2)",
            got=f"alpha {tuple(alpha.shape)}, omega {tuple(omega.shape)}",
            where=where,
        )
    incoming = alpha[:, :entries].reshape(channels, *incoming_shape)
    outgoing = omega.to(alpha).reshape(channels, math.prod(taps), -1).permute(2, 0, 1).unflatten(2, taps).contiguous()
    before = make_conv(incoming, alpha[:, entries] if bias else None, **(first or {}))
    return before, make_conv(outgoing, None, **(second or {}))


def exact_locations(first: nn.Module, second: nn.Module, input_size: Sequence[int]) -> Bool[Tensor, "*output_size"]:
    """Where the composite convolution equals the pair: outputs for which no tap of the second reads hidden padding.

    Args:
        first: the first convolution.
        second: the second.
        input_size: size of the first one's input grid.

    Returns:
        A mask over output locations, True where both are equal for every input and kernel; all True without hidden
        padding.

    Example:
        >>> growconv.exact_locations(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1), (8, 8)).sum()
        tensor(36)
    """
    before, after = _checked_pair(first, second, "exact_locations")
    geometry = Geometry.of(after)
    hidden = Geometry.of(before).output_size(input_size)
    result = torch.ones((), dtype=torch.bool)
    for axis, size in enumerate(hidden):
        inside = torch.from_numpy((geometry.reads(axis, size) >= 0).all(1))
        result = result.unsqueeze(-1) & inside
    return result


def composite_matrix(
    first: nn.Module, second: nn.Module, input_size: Sequence[int], *, sparse: bool = False
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, " rows"]]:
    """The pair as one affine map, borders included: the product of both Toeplitz matrices, and what the biases add.

    Args:
        first: the first convolution.
        second: the second, reading the first one's channels.
        input_size: size of the first one's input grid.
        sparse: multiply and return sparse matrices.

    Returns:
        Matrix (C2·M, C0·L0) and offset (C2·M,): `matrix @ x.flatten() + offset` is `second(first(x))` flattened.

    Example:
        >>> matrix, offset = growconv.composite_matrix(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3), (6, 6))
        >>> matrix.shape
        torch.Size([4, 36])
    """
    before, after = _checked_pair(first, second, "composite_matrix")
    hidden = Geometry.of(before).output_size(input_size)
    inner, outer = (
        toeplitz_matrix(
            conv.weight.detach(),
            size,
            Geometry.of(conv).stride,
            Geometry.of(conv).padding,
            Geometry.of(conv).dilation,
            groups=conv.groups,
            padding_mode=conv.padding_mode,
            sparse=sparse,
        )
        for conv, size in ((before, input_size), (after, hidden))
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        matrix = torch.sparse.mm(outer, inner) if sparse else outer @ inner
    offset = matrix.new_zeros(outer.shape[0], layout=torch.strided)
    if before.bias is not None:
        offset = outer @ before.bias.detach().repeat_interleave(math.prod(hidden))
    if after.bias is not None:
        offset = offset + after.bias.detach().repeat_interleave(outer.shape[0] // after.out_channels)
    return matrix, offset


def commute_average_pool(first: nn.Module, second: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The same function with an average pooling and a convolution in the other order.

    The stride of the second layer moves to the new last layer; the stride of a pooling that comes first becomes
    dilation of the convolution; the padding of the first layer moves to the new first layer.

    Args:
        first: nn.AvgPool1d/2d/3d or nn.Conv1d/2d/3d.
        second: the other of the two, without padding.

    Returns:
        Two new modules to apply in this order; the convolution shares its Parameters with the one given.

    Raises:
        GeometryError: no exact exchange exists: the second layer has padding (its border zeros are not the output of
            the first), a convolution with stride comes before the pooling (it would need a dilated pooling), or the
            pooling rounds its size up or leaves padding out of the average.
        ArgumentTypeError: for other layers.

    Example:
        >>> pool, conv = growconv.commute_average_pool(nn.Conv2d(3, 4, 1), nn.AvgPool2d(2))
    """
    if isinstance(first, AveragePool) and isinstance(second, Conv):
        pool, conv, pool_first = first, second, True
    elif isinstance(first, Conv) and isinstance(second, AveragePool):
        pool, conv, pool_first = second, first, False
    else:
        raise ArgumentTypeError(
            "one average pooling and one convolution are needed",
            got=f"{type(first).__name__} then {type(second).__name__}",
            where="commute_average_pool",
        )
    pooling, convolving = Geometry.of(pool), Geometry.of(conv)
    problem = _why_not(pool, pooling, convolving, pool_first)
    if problem:
        raise GeometryError(problem, got=f"{first} then {second}", where="commute_average_pool")
    last = tuple(s1 * s2 for s1, s2 in zip(pooling.stride, convolving.stride, strict=True))
    padding = tuple(low for low, _ in (pooling if pool_first else convolving).padding)
    none, one = (0,) * pooling.axes, (1,) * pooling.axes
    divisor = {} if isinstance(pool, nn.AvgPool1d) else {"divisor_override": pool.divisor_override}
    if pool_first:
        dilation = tuple(d * s for d, s in zip(convolving.dilation, pooling.stride, strict=True))
        new_conv = make_conv(conv.weight, conv.bias, one, padding, dilation, conv.groups)
        return new_conv, type(pool)(pooling.kernel_size, last, none, **divisor)  # pyright: ignore[reportArgumentType]
    new_pool = type(pool)(pooling.kernel_size, one, padding, **divisor)  # pyright: ignore[reportArgumentType]
    return new_pool, make_conv(conv.weight, conv.bias, last, none, convolving.dilation, conv.groups)


def _why_not(pool: AveragePool, pooling: Geometry, convolving: Geometry, pool_first: bool) -> str | None:
    """One line saying why the layers do not commute; None where they do."""
    second = convolving if pool_first else pooling
    if pooling.axes != convolving.axes:
        return "pooling and convolution have different numbers of axes"
    if any(low or high for low, high in second.padding):
        return "the second layer pads with zeros where the first one's output would have to stand"
    if pooling.ceil_mode:
        return "a pooling that rounds its size up averages over partial windows"
    if pool_first:
        padded = any(low for low, _ in pooling.padding)
        return (
            "a pooling that leaves padding out of its average is no convolution"
            if (padded and not pool.count_include_pad)
            else None
        )
    if max(convolving.stride) > 1:
        return "after a convolution with stride the pooling would have to be dilated"
    if convolving.padding_mode != "zeros" and any(low or high for low, high in convolving.padding):
        return "a pooling can only pad with zeros"
    if any(low != high for low, high in convolving.padding):
        return "a pooling pads both sides alike"
    if any(2 * low > size for (low, _), size in zip(convolving.padding, pooling.kernel_size, strict=True)):
        return "torch's pooling cannot take over padding of more than half its window"
    return None


def _checked_pair(first: nn.Module, second: nn.Module, where: str) -> tuple[Conv, Conv]:
    if not isinstance(first, Conv) or not isinstance(second, Conv) or len(first.kernel_size) != len(second.kernel_size):
        raise ArgumentTypeError(
            "two convolutions on the same axes are needed",
            expected="nn.Conv1d, nn.Conv2d or nn.Conv3d, twice the same",
            got=f"{type(first).__name__} and {type(second).__name__}",
            where=where,
        )
    if first.out_channels != second.in_channels:
        raise GeometryError(
            "the second convolution does not read what the first one writes",
            expected=f"{first.out_channels} input channels",
            got=second.in_channels,
            where=where,
        )
    return first, second
