"""Evci et al. 2022, "GradMax: Growing Neural Networks using Gradient Information" (ICLR)."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.errors import SolverError
from growconv.limits import limited
from growconv.linalg import RANK_TOLERANCE, leading_svd
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite, Norm
from growconv.solvers.assembly import (
    NOT_TAKEN,
    assemble,
    expected_decrease,
    require_moments,
    require_statistics,
    shortfall,
)
from growconv.solvers.base import Request, Solver, register
from growconv.solvers.weights import bias_of, entries_of, filter_norms, filters_of, normal, not_plain, outgoing_norms


class GradMaxChannels(NamedTuple):
    """Outgoing weights that maximise the first gradient on the new incoming weights.

    Attributes:
        omega: (k, b, c), orthonormal rows; (k, columns) for N_raw as a matrix.
        gains: (k,) squared singular values, descending: ‖∂L/∂α_k‖² at α = 0 for ω_k of norm 1.
    """

    omega: Tensor
    gains: Tensor


def gradmax(
    N_raw: Float[Tensor, "a *columns"], channels: int = 8, rank_tolerance: float = RANK_TOLERANCE
) -> GradMaxChannels:
    """Leading right singular vectors of N_raw (GradMax, equation 9): no whitening and no projection.

    Args:
        N_raw: correlation of patches and negative loss gradient (a, b, c), or as a matrix (a, b·c).
        channels: how many, at least 1.
        rank_tolerance: singular values below this share of the largest count as zero.

    Returns:
        `channels` channels, or fewer where the numerical rank is lower; none where N_raw is zero.

    Raises:
        ArgumentTypeError: `channels` is no integer, or a tensor has half precision.
        ArgumentValueError: fewer than one channel, a vector instead of a matrix, or entries that are not finite.
    """
    require_moments(channels, N_raw)
    if not bool((N_raw != 0).any()):
        return GradMaxChannels(N_raw.new_zeros(0, *N_raw.shape[1:]), N_raw.new_zeros(0))
    _, sigma, right = leading_svd(N_raw.flatten(1), channels)
    kept = int((sigma > rank_tolerance * sigma[0]).sum())
    return GradMaxChannels(right[:kept].reshape(kept, *N_raw.shape[1:]), sigma[:kept].square())


@register("gradmax")
@dataclass(frozen=True)
class GradMax(Solver):
    """Channels with α = 0 and the ω that make the first gradient on α the largest.

    With α = 0 every activation is at 0, where the slope of ReLU is 0 in PyTorch: all gradients would vanish and the
    channels would stay dead. Behind ReLU the channels are therefore lifted: their bias (or the mean of the norm layer
    behind the producer, in training) is set so that they are a little above 0, where the slope is 1, as the method
    assumes. This changes outputs by about `lift`.

    Attributes:
        outgoing: norm of each ω_k relative to the mean over the existing channels.
        directions: "gradient", or "random": the paper's baseline, Gaussian ω of the same norm and α = 0.
        lift: bias of channels that would be dead, relative to the existing filters' mean norm; with 0 they are refused.
        rank_tolerance: relative threshold on singular values.
    """

    outgoing: float = limited(0.5, above=0)
    directions: str = limited("gradient", choices=("gradient", "random"))
    lift: float = limited(1e-3, least=0)
    rank_tolerance: float = RANK_TOLERANCE
    reads = frozenset({"N_raw"})
    gain_unit = "loss"
    counts = False
    function_preserving = True
    linearises = True
    needs_closed_form = True

    def refusal(self, site: GrowthSite) -> str | None:
        """Also where the layer does not multiply with its stored filters, as under weight standardisation."""
        return super().refusal(site) or not_plain(site, *site.producers)

    def caution(self, site: GrowthSite) -> str | None:
        """A warning behind a norm layer, which the paper's networks do not have there."""
        normed = any(isinstance(step, Norm) for route in site.routes for step in route.steps)
        return "a norm layer brings filters that were zero to full size at their first step" if normed else None

    def solve(self, request: Request) -> ChannelGrowth:
        """See `Solver.solve`; several consumers share one SVD of their stacked columns."""
        subject, site, requested = request.subject, request.site, request.number
        stacked = torch.cat([each.flatten(1) for each in require_statistics(subject, "N_raw")], 1)
        if self.directions == "random":
            drawn = normal((requested, stacked.shape[1]), stacked, request.generator)
            omega = drawn / drawn.norm(dim=1, keepdim=True)
            gains = (stacked @ omega.mT).square().sum(0)
            order = gains.argsort(descending=True)
            every = GradMaxChannels(omega[order], gains[order])
        else:
            every = gradmax(stacked, requested + NOT_TAKEN, self.rank_tolerance)
        omega, gains = (part[:requested] for part in every)
        found = len(omega)
        norm = float(outgoing_norms(site).mean()) * self.outgoing
        alpha = stacked.new_zeros(found, stacked.shape[0])
        moved: dict[str, tuple[Tensor, Tensor]] = {}
        if found and any(route.dead_at_zero for route in site.routes):
            alpha, moved = self._lifted(request, alpha)
        growth = assemble(request, self.name, alpha, norm * omega, gains, shortfall(found, requested, "N_raw"))
        growth.norms.update(moved)
        if moved and growth.expected_decrease is not None:
            # A batch norm on the batch's own statistics puts its bias in the place of zeros, as a producer's bias does.
            norms = [site.model.get_submodule(path) for path in moved]
            own = any(norm.training or getattr(norm, "running_mean", None) is None for norm in norms)
            heights = {route.producer: moved[route.norm][0] for route in site.routes if route.norm}
            biases = heights if own else growth.incoming_bias
            decrease = expected_decrease(subject, replace(growth, incoming_bias=biases))
            growth = replace(growth, expected_decrease=decrease)
        return replace(growth, spectrum=every.gains)

    def _lifted(self, request: Request, alpha: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        site = request.site
        height = self.lift * float(filter_norms(site).mean())
        norms = {route.norm for route in site.routes if route.norm}
        biased = [getattr(site.model.get_submodule(path), "bias", None) is not None for path in norms]
        with_bias = [path for path in site.producers if bias_of(site, path) is not None]
        liftable = height > 0 and (all(biased) if norms else bool(with_bias))
        if not liftable or any(route.dead_above_zero for route in site.routes):
            raise SolverError(
                "gradmax would build dead channels: the function behind the producer has slope 0 at α = 0",
                got=", ".join(getattr(step, "name", type(step).__name__) for step in site.routes[0].steps),
                where=site.name,
                fix="set lift > 0 (the producer, or the norm layer behind it, needs a bias), or use another method",
            )
        mean = filters_of(site, site.producers[0]).new_full((alpha.shape[0],), height)
        if norms:
            return alpha, {path: (mean, torch.zeros_like(mean)) for path in norms}
        alpha, end = alpha.clone(), 0
        for path in site.producers:
            end += entries_of(site, path)
            if path == with_bias[0]:
                alpha[:, end - 1] = height
        return alpha, {}
