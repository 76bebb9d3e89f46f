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
from growconv.solvers.base import Request, Solver, register
from growconv.solvers.energy import require_samples
from growconv.solvers.filters import Filters, random_filters, whitened
from growconv.solvers.fitting import Fit, Objective, Path, Search, is_homogeneous
from growconv.solvers.weights import filter_norms, of_units, silent_outgoing
from growconv.statistics.samples import KeptPass, KeptSamples

WHITENING = 1e-3
"""Damping of the coordinates that are searched, as a share of the patches' mean eigenvalue."""


def expansion_score(
    proposed: Float[Tensor, "i p m"],
    residual: Float[Tensor, "i c m"],
    precision: Float[Tensor, "c c"],
    damping: float = 1e-4,
) -> Float[Tensor, ""]:
    """Δη' of theorem 3.2 for one consumer.

    Args:
        proposed: a_p per sample and location, p = new channels times taps.
        residual: g_r per sample and location.
        precision: Γ⁻¹.
        damping: added to A_p, relative to its mean diagonal entry.

    Returns:
        The score; differentiable.
    """
    samples = proposed.shape[0]
    rows = proposed.transpose(0, 1).flatten(1)
    cross = rows @ residual.transpose(0, 1).flatten(1).mT / samples
    moment = rows @ rows.mT / samples
    size = moment.shape[0]
    scale = moment.diagonal().mean().detach()
    # proposals that are silent on all samples score 0, whatever they are divided by
    scale = torch.where(scale > 0, scale, 1.0)
    damped = moment + damping * scale * torch.eye(size, dtype=moment.dtype, device=moment.device)
    factor = torch.linalg.cholesky(damped)
    whitened = torch.linalg.solve_triangular(factor, cross, upper=False)
    return torch.einsum("pc,cd,pd->", whitened, precision, whitened)


def output_precision(gradient: Float[Tensor, "i c m"], damping: float = 1e-4) -> Float[Tensor, "c c"]:
    """Γ⁻¹, the inverse second moment of the output gradient averaged over samples and locations.

    Args:
        gradient: v per sample and location.
        damping: relative to the mean diagonal entry.
    """
    moment = torch.einsum("icm,idm->cd", gradient, gradient) / (gradient.shape[0] * gradient.shape[2])
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
                precisions[path, group] = output_precision(torch.cat(part, 1)[None], self.damping)
        norm = float(filter_norms(site).mean())
        filters = random_filters(site, requested, request.generator).at_norm(norm)
        fit = Fit(_weighed(kept.projected(), precisions))
        if self.steps and fit.samples.energy > 0 and norm > 0:
            coordinates = whitened(fit.samples, WHITENING)
            if not is_homogeneous(fit, filters.picked(range(min(filters.units, 2)))):
                coordinates = replace(coordinates, longest=norm)
            objective = Objective(fit, coordinates, self.damping)
            search = Search(objective, None, coordinates.encode(filters), self.steps + 1).run(self.steps)
            filters = coordinates.filters(search.best.theta).at_norm(norm)
        return self._growth(kept, filters, precisions, requested)

    def _designs(self, kept: KeptSamples, filters: Filters, inserted: Inserted) -> dict[Path, Tensor]:
        """What the consumers multiply new columns with, (d, p), per consumer and group."""
        found: dict[Path, list[Tensor]] = {}
        for each in kept.passes:
            for path, read in each.read(filters.incoming, filters.biases, inserted).items():
                for group, design in enumerate(each.design(path, read)):
                    found.setdefault((path, group), []).append(design)
        return {key: torch.cat(parts, 1) for key, parts in found.items()}

    def _score(self, kept: KeptSamples, precisions: Mapping[Path, Tensor], designs: Mapping[Path, Tensor]) -> Tensor:
        """Δη' of what some designs would explain of the samples' v, summed over the consumers."""
        total = kept.like.new_zeros(())
        for (path, group), precision in precisions.items():
            wanted = torch.cat([one.targets(path)[group] for one in kept.passes], 1)
            score = expansion_score(designs[path, group][None], wanted[None], precision, self.damping)
            total = total + score / len(kept)
        return total

    @torch.no_grad()
    def _growth(
        self, kept: KeptSamples, filters: Filters, precisions: Mapping[Path, Tensor], requested: int
    ) -> ChannelGrowth:
        site, size, units, projected = kept.site, kept.site.granularity, filters.units, kept.projected()
        measured = kept.moments(filters.incoming, filters.biases)
        blocks, own = {}, {}
        for key, design in self._designs(kept, filters, Inserted(norms=measured)).items():
            blocks[key] = design.unflatten(0, (units, -1))
        for path, group in precisions:
            own[path, group] = torch.cat([one.own_design(path)[group] for one in kept.passes], 1)
        scores = []
        for unit in range(units):
            scores.append(self._score(projected, precisions, {key: block[unit] for key, block in blocks.items()}))
        alone = torch.stack(scores)
        order = alone.argsort(descending=True).tolist()
        growth = ChannelGrowth(
            site=site.name,
            method=self.name,
            incoming=filters.incoming,
            incoming_bias=filters.biases,
            outgoing=silent_outgoing(site, requested),
            gains=alone.repeat_interleave(size) / size,
            requested=requested,
            measured={"score": float(self._score(kept, precisions, own))},  # η (equation 3), biases left out
            norms=measured,
        )
        return growth.subset(of_units(order, size))


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
