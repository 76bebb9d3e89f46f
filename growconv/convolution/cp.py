"""Convolutions with a CP kernel: a sum of R rank-one terms, W[o,i,*t] = Σ_r out[o,r]·in[i,r]·∏ axis[t,r]."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from growconv.convolution.decomposition import Fit, cp_kernel, decompose_cp
from growconv.convolution.factorized import FactorizedConv
from growconv.convolution.ranks import Rank, cp_rank


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

    def _load_kernel(self, kernel: Tensor, **options: Any) -> Fit:
        factors, fit = decompose_cp(kernel, self.rank, **options)
        for parameter, factor in zip((self.out_factor, self.in_factor, *self.axis_factors), factors, strict=True):
            parameter.copy_(factor)
        return fit

    def _chain(self, x: Tensor) -> Tensor:
        x = self._mix(x, self.in_factor.T)
        if self.implementation == "mobilenet":
            for axis, factor in enumerate(self.axis_factors):
                x = self._convolve_axis(x, axis, factor.T)
        else:
            window = self.axis_factors[0].T
            for factor in self.axis_factors[1:]:
                window = window.unsqueeze(-1) * factor.T.reshape(self.rank, *[1] * (window.dim() - 1), -1)
            x = self.convolve(x, window.unsqueeze(1), groups=self.rank)
        return self._mix(x, self.out_factor, self.bias)


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
