"""Filters of the linear theory, from samples: where the fit through the real activation starts from."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from growconv.network import layers
from growconv.network.seats import Calls
from growconv.solvers.filters import Filters
from growconv.solvers.fitting import Fit, Objective, minimize
from growconv.solvers.parametrization import Parametrization
from growconv.solvers.tiny import tiny
from growconv.solvers.weights import filters_of
from growconv.statistics.held_out import sample_averages
from growconv.statistics.problem import pair_problem
from growconv.statistics.samples import KeptPass

EXACT_ITERATIONS = 6
"""Steps on the linear problem: a start need not be the optimum."""


def tiny_filters(fit: Fit, channels: int) -> Filters:
    """Filters of the closed form.

    Args:
        fit: on a site that has one, of whole channels.
        channels: how many; fewer come back where N has a lower rank.
    """
    site = fit.site
    names, (path,) = frozenset({"S", "N_raw"}), site.producers
    averages = [sample_averages(fit.samples, consumer, names) for consumer in site.consumers]
    gram = torch.stack([each["S"] for each in averages]).mean(0)
    linear = torch.cat([each["N_raw"].flatten(1) for each in averages], 1)
    alpha = tiny(gram, linear[:, None], channels).alpha
    like, shape = fit.samples.like, filters_of(site.model, path).shape[1:]
    biased = layers.weighted(fit.module(path)).bias() is not None
    weight = (alpha[:, :-1] if biased else alpha).reshape(alpha.shape[0], *shape)
    return Filters(len(alpha), {path: (weight.to(like), alpha[:, -1].to(like) if biased else None)})


def exact_filters(fit: Fit, start: Tensor, coordinates: Parametrization) -> Filters:
    """Filters of the linear optimum, or near it: the same search with the activation left out.

    Args:
        fit: on a site with a closed form.
        start: parameters to start from.
        coordinates: their meaning.
    """
    linear = Fit(fit.samples, _linear)
    found = minimize(Objective(linear, coordinates), linear, start, EXACT_ITERATIONS, EXACT_ITERATIONS + 1)
    with torch.no_grad():
        return coordinates.filters(found.point.theta)


def _linear(piece: KeptPass, filters: Filters) -> Mapping[str, Calls]:
    """What the consumers read if all that lies between were linear."""
    site, found = piece.region.site, {}
    produced = piece.produced(filters.incoming, filters.biases)
    for route in site.routes:
        producer, consumer = (site.model.get_submodule(path) for path in (route.producer, route.consumer))
        found[route.consumer] = []
        calls = (piece.x[route.producer], produced[route.producer], piece.h[route.consumer], piece.v[route.consumer])
        for x, new, h, v in zip(*calls, strict=True):
            problem = pair_problem(route, producer, consumer, x, h, v)[0]
            if not layers.weighted(producer).kernel_size:
                new = new.unsqueeze(-1) if new.dim() == 2 else new.movedim(-1, 1)
            found[route.consumer].append(_laid_out(problem.between(new), consumer, v))
    return found


def _laid_out(maps: Tensor, consumer: nn.Module, target: Tensor) -> Tensor:
    """Maps (n, k, *grid) as the consumer takes them."""
    if layers.weighted(consumer).kernel_size:
        return maps
    return maps.flatten(1) if target.dim() == 2 else maps.movedim(1, -1)
