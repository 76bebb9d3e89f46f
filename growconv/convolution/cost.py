"""What a convolution costs in its forward pass.

FLOPs are 2 × multiply-adds, as `torch.utils.flop_counter` counts them: padding is multiplied like any other value, and
biases and elementwise products are free. The backward pass takes as much for the kernel and as much for the input.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from growconv.convolution.cp import CPConv
from growconv.convolution.factorized import FactorizedConv, Stage
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
    size, outputs = tuple(input_size), 0
    elementwise, products = _building(conv)
    cost = ConvCost(elementwise + products, products, 0, elementwise)
    for weight, geometry, _ in _stages(conv):
        output = geometry.output_size(size)
        outputs, filters = batch * weight.shape[0] * math.prod(output), batch * weight.shape[0] * weight.shape[1]
        reads = math.prod(int((geometry.reads(axis, length) >= 0).sum()) for axis, length in enumerate(size))
        products = outputs * weight[0].numel()
        cost += ConvCost(products, products - outputs, products - filters * reads, 0)
        size = output
    return cost if conv.bias is None else cost + ConvCost(0, outputs, 0, 0)


def multiplications_per_output(conv: FactorizedConv) -> float:
    """Multiply-adds per output location; what builds a kernel from factors is left out.

    A convolution that it runs before its stride counts as often as it runs per output location.
    """
    total, left = 0.0, math.prod(conv.stride)
    for weight, geometry, _ in _stages(conv):
        left /= math.prod(geometry.stride)
        total += left * weight.numel()
    return total


@torch.no_grad()
def _stages(conv: Conv | FactorizedConv) -> list[Stage]:
    """The convolutions that a layer runs, in order."""
    return conv.stages() if isinstance(conv, FactorizedConv) else [Stage(conv.weight, Geometry.of(conv), conv.groups)]


def _building(conv: Conv | FactorizedConv) -> tuple[int, int]:
    """What builds kernels out of factors on every call: elementwise products and multiply-adds."""
    reconstructed = isinstance(conv, FactorizedConv) and conv.implementation == "reconstructed"
    taps = math.prod(conv.kernel_size)
    if isinstance(conv, TuckerConv) and reconstructed:
        outputs, inputs = conv.rank
        return 0, outputs * conv.in_channels * taps * (inputs + conv.out_channels)
    if not isinstance(conv, CPConv) or conv.implementation == "mobilenet":
        return 0, 0
    # Outer products, axis by axis: of the window alone, or of input channel and window.
    sizes = [conv.in_channels, *conv.kernel_size] if reconstructed else list(conv.kernel_size)
    partial = sum(math.prod(sizes[: count + 1]) for count in range(1, len(sizes)))
    return partial * conv.rank, conv.out_channels * math.prod(sizes) * conv.rank if reconstructed else 0
