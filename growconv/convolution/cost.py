"""What a convolution costs in its forward pass.

FLOPs are 2 × multiply-adds, as `torch.utils.flop_counter` counts them: padding is multiplied like any other value, and
biases and elementwise products are free. The backward pass takes as much for the kernel and as much for the input.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import nn

from growconv.convolution.cp import CPConv
from growconv.convolution.factorized import FactorizedConv
from growconv.convolution.geometry import Geometry
from growconv.convolution.kernels import Conv
from growconv.convolution.tucker import TuckerConv
from growconv.errors import ArgumentTypeError, ArgumentValueError


@dataclass(frozen=True)
class ConvCost:
    """Operations of one convolution layer's forward pass on one batch.

    Attributes:
        multiplications: those with padding included.
        additions: biases included.
        padding_multiplications: those of the multiplications that meet zero padding.
        elementwise_multiplications: those of the multiplications that build a kernel from factors by outer products.
    """

    multiplications: int
    additions: int
    padding_multiplications: int
    elementwise_multiplications: int

    @property
    def flops(self) -> int:
        """2 × multiply-adds of the forward pass."""
        return 2 * (self.multiplications - self.elementwise_multiplications)

    def __add__(self, other: "ConvCost") -> "ConvCost":
        """Cost of two layers."""
        return ConvCost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class _Stage:
    """One conv of a layer: channels read and written, groups, and the geometry."""

    inputs: int
    outputs: int
    groups: int
    geometry: Geometry


def conv_cost(conv: nn.Module, input_size: Sequence[int], batch: int = 1) -> ConvCost:
    """Cost of a convolution on inputs of a given size, counted, not measured.

    Args:
        conv: nn.Conv1d/2d/3d, or a CP or Tucker convolution, whose implementation decides.
        input_size: size of the input grid, one entry per axis.
        batch: number of samples n.

    Returns:
        The cost.

    Raises:
        GeometryError: the kernel does not fit the input.
        ArgumentTypeError: for another kind of layer.

    Example:
        >>> growconv.conv_cost(nn.Conv2d(3, 8, 3, padding=1), (16, 16)).flops
        110592
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ArgumentValueError(
            "this batch size is invalid", expected="1 or more samples", got=batch, where="conv_cost"
        )
    if not isinstance(conv, Conv) and not isinstance(conv, FactorizedConv):
        raise ArgumentTypeError(
            "only convolutions have this cost",
            expected="nn.Conv1d/2d/3d, CPConv or TuckerConv",
            got=type(conv).__name__,
            where="conv_cost",
        )
    counts = dict.fromkeys((field.name for field in fields(ConvCost)), 0)
    size, outputs = tuple(input_size), 0
    for stage in _stages(conv):
        output = stage.geometry.output_size(size)
        outputs = batch * stage.outputs * math.prod(output)
        products = outputs * (stage.inputs // stage.groups) * stage.geometry.taps
        real = batch * stage.outputs * (stage.inputs // stage.groups) * _reads(stage.geometry, size)
        counts["multiplications"] += products
        counts["additions"] += products - outputs
        counts["padding_multiplications"] += products - real
        size = output
    if conv.bias is not None:
        counts["additions"] += outputs
    if isinstance(conv, FactorizedConv):
        elementwise, products = _building(conv)
        counts["elementwise_multiplications"] = elementwise
        counts["multiplications"] += elementwise + products
        counts["additions"] += products
    return ConvCost(**counts)


def multiplications_per_output(conv: Conv | FactorizedConv) -> float:
    """Multiply-adds per output location; what builds a kernel from factors is left out.

    Args:
        conv: nn.Conv1d/2d/3d, or a CP or Tucker convolution. A conv that it runs before its stride counts as often as
            it runs per output location.
    """
    total, left = 0.0, math.prod(conv.stride)
    for stage in _stages(conv):
        left /= math.prod(stage.geometry.stride)
        total += left * stage.outputs * (stage.inputs // stage.groups) * stage.geometry.taps
    return total


def _stages(conv: Conv | FactorizedConv) -> list[_Stage]:
    """The convs that a layer runs, in order."""
    geometry = Geometry.of(conv)
    if isinstance(conv, Conv) or conv.implementation == "reconstructed":
        return [_Stage(conv.in_channels, conv.out_channels, conv.groups, geometry)]
    one = Geometry.covering((1,) * geometry.axes)
    if isinstance(conv, TuckerConv):
        outputs, inputs = conv.rank
        middle = [_Stage(inputs, outputs, 1, geometry)]
    elif isinstance(conv, CPConv):
        inputs = outputs = conv.rank
        windows = [_along(geometry, axis) for axis in range(geometry.axes)]
        middle = [
            _Stage(inputs, inputs, inputs, window)
            for window in (windows if conv.implementation == "mobilenet" else [geometry])
        ]
    else:
        raise ArgumentTypeError("this factorized convolution is not known", got=type(conv).__name__, where="conv_cost")
    return [_Stage(conv.in_channels, inputs, 1, one), *middle, _Stage(outputs, conv.out_channels, 1, one)]


def _building(conv: FactorizedConv) -> tuple[int, int]:
    """What builds kernels out of factors on every call: elementwise products and multiply-adds."""
    taps = math.prod(conv.kernel_size)
    if conv.implementation == "reconstructed" and isinstance(conv, TuckerConv):
        outputs, inputs = conv.rank
        return 0, outputs * conv.in_channels * taps * (inputs + conv.out_channels)
    if not isinstance(conv, CPConv) or conv.implementation == "mobilenet":
        return 0, 0
    # Outer products, axis by axis: of the window alone, or of input channel and window.
    reconstructed = conv.implementation == "reconstructed"
    sizes = [conv.in_channels, *conv.kernel_size] if reconstructed else list(conv.kernel_size)
    partial = sum(math.prod(sizes[: count + 1]) for count in range(1, len(sizes)))
    full = conv.out_channels * math.prod(sizes) if reconstructed else 0
    return partial * conv.rank, full * conv.rank


def _along(geometry: Geometry, axis: int) -> Geometry:
    """The part of a separable window on one axis."""

    def only(values: tuple, neutral: object) -> tuple:
        return tuple(value if index == axis else neutral for index, value in enumerate(values))

    return Geometry(
        only(geometry.kernel_size, 1),
        only(geometry.stride, 1),
        only(geometry.dilation, 1),
        only(geometry.padding, (0, 0)),
        geometry.padding_mode,
    )


def _reads(geometry: Geometry, size: tuple[int, ...]) -> int:
    """Number of (output location, tap) that read a real input location."""
    return math.prod(int((geometry.reads(axis, length) >= 0).sum()) for axis, length in enumerate(size))
