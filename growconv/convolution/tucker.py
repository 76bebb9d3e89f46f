"""Convolutions with a Tucker kernel: W[o,i,*t] = Σ_pq out[o,p]·in[i,q]·core[p,q,*t]."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from growconv.convolution.decomposition import Fit, decompose_tucker, tucker_kernel
from growconv.convolution.factorized import FactorizedConv
from growconv.convolution.ranks import Rank, tucker_ranks


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

    def _load_kernel(self, kernel: Tensor, **options: Any) -> Fit:
        core, outputs, inputs, fit = decompose_tucker(kernel, self.rank, **options)
        self.core.copy_(core)
        self.out_factor.copy_(outputs)
        self.in_factor.copy_(inputs)
        return fit

    def _chain(self, x: Tensor) -> Tensor:
        x = self._mix(x, self.in_factor.T)
        x = self.convolve(x, self.core)
        return self._mix(x, self.out_factor, self.bias)


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
