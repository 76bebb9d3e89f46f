"""Channels fitted through the real activation: the minimiser of Σ‖v⊥ − conv2_new(between(conv1_new(x)))‖².

The closed forms take what lies between the two convolutions as linear. Here it is the model's own: norms inserted as
the identity, any activation, pooling, dropout off. The filters are searched for by L-BFGS with the consumers' weights
solved for at every step (see `fitting`), on kept samples, from two starts, and stopped where the captured energy on
samples held out from the fit no longer rises.
"""

import logging
import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from growconv.limits import limited
from growconv.linalg import RANK_TOLERANCE, leading_svd
from growconv.network.proposal import ChannelGrowth
from growconv.network.seats import Inserted
from growconv.network.site import GrowthSite
from growconv.solvers.assembly import NOTHING_TO_GAIN, empty, expected_decrease, require_samples
from growconv.solvers.base import Request, Solver, register
from growconv.solvers.fitting import (
    Coordinates,
    Objective,
    Search,
    best_outgoing,
    greedy_order,
    is_homogeneous,
    normal_equations,
    whitened,
)
from growconv.solvers.weights import Filters, filter_norms, of_units, old_filters, old_steepness, silent_outgoing
from growconv.statistics.pair import sample_averages
from growconv.statistics.samples import KeptSamples, by_sample

logger = logging.getLogger("growconv.solvers")


class FewSamplesWarning(UserWarning):
    """Fewer samples were kept than a fit has parameters."""


