"""Channels fitted through the real activation: the minimiser of Σ‖v⊥ − conv2_new(between(conv1_new(x)))‖².

The closed forms take what lies between the two convolutions as linear. Here it is the model's own: norms inserted as
the identity, any activation, pooling, dropout off. The filters are searched for by L-BFGS with the consumers' weights
solved for at every step (see `fitting`), on kept samples, from several starts, and stopped where the captured energy on
samples held out from the fit no longer rises.
"""

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from growconv.errors import ArgumentValueError, SolverError, StatisticsError
from growconv.network import layers
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite
from growconv.solvers.assembly import NOTHING_TO_GAIN
from growconv.solvers.base import Channels, Solver, register
from growconv.solvers.energy import bottleneck, expected_decrease, kept_samples
from growconv.solvers.existing import filter_norms, normal
from growconv.solvers.filters import Filters, at_norm, count_of, each, in_blocks, joined, picked, scaled
from growconv.solvers.fitting import (
    RIDGE,
    Normal,
    Objective,
    Samples,
    Search,
    best_outgoing,
    greedy_order,
    minimize,
    normal_equations,
)
from growconv.solvers.linear_start import exact_filters, tiny_filters
from growconv.solvers.parametrization import Bounded, Parametrization, Separable, Whitened, patch_gram
from growconv.solvers.scale import old_steepness
from growconv.statistics import PairStatistics

logger = logging.getLogger("growconv.solvers")

STARTS = ("tiny", "signs", "exact", "random")


class FewSamplesWarning(UserWarning):
    """Fewer samples were kept than a fit has parameters."""


