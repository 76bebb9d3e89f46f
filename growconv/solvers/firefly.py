"""Firefly (Wu, Liu, Stone and Liu 2020, "Firefly Neural Architecture Descent", NeurIPS), growing wider by new neurons.

The network f with candidate channels δ_l at strength ε_l is f_ε,δ (equation 3). Step one (equation 5) trains all
candidates with ‖δ_l‖ ≤ 1 for a few steps at small ε; step two (equations 6 and 7) writes L(f_ε,δ) = L(f) + Σ_l ε_l s_l
+ O(ε²) and keeps the candidates with the largest |s_l|, the Taylor gains, over all layers. As ε → 0 the loss of step
one is its own linear part, s_l = −⟨v, δz_l⟩ averaged over samples, so that kept samples are all it takes; this limit
is what is computed here. The paper's other candidates are splittings of old neurons: `splits` mixes them in, each with
the ε²/2·|λ_min| that splitting it takes off the loss (`growconv.solvers.splitting`).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from growconv.limits import limited
from growconv.linalg.optimizers import Adam
from growconv.network.proposal import ChannelGrowth
from growconv.network.seats import Inserted
from growconv.network.site import GrowthSite
from growconv.solvers.assembly import NOTHING_TO_GAIN, require_samples
from growconv.solvers.base import Request, Solver, register
from growconv.solvers.splitting import Splitting
from growconv.solvers.weights import (
    Filters,
    columns_of,
    filter_norms,
    normal,
    norms_of,
    of_units,
    outgoing_norms,
    random_filters,
    scaled_units,
    silent_outgoing,
)
from growconv.statistics.samples import KeptSamples

SAMPLES = 128
"""Of the kept samples at least this many take part in one gradient step."""


@register("firefly")
@dataclass(frozen=True)
class Firefly(Solver):
    """Random channels, trained for a few steps to lower the loss as much as they can; the best are kept.

    Attributes:
        candidates: channels trained for every channel kept.
        steps: gradient steps of step one, each on a part of the kept samples if there are many.
        learning_rate: rate of Adam; in 20 steps an entry moves by at most 0.4, so that candidates stay different.
        splits: splits of old channels are candidates too. The channels kept then have the next two strengths.
        strength: norm of a new channel's ω, relative to the mean of the old ones (the paper's code: entries of 0.01).
        step: how far the halves of a channel move, relative to its filter's norm (the code: entries of 0.1).
    """

    candidates: int = limited(4, least=1)
    steps: int = limited(20, least=0)
    learning_rate: float = limited(0.02, above=0)
    splits: bool = False
    strength: float = limited(0.01, above=0)
    step: float = limited(0.1, above=0)
    reads = frozenset({"samples"})
    gain_unit = "loss"
    counts = False

    def solve(self, request: Request) -> ChannelGrowth:
        """See `Solver.solve`; `gains` are the Taylor gains |s_l| for ω of norm 1 and α at the old mean norm.

        With splits, `gains` are how much each channel lowers the loss at its strength.
        """
        requested, size, generator = request.number, request.site.granularity, request.generator
        kept = require_samples(request.subject, self.name)
        candidates = Candidates(kept, requested * self.candidates, generator)
        candidates.train(self.steps, self.learning_rate)
        gains = candidates.taylor_gains()
        if self.splits:
            return self._mixed(candidates, gains, request)
        best = gains.abs().argsort(descending=True)[: requested // size]
        return candidates.keep([int(index) for index in best if gains[index] != 0], gains, requested)

    def refusal(self, site: GrowthSite) -> str | None:
        """With splits also where old weights are computed from others."""
        return Splitting().refusal(site) if self.splits else None

    def _mixed(self, candidates: "Candidates", gains: Tensor, request: Request) -> ChannelGrowth:
        """The best of new channels and halves of old ones, compared by what they take off the loss."""
        requested = request.number
        kept, site = candidates.kept, candidates.kept.site
        splitting = Splitting(step=self.step, tolerance=0.01)  # their gains are compared with those of others
        values, vectors = splitting.curvatures(kept, request.generator)
        size = site.granularity
        strength = self.strength * outgoing_norms(site).mean()
        halves = (self.step * filter_norms(site)).square() * -values / 2
        worth = torch.cat([strength * gains.abs(), halves.clamp_min(0)])
        best = [int(index) for index in worth.argsort(descending=True)[: requested // size] if worth[index] > 0]
        fresh, split = ([i for i in best if i < len(gains)], [i - len(gains) for i in best if i >= len(gains)])
        new = candidates.keep(fresh, gains, requested, strength)
        if split:
            order = torch.tensor(split, device=values.device)
            new = _joined(new, splitting.split(site, order, values, vectors, requested))
        if not best:
            return new
        taken = worth[[*fresh, *(i + len(gains) for i in split)]].repeat_interleave(size) / size
        order = taken.argsort(descending=True, stable=True).tolist()
        few = len(best) * size < requested
        reason = f"only {len(best) * size} of {requested} candidates change the loss" if few else None
        spectrum = worth.sort(descending=True).values.repeat_interleave(size) / size
        new = replace(new, gains=taken, reason=reason, spectrum=spectrum).subset(order)
        return replace(new, expected_decrease=float(worth[best].sum()))


def _joined(new: ChannelGrowth, halves: ChannelGrowth) -> ChannelGrowth:
    """New channels and halves of old ones in one proposal."""

    def both(mine: dict[str, Tensor], others: dict[str, Tensor], axis: int = 0) -> dict[str, Tensor]:
        return {path: torch.cat([each, others[path].to(each)], axis) for path, each in mine.items()}

    norms, copied = {}, torch.as_tensor(halves.copied_from)
    for path, (mean, variance) in new.norms.items():
        missing = (0, len(mean) * halves.channels // new.channels)
        norms[path] = (functional.pad(mean, missing), functional.pad(variance, missing))
    return replace(
        new,
        incoming=both(new.incoming, halves.incoming),
        incoming_bias=both(new.incoming_bias, halves.incoming_bias),
        outgoing=both(new.outgoing, halves.outgoing, 1),
        norms=norms,
        revised=halves.revised,
        copied_from=torch.cat([copied.new_full((new.channels,), -1), copied]),
    )


class Candidates:
    """Candidate units of channels with their free parameters; both sides are normalised on use."""

    def __init__(self, kept: KeptSamples, channels: int, generator: torch.Generator | None) -> None:
        site = kept.site
        self.kept = kept
        self.norm = float(filter_norms(site).mean())
        self.filters = random_filters(site, channels, generator).each(torch.Tensor.requires_grad_)
        self.outgoing: dict[str, Tensor] = {}
        for path, zeros in silent_outgoing(site, channels).items():
            drawn = normal(tuple(zeros.shape), zeros, generator) / math.sqrt(columns_of(site, path).numel())
            self.outgoing[path] = drawn.requires_grad_()

    def weights(self) -> tuple[Filters, dict[str, Tensor]]:
        """α at the old filters' mean norm, ω at norm 1 as (out, entries, *kernel)."""
        norms = norms_of(self.outgoing.values(), self.filters.units, 1)
        factor = 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        outgoing = {path: scaled_units(weight, factor, 1) for path, weight in self.outgoing.items()}
        return self.filters.at_norm(self.norm), outgoing

    def train(self, steps: int, learning_rate: float) -> None:
        """Step one: gradient ascent on the candidates' summed Taylor gains; they do not see each other."""
        free = [*self.filters.rows.values(), *self.outgoing.values()]
        optimizer, parts = Adam(free, lr=learning_rate), self.kept.parts(SAMPLES)
        with torch.enable_grad():
            for step in range(steps):
                optimizer.zero_grad()
                part = parts[step % len(parts)]
                for piece in part.passes:
                    filters, outgoing = self.weights()
                    decrease = piece.agreement(piece.added(piece.read(*filters.weights), outgoing))
                    (-decrease / len(part)).backward(inputs=free)
                optimizer.step()

    def taylor_gains(self) -> Tensor:
        """−s_l = ∂⟨v, δz⟩/∂ε_l of every candidate, on all samples (equation 7 at ε = 0)."""
        strength = self.filters.like.new_ones(self.filters.units).requires_grad_()
        total = torch.zeros_like(strength)
        for piece in self.kept.passes:
            with torch.no_grad():
                filters, outgoing = self.weights()
                read = piece.read(*filters.weights)
            with torch.enable_grad():
                scaled = {path: scaled_units(weight, strength, 1) for path, weight in outgoing.items()}
                total += torch.autograd.grad(piece.agreement(piece.added(read, scaled)), strength)[0]
        return total.detach() / len(self.kept)

    @torch.no_grad()
    def keep(self, order: list[int], gains: Tensor, requested: int, strength: Tensor | None = None) -> ChannelGrowth:
        """The chosen candidates, ω with the sign that lowers the loss and of one norm; None: that which fits v best."""
        size, signs = self.kept.site.granularity, gains[order].sign()
        filters, outgoing = self.weights()
        for path, weight in outgoing.items():
            own = weight[:, of_units(order, weight.shape[1] // filters.units)]
            outgoing[path] = scaled_units(own, signs, 1).contiguous()
        filters, measured, expected, reason = filters.picked(order), {}, 0.0, NOTHING_TO_GAIN
        if order:
            measured = self.kept.moments(*filters.weights)
            decrease, energy = self.kept.like.new_zeros(2)
            for piece in self.kept.passes:
                added = piece.added(piece.read(*filters.weights, Inserted(norms=measured)), outgoing)
                decrease += piece.agreement(added)
                energy += sum(delta.square().sum() for calls in added.values() for delta in calls)
            scale = decrease / energy if strength is None else strength
            outgoing = {path: weight * scale.to(weight) for path, weight in outgoing.items()}
            expected = float(decrease * scale) / len(self.kept)
            few = f"only {len(order) * size} of {requested} candidates change the loss"
            reason = few if len(order) * size < requested else None
        return filters.proposed(
            "firefly",
            outgoing,
            gains[order].abs().repeat_interleave(size) / size,
            requested=requested,
            reason=reason,
            norms=measured,
            expected_decrease=expected,
            spectrum=gains.abs().sort(descending=True).values.repeat_interleave(size) / size,
        )
