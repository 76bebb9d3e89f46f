"""Arguments of convolutions as users write them: one number or one per axis, padding by number or by name."""

from collections.abc import Sequence

from growconv.convolution.geometry import Geometry
from growconv.errors import ArgumentTypeError, GeometryError

PerAxis = int | Sequence[int]
Padding = int | str | Sequence[int] | Sequence[tuple[int, int]]


def per_axis(value: PerAxis, axes: int, what: str, least: int, where: str | None = None) -> tuple[int, ...]:
    """One integer per axis.

    Args:
        value: one number for all axes, or one per axis.
        axes: number of axes.
        what: name of the argument, for messages.
        least: smallest value allowed.
        where: function or module path, for messages.

    Returns:
        A tuple with one entry per axis.
    """
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if any(isinstance(entry, bool) or not isinstance(entry, int) for entry in values):
        raise ArgumentTypeError(f"{what} is not made of integers", got=repr(value), where=where)
    if len(values) != axes:
        raise GeometryError(
            f"{what} has {len(values)} entries", expected=f"one number, or {axes} of them", got=values, where=where
        )
    if min(values) < least:
        raise GeometryError(f"{what} too small", expected=f"entries of at least {least}", got=values, where=where)
    return values


def geometry(
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    padding_mode: str = "zeros",
    *,
    axes: int | None = None,
    where: str | None = None,
) -> Geometry:
    """Geometry of a convolution from the arguments that `nn.Conv2d` takes.

    Args:
        kernel_size: taps per axis.
        stride: step per output location.
        padding: one number, one per axis, a (low, high) pair per axis, "same" (stride 1 only) or "valid".
        dilation: step between taps.
        padding_mode: what stands in the padding.
        axes: number of axes; None takes the length of `kernel_size`.
        where: function or module path, for messages.

    Returns:
        The geometry, with padding resolved into (low, high) per axis.
    """
    count = axes or (1 if isinstance(kernel_size, int) else len(tuple(kernel_size)))
    sizes = per_axis(kernel_size, count, "kernel_size", 1, where)
    strides = per_axis(stride, count, "stride", 1, where)
    dilations = per_axis(dilation, count, "dilation", 1, where)
    return Geometry(sizes, strides, dilations, _sides(padding, sizes, strides, dilations, where), padding_mode)


def _sides(
    padding: Padding, sizes: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...], where: str | None
) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        padding = 0
    if isinstance(padding, str):
        if padding != "same" or max(strides) > 1:
            raise GeometryError(
                "this named padding is not possible here",
                expected="'valid', or 'same' with stride 1",
                got=f"padding={padding!r}, stride={strides}",
                where=where,
            )
        totals = [step * (size - 1) for step, size in zip(dilations, sizes, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if not isinstance(padding, int) and any(isinstance(entry, Sequence) for entry in padding):
        if len(padding) != len(sizes):
            raise GeometryError(
                "the padding has the wrong number of axes", expected=f"{len(sizes)} pairs", got=padding, where=where
            )
        pairs = [per_axis(entry, 2, "a padding pair", 0, where) for entry in padding]
        return tuple((low, high) for low, high in pairs)
    amounts = per_axis(padding, len(sizes), "padding", 0, where)  # pyright: ignore[reportArgumentType]
    return tuple((amount, amount) for amount in amounts)
