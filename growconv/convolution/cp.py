"""Convolutions with a CP kernel: a sum of R rank-one terms, W[o,i,*t] = Σ_r out[o,r]·in[i,r]·∏ axis[t,r]."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from growconv.convolution.decomposition import Fit, cp_kernel, decompose_cp
from growconv.convolution.factorized import FactorizedConv, Rank, Stage, one_tap, share_of, whole_ranks
from growconv.convolution.geometry import Geometry
from growconv.errors import ArgumentValueError


def cp_rank(shape: tuple[int, ...], rank: Rank = "same", where: str | None = None) -> int:
    """Number of rank-one terms of a CP kernel.

    Args:
        shape: of the full kernel (C2, C1, *kernel_size).
        rank: a number of terms; a float for a share of the full kernel's parameters; "same" for (at most) as many
            parameters as the full kernel has.
        where: module path or name for error messages.

    Returns:
        A number from 1 to the bound ∏ shape / max(shape), above which no kernel of this shape needs another term.
    """
    bound, share = math.prod(shape) // max(shape), share_of(rank, where)
    if share is None:
        return whole_ranks(rank, [bound], where)[0]
    terms = max(1, int(share * math.prod(shape) / sum(shape)))
    if terms > bound:
        raise ArgumentValueError(
            "this share of the parameters gives more terms than any kernel of this shape needs",
            expected=f"at most {bound * sum(shape) / math.prod(shape):.3g}, that is {bound} terms",
            got=rank,
            where=where,
        )
    return terms


class CPConv(FactorizedConv):
    """A convolution with a CP kernel (Lebedev et al. 2015).

    Implementations: "factorized" is a 1-tap conv (C1 → R), a depthwise conv over the whole window and a 1-tap conv
    (R → C2); "mobilenet" does the depthwise part one axis after the other; "reconstructed" builds the full kernel.

    Attributes:
        out_factor: (C2, R).
        in_factor: (C1, R).
        axis_factor_0, axis_factor_1, ...: (taps of the axis, R).

    Example:
        >>> growconv.CPConv.from_conv(nn.Conv2d(16, 32, 3), rank=0.5).rank
        42
    """

    implementations: ClassVar[tuple[str, ...]] = ("factorized", "reconstructed", "mobilenet")
    expected_factors: ClassVar[str] = "(C2, R), (C1, R), and (taps, R) per axis of the kernel"
    out_factor: nn.Parameter
    in_factor: nn.Parameter

    def _make_factors(self, rank: Rank, factory: dict[str, Any]) -> None:
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        terms = cp_rank(shape, rank, type(self).__name__)
        names = ["out_factor", "in_factor", *(f"axis_factor_{axis}" for axis in range(self.axes))]
        for name, size in zip(names, shape, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(size, terms, **factory)))

    @property
    def rank(self) -> int:
        """Number of rank-one terms."""
        return self.in_factor.shape[1]

    @property
    def axis_factors(self) -> tuple[Tensor, ...]:
        """One factor (taps, R) per axis of the kernel."""
        return tuple(getattr(self, f"axis_factor_{axis}") for axis in range(self.axes))

    @property
    def weight(self) -> Tensor:
        """Full kernel (C2, C1, *kernel_size), differentiable in every factor."""
        return cp_kernel([self.out_factor, self.in_factor, *self.axis_factors])

    @classmethod
    def _meant_by(cls, factors: Sequence[Tensor]) -> tuple[tuple[int, ...], Rank] | None:
        if any(each.dim() != 2 or each.shape[1] != factors[0].shape[1] for each in factors):
            return None
        return tuple(each.shape[0] for each in factors), factors[0].shape[1]

    def _decomposed(self, kernel: Tensor, **options: Any) -> tuple[tuple[Tensor, ...], Fit]:
        return decompose_cp(kernel, self.rank, **options)

    def _chain(self) -> list[Stage]:
        first, *rest = self.axis_factors
        if self.implementation == "mobilenet":
            windows = [self._along(axis) for axis in range(self.axes)]
        else:
            window = first.T
            for factor in rest:
                window = window.unsqueeze(-1) * factor.T.reshape(self.rank, *[1] * (window.dim() - 1), -1)
            windows = [Stage(window.unsqueeze(1), self.geometry, self.rank)]
        return [one_tap(self.in_factor.T, self.axes), *windows, one_tap(self.out_factor, self.axes)]

    def _along(self, axis: int) -> Stage:
        """The depthwise convolution along one axis."""
        whole, one = self.geometry, Geometry.covering((1,) * self.axes)
        settings: dict[str, Any] = {
            name: tuple(getattr(whole if each == axis else one, name)[each] for each in range(self.axes))
            for name in ("kernel_size", "stride", "dilation", "padding")
        }
        geometry = Geometry(**settings, padding_mode=whole.padding_mode)
        return Stage(self.axis_factors[axis].T.reshape(self.rank, 1, *geometry.kernel_size), geometry, self.rank)


class CPConv1d(CPConv):
    """`nn.Conv1d` with a CP kernel; see `CPConv` for the factors and `FactorizedConv` for the arguments.

    Example:
        >>> growconv.CPConv1d(4, 8, 3, rank=2)(torch.zeros(1, 4, 9)).shape
        torch.Size([1, 8, 7])
    """

    axes = 1


class CPConv2d(CPConv):
    """`nn.Conv2d` with a CP kernel; see `CPConv` for the factors and `FactorizedConv` for the arguments.

    Example:
        >>> growconv.CPConv2d(4, 8, 3, rank=2)(torch.zeros(1, 4, 9, 9)).shape
        torch.Size([1, 8, 7, 7])
    """

    axes = 2


class CPConv3d(CPConv):
    """`nn.Conv3d` with a CP kernel; see `CPConv` for the factors and `FactorizedConv` for the arguments.

    Example:
        >>> growconv.CPConv3d(4, 8, 3, rank=2)(torch.zeros(1, 4, 9, 9, 9)).shape
        torch.Size([1, 8, 7, 7, 7])
    """

    axes = 3
