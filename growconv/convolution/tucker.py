"""Convolutions with a Tucker kernel: W[o,i,*t] = Σ_pq out[o,p]·in[i,q]·core[p,q,*t]."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from growconv.convolution.decomposition import Fit, decompose_tucker, tucker_kernel
from growconv.convolution.factorized import FactorizedConv, Rank, Stage, one_tap, share_of, whole_ranks
from growconv.errors import ArgumentValueError


def tucker_ranks(shape: tuple[int, ...], rank: Rank = "same", where: str | None = None) -> tuple[int, int]:
    """Ranks (output, input) of a Tucker kernel.

    Args:
        shape: of the full kernel (C2, C1, *kernel_size).
        rank: one integer for both, a pair (output rank, input rank), a float for a share of the full kernel's
            parameters, or "same" for (at most) as many parameters. A share keeps output rank / C2 = input rank / C1.
        where: module path or name for error messages.

    Returns:
        The pair, each at least 1 and at most its bound: min(C2, C1·taps) and min(C1, C2·taps).
    """
    outputs, inputs, taps = shape[0], shape[1], math.prod(shape[2:])
    bounds, share = (min(outputs, inputs * taps), min(inputs, outputs * taps)), share_of(rank, where)
    if share is None:
        ranks = whole_ranks(rank, bounds, where)
        return ranks[0], ranks[1]
    # r2 = ρ·C2 and r1 = ρ·C1 give ρ·(C2² + C1²) + ρ²·C2·C1·taps parameters.
    linear, square = outputs**2 + inputs**2, outputs * inputs * taps
    scale = (math.sqrt(linear**2 + 4 * square**2 * share) - linear) / (2 * square)
    if scale > 1:
        raise ArgumentValueError(
            "this share of the parameters gives ranks above the number of channels",
            expected=f"at most {(linear + square) / square:.3g}",
            got=rank,
            where=where,
        )
    return max(1, min(bounds[0], int(scale * outputs))), max(1, min(bounds[1], int(scale * inputs)))


class TuckerConv(FactorizedConv):
    """A convolution with a Tucker-2 kernel (Kim et al. 2016): low rank in both channel axes, full over the window.

    Implementations: "factorized" is a 1-tap conv (C1 → r1), a conv with the core (r1 → r2) and a 1-tap conv (r2 → C2);
    "reconstructed" builds the full kernel.

    Attributes:
        core: (r2, r1, *kernel_size).
        out_factor: (C2, r2).
        in_factor: (C1, r1).

    Example:
        >>> growconv.TuckerConv.from_conv(nn.Conv2d(16, 32, 3), rank=(8, 4)).rank
        (8, 4)
    """

    expected_factors: ClassVar[str] = "a core (r2, r1, *kernel_size), (C2, r2) and (C1, r1)"
    core: nn.Parameter
    out_factor: nn.Parameter
    in_factor: nn.Parameter

    def _make_factors(self, rank: Rank, factory: dict[str, Any]) -> None:
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        outputs, inputs = tucker_ranks(shape, rank, type(self).__name__)
        self.core = nn.Parameter(torch.empty(outputs, inputs, *self.kernel_size, **factory))
        self.out_factor = nn.Parameter(torch.empty(self.out_channels, outputs, **factory))
        self.in_factor = nn.Parameter(torch.empty(self.in_channels, inputs, **factory))

    @property
    def rank(self) -> tuple[int, int]:
        """(output rank, input rank)."""
        return self.core.shape[0], self.core.shape[1]

    @property
    def weight(self) -> Tensor:
        """Full kernel (C2, C1, *kernel_size), differentiable in every factor."""
        return tucker_kernel(self.core, self.out_factor, self.in_factor)

    @classmethod
    def _meant_by(cls, factors: Sequence[Tensor]) -> tuple[tuple[int, ...], Rank] | None:
        if [each.dim() for each in factors[1:]] != [2, 2] or factors[0].dim() < 3:
            return None
        core, outputs, inputs = factors
        ranks = (core.shape[0], core.shape[1])
        fits = ranks == (outputs.shape[1], inputs.shape[1])
        return ((outputs.shape[0], inputs.shape[0], *core.shape[2:]), ranks) if fits else None

    def _decomposed(self, kernel: Tensor, **options: Any) -> tuple[tuple[Tensor, ...], Fit]:
        return decompose_tucker(kernel, self.rank, **options)

    def _chain(self) -> list[Stage]:
        core = Stage(self.core, self.geometry)
        return [one_tap(self.in_factor.T, self.axes), core, one_tap(self.out_factor, self.axes)]


class TuckerConv1d(TuckerConv):
    """`nn.Conv1d` with a Tucker kernel; see `TuckerConv` for the factors and `FactorizedConv` for the arguments.

    Example:
        >>> growconv.TuckerConv1d(4, 8, 3, rank=(3, 2))(torch.zeros(1, 4, 9)).shape
        torch.Size([1, 8, 7])
    """

    axes = 1


class TuckerConv2d(TuckerConv):
    """`nn.Conv2d` with a Tucker kernel; see `TuckerConv` for the factors and `FactorizedConv` for the arguments.

    Example:
        >>> growconv.TuckerConv2d(4, 8, 3, rank=(3, 2))(torch.zeros(1, 4, 9, 9)).shape
        torch.Size([1, 8, 7, 7])
    """

    axes = 2


class TuckerConv3d(TuckerConv):
    """`nn.Conv3d` with a Tucker kernel; see `TuckerConv` for the factors and `FactorizedConv` for the arguments.

    Example:
        >>> growconv.TuckerConv3d(4, 8, 3, rank=(3, 2))(torch.zeros(1, 4, 9, 9, 9)).shape
        torch.Size([1, 8, 7, 7, 7])
    """

    axes = 3