@register("functional")
@dataclass(frozen=True)
class Functional(Solver):
    """Channels fitted on kept samples, through the model's own operations.

    Attributes:
        kernel: "full", or "separable" for new channels whose filters and outgoing kernels are of rank one (one CP term
            a channel): fewer parameters to fit, and a CP convolution carries each of them by one more term.
        iterations: L-BFGS steps of the winning start, at most; about twenty give most of what there is.
        starts: where to start from, out of "tiny" (the closed form), "signs" (its channels, each with the better sign),
            "exact" (the linear optimum, signs likewise) and "random" (the best of three times as many). The linear ones
            need a site with a closed form; others start at random.
        trial_iterations: steps that every start gets on a part of the samples before the best one goes on.
        held_out: share of the kept samples that judges starts and stops the fit.
        patience: steps without a better held-out captured energy before stopping.
        damping: of the whitened coordinates, as a share of the patches' mean eigenvalue. It keeps directions that the
            data hardly uses short: with less, the fit is slower and carries over worse.
    """

    kernel: Literal["full", "separable"] = "full"
    iterations: int = 28
    starts: Sequence[str] = STARTS
    trial_iterations: int = 5
    held_out: float = 0.2
    patience: int = 8
    damping: float = 0.1
    reads = frozenset({"samples"})
    energy_gains = True

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        wrong = [start for start in self.starts if start not in STARTS]
        if self.kernel not in ("full", "separable") or wrong or not self.starts:
            raise ArgumentValueError(
                "impossible hyperparameters of functional",
                expected=f"kernel 'full' or 'separable', starts out of {', '.join(STARTS)}",
                got=f"kernel={self.kernel!r}, starts={tuple(self.starts)}",
                where="functional",
            )
        if self.iterations < 0 or self.trial_iterations < 0 or self.patience < 1 or not self.damping > 0:
            raise ArgumentValueError(
                "impossible hyperparameters of functional",
                expected="iterations ≥ 0, trial_iterations ≥ 0, patience ≥ 1, damping > 0",
                got=(self.iterations, self.trial_iterations, self.patience, self.damping),
                where="functional",
            )
        if not 0 < self.held_out < 1:
            raise ArgumentValueError("a share", expected="between 0 and 1", got=self.held_out, where="held_out")

    def solve(
        self,
        subject: Any,
        site: Any,
        channels: Channels,
        model: nn.Module,
        generator: torch.Generator | None = None,
    ) -> ChannelGrowth:
        """See `Solver.solve`; works on sites of every kind, streams included."""
        samples = fitting_samples(subject)
        most = site.growable_channels(min(max(site.width, 4), 32)) if channels == "auto" else channels
        if not samples.energy > 1e-12 * _energy(subject):
            return self._nothing(samples, site, most, model, NOTHING_TO_GAIN)
        require_separate_channels(samples, site)
        self._warn(samples, site, most)
        fit, held_out = _split(samples, self.held_out)
        coordinates = self._coordinates(fit)
        free = is_homogeneous(
            fit, random_filters(fit, coordinates, 2 * site.granularity, torch.Generator().manual_seed(0))
        )
        # Behind a curved activation the best filters can be many times as long as the old ones: what they amplify, a
        # step of the layers below changes as much, and training suffers at any amplitude.
        longest = float((filter_norms(site, model) if free else old_steepness(site)).mean())
        if not free and longest > 0:
            coordinates = Bounded(coordinates, longest)
        search = self._search(fit, held_out, coordinates, most, site, generator)
        with torch.no_grad():
            filters = coordinates.filters(search.point.theta)
            # where the scale is free, that of the old filters keeps training even
            filters = at_norm(filters, longest) if free and longest > 0 else filters
        size = site.granularity
        filters = picked(filters, in_blocks(greedy_order(normal_equations(fit, filters), most // size)[0], size))
        reason = None
        if channels == "auto":
            kept = telling_channels(fit, held_out, filters, size)
            reason = f"{kept} of {most} tried channels have a held-out gain above its error bar"
            if kept == 0:
                return self._nothing(samples, site, most, model, reason)
            filters = picked(filters, range(kept))
        return self._assembled(subject, samples, model, filters, reason)

    def _coordinates(self, samples: Samples) -> Parametrization:
        grams = {path: patch_gram(module, samples.inputs[path]) for path, module in samples.producers.items()}
        dtype = next(iter(samples.inputs.values())).dtype
        whitened = Whitened(grams, samples.producers, self.damping, dtype)
        return Separable(whitened) if self.kernel == "separable" else whitened

    def _objective(self, samples: Samples, coordinates: Parametrization) -> Objective:
        return Objective(samples, coordinates, separable=self.kernel == "separable")

    def _search(
        self,
        fit: Samples,
        held_out: Samples,
        coordinates: Parametrization,
        channels: int,
        site: GrowthSite,
        generator: torch.Generator | None,
    ) -> Search:
        """Try every start on a part of the samples, and go on with the best."""
        # a quarter tells the starts apart; below a few hundred samples their ranking would be noise
        part = fit.part(slice(None, None, max(1, min(4, len(fit) // 200))))
        trial = self._objective(part, coordinates)
        best: tuple[str, Search] | None = None
        for name, filters in self._starts(part, coordinates, channels, site, generator):
            found = minimize(trial, held_out, coordinates.encode(filters), self.trial_iterations, self.patience)
            logger.debug("%s: from %s, held-out captured energy %.3g", site.name, name, found.held_out)
            if best is None or found.held_out > best[1].held_out:
                best = name, found
        if best is None:
            raise SolverError("no start for the search", where=site.name)
        start = best[1].point.theta
        result = minimize(self._objective(fit, coordinates), held_out, start, self.iterations, self.patience)
        logger.info(
            "%s: functional from %s, %d steps, held-out captured energy %.3g",
            site.name,
            best[0],
            result.iterations,
            result.held_out,
        )
        return result

    def _starts(
        self,
        samples: Samples,
        coordinates: Parametrization,
        channels: int,
        site: GrowthSite,
        generator: torch.Generator | None,
    ) -> list[tuple[str, Filters]]:
        """Filters to start from by name, of unit size where the patches are whitened."""
        size = site.granularity
        result: list[tuple[str, Filters]] = []
        if site.closed_form is None and set(self.starts) - {"random"}:
            tiny = unit(tiny_filters(samples, site, channels), coordinates)
            missing = channels - count_of(tiny)
            if missing:
                tiny = joined([tiny, random_filters(samples, coordinates, missing, generator)])
            if "tiny" in self.starts:
                result.append(("tiny", tiny))
            if "signs" in self.starts:
                both = joined([tiny, each(tiny, torch.neg)])
                result.append(("signs", _best_of(samples, both, channels, size)))
            if "exact" in self.starts:
                exact = exact_filters(samples, site, coordinates.encode(tiny), coordinates)
                exact = unit(exact, coordinates)
                both = joined([exact, each(exact, torch.neg)])
                result.append(("exact", _best_of(samples, both, channels, size)))
        if "random" in self.starts or not result:
            pool = random_filters(samples, coordinates, 3 * channels, generator)
            result.append(("random", _best_of(samples, pool, channels, size)))
        return result

    def _assembled(
        self, subject: PairStatistics, samples: Samples, model: nn.Module, filters: Filters, reason: str | None
    ) -> ChannelGrowth:
        """The proposal: norms measured, and outgoing weights solved for on all samples, the best channel first."""
        site, size, count = subject.growth_site, subject.growth_site.granularity, count_of(filters)
        measured: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.no_grad():
            site.between(dict(samples.write(filters)), measured=measured)
        inserted = replace(samples, between=lambda new: site.between(new, measured))
        equations = normal_equations(inserted, filters)
        order, gains = greedy_order(equations, count // size)
        gains = (gains / size).repeat_interleave(size)
        like = next(iter(filters.values()))[0]
        outgoing = best_outgoing(equations, samples.consumers, like, self.kernel == "separable", RIDGE)

        def shaped(path: str, tensor: Tensor) -> Tensor:
            weight = model.get_submodule(path).weight
            return tensor.detach().to(weight if isinstance(weight, Tensor) else tensor).contiguous()

        growth = ChannelGrowth(
            site=site.name,
            method=self.name,
            incoming={path: shaped(path, weight) for path, (weight, _) in filters.items()},
            incoming_bias={path: shaped(path, bias) for path, (_, bias) in filters.items() if bias is not None},
            outgoing={path: shaped(path, weight) for path, weight in outgoing.items()},
            gains=gains / len(samples),
            requested=count,
            norms=measured,
        )
        growth = replace(growth.subset(in_blocks(order, size), reason), gains=growth.gains)
        return replace(growth, expected_decrease=expected_decrease(subject, growth))

    def _nothing(
        self, samples: Samples, site: GrowthSite, requested: int, model: nn.Module, reason: str
    ) -> ChannelGrowth:
        """No channels, and why."""
        incoming, biases, outgoing = {}, {}, {}
        for path, module in samples.producers.items():
            incoming[path] = samples.inputs[path].new_zeros(layers.filter_shape(module, 0))
            if getattr(module, "bias", None) is not None:
                biases[path] = samples.inputs[path].new_zeros(0)
        for path, module in samples.consumers.items():
            outgoing[path] = samples.targets[path].new_zeros(layers.column_shape(module, 0))
        return ChannelGrowth(
            site=site.name,
            method=self.name,
            incoming=incoming,
            incoming_bias=biases,
            outgoing=outgoing,
            gains=next(iter(incoming.values())).new_zeros(0, dtype=torch.float64),
            requested=requested,
            reason=reason,
            expected_decrease=0.0,
        )

    def _warn(self, samples: Samples, site: GrowthSite, channels: int) -> None:
        """Say how many samples the fit would need: one a parameter."""
        separable, per_channel = self.kernel == "separable", 0
        for module in samples.producers.values():
            shape = layers.filter_shape(module, 1)[1:]
            per_channel += sum(shape) if separable else math.prod(shape)
            per_channel += getattr(module, "bias", None) is not None
        for path, module in samples.consumers.items():
            shape = layers.column_shape(module, site.ratio(path))
            per_channel += shape[0] + sum(shape[2:]) if separable else math.prod(shape)
        needed = channels * per_channel
        if len(samples) < needed:
            warnings.warn(
                f"{site.name}: fewer kept samples than parameters of the fit, {len(samples)} for {needed}: what it "
                f"captures may not carry over to other samples; collect with keep_samples={needed}, ask for fewer "
                "channels, or take kernel='separable'",
                FewSamplesWarning,
                stacklevel=4,
            )


def fitting_samples(subject: PairStatistics) -> Samples:
    """The kept samples of a site as a fit takes them.

    Args:
        subject: statistics with kept samples.

    Raises:
        StatisticsError: no samples were kept, or some are not finite.
    """
    site = subject.growth_site
    kept = kept_samples(subject, "functional")
    for path, tensor in (*kept.x.items(), *kept.h.items(), *kept.v.items()):
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            raise StatisticsError(
                "the kept samples are not finite",
                where=f"{site.name}, {path}",
                fix="look for an overflow in the loss, or lower the loss scale",
            )
    return Samples(
        inputs=dict(kept.x),
        targets=bottleneck(subject),
        old=dict(kept.h),
        producers={path: site.model.get_submodule(path) for path in site.producers},
        consumers={path: site.model.get_submodule(path) for path in site.consumers},
        between=site.between,
    )


def telling_channels(fit: Samples, held_out: Samples, filters: Filters, size: int = 1) -> int:
    """How many of the channels, in their order, take more off the held-out bottleneck than its error bar.

    Args:
        fit: samples that the outgoing weights are solved on, for the first 1, 2, ... channels.
        held_out: samples that judge.
        filters: the filters, the best channel first.
        size: channels come in groups of this size.

    Returns:
        The number up to the last channel whose mean gain over the held-out samples is above its standard error.
    """
    channels = count_of(filters)
    equations = normal_equations(fit, filters)
    like = next(iter(filters.values()))[0]
    before = torch.zeros(len(held_out), dtype=torch.float64, device=like.device)
    last = 0
    for count in range(size, channels + 1, size):
        leading = {}
        for path, normal_equation in equations.items():
            rows = count * (normal_equation.gram.shape[0] // channels)
            leading[path] = Normal(normal_equation.gram[:rows, :rows], normal_equation.cross[:rows])
        outgoing = best_outgoing(leading, fit.consumers, like, False, RIDGE)
        gain = torch.zeros_like(before)
        with torch.no_grad():
            for path, delta in held_out.added(picked(filters, range(count)), outgoing).items():
                taken = 2 * held_out.targets[path] * delta - delta.square()
                gain += taken.flatten(1).sum(1, dtype=torch.float64)
        more = gain - before
        error = float(more.std()) / len(held_out) ** 0.5 if len(held_out) > 1 else math.inf
        if float(more.mean()) > error:
            last = count
        before = gain
    return last


def is_homogeneous(samples: Samples, filters: Filters) -> bool:
    """Whether what lies between is positively homogeneous, as the ReLU family is: a filter's norm can move into ω."""
    few = samples.part(slice(0, 8))
    once = few.read(filters)
    for factor in (0.5, 4.0):
        for path, value in few.read(each(filters, lambda tensor, factor=factor: tensor * factor)).items():
            if not torch.allclose(value, factor * once[path], rtol=1e-3, atol=1e-4 * float(value.abs().max())):
                return False
    return True


def unit(filters: Filters, coordinates: Parametrization) -> Filters:
    """Filters whose output has about unit size: of norm one where the patches are whitened."""
    rows = [producer.embed(*filters[producer.path]) for producer in coordinates.producers]
    size = torch.cat(rows, 1).norm(dim=1)
    return scaled(filters, torch.where(size > 0, 1 / torch.where(size > 0, size, 1.0), 0.0))


def random_filters(
    samples: Samples, coordinates: Parametrization, channels: int, generator: torch.Generator | None
) -> Filters:
    """Filters of unit size with random directions, all those that the patches take being alike."""
    result: Filters = {}
    for producer in coordinates.producers:
        noise = normal((channels, producer.entries), producer.root, generator)
        result[producer.path] = producer.unflatten(torch.nn.functional.normalize(noise, dim=1) @ producer.root)
    return result


def require_separate_channels(samples: Samples, site: GrowthSite) -> None:
    """Refuse a site where one new channel changes what another gives, but for the channels of its own group.

    Raises:
        SolverError: naming the operations in between.
    """
    size, few = site.granularity, samples.part(slice(0, 2))
    generator = torch.Generator().manual_seed(0)
    filters: Filters = {}
    for path, module in samples.producers.items():
        weight = normal(layers.filter_shape(module, 2 * size), samples.inputs[path], generator)
        bias = None if getattr(module, "bias", None) is None else weight.new_zeros(2 * size)
        filters[path] = (weight / weight[0].numel() ** 0.5, bias)
    changed = {path: (weight.clone(), bias) for path, (weight, bias) in filters.items()}
    for weight, _ in changed.values():
        weight[size:] *= -3
    with torch.no_grad():
        before, after = few.read(filters), few.read(changed)
    for path, value in before.items():
        axis = layers.channel_axis(samples.consumers[path], value.dim())
        own = value.shape[axis] // 2
        if not torch.allclose(value.narrow(axis, 0, own), after[path].narrow(axis, 0, own), rtol=1e-4, atol=1e-6):
            steps = [
                str(getattr(step, "path", None) or getattr(step, "name", type(step).__name__))
                for route in site.routes
                if route.consumer == path
                for step in route.steps
            ]
            raise SolverError(
                "an operation between the layers mixes channels, so that new ones cannot be fitted by themselves",
                got=", ".join(dict.fromkeys(steps)) or "an operation in between",
                where=f"{site.name}, before {path}",
                fix="use method='random' or 'net2net' for this site",
            )


def _best_of(samples: Samples, filters: Filters, channels: int, size: int) -> Filters:
    """The channels that together capture the most, chosen one after the other."""
    groups = count_of(filters) // size
    order, _ = greedy_order(normal_equations(samples, filters), groups)
    return picked(filters, in_blocks(order[: channels // size], size))


def _energy(subject: PairStatistics) -> float:
    kept = kept_samples(subject, "functional")
    return sum(float(torch.linalg.vector_norm(v.flatten(), dtype=torch.float64)) ** 2 for v in kept.v.values())


def _split(samples: Samples, share: float) -> tuple[Samples, Samples]:
    if len(samples) < 2:
        raise SolverError(
            "the fit is judged on samples that it has not seen",
            expected="at least 2 kept samples",
            got=len(samples),
            fix="collect with keep_samples=2000, say",
        )
    count = min(max(1, round(share * len(samples))), len(samples) - 1)
    return samples.part(slice(0, len(samples) - count)), samples.part(slice(len(samples) - count, None))
