"""Patches, the mask tensor T and tap multiplicities q, on any number of axes."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from growconv.convolution.geometry import Geometry
from growconv.convolution.memory import require_memory


def pad(x: Float[Tensor, "n c *size"], geometry: Geometry) -> Float[Tensor, "n c *padded"]:
    """Input with the padding of a geometry put around it.

    Args:
        x: feature maps.
        geometry: whose padding and padding mode.

    Returns:
        The padded maps; with ceil_mode also the zeros that the last windows reach.
    """
    size = tuple(x.shape[2:])
    output = geometry.output_size(size)
    sides: list[int] = []
    extra: list[int] = []
    for axis in reversed(range(geometry.axes)):
        low, high = geometry.padding[axis]
        sides += [low, high]
        reach = (output[axis] - 1) * geometry.stride[axis] + geometry.effective_size[axis]
        extra += [0, max(0, reach - size[axis] - low - high)]
    if any(sides):
        x = F.pad(x, sides) if geometry.padding_mode == "zeros" else F.pad(x, sides, mode=geometry.padding_mode)
    return F.pad(x, extra) if any(extra) else x


def windows(padded: Float[Tensor, "n c *padded"], geometry: Geometry) -> Float[Tensor, "n c *kernel_and_output"]:
    """View of an already padded input as (n, c, *kernel, *output); copies nothing.

    Args:
        padded: feature maps with their padding.
        geometry: kernel, stride and dilation; its padding is not looked at.

    Returns:
        The view.
    """
    view = padded
    for axis in range(geometry.axes):
        view = view.unfold(2 + axis, geometry.effective_size[axis], geometry.stride[axis])
        view = view[..., :: geometry.dilation[axis]]
    axes = geometry.axes
    return view.permute(0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))


def unfold(x: Float[Tensor, "n c *size"], geometry: Geometry) -> Float[Tensor, "n a l"]:
    """Patches U that a convolution reads, one column per output location.

    Args:
        x: feature maps (n, C, *size).
        geometry: of the convolution.

    Returns:
        (n, C·taps, L). Rows are ordered channel first, then taps row-major, as torch.nn.functional.unfold has them.
    """
    view = windows(pad(x, geometry), geometry)
    return view.reshape(x.shape[0], x.shape[1] * geometry.taps, -1)


def fold(columns: Float[Tensor, "n a l"], geometry: Geometry, input_size: Sequence[int]) -> Float[Tensor, "n c *size"]:
    """Adjoint of `unfold`: adds every entry of the columns to the input location that it was read from.

    Args:
        columns: (n, C·taps, L).
        geometry: of the convolution.
        input_size: grid of the result.

    Returns:
        (n, C, *input_size); what was read from zero padding is dropped.
    """
    with torch.enable_grad():
        channels = columns.shape[1] // geometry.taps
        x = torch.zeros(columns.shape[0], channels, *input_size, dtype=columns.dtype, device=columns.device)
        # a sum, since torch.autograd.grad of tensors loads sympy at its first call, for half a second
        total = (unfold(x.requires_grad_(), geometry) * columns).sum()
    (result,) = torch.autograd.grad(total, x)
    return result


def mask_tensor(
    input_size: Sequence[int],
    conv: nn.Module | Geometry,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "m b l"]:
    """Mask tensor T: 1 iff tap b of output m reads input location l (TINY, section on convolutions).

    Args:
        input_size: size of the input grid of the convolution.
        conv: the convolution, or its geometry.
        dtype: dtype of the result; None for torch's default dtype.
        device: device of the result; None for torch's default device.

    Returns:
        T (M, B, L), all zeros for a tap that falls into zero padding. It has M·B·L entries: meant for small grids.

    Raises:
        GeometryError: the kernel does not fit the input, or T would not fit into memory.

    Example:
        >>> growconv.mask_tensor((6, 6), nn.Conv2d(1, 1, 3)).shape  # outputs, taps, inputs
        torch.Size([16, 9, 36])
    """
    geometry = conv if isinstance(conv, Geometry) else Geometry.of(conv)
    shape = (math.prod(geometry.output_size(input_size)), geometry.taps, math.prod(input_size))
    entry = (dtype or torch.get_default_dtype()).itemsize
    require_memory(math.prod(shape) * entry, device, f"the mask tensor {shape}", "mask_tensor", "use unfold instead")
    result = torch.ones(1, 1, 1, dtype=dtype or torch.get_default_dtype(), device=device)
    for axis, size in enumerate(input_size):
        reads = torch.tensor(geometry.reads(axis, size), device=device)
        one_axis = (reads.unsqueeze(-1) == torch.arange(size, device=device)).to(result.dtype)
        result = torch.einsum("mbl,xyz->mxbylz", result, one_axis).flatten(4).flatten(2, 3).flatten(0, 1)
    return result


def tap_multiplicities(
    input_size: Sequence[int],
    geometry: Geometry,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, " *size"]:
    """How often each input location is read: q_l = number of (m, b) with T_mbl = 1.

    Args:
        input_size: size of the input grid.
        geometry: of the convolution that reads it.
        dtype: of the result; None for torch's default dtype.
        device: of the result; None for torch's default device.

    Returns:
        The counts on the input grid. They are a product of one factor per axis.
    """
    geometry.output_size(input_size)
    result = torch.ones((), dtype=dtype or torch.get_default_dtype(), device=device)
    for axis, size in enumerate(input_size):
        reads = geometry.reads(axis, size)
        counts = torch.from_numpy(np.bincount(reads[reads >= 0], minlength=size))
        result = result.unsqueeze(-1) * counts.to(result)
    return result
