"""Average pooling is a convolution, and convolutions commute: the two layers in the other order, exactly."""

from torch import nn

from growconv.convolution.geometry import Geometry
from growconv.convolution.kernels import Conv, make_conv
from growconv.errors import ArgumentTypeError, GeometryError

AveragePool = nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d


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
