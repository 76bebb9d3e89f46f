"""NORTH* (Maile, Rachelson, Luga and Wilson 2022, "When, Where, and How to Add New Neurons to ANNs", AutoML-Conf).

New channels should respond in directions that the old ones leave free. Their outgoing weights are zero, so that nothing
changes at first. Three of the paper's initialisations (section 3.2):

- NORTH-Pre: responses before the activation that are orthogonal to all old ones over the data;
- NORTH-Select: of many random filters those whose responses after the activation are most orthogonal to the old ones;
- NORTH-Weight: filters orthogonal to the old filters.

NORTH-Random is the method `random`. The paper's trigger, the effective dimension φ of the responses (section 3.1),
chooses how many where "auto" is asked for: ⌊C·(φ − γ)⌋ channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from growconv.errors import ArgumentValueError, SolverError
from growconv.network.proposal import ChannelGrowth
from growconv.solvers.assembly import norm_moments, require_closed_form, require_statistics
from growconv.solvers.base import Channels, Solver, register
from growconv.solvers.existing import (
    bias_of,
    filter_norms,
    filters_of,
    normal,
    normalised,
    random_filters,
    silent_outgoing,
)
from growconv.solvers.sampled import SampledSite


def effective_dimension(gram: Float[Tensor, "c c"], tolerance: float = 0.01) -> int:
    """How many directions C responses use: singular values of H/√n above a tolerance (φ^ED of section 3.1, times C).

    Args:
        gram: second moment of the responses over samples and locations, whose eigenvalues are those values squared.
        tolerance: relative to the largest singular value, where the paper's ε = 0.01 is absolute.
    """
    values = torch.linalg.eigvalsh(gram.double()).clamp_min(0).sqrt()
    return int((values > tolerance * values.max()).sum()) if bool(values.max() > 0) else 0


def orthogonal_filters(
    filters: Float[Tensor, "k a"], old: Float[Tensor, "c a"], gram: Float[Tensor, "a a"], tolerance: float = 1e-10
) -> Float[Tensor, "found a"]:
    """The part of filters whose responses are orthogonal to those of the old filters (NORTH-Pre).

    Responses are inner products with patches of second moment G, so that the responses of α and w are orthogonal when
    αᵀGw = 0. Among themselves the new responses become orthonormal. With G = 1 this is NORTH-Weight.

    Args:
        filters: candidates, one a row.
        old: the old filters.
        gram: second moment G of the patches.
        tolerance: directions with less than this share of the largest variance count as no direction.

    Returns:
        Filters with αᵀGα' = 1 for α = α' and 0 else; fewer than k where no directions are left.
    """
    values, vectors = torch.linalg.eigh(gram)
    kept = values > tolerance * values.max().clamp_min(0)
    root = values[kept].sqrt()
    # coordinates in which responses are plain vectors
    towards, back = vectors[:, kept] * root, vectors[:, kept] / root
    taken = torch.linalg.svd((old @ towards).mT, full_matrices=False)
    basis = taken.U[:, taken.S / taken.S.max() > tolerance**0.5]
    free = filters @ towards
    scale = free.norm(dim=1, keepdim=True).clamp_min(torch.finfo(free.dtype).tiny)
    free = free / scale
    for _ in range(2):  # twice, for orthogonality to the last bit
        free = free - (free @ basis) @ basis.mT
    rank = min(len(filters), len(root) - basis.shape[1])
    if rank <= 0:
        return filters[:0]
    orthonormal = torch.linalg.qr(free[:rank].mT).Q
    return orthonormal.mT @ back.mT


def most_orthogonal(
    candidates: Float[Tensor, "m s"], old: Float[Tensor, "c s"], count: int
) -> tuple[list[int], Float[Tensor, " count"]]:
    """Greedy choice of the responses that are most orthogonal to the old and to the chosen ones (NORTH-Select).

    Args:
        candidates: responses of the candidates, one a row.
        old: responses of the old channels.
        count: how many to choose, at most m.

    Returns:
        Indices in the order chosen, and the share of each one's norm that was orthogonal when it was chosen.
    """
    norms = candidates.norm(dim=1)
    rest = candidates / norms.clamp_min(torch.finfo(candidates.dtype).tiny)[:, None]
    spanned = torch.linalg.svd(old.mT, full_matrices=False)
    basis = spanned.U[:, spanned.S / spanned.S.max() > 1e-6]
    rest = rest - (rest @ basis) @ basis.mT
    chosen: list[int] = []
    shares = []
    for _ in range(count):
        lengths = rest.norm(dim=1)
        lengths[chosen] = -1
        best = int(lengths.argmax())
        chosen.append(best)
        shares.append(lengths[best].clamp_min(0))
        direction = rest[best] / lengths[best].clamp_min(torch.finfo(rest.dtype).tiny)
        rest = rest - (rest @ direction)[:, None] * direction
    return chosen, torch.stack(shares)


@register("north")
@dataclass(frozen=True)
class North(Solver):
    """Channels with responses that the old ones do not have, and outgoing weights of zero.

    Attributes:
        variant: "pre" (second moment of the patches), "select" (kept samples) or "weight" (no data).
        candidates: random filters drawn per new channel in "select".
        gamma: γ of the trigger, used for "auto": the share of directions in use above which channels are added.
        tolerance: singular values below this share of the largest are no direction (the paper's ε is 0.01).
    """

    variant: str = "pre"
    candidates: int = 16
    gamma: float = 0.9
    tolerance: float = 0.01
    function_preserving = True

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        if self.variant not in ("pre", "select", "weight"):
            raise ArgumentValueError(
                "unknown variant of NORTH", expected="pre, select or weight", got=self.variant, where="variant"
            )
        if self.candidates < 1:
            raise ArgumentValueError("candidates", expected="at least 1", got=self.candidates, where="candidates")

    @property
    def reads(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the variant needs."""
        return frozenset({"pre": {"patch"}, "select": {"samples"}, "weight": ()}[self.variant])

    def solve(
        self,
        subject: Any,
        site: Any,
        channels: Channels,
        model: nn.Module,
        generator: torch.Generator | None = None,
    ) -> ChannelGrowth:
        """See `Solver.solve`."""
        if self.variant == "select":
            return self._select(SampledSite.of(subject, model, self.name), channels, generator)
        require_closed_form(site, self.name)
        path = site.producers[0]
        old = flat_filters(model, path)
        if self.variant == "weight":
            gram = torch.eye(old.shape[1], dtype=old.dtype, device=old.device)
        else:
            require_statistics(subject)
            gram = subject.patch_gram
            if gram is None:
                raise SolverError(
                    "the second moment of the patches was not collected",
                    where=site.name,
                    fix="collect with quantities={'patch', ...}, or solver.reads",
                )
        requested = self._number(old @ gram @ old.mT, channels, site)
        if requested == 0:
            return self._none(site, model)
        filters = orthogonal_filters(normal((requested, old.shape[1]), gram, generator), old, gram)
        found = filters.shape[0] // site.granularity * site.granularity
        reason = None
        if found < requested:
            reason = f"asked for {requested}, got {found}: no more directions are free of the old responses"
        filters = (
            filters[:found] / filters[:found].norm(dim=1, keepdim=True) * filter_norms(site, model).mean().double()
        )
        return self._grown(site, model, path, filters, requested, reason, subject)

    def _grown(
        self, site: Any, model: nn.Module, path: str, filters: Tensor, requested: int, reason: str | None, subject: Any
    ) -> ChannelGrowth:
        like = filters_of(model, path)
        entries = like[0].numel()
        biased = bias_of(model, path) is not None
        return ChannelGrowth(
            site=site.name,
            method=self.name,
            incoming={path: filters[:, :entries].reshape(-1, *like.shape[1:]).to(like).contiguous()},
            incoming_bias={path: filters[:, entries].to(like).contiguous()} if biased else {},
            outgoing=silent_outgoing(site, model, filters.shape[0]),
            gains=like.new_zeros(filters.shape[0]),
            requested=requested,
            reason=reason,
            norms={} if subject is None else norm_moments(subject, filters),
        )

    def _select(self, sampled: SampledSite, channels: Channels, generator: torch.Generator | None) -> ChannelGrowth:
        """NORTH-Select: responses after everything in between, as the consumers see them."""
        site, model = sampled.site, sampled.model
        if site.granularity > 1:
            raise SolverError(
                "north with variant='select' chooses channels one by one",
                got=f"a site that grows in groups of {site.granularity}",
                where=site.name,
                fix="use variant='weight', or another method",
            )
        old = torch.cat([sampled.responses(sampled.old_readings(path), path) for path in site.consumers], 1)
        requested = self._number(old @ old.mT, channels, site)
        if requested == 0:
            return self._none(site, model)
        drawn, biases = random_filters(site, model, requested * self.candidates, generator)
        drawn, biases = normalised(drawn, biases, filter_norms(site, model).mean())
        measured: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.no_grad():
            hidden = sampled.hidden(drawn, biases, measured)
        new = torch.cat([sampled.responses(hidden[path], path) for path in site.consumers], 1)
        chosen, _ = most_orthogonal(new, old, requested)
        return ChannelGrowth(
            site=site.name,
            method=self.name,
            incoming={path: weight[chosen] for path, weight in drawn.items()},
            incoming_bias={path: bias[chosen] for path, bias in biases.items()},
            outgoing=silent_outgoing(site, model, requested),
            gains=new.new_zeros(requested),
            requested=requested,
            norms={path: (mean[chosen], variance[chosen]) for path, (mean, variance) in measured.items()},
        )

    def _number(self, gram: Tensor, channels: Channels, site: Any) -> int:
        """The number asked for, or for "auto" the excess of the effective dimension over γ of the width."""
        if channels != "auto":
            return int(channels)
        used = effective_dimension(gram, self.tolerance)
        return max(int(used - self.gamma * site.width), 0) // site.granularity * site.granularity

    def _none(self, site: Any, model: nn.Module) -> ChannelGrowth:
        """No channels: the old ones leave directions unused."""
        path = site.producers[0]
        filters = flat_filters(model, path)[:0]
        reason = f"nothing added: fewer than {self.gamma:.0%} of the {site.width} directions are in use"
        return self._grown(site, model, path, filters, 0, reason, None)


def flat_filters(model: nn.Module, path: str) -> Float[Tensor, "c a"]:
    """Filters of a producer as rows in float64, the bias last where it has one."""
    filters = filters_of(model, path).flatten(1).double()
    bias = bias_of(model, path)
    return filters if bias is None else torch.cat([filters, bias.double()[:, None]], 1)
