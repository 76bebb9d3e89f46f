"""Convolutions and linear layers as a matrix product: weights times columns, whatever the layer."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from growconv.convolution.geometry import Geometry
from growconv.convolution.unfold import pad, windows
from growconv.network import layers


def columns(module: nn.Module, values: Tensor) -> Float[Tensor, "d p"]:
    """What a layer multiplies its weights with: layer(values) = weights @ columns, one column per sample and location.

    Args:
        module: convolution (also transposed) or linear layer; only its geometry is looked at.
        values: input of the layer as the module receives it, with any number of channels.

    Returns:
        (d, p). Rows in the order of a weight (out, in, *kernel) flattened behind its first axis; columns in the order
        of `positions`.
    """
    if not layers.weighted(module).kernel_size:
        return values.reshape(-1, values.shape[-1]).mT
    if layers.is_transposed(module):
        return _transposed_columns(module, values)
    geometry = Geometry.of(module)
    view = windows(pad(values, geometry), geometry)
    axes = geometry.axes
    return view.permute(*range(1, 2 + axes), 0, *range(2 + axes, 2 + 2 * axes)).reshape(
        values.shape[1] * geometry.taps, -1
    )


def designs(module: nn.Module, read: Sequence[Tensor], groups: int) -> list[Float[Tensor, "d p"]]:
    """`columns` of each group of a layer, several calls side by side.

    Args:
        read: what each of its calls read.
        groups: number of groups.
    """
    axis = layers.channel_axis(module, read[0].dim())
    parts = [each.chunk(groups, axis) for each in read]
    found = [[columns(module, own) for own in calls] for calls in zip(*parts, strict=True)]
    return [calls[0] if len(calls) == 1 else torch.cat(calls, 1) for calls in found]


def positions(module: nn.Module, outputs: Tensor) -> Float[Tensor, "c p"]:
    """Outputs of a layer as one column per sample and location.

    Args:
        outputs: what it gives.
    """
    return outputs.movedim(layers.channel_axis(module, outputs.dim()), 0).flatten(1)


def _transposed_columns(module: nn.Module, values: Tensor) -> Tensor:
    """A transposed convolution is one with the mirrored kernel on the input with zeros put between its entries."""
    axes = len(layers.weighted(module).kernel_size)
    stride, padding, dilation, extra, kernel = (
        tuple(getattr(module, name)) for name in ("stride", "padding", "dilation", "output_padding", "kernel_size")
    )
    spread = values.new_zeros(
        *values.shape[:2], *((size - 1) * step + 1 for size, step in zip(values.shape[2:], stride, strict=True))
    )
    spread[(..., *(slice(None, None, step) for step in stride))] = values
    sides = []
    for axis in reversed(range(axes)):
        reach = dilation[axis] * (kernel[axis] - 1) - padding[axis]
        sides += [reach, reach + extra[axis]]
    view = windows(F.pad(spread, sides), Geometry(kernel, (1,) * axes, dilation, ((0, 0),) * axes))
    view = torch.flip(view, tuple(range(2, 2 + axes)))
    order = (*range(1, 2 + axes), 0, *range(2 + axes, 2 + 2 * axes))
    return view.permute(order).flatten(0, axes).flatten(1)
