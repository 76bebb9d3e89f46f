"""Filters of the linear theory, from samples: where the fit through the real activation starts from."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from growconv.network.site import GrowthSite
from growconv.solvers.filters import Filters
from growconv.solvers.fitting import Objective, Samples, minimize
from growconv.solvers.parametrization import Parametrization
from growconv.solvers.tiny import tiny
from growconv.statistics.accumulator import ConsumerSums
from growconv.statistics.collector import SCRATCH_BYTES
from growconv.statistics.problem import PairProblem, pair_problem

EXACT_ITERATIONS = 6
"""Steps on the linear problem: a start need not be the optimum."""


def tiny_filters(samples: Samples, site: GrowthSite, channels: int) -> Filters:
    """Filters of the closed form.

    Args:
        samples: of a site that has one, with what the consumers read.
        site: the site.
        channels: how many; fewer come back where N has a lower rank.
    """
    ((producer, producer),) = samples.producers.items()
    grams, linears = [], []
    for path in samples.consumers:
        problem, x, h, v = _problem(samples, site, path)
        sums = ConsumerSums(path, frozenset({"S", "N_raw"}), "auto", SCRATCH_BYTES)
        sums.add(problem, x, h, v, counts=True)
        averages = sums.averages()
        grams.append(averages["S"])
        linears.append(averages["N_raw"].flatten(1))
    alpha = tiny(torch.stack(grams).mean(0), torch.cat(linears, 1)[:, None], channels).alpha
    like = samples.inputs[producer]
    has_bias = getattr(producer, "bias", None) is not None
    weight = (alpha[:, :-1] if has_bias else alpha).reshape(alpha.shape[0], *_shape(producer))
    return {producer: (weight.to(like), alpha[:, -1].to(like) if has_bias else None)}


def exact_filters(samples: Samples, site: GrowthSite, start: Tensor, coordinates: Parametrization) -> Filters:
    """Filters of the linear optimum, or near it: the same search with the activation left out.

    Args:
        samples: of a site with a closed form.
        site: the site.
        start: parameters to start from.
        coordinates: their meaning.
    """
    ((producer, producer),) = samples.producers.items()
    problems = {path: _problem(samples.part(slice(0, 1)), site, path)[0] for path in samples.consumers}

    def between(new: dict[str, Tensor]) -> dict[str, Tensor]:
        maps = new[producer]
        if isinstance(producer, nn.Linear):
            maps = maps.unsqueeze(-1) if maps.dim() == 2 else maps.movedim(-1, 1)
        return {
            path: _laid_out(problem.between(maps), samples.consumers[path], samples.targets[path])
            for path, problem in problems.items()
        }

    linear = replace(samples, between=between)
    found = minimize(Objective(linear, coordinates), linear, start, EXACT_ITERATIONS, EXACT_ITERATIONS + 1)
    with torch.no_grad():
        return coordinates.filters(found.point.theta)


def _problem(samples: Samples, site: GrowthSite, path: str) -> tuple[PairProblem, Tensor, Tensor, Tensor]:
    route = next(route for route in site.routes if route.consumer == path)
    producer, consumer = samples.producers[route.producer], samples.consumers[path]
    return pair_problem(route, producer, consumer, samples.inputs[route.producer], samples.old[path], samples.targets[path])


def _laid_out(maps: Tensor, consumer: nn.Module, target: Tensor) -> Tensor:
    """Maps (n, k, *grid) as the consumer takes them."""
    if not isinstance(consumer, nn.Linear):
        return maps
    return maps.flatten(1) if target.dim() == 2 else maps.movedim(1, -1)


def _shape(producer: nn.Module) -> tuple[int, ...]:
    weight = producer.weight
    return tuple(weight.shape[1:]) if isinstance(weight, Tensor) else ()
