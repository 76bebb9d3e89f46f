"""NORTH* (Maile, Rachelson, Luga and Wilson 2022, "When, Where, and How to Add New Neurons to ANNs", AutoML-Conf).

New channels should respond in directions that the old ones leave free. Their outgoing weights are zero, so that nothing
changes at first. Three of the paper's initialisations (section 3.2):

- NORTH-Pre: responses before the activation that are orthogonal to all old ones over the data;
- NORTH-Select: of many random filters those whose responses after the activation are most orthogonal to the old ones;
- NORTH-Weight: filters orthogonal to the old filters.

NORTH-Random is the method `random`. The effective dimension φ of what the consumers read of the old channels (section
3.1) goes along with the proposal as `measured["rank"]`; the paper's trigger, which decides by it, is the policy
`growconv.growth.RankTrigger`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.errors import SolverError
from growconv.limits import limited
from growconv.network import layers
from growconv.network.layout import IN
from growconv.network.proposal import ChannelGrowth
from growconv.network.seats import Calls, Inserted
from growconv.solvers.assembly import norm_moments, require_samples
from growconv.solvers.base import Request, Solver, register
from growconv.solvers.fitting import patch_gram
from growconv.solvers.weights import (
    Filters,
    filter_norms,
    normal,
    of_units,
    old_filters,
    random_filters,
    silent_outgoing,
)
from growconv.statistics.samples import KeptPass, KeptSamples


def effective_dimension(gram: Float[Tensor, "c c"], tolerance: float = 0.01, relative: bool = True) -> int:
    """How many directions C responses use: singular values of H/√n above a tolerance (φ^ED of section 3.1, times C).

    The tolerance ε is a share of the largest singular value, or a number as in the paper; their squares are the
    eigenvalues of the second moment over samples and locations that is given.
    """
    values = torch.linalg.eigvalsh(gram.double()).clamp_min(0).sqrt()
    return int((values > tolerance * (values.max() if relative else 1.0)).sum()) if bool(values.max() > 0) else 0


def orthogonal_filters(
    filters: Float[Tensor, "k a"], old: Float[Tensor, "c a"], gram: Float[Tensor, "a a"], tolerance: float = 1e-10
) -> Float[Tensor, "found a"]:
    """The part of filters whose responses are orthogonal to those of the old filters (NORTH-Pre).

    Responses are inner products with patches of second moment G, so that the responses of α and w are orthogonal when
    αᵀGw = 0. Among themselves the new responses become orthonormal: αᵀGα' = 1 for α = α' and 0 else. With G = 1 this is
    NORTH-Weight. Fewer than k come back where no directions are left; one with less than the tolerance's share of the
    largest variance is none.
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
    """Channels whose responses are new, with outgoing weights of zero.

    Attributes:
        variant: "pre" (second moment of the patches), "select" (kept samples) or "weight" (no data).
        candidates: random filters drawn per new channel in "select".
        tolerance: singular values of the old responses below it do not count as directions (the paper's ε is 0.01).
        relative: `tolerance` is a share of the largest singular value; False: an absolute number, as in the paper.
    """

    variant: str = limited("pre", choices=("pre", "select", "weight"))
    candidates: int = limited(16, least=1)
    tolerance: float = 0.01
    relative: bool = True
    gain_unit = "rank"
    counts = False
    function_preserving = True

    @property
    def reads(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the variant needs; for sites without a closed form, "pre" computes second moments from kept samples."""
        return frozenset({"pre": {"patch", "samples"}, "select": {"samples"}, "weight": ()}[self.variant])

    def solve(self, request: Request) -> ChannelGrowth:
        """See `Solver.solve`; every producer's filters are orthogonal to its own old ones."""
        if self.variant == "select":
            return self._select(request)
        site, subject, requested = request.site, request.statistics, request.number
        old, size, found = old_filters(site).each(Tensor.double), site.granularity, {}
        units = requested // size
        for path, rows in old.rows.items():
            gram = self._gram(request, path, rows)
            drawn = normal((requested // size * (len(rows) // old.units), rows.shape[1]), gram, request.generator)
            found[path] = orthogonal_filters(drawn, rows, gram)
            units = min(units, len(found[path]) * old.units // len(rows))
        reason = f"asked for {requested}, got {units * size}: no more directions are free of the old responses"
        rows = {path: each[: units * len(old.rows[path]) // old.units] for path, each in found.items()}
        filters, norms = Filters(site, units, rows), {}
        if units:
            filters = filters.at_norm(float(filter_norms(site).mean()))
            if subject is not None and subject.patch_gram is not None:
                norms = norm_moments(subject, filters)
            elif subject is not None and subject.samples_kept is not None:
                norms = subject.samples_kept.moments(*filters.weights)
        reason = reason if units * size < requested else None
        return self._proposed(request, filters, reason=reason, norms=norms)

    def _select(self, request: Request) -> ChannelGrowth:
        """NORTH-Select: responses after everything in between, as the consumers see them."""
        kept = require_samples(request.subject, self.name)
        site, size, requested = kept.site, kept.site.granularity, request.number
        drawn = random_filters(site, requested * self.candidates, request.generator)
        drawn = drawn.at_norm(float(filter_norms(site).mean()))
        measured = kept.moments(*drawn.weights)
        parts = []
        with torch.no_grad():
            for each in kept.passes:
                read = each.read(*drawn.weights, Inserted(norms=measured))
                parts += [_responses(each, path, read[path], drawn.units) for path in site.consumers]
        chosen, _ = most_orthogonal(torch.cat(parts, 1), _old_responses(kept), requested // size)
        growth = self._proposed(request, drawn, norms=measured)
        return growth.subset(of_units(chosen, size))

    def _proposed(self, request: Request, filters: Filters, **others: Any) -> ChannelGrowth:
        """The proposal, with the share of directions that the consumers read of the old units."""
        site, subject, responses, measured = request.site, request.statistics, None, {}
        if self.variant == "weight":
            responses = old_filters(site).each(Tensor.double).matrix
        elif subject is not None and subject.samples_kept is not None:
            responses = _old_responses(subject.samples_kept)
        if responses is not None:
            gram = responses @ responses.mT / responses.shape[1]
            measured["rank"] = effective_dimension(gram, self.tolerance, self.relative) / len(gram)
        outgoing = silent_outgoing(site, filters.units * site.granularity)
        return filters.proposed(self.name, outgoing, requested=request.number, measured=measured, **others)

    def _gram(self, request: Request, path: str, old: Tensor) -> Tensor:
        """Second moment of a producer's patches; the identity where responses are not looked at."""
        subject = request.statistics
        if self.variant == "weight":
            return torch.eye(old.shape[1], dtype=old.dtype, device=old.device)
        if subject is not None and subject.patch_gram is not None:
            return subject.patch_gram
        if subject is None or subject.samples_kept is None:
            raise SolverError(
                "the second moment of the patches was not collected",
                where=request.site.name,
                fix="collect with quantities={'patch', 'samples'}, or solver.reads",
            )
        return patch_gram(require_samples(subject, self.name), path)


def _old_responses(kept: KeptSamples) -> Float[Tensor, "u s"]:
    """What the consumers read of the old units, behind everything in between: one row a unit."""
    parts = []
    for piece in kept.passes:
        for path in kept.site.consumers:
            places = piece.region.places[path, IN]
            axis = layers.channel_axis(piece.region.site.model.get_submodule(path), piece.h[path][0].dim())
            own = [each.index_select(axis, places.flatten()) for each in piece.h[path]]
            parts.append(_responses(piece, path, own, len(places)))
    return torch.cat(parts, 1)


def _responses(piece: KeptPass, path: str, read: Calls, units: int) -> Tensor:
    """What a consumer reads as one row a unit: (units, entries · samples · locations)."""
    axis = layers.channel_axis(piece.region.site.model.get_submodule(path), read[0].dim())
    return torch.cat([each.movedim(axis, 0).unflatten(0, (units, -1)).flatten(1) for each in read], 1)
