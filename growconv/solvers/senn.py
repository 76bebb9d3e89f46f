"""SENN (Mitchell, Menzenbach, Kersting and Mundt 2023, "Self-Expanding Neural Networks", arXiv 2307.04526).

New channels whose outgoing weights are zero change nothing, but they enlarge what a natural-gradient step can achieve.
The natural expansion score η = gᵀF⁻¹g (equation 3) measures this. With the Kronecker-factored F = A ⊗ Γ, new channels
increase it by at least (theorem 3.2)

    Δη' = Tr[Γ⁻¹ E[g_r a_pᵀ] A_p⁻¹ E[a_p g_rᵀ]].

Here a_p is what the consumer reads from the new channels and A_p its second moment; g_r = v⊥ is the consumer's output
gradient without the part that the old channels explain (lemma A.6), and Γ the second moment of the output gradient. The
incoming weights maximise Δη'. With Γ^(-1/2)·g_r instead of g_r, Δη' is what a least-squares fit by the new channels
explains, so the search of `functional` can be used. For a convolution the averages are sums over locations, as in K-FAC
for convolutions; Γ is the average over locations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.limits import limited
from growconv.network import layers
from growconv.network.proposal import ChannelGrowth
from growconv.network.seats import Inserted
from growconv.solvers.assembly import require_samples
from growconv.solvers.base import Request, Solver, register
from growconv.solvers.fitting import Objective, Path, Search, is_homogeneous, normal_equations, whitened
from growconv.solvers.weights import Filters, filter_norms, of_units, random_filters, silent_outgoing
from growconv.statistics.samples import KeptPass, KeptSamples

WHITENING = 1e-3
"""Damping of the coordinates that are searched, as a share of the patches' mean eigenvalue."""


def expansion_score(
    moment: Float[Tensor, "p p"], cross: Float[Tensor, "p c"], precision: Float[Tensor, "c c"], damping: float = 1e-4
) -> Float[Tensor, ""]:
    """Δη' of theorem 3.2 for one consumer, differentiable; 0 for proposals that are silent on all samples.

    Args:
        moment: A_p, p = new channels times taps.
        cross: E[a_p g_rᵀ].
        precision: Γ⁻¹.
        damping: added to A_p, relative to its mean diagonal entry.
    """
    scale = moment.diagonal().mean().detach()
    scale = torch.where(scale > 0, scale, 1.0)
    damped = moment + damping * scale * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(damped), cross, upper=False)
    return torch.einsum("pc,cd,pd->", whitened, precision, whitened)


def output_precision(gradient: Float[Tensor, "c m"], damping: float = 1e-4) -> Float[Tensor, "c c"]:
    """Γ⁻¹, the inverse second moment of v over samples and locations, damped relative to its mean diagonal entry."""
    moment = torch.einsum("cm,dm->cd", gradient, gradient) / gradient.shape[1]
    scale = moment.diagonal().mean()
    if not bool(scale > 0):
        return torch.zeros_like(moment)
    return torch.linalg.inv(moment + damping * scale * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))


@register("senn")
@dataclass(frozen=True)
class Senn(Solver):
    """Channels that raise the natural expansion score the most, with outgoing weights of zero.

    Attributes:
        steps: L-BFGS steps on the incoming weights.
        damping: damping of A and Γ, relative to their mean diagonal entries.
    """

    steps: int = limited(20, least=0)
    damping: float = limited(1e-4, above=0)
    reads = frozenset({"samples"})
    gain_unit = "score"
    counts = False
    function_preserving = True

    def solve(self, request: Request) -> ChannelGrowth:
        """See `Solver.solve`; `gains` are the scores of the channels, best first, each as if it were added alone."""
        site, requested = request.site, request.number
        kept = require_samples(request.subject, self.name)
        precisions: dict[Path, Tensor] = {}
        for path in site.consumers:
            parts = zip(*(each.targets(path) for each in kept.passes), strict=True)
            for group, part in enumerate(parts):
                precisions[path, group] = output_precision(torch.cat(part, 1), self.damping)
        norm = float(filter_norms(site).mean())
        filters = random_filters(site, requested, request.generator).at_norm(norm)
        samples = _weighed(kept.projected(), precisions)
        if self.steps and samples.energy > 0 and norm > 0:
            coordinates = whitened(samples, WHITENING)
            if not is_homogeneous(samples, filters.picked(range(min(filters.units, 2)))):
                coordinates = replace(coordinates, longest=norm)
            objective = Objective(samples, coordinates, self.damping)
            search = Search(objective, None, coordinates.encode(filters), self.steps + 1).run(self.steps)
            filters = coordinates.filters(search.best.theta).at_norm(norm)
        return self._growth(kept, filters, precisions, requested)

    @torch.no_grad()
    def _growth(
        self, kept: KeptSamples, filters: Filters, precisions: dict[Path, Tensor], requested: int
    ) -> ChannelGrowth:
        site, size, units = kept.site, kept.site.granularity, filters.units
        measured, like = kept.moments(*filters.weights), kept.like.double()
        alone, own = like.new_zeros(units), 0.0
        for key, equation in normal_equations(kept.projected(), filters, Inserted(norms=measured)).items():
            precision = precisions[key].double()
            moments = (equation.gram / len(kept)).view(units, -1, units, len(equation.gram) // units)
            crosses = (equation.cross / len(kept)).unflatten(0, (units, -1))
            for unit in range(units):
                alone[unit] += expansion_score(moments[unit, :, unit], crosses[unit], precision, self.damping)
        for (path, group), precision in precisions.items():  # η (equation 3), biases left out
            design = torch.cat([each.own_design(path)[group] for each in kept.passes], 1)
            wanted = torch.cat([each.targets(path)[group] for each in kept.passes], 1)
            moment, cross = design @ design.mT / len(kept), design @ wanted.mT / len(kept)
            own += float(expansion_score(moment, cross, precision, self.damping))
        growth = filters.proposed(
            self.name,
            silent_outgoing(site, requested),
            alone.repeat_interleave(size) / size,
            requested=requested,
            measured={"score": own},
            norms=measured,
        )
        return growth.subset(of_units(alone.argsort(descending=True).tolist(), size))


def _weighed(kept: KeptSamples, precisions: Mapping[Path, Tensor]) -> KeptSamples:
    """The samples with v times a root of Γ⁻¹: Δη' is what least squares take off ‖v‖² then, on average."""
    roots = {}
    for path in kept.passes[0].v:
        roots[path] = torch.block_diag(*[_root(each) for key, each in precisions.items() if key[0] == path])

    def weighed(path: str, v: Tensor) -> Tensor:
        axis = layers.channel_axis(kept.site.model.get_submodule(path), v.dim())
        return (v.movedim(axis, -1) @ roots[path]).movedim(-1, axis).contiguous()

    def of_pass(each: KeptPass) -> KeptPass:
        return replace(each, v={path: tuple(weighed(path, v) for v in calls) for path, calls in each.v.items()})

    return kept.changed(of_pass)


def _root(precision: Tensor) -> Tensor:
    """L with L·Lᵀ = Γ⁻¹; zeros where there is no gradient."""
    factor, failed = torch.linalg.cholesky_ex(precision)
    return torch.zeros_like(precision) if bool(failed) else factor
