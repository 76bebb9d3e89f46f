"""The closed form of Verbockhaven et al. 2024, "Growing Tiny Networks" (TMLR): taps taken as independent."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.errors import ArgumentValueError
from growconv.limits import limited
from growconv.linalg import RANK_TOLERANCE, fix_signs, leading_svd, shrink, whiten
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite
from growconv.solvers.assembly import NOT_TAKEN, assemble, require_moments, require_statistics, shortfall
from growconv.solvers.base import Request, Solver, register
from growconv.solvers.energy import worthwhile
from growconv.solvers.weights import entries_of


class TinyChannels(NamedTuple):
    """Factors of the closed form.

    Attributes:
        alpha: (k, a), filters of the first conv, the bias last where it has one.
        omega: (k, b, c), weights of the second conv; (k, columns) for N as a matrix.
        gains: (k,) σ_k², descending: what channel k would capture of ‖v⊥‖²/n if the taps were independent.
    """

    alpha: Tensor
    omega: Tensor
    gains: Tensor


def tiny(
    S: Float[Tensor, "a a"],
    N: Float[Tensor, "rows *columns"],
    channels: int = 8,
    rank_tolerance: float = RANK_TOLERANCE,
) -> TinyChannels:
    """Rank-K minimiser of ⟨Θ, SΘ⟩ − 2⟨N, Θ⟩: an SVD of S^(-1/2)·N (TINY, proposition 3.2).

    α_k = √σ_k S^(-1/2) u_k and ω_k = √σ_k w_k. Exact for a second kernel of one tap and for linear layers; for larger
    kernels S overestimates the true quadratic form, so that the amplitude is too small and the ranking is not optimal.

    Args:
        S: second moment of the first conv's patches (a, a), symmetric positive semi-definite.
        N: correlation of patches and expressivity bottleneck (a, b, c), or as a matrix (a, b·c).
        channels: how many, at least 1.
        rank_tolerance: eigenvalues of S, and singular values σ, below this share of the largest count as zero.

    Returns:
        `channels` channels, or fewer where the numerical rank is lower; none where N is zero.

    Raises:
        ArgumentTypeError: `channels` is no integer, or a tensor has half precision.
        ArgumentValueError: fewer than one channel, shapes that do not fit together, or entries that are not finite.
    """
    require_moments(channels, N, S=S)
    if S.shape[0] != N.shape[0]:
        raise ArgumentValueError(
            "S and N do not belong together", expected=f"N of shape ({S.shape[0]}, ...)", got=tuple(N.shape), where="N"
        )
    whitening = whiten(S, rank_tolerance)
    if whitening.rank == 0 or not bool((N != 0).any()):
        return TinyChannels(N.new_zeros(0, N.shape[0]), N.new_zeros(0, *N.shape[1:]), N.new_zeros(0))
    left, sigma, right = leading_svd(whitening.whiten(N.flatten(1)), channels)
    kept = int((sigma > rank_tolerance * sigma[0]).sum())
    root = sigma[:kept].sqrt()
    alpha = whitening.unwhiten(left[:, :kept] * root).mT
    alpha, omega = fix_signs(alpha, right[:kept] * root[:, None])
    return TinyChannels(alpha.contiguous(), omega.reshape(kept, *N.shape[1:]), sigma[:kept].square())


@register("tiny")
@dataclass(frozen=True)
class Tiny(Solver):
    """Channels of the closed form.

    Attributes:
        rank_tolerance: relative threshold on eigenvalues of S and on singular values.
        shrinkage: how far S is shrunk towards (tr S / a)·1, between 0 and 1, for directions that few samples have seen;
            "auto" uses the oracle-approximating value of Chen et al. 2010.
        signs: choose the sign of each channel on kept samples, through the real activation.
    """

    rank_tolerance: float = RANK_TOLERANCE
    shrinkage: float | Literal["auto"] = limited(0.0, least=0, most=1, choices=("auto",))
    signs: bool = True
    keep_samples = 128  # for signs; `experiments.benchmarks.signs` has what more and fewer give
    keep_dtype = torch.bfloat16
    gain_unit = "energy"
    linearises = True
    needs_closed_form = True

    @property
    def reads(self) -> frozenset[str]:
        """S, N, the statistics that norm layers need, and samples for the signs."""
        return frozenset({"S", "N", "patch"} | ({"samples"} if self.signs else set()))

    def solve(self, request: Request) -> ChannelGrowth:
        """See `Solver.solve`; several consumers share one SVD of their stacked columns."""
        subject, channels = request.subject, request.channels
        grams, correlations = (require_statistics(subject, name) for name in ("S", "N"))
        if channels == "auto":
            return worthwhile(self.solve, request)
        # The consumers' quadratic forms add up; with one S for all of them the minimiser is an SVD of stacked columns.
        S = shrink(_mean_gram(request.site, grams), self.shrinkage, subject.samples)[0]
        columns = torch.cat([each.flatten(1) for each in correlations], 1)
        every = tiny(S, columns, channels + NOT_TAKEN, self.rank_tolerance)
        alpha, omega, gains = every.alpha[:channels], every.omega[:channels], every.gains[:channels]
        reason = shortfall(len(alpha), channels, "S^(-1/2)·N")
        growth = assemble(request, self.name, alpha, omega, gains, reason, self.signs)
        return replace(growth, spectrum=every.gains)


def _mean_gram(site: GrowthSite, grams: list[Tensor]) -> Float[Tensor, "a a"]:
    """One S for all consumers: that of each producer averaged over the consumers that read it, c of them.

    The consumers' forms add up; entry (a, a') of the sum is divided by √(c_a·c_a'), which keeps it positive.
    """
    counts, producers = [], [route.producer for route in site.routes]
    for path in site.producers:
        counts += [producers.count(path)] * entries_of(site, path)
    root = torch.tensor(counts).to(grams[0]).sqrt()
    return sum(grams[1:], grams[0]) / (root[:, None] * root)
