"""Geometry of a convolution: kernel, stride, dilation and padding on any number of axes, also as users write them."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from growconv.errors import ArgumentTypeError, GeometryError

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_POOLS: tuple[tuple[tuple[type[nn.Module], ...], int], ...] = (
    ((nn.MaxPool1d, nn.AvgPool1d), 1),
    ((nn.MaxPool2d, nn.AvgPool2d), 2),
    ((nn.MaxPool3d, nn.AvgPool3d), 3),
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

PerAxis = int | Sequence[int]
Padding = int | str | Sequence[int] | Sequence[tuple[int, int]]


def per_axis(value: PerAxis, axes: int, what: str, least: int, where: str | None = None) -> tuple[int, ...]:
    """One integer of at least `least` per axis, from one number for all axes or one for each; `what` names it."""
    given = value if isinstance(value, Sequence) else (value,) * axes
    values: tuple[int, ...] | None = None
    with suppress(TypeError):
        values = tuple(map(index, given))
    if values is None or bool in map(type, given):
        raise ArgumentTypeError(f"{what} is not made of integers", got=repr(value), where=where)
    if len(values) != axes:
        raise GeometryError(
            f"{what} has {len(values)} entries", expected=f"one number, or {axes} of them", got=values, where=where
        )
    if min(values) < least:
        raise GeometryError(f"{what} too small", expected=f"entries of at least {least}", got=values, where=where)
    return values


@dataclass(frozen=True)
class Geometry:
    """Which input locations each output location of a convolution or pooling reads.

    Output location m of an axis reads, with its tap b, the input location ``stride·m + dilation·b − low``.

    Attributes:
        kernel_size: taps per axis.
        stride: step between output locations per axis, in input locations.
        dilation: step between taps per axis, in input locations.
        padding: (low, high) per axis, in input locations.
        padding_mode: what stands in the padding: "zeros", "reflect", "replicate" or "circular".
        ceil_mode: whether a pooling rounds its output size up.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: str = "zeros"
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        """Check that the settings belong together."""
        axes = len(self.kernel_size)
        parts = (self.kernel_size, self.stride, self.dilation, self.padding)
        if axes == 0 or {len(part) for part in parts} != {axes}:
            raise GeometryError(
                "kernel size, stride, dilation and padding need one entry per axis, and at least one axis", got=parts
            )
        if min(*self.kernel_size, *self.stride, *self.dilation) < 1 or min(chain(*self.padding)) < 0:
            raise GeometryError(
                "kernel size, stride, dilation or padding are too small",
                expected="at least 1, and a padding of at least 0",
                got=parts,
            )
        if self.padding_mode not in PADDING_MODES:
            raise GeometryError(
                "there is no such padding mode", expected=" or ".join(PADDING_MODES), got=self.padding_mode
            )

    @classmethod
    def read(
        cls,
        kernel_size: PerAxis,
        stride: PerAxis = 1,
        padding: Padding = 0,
        dilation: PerAxis = 1,
        padding_mode: str = "zeros",
        *,
        axes: int | None = None,
        where: str | None = None,
    ) -> "Geometry":
        """Geometry from the arguments that `nn.Conv2d` takes.

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
        return cls(sizes, strides, dilations, _sides(padding, sizes, strides, dilations, where), padding_mode)

    @classmethod
    def of(cls, module: nn.Module) -> "Geometry":
        """Geometry of a layer, with padding="same" resolved into numbers.

        Args:
            module: nn.Conv1d/2d/3d, nn.MaxPool or nn.AvgPool of 1 to 3 axes, a CP or Tucker convolution, or nn.Linear,
                which is a convolution of one tap on a grid of one axis.

        Raises:
            GeometryError: for a transposed convolution, whose outputs do not read windows.
            ArgumentTypeError: for any other layer.
        """
        own = getattr(module, "geometry", None)
        if isinstance(own, cls):  # factorized convolutions know theirs
            return own
        if isinstance(module, nn.Linear):
            return cls((1,), (1,), (1,), ((0, 0),))
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return cls.read(module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)
        for kinds, axes in _POOLS:
            if isinstance(module, kinds):
                pool: Any = module
                stride = pool.kernel_size if pool.stride is None else pool.stride
                own = cls.read(pool.kernel_size, stride, pool.padding, getattr(pool, "dilation", 1), axes=axes)
                return replace(own, ceil_mode=bool(pool.ceil_mode))
        if isinstance(module, _TRANSPOSED):
            raise GeometryError(
                "a transposed convolution has no windows to unfold",
                expected="a layer whose outputs each read one window",
                got=type(module).__name__,
            )
        raise ArgumentTypeError(
            "this layer has no convolution geometry",
            expected="nn.Conv1d/2d/3d, nn.MaxPool, nn.AvgPool or nn.Linear",
            got=type(module).__name__,
        )

    @classmethod
    def covering(cls, size: Sequence[int]) -> "Geometry":
        """Geometry of a kernel as large as its input grid: a linear layer that reads a flattened feature map."""
        axes = len(size)
        return cls(tuple(size), (1,) * axes, (1,) * axes, ((0, 0),) * axes)

    @property
    def axes(self) -> int:
        """Number of axes of the grid."""
        return len(self.kernel_size)

    @property
    def taps(self) -> int:
        """Number of taps B of the kernel."""
        return math.prod(self.kernel_size)

    @property
    def effective_size(self) -> tuple[int, ...]:
        """Extent of the kernel per axis: dilation·(taps − 1) + 1."""
        return tuple(step * (taps - 1) + 1 for taps, step in zip(self.kernel_size, self.dilation, strict=True))

    @property
    def identity_tap(self) -> tuple[int, ...]:
        """Centre tap per axis, rounded down: alone it copies the input of a layer with "same" padding."""
        return tuple((taps - 1) // 2 for taps in self.kernel_size)

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """Number of output locations per axis, for an input grid of some size.

        Raises:
            GeometryError: when the number of axes differs, or the kernel does not fit into the padded input.
        """
        if len(input_size) != self.axes:
            raise GeometryError(
                "input and kernel have different numbers of axes",
                expected=f"{self.axes} axes",
                got=f"input grid {tuple(input_size)}",
            )
        output = []
        for axis, size in enumerate(input_size):
            low, high = self.padding[axis]
            if size < 1 or size + low + high < self.effective_size[axis]:
                raise GeometryError(
                    "the kernel does not fit into the padded input",
                    expected=f"at least {max(1, self.effective_size[axis] - low - high)} locations on axis {axis}",
                    got=f"input grid {tuple(input_size)} for kernel {self.kernel_size}, dilation {self.dilation}, "
                    f"padding {self.padding}",
                )
            limit = {"reflect": size - 1, "circular": size}.get(self.padding_mode)
            if limit is not None and max(low, high) > limit:
                raise GeometryError(
                    f"{self.padding_mode} padding reaches beyond the input",
                    expected=f"padding of at most {limit} on axis {axis}",
                    got=self.padding,
                )
            span = size + low + high - self.effective_size[axis]
            count = span // self.stride[axis] + 1
            if self.ceil_mode and span % self.stride[axis] and count * self.stride[axis] < size + low:
                count += 1  # a last window that starts inside the input or its low padding, as torch has it
            output.append(count)
        return tuple(output)

    def along(self, axis: int) -> "Geometry":
        """The same on one axis alone."""
        return Geometry(
            (self.kernel_size[axis],),
            (self.stride[axis],),
            (self.dilation[axis],),
            (self.padding[axis],),
            self.padding_mode,
            self.ceil_mode,
        )

    def reads(self, axis: int, size: int) -> NDArray[np.int64]:
        """Input location, of `size` on one axis, that each of its output locations reads with each tap.

        Returns:
            (output locations, taps), −1 where a tap falls into zero padding.
        """
        (count,) = self.along(axis).output_size((size,))
        starts, taps = self.stride[axis] * np.arange(count), self.dilation[axis] * np.arange(self.kernel_size[axis])
        at = starts[:, None] + taps - self.padding[axis][0]
        if self.padding_mode == "circular":
            at %= size
        elif self.padding_mode == "reflect":
            at = size - 1 - np.abs(size - 1 - np.abs(at))
        elif self.padding_mode == "replicate":
            at = at.clip(0, size - 1)
        else:
            at[at >= size] = -1
            at[at < 0] = -1
        return at


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
    if isinstance(padding, Sequence) and any(isinstance(entry, Sequence) for entry in padding):
        if len(padding) != len(sizes):
            raise GeometryError(
                "the padding has the wrong number of axes", expected=f"{len(sizes)} pairs", got=padding, where=where
            )
        pairs = [per_axis(entry, 2, "a padding pair", 0, where) for entry in padding]
        return tuple((low, high) for low, high in pairs)
    amounts = per_axis(padding, len(sizes), "padding", 0, where)  # pyright: ignore[reportArgumentType]
    return tuple((amount, amount) for amount in amounts)
