"""Filters of the linear theory, from samples: where the fit through the real activation starts from."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from growconv.linalg import RANK_TOLERANCE, leading_svd
from growconv.network import layers
from growconv.network.seats import Calls
from growconv.solvers.filters import Filters
from growconv.solvers.fitting import Fit, Objective, Search
from growconv.solvers.parametrization import Parametrization
from growconv.statistics.held_out import sample_averages
from growconv.statistics.problem import pair_problem
from growconv.statistics.samples import KeptPass

EXACT_ITERATIONS = 4
"""Steps on the linear problem: a start need not be the optimum."""


def tiny_filters(fit: Fit, channels: int, coordinates: Parametrization) -> Filters:
    """Filters of the closed form in whitened coordinates, of norm one there.

    Args:
        fit: on a site that has one, of whole channels.
        channels: how many; fewer come back where N has a lower rank.
        coordinates: whose damped second moment of the patches stands for S.
    """
    names, (producer,) = frozenset({"N_raw"}), coordinates.producers
    averages = [sample_averages(fit.samples, consumer, names)["N_raw"] for consumer in fit.site.consumers]
    linear = torch.cat([each.flatten(1) for each in averages], 1)
    left, values, _ = leading_svd(producer.root.to(linear) @ linear, channels)
    rows = left[:, values > RANK_TOLERANCE * values[0]].mT.to(producer.root)
    return Filters(len(rows), {producer.path: producer.unflatten(rows @ producer.root)})


def exact_filters(fit: Fit, start: Tensor, coordinates: Parametrization) -> Filters:
    """Filters of the linear optimum, or near it: the same search with the activation left out.

    Args:
        fit: on a site with a closed form.
        start: parameters to start from.
        coordinates: their meaning.
    """
    linear = Fit(fit.samples, _linear)
    found = Search(Objective(linear, coordinates), None, start, EXACT_ITERATIONS + 1).run(EXACT_ITERATIONS)
    with torch.no_grad():
        return coordinates.filters(found.best.theta)


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
