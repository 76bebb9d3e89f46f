"""One convolution written three ways: as a doubly block Toeplitz matrix, over unfolded patches, and through T."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from growconv.convolution.geometry import Geometry, Padding, PerAxis, per_axis
from growconv.convolution.unfold import mask_tensor, require_memory, unfold
from growconv.errors import GeometryError


def toeplitz_matrix(
    weight: Float[Tensor, "outputs inputs *taps"],
    input_size: PerAxis,
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
    *,
    groups: int = 1,
    padding_mode: str = "zeros",
    sparse: bool = False,
) -> Float[Tensor, "rows columns"]:
    """A convolution as a matrix: doubly block Toeplitz, one block per (output channel, input channel) at stride 1.

    Args:
        weight: (C2, C1 / groups, *kernel_size) on one to three axes; the matrix is differentiable in it.
        input_size: size of the input grid, one entry per axis, or one number for all.
        stride: as in `F.conv2d`.
        padding: as in `F.conv2d`, or (low, high) pairs per axis.
        dilation: as in `F.conv2d`.
        groups: as in `F.conv2d`.
        padding_mode: how the padding is filled; with anything but zeros, columns that are read twice add up.
        sparse: return a coalesced `torch.sparse_coo_tensor` with C2·C1·(read taps) entries instead of a dense matrix.

    Returns:
        (C2·M, C1·L): rows (output channel, output location row-major), columns (input channel, input location), so that
        `matrix @ x.flatten()` is `F.conv2d(x)` flattened.

    Raises:
        GeometryError: the kernel does not fit the input, or the matrix would not fit into memory.

    Example:
        >>> growconv.toeplitz_matrix(torch.randn(2, 1, 3, 3), (6, 6)).shape
        torch.Size([32, 36])
    """
    shape = Geometry.read(tuple(weight.shape[2:]), stride, padding, dilation, padding_mode, where="toeplitz_matrix")
    input_size = per_axis(input_size, shape.axes, "input_size", 1, "toeplitz_matrix")
    weight = regroup(weight, groups)
    outputs, inputs = weight.shape[:2]
    rows, columns = math.prod(shape.output_size(input_size)), math.prod(input_size)
    size = (outputs * rows, inputs * columns)
    taken = outputs * inputs * rows * shape.taps * (weight.element_size() + 16)  # two indices beside each value
    require_memory(
        taken if sparse else math.prod(size) * weight.element_size(),
        weight.device,
        f"the {'sparse ' if sparse else ''}Toeplitz matrix {size}",
        "toeplitz_matrix",
        "use F.conv2d, a smaller input" + ("" if sparse else ", or sparse=True"),
    )
    m, b, location = _reads(input_size, shape, weight.device)
    values = weight.flatten(2)[:, :, b]  # (C2, C1, reads)
    if not sparse:
        matrix = weight.new_zeros(outputs, rows, inputs, columns)
        matrix.permute(1, 3, 0, 2).index_put_((m, location), values.permute(2, 0, 1), accumulate=True)
        return matrix.reshape(size)
    row = torch.arange(outputs, device=weight.device)[:, None, None] * rows + m
    column = torch.arange(inputs, device=weight.device)[None, :, None] * columns + location
    index = torch.stack([each.expand(values.shape).flatten() for each in (row, column)])
    return torch.sparse_coo_tensor(index, values.flatten(), size, check_invariants=False).coalesce()


def toeplitz_adjoint(
    matrix: Float[Tensor, "rows columns"], weight_shape: Sequence[int], input_size: PerAxis, **settings: Any
) -> Float[Tensor, "outputs inputs *taps"]:
    """Adjoint of `toeplitz_matrix`: maps the gradient of a loss with respect to the matrix to that of the kernel.

    Args:
        matrix: (C2·M, C1·L). Entries where the Toeplitz matrix holds no weight are ignored.
        weight_shape: (C2, C1 / groups, *kernel_size).
        input_size: size of the input grid, one entry per axis, or one number for all.
        **settings: stride, padding, dilation, groups, padding_mode and sparse, as given to `toeplitz_matrix`.

    Returns:
        A tensor of `weight_shape`: each entry is the sum over the places where the Toeplitz matrix holds that weight,
        so that ⟨matrix, toeplitz_matrix(weight)⟩ = ⟨toeplitz_adjoint(matrix), weight⟩ for every weight.

    Raises:
        GeometryError: the kernel does not fit the input, or the matrix has another shape.

    Example:
        >>> growconv.toeplitz_adjoint(torch.ones(32, 36), (2, 1, 3, 3), (6, 6)).flatten()[0]
        tensor(16.)
    """
    with torch.enable_grad():
        weight = torch.zeros(tuple(weight_shape), dtype=matrix.dtype, device=matrix.device, requires_grad=True)
        made = toeplitz_matrix(weight, input_size, **settings)
    if made.shape != matrix.shape:
        raise GeometryError(
            "the matrix does not belong to this convolution",
            expected=tuple(made.shape),
            got=tuple(matrix.shape),
            where="toeplitz_adjoint",
        )
    (result,) = torch.autograd.grad(made, weight, matrix)
    return result


def unfolded_conv(
    x: Float[Tensor, "n channels *size"],
    weight: Float[Tensor, "outputs inputs *taps"],
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
) -> Float[Tensor, "n outputs *output_size"]:
    """The same convolution as one matrix product with the unfolded patches: z_icm = Σ_d W_cd U_idm.

    Args:
        x: (n, C1, *size).
        weight: (C2, C1, *kernel_size).
        stride: as in `F.conv2d`.
        padding: as in `F.conv2d`, or (low, high) pairs per axis.
        dilation: as in `F.conv2d`.

    Returns:
        (n, C2, *output size).
    """
    shape = _geometry(x, weight, stride, padding, dilation, "unfolded_conv")
    result = torch.einsum("cd,idm->icm", weight.flatten(1), unfold(x, shape))
    return result.unflatten(2, shape.output_size(x.shape[2:]))


def masked_conv(
    x: Float[Tensor, "n channels *size"],
    weight: Float[Tensor, "outputs inputs *taps"],
    stride: PerAxis = 1,
    padding: Padding = 0,
    dilation: PerAxis = 1,
) -> Float[Tensor, "n outputs *output_size"]:
    """The same convolution through the mask tensor: z_icm = Σ_kbl W_ckb T_mbl x_ikl, k being the channel that is read.

    Arguments and result are those of `unfolded_conv`.
    """
    shape = _geometry(x, weight, stride, padding, dilation, "masked_conv")
    size = tuple(x.shape[2:])
    mask = mask_tensor(size, shape, dtype=x.dtype, device=x.device)
    patches = torch.einsum("mbl,ikl->ikbm", mask, x.flatten(2))
    return torch.einsum("ckb,ikbm->icm", weight.flatten(2), patches).unflatten(2, shape.output_size(size))


def regroup(weight: Tensor, groups: int, fewer: int = 1) -> Tensor:
    """The kernel (C2, C1 / groups, *kernel_size) of a grouped convolution with some of its zeros written out.

    The result (C2, C1 / fewer, *kernel_size) is block diagonal inside each of `fewer` larger groups.
    """
    if groups < 1 or weight.shape[0] % groups or groups % fewer:
        raise GeometryError(
            "the channels cannot be divided into these groups",
            got=f"{weight.shape[0]} outputs, {groups} to {fewer} groups",
        )
    inside = groups // fewer
    if inside == 1:
        return weight
    blocks = weight.unflatten(0, (fewer, inside, -1))
    eye = torch.eye(inside, dtype=weight.dtype, device=weight.device)
    return torch.einsum("fgci...,gh->fgchi...", blocks, eye).flatten(3, 4).flatten(0, 2)


def _reads(
    input_size: Sequence[int], shape: Geometry, device: torch.device
) -> tuple[Int[Tensor, " reads"], Int[Tensor, " reads"], Int[Tensor, " reads"]]:
    """Every (output location, tap, input location) with T_mbl = 1, all row-major."""
    combined = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(3)]
    for axis, size in enumerate(input_size):
        table = torch.tensor(shape.reads(axis, size), device=device)
        m, b = torch.nonzero(table >= 0, as_tuple=True)
        for position, (index, count) in enumerate(((m, table.shape[0]), (b, table.shape[1]), (table[m, b], size))):
            combined[position] = (combined[position][:, None] * count + index).flatten()
    return combined[0], combined[1], combined[2]


def _geometry(x: Tensor, weight: Tensor, stride: PerAxis, padding: Padding, dilation: PerAxis, where: str) -> Geometry:
    """Of a convolution whose kernel has to fit its input."""
    if x.dim() != weight.dim() or x.shape[1] != weight.shape[1]:
        raise GeometryError(
            "input and kernel do not fit",
            expected=f"an input (n, {weight.shape[1]}, *size) on {weight.dim() - 2} axes",
            got=tuple(x.shape),
            where=where,
        )
    return Geometry.read(tuple(weight.shape[2:]), stride, padding, dilation, where=where)