@register("functional")
@dataclass(frozen=True)
class Functional(Solver):
    """Channels fitted on kept samples, through the model's own operations.

    Attributes:
        iterations: the most L-BFGS steps of the winning start, including its trial; about twenty achieve most of the
            gain.
        trial_iterations: steps on a part of the samples after which only the better start continues.
        held_out: share of the kept samples used to judge the starts and to stop the fit.
        patience: steps without a better held-out captured energy before stopping.
        damping: damping of the whitened coordinates, as a share of the patches' mean eigenvalue. It keeps directions
            that the data hardly use short: with less damping, the fit is slower and generalises worse.
    """

    iterations: int = limited(28, least=0)
    trial_iterations: int = limited(2, least=0)
    held_out: float = limited(0.2, above=0, below=1)
    patience: int = limited(8, least=1)
    damping: float = limited(0.1, above=0)
    reads = frozenset({"samples"})
    gain_unit = "energy"

    def solve(self, request: Request) -> ChannelGrowth:
        """See `Solver.solve`; works on sites of every kind, streams included."""
        site, channels = request.site, request.channels
        kept = require_samples(request.subject, self.name)
        kept.require_finite()
        samples, size = kept.projected(), site.granularity
        most = site.growable_channels(min(max(site.width, 4), 32)) if channels == "auto" else channels
        if not samples.energy > 1e-12 * kept.energy:
            return empty(replace(request, channels=most), self.name, NOTHING_TO_GAIN)
        self._warn(samples, site, most)
        rest, judge = samples.split(1 - self.held_out)
        coordinates = whitened(rest, self.damping)
        free = is_homogeneous(rest, coordinates.random(2, torch.Generator().manual_seed(0)))
        # Behind a curved activation the best filters can be many times as long as the old ones: what they amplify, a
        # step of the layers below changes as much, and training suffers at any amplitude.
        longest = float((filter_norms(site) if free else old_steepness(site)).mean())
        if not free and longest > 0:
            coordinates = replace(coordinates, longest=longest)
        search = self._search(rest, judge, coordinates, most // size, request.generator)
        filters = coordinates.filters(search.best.theta)
        # where the scale is free, that of the old filters keeps training even
        filters = filters.at_norm(longest) if free and longest > 0 else filters
        filters = _best_of(rest, filters, most // size)
        reason = None
        if channels == "auto":
            units = telling_units(rest, judge, filters)
            reason = f"{units * size} of {most} tried channels have a held-out gain above its error bar"
            if units == 0:
                return empty(replace(request, channels=most), self.name, reason)
            filters = filters.picked(range(units))
        return self._assembled(request, samples, filters, reason)

    def _search(
        self,
        fit: KeptSamples,
        held_out: KeptSamples,
        coordinates: Coordinates,
        units: int,
        generator: torch.Generator | None,
    ) -> Search:
        """Try every start on a part of the samples, and go on with the best."""
        # a quarter tells the starts apart; below a few hundred samples their ranking would be noise
        step = max(1, min(4, len(fit) // 200))
        part = fit.subset(slice(None, None, step)) if step > 1 else fit
        trial, running = Objective(part, coordinates), []
        for name, filters in _starts(part, coordinates, units, generator):
            running.append((name, Search(trial, held_out, coordinates.encode(filters), self.patience)))
        for _, search in running if len(running) > 1 else ():
            search.run(self.trial_iterations)
        name, search = max(running, key=lambda each: each[1].held_out)
        if step > 1:
            search = search.onto(Objective(fit, coordinates))
        search.run(self.iterations - search.iterations)
        logger.info(
            "%s: functional from %s, %d steps, held-out captured energy %.3g",
            fit.site.name,
            name,
            search.iterations,
            search.held_out,
        )
        return search

    def _assembled(self, request: Request, samples: KeptSamples, filters: Filters, reason: str | None) -> ChannelGrowth:
        """The proposal: norms measured, and outgoing weights solved for on all samples, the best channel first."""
        site, size, count = samples.site, samples.site.granularity, filters.units
        measured = samples.moments(*filters.weights)
        equations = normal_equations(samples, filters, Inserted(norms=measured))
        order, gains = greedy_order(equations, count)
        outgoing = best_outgoing(equations, site, filters.like)
        gains = (gains / size).repeat_interleave(size) / len(samples)
        growth = filters.proposed(self.name, outgoing, gains, requested=count * size, norms=measured)
        growth = replace(growth.subset(of_units(order, size), reason), gains=gains)
        return replace(growth, expected_decrease=expected_decrease(request.subject, growth))

    def _warn(self, samples: KeptSamples, site: GrowthSite, channels: int) -> None:
        """Say how many samples the fit would need: one a parameter."""
        needed = channels // site.granularity * old_filters(site).matrix.shape[1]
        needed += sum(weight.numel() for weight in silent_outgoing(site, channels).values())
        if len(samples) < needed:
            warnings.warn(
                f"{site.name}: fewer kept samples than parameters of the fit, {len(samples)} for {needed}: what it "
                f"captures may not generalise to other samples; collect with keep_samples={needed}, or ask for fewer "
                "channels",
                FewSamplesWarning,
                stacklevel=4,
            )


def telling_units(fit: KeptSamples, held_out: KeptSamples, filters: Filters) -> int:
    """How many units, the best first, take more off the held-out bottleneck than its error bar.

    The outgoing weights of the first 1, 2, ... units are solved on `fit`. Counted is up to the last unit whose mean
    gain over the held-out samples is above its standard error.
    """
    equations = normal_equations(fit, filters)
    count, last, before = len(held_out), 0, None
    for units in range(1, filters.units + 1):
        leading = {}
        for path, equation in equations.items():
            rows = units * (equation.gram.shape[0] // filters.units)
            leading[path] = replace(equation, gram=equation.gram[:rows, :rows], cross=equation.cross[:rows])
        outgoing = best_outgoing(leading, fit.site, filters.like)
        gain = _gain_by_sample(held_out, filters.picked(range(units)), outgoing)
        more = gain if before is None else gain - before
        error = float(more.std()) / count**0.5 if count > 1 else math.inf
        if float(more.mean()) > error:
            last = units
        before = gain
    return last


@torch.no_grad()
def _gain_by_sample(samples: KeptSamples, filters: Filters, outgoing: dict[str, Tensor]) -> Tensor:
    """What new channels take off ‖v⊥‖² of every sample."""
    found = []
    for batch in samples.batches:
        gain = samples.like.new_zeros(batch.samples, dtype=torch.float64)
        for piece in batch.passes:
            for delta, target in piece.beside_v(piece.added(piece.read(*filters.weights), outgoing)):
                gains = (2 * target * delta - delta.square()).flatten(1).sum(1, dtype=torch.float64)
                gain += by_sample(gains, batch.samples)
        found.append(gain)
    return torch.cat(found)


def _starts(
    fit: KeptSamples, coordinates: Coordinates, units: int, generator: torch.Generator | None
) -> list[tuple[str, Filters]]:
    """The closed form with the better signs, where there is one, and the best of three times as many random filters."""
    result: list[tuple[str, Filters]] = []
    if fit.site.closed_form and len(fit.site.producers) == 1:
        tiny = tiny_filters(fit, units, coordinates).matrix
        if len(tiny) < units:
            tiny = torch.cat([tiny, coordinates.random(units - len(tiny), generator).matrix])
        both = coordinates.old.from_matrix(torch.cat([tiny, -tiny]))
        result.append(("tiny", _best_of(fit, both, units)))
    pool = coordinates.random(3 * units, generator)
    return [*result, ("random", _best_of(fit, pool, units))]


def tiny_filters(fit: KeptSamples, units: int, coordinates: Coordinates) -> Filters:
    """Filters of the closed form in whitened coordinates, of norm one there; fewer where N has a lower rank.

    The damped second moment of the patches in the coordinates stands for S.
    """
    names, ((path, root),), size = frozenset({"N_raw"}), coordinates.roots.items(), fit.site.granularity
    averages = [sample_averages(fit, consumer, names)["N_raw"] for consumer in fit.site.consumers]
    linear = torch.cat([each.flatten(1) for each in averages], 1)
    left, values, _ = leading_svd(root.to(linear) @ linear, units * size)
    rows = left[:, values > RANK_TOLERANCE * values[0]].mT.to(root) @ root
    return Filters(fit.site, len(rows) // size, {path: rows[: len(rows) // size * size]})


def _best_of(samples: KeptSamples, filters: Filters, units: int) -> Filters:
    """The units that together capture the most, chosen one after the other."""
    return filters.picked(greedy_order(normal_equations(samples, filters), filters.units, units)[0])
