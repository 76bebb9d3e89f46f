"""Patches, the mask tensor T and tap multiplicities q, on any number of axes."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from growconv.convolution.geometry import Geometry
from growconv.errors import GeometryError


def pad(x: Tensor, geometry: Geometry) -> Tensor:
    """Feature maps (n, C, *size), or one (C, *size), with their padding; in ceil_mode with all that windows read."""
    size = tuple(x.shape[-geometry.axes :])
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


def convolve(
    x: Tensor,
    weight: Float[Tensor, "k c_per_group *taps"],
    geometry: Geometry,
    bias: Float[Tensor, " k"] | None = None,
    groups: int = 1,
) -> Tensor:
    """The convolution of a geometry with any weights, of (n, C, *size) or without the sample axis.

    What torch's convolution cannot pad itself is padded before.
    """
    padding = [low for low, _ in geometry.padding]
    if geometry.padding_mode != "zeros" or any(low != high for low, high in geometry.padding):
        x, padding = pad(x, geometry), [0] * geometry.axes
    function = (F.conv1d, F.conv2d, F.conv3d)[geometry.axes - 1]
    return function(x, weight, bias, geometry.stride, padding, geometry.dilation, groups)


def windows(padded: Float[Tensor, "n c *padded"], geometry: Geometry) -> Float[Tensor, "n c *kernel_and_output"]:
    """View of feature maps with their padding as (n, c, *kernel, *output); copies nothing."""
    view, axes = padded, geometry.axes
    for axis in range(axes):
        view = view.unfold(2 + axis, geometry.effective_size[axis], geometry.stride[axis])
        view = view[..., :: geometry.dilation[axis]]
    return view.permute(0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))


def unfold(x: Float[Tensor, "n c *size"], geometry: Geometry) -> Float[Tensor, "n a l"]:
    """Patches U (n, C·taps, L) that a convolution reads of maps (n, C, *size), one column per output location.

    Rows are ordered channel first, then taps row-major, as torch.nn.functional.unfold has them.
    """
    view = windows(pad(x, geometry), geometry)
    return view.reshape(x.shape[0], x.shape[1] * geometry.taps, math.prod(view.shape[2 + geometry.axes :]))


def fold(columns: Float[Tensor, "n a l"], geometry: Geometry, input_size: Sequence[int]) -> Float[Tensor, "n c *size"]:
    """Adjoint of `unfold`: adds every entry of the columns (n, C·taps, L) to the input location that it was read from.

    What was read from zero padding is dropped; the result is (n, C, *input_size).
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
    """How often each location of the input grid is read: q_l = number of (m, b) with T_mbl = 1.

    The counts are a product of one factor per axis. None stands for torch's default dtype and device.
    """
    geometry.output_size(input_size)  # refuses what does not fit
    result = torch.ones((), dtype=dtype or torch.get_default_dtype(), device=device)
    for axis, size in enumerate(input_size):
        reads = geometry.reads(axis, size)
        counts = torch.from_numpy(np.bincount(reads[reads >= 0], minlength=size))
        result = result.unsqueeze(-1) * counts.to(result)
    return result


def available_bytes(device: torch.device | str | None = None) -> int | None:
    """Bytes that could be allocated now on a device, None being the CPU; None where that is not known."""
    kind = torch.device(device or "cpu")
    if kind.type == "cuda":
        free, _ = torch.cuda.mem_get_info(kind)
        return free + torch.cuda.memory_reserved(kind) - torch.cuda.memory_allocated(kind)
    file = Path("/proc/meminfo")
    if kind.type != "cpu" or not file.exists():
        return None
    lines = file.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def require_memory(needed: int, device: torch.device | str | None, what: str, where: str, fix: str) -> None:
    """Refuse a tensor that would not fit, before it is allocated.

    Raises:
        GeometryError: saying the bytes it would take.
    """
    limit = available_bytes(device)
    if limit is not None and needed > limit:
        raise GeometryError(
            f"{what} would not fit into memory",
            expected=f"at most {limit / 2**30:.3g} GiB on {torch.device(device or 'cpu')}",
            got=f"{needed} bytes ({needed / 2**30:.3g} GiB)",
            where=where,
            fix=fix,
        )
