"""SENN (Mitchell, Menzenbach, Kersting and Mundt 2023, "Self-Expanding Neural Networks", arXiv 2307.04526).

New channels whose outgoing weights are zero change nothing, but they enlarge what a natural-gradient step can do. The
natural expansion score η = gᵀF⁻¹g (equation 3) measures that; with the Kronecker-factored F = A ⊗ Γ its increase by new
channels is at least (theorem 3.2)

    Δη' = Tr[Γ⁻¹ E[g_r a_pᵀ] A_p⁻¹ E[a_p g_rᵀ]],

a_p: what the consumer reads of the new channels, A_p its second moment, g_r = v⊥: the consumer's output gradient without
what the old channels explain (lemma A.6), Γ: second moment of the output gradient. The incoming weights maximise Δη'.
For a convolution the averages are sums over locations, as in K-FAC for convolutions; Γ is the average over locations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from growconv.errors import ArgumentValueError, SolverError
from growconv.network.proposal import ChannelGrowth
from growconv.solvers.base import Channels, Solver, register
from growconv.solvers.existing import filter_norms, normalised, random_filters, require_number, silent_outgoing
from growconv.solvers.sampled import SampledSite


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
    cross = torch.einsum("icm,ipm->pc", residual, proposed) / samples
    moment = torch.einsum("ipm,iqm->pq", proposed, proposed) / samples
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
    """Channels that raise the natural expansion score most, with outgoing weights of zero.

    Attributes:
        steps: gradient steps on the incoming weights.
        learning_rate: of Adam, for filters of unit norm.
        damping: of A and Γ, relative to their mean diagonal entries.
    """

    steps: int = 60
    learning_rate: float = 0.1
    damping: float = 1e-4
    reads = frozenset({"samples"})
    function_preserving = True

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        if self.steps < 0 or not self.learning_rate > 0 or not self.damping > 0:
            raise ArgumentValueError(
                "impossible hyperparameters of senn",
                expected="steps ≥ 0, learning_rate > 0, damping > 0",
                got=(self.steps, self.learning_rate, self.damping),
                where="senn",
            )

    def solve(
        self,
        subject: Any,
        site: Any,
        channels: Channels,
        model: nn.Module,
        generator: torch.Generator | None = None,
    ) -> ChannelGrowth:
        """See `Solver.solve`; `gains` are the channels' own scores, best first, each as if it came alone."""
        requested = require_number(channels, self.name, site)
        if site.granularity > 1:
            raise SolverError(
                "senn scores channels one by one",
                got=f"a site that grows in groups of {site.granularity}",
                where=site.name,
                fix="use another method",
            )
        sampled = SampledSite.of(subject, model, self.name)
        wanted = {path: sampled.located(sampled.wanted, path) for path in site.consumers}
        consumer = {
            path: (sampled.residual(path), output_precision(gradient, self.damping))
            for path, gradient in wanted.items()
        }
        drawn, biases = random_filters(site, model, requested, generator)
        free = [weight.requires_grad_() for weight in (*drawn.values(), *biases.values())]
        optimizer = torch.optim.Adam(free, lr=self.learning_rate)
        norm = filter_norms(site, model).mean()
        with torch.enable_grad():
            for _ in range(self.steps):
                hidden = sampled.hidden(*normalised(drawn, biases, norm))
                score = self._score(sampled, hidden, consumer, range(requested))
                gradients = torch.autograd.grad(-score, free, allow_unused=True)
                for parameter, gradient in zip(free, gradients, strict=True):
                    parameter.grad = None if gradient is None else gradient / score.detach().clamp_min(1e-30)
                optimizer.step()
        return self._growth(sampled, drawn, biases, consumer, requested)

    def _score(
        self,
        sampled: SampledSite,
        hidden: dict[str, Tensor],
        consumers: dict[str, tuple[Tensor, Tensor]],
        channels: Sequence[int],
    ) -> Tensor:
        """Δη' of some of the proposed channels, summed over the consumers."""
        scores = []
        for path, (residual, precision) in consumers.items():
            patches = sampled.patches(hidden, path)
            entries = patches.shape[1] // sampled.responses(hidden[path], path).shape[0]
            chosen = patches.unflatten(1, (-1, entries))[:, list(channels)].flatten(1, 2)
            scores.append(expansion_score(chosen, residual, precision, self.damping))
        return torch.stack(scores).sum()

    @torch.no_grad()
    def _growth(
        self,
        sampled: SampledSite,
        drawn: dict[str, Tensor],
        biases: dict[str, Tensor],
        consumers: dict[str, tuple[Tensor, Tensor]],
        requested: int,
    ) -> ChannelGrowth:
        site, model = sampled.site, sampled.model
        incoming, shifts = normalised(drawn, biases, filter_norms(site, model).mean())
        measured: dict[str, tuple[Tensor, Tensor]] = {}
        hidden = sampled.hidden(incoming, shifts, measured)
        alone = torch.stack([self._score(sampled, hidden, consumers, [index]) for index in range(requested)])
        order = alone.argsort(descending=True)
        return ChannelGrowth(
            site=site.name,
            method=self.name,
            incoming={path: weight[order].contiguous() for path, weight in incoming.items()},
            incoming_bias={path: bias[order] for path, bias in shifts.items()},
            outgoing=silent_outgoing(site, model, requested),
            gains=alone[order],
            requested=requested,
            norms={path: (mean[order], variance[order]) for path, (mean, variance) in measured.items()},
        )
