"""The problem of a site and one of its consumers: several producers, as of a residual stream, are taken as one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from growconv.convolution.geometry import Geometry
from growconv.network import layers
from growconv.network.site import GrowthSite
from growconv.statistics.problem import PairProblem, centred, linear_geometry, pair_problem


def site_problem(
    site: GrowthSite, consumer: str, x: Mapping[str, Tensor], h: Tensor, v: Tensor
) -> tuple[PairProblem, Tensor, Tensor, Tensor]:
    """The problem of a site and one of its consumers, as `pair_problem` gives it.

    Several producers are one: a convolution that reads the inputs of all, where they have one geometry (1×1 kernels are
    one tap of it), else a linear layer on the grid of the consumer's input that reads their patches.

    Args:
        site: which.
        consumer: path of the consumer.
        x: per producer its input.
        h: input of the consumer.
        v: desired change of its output.
    """
    layer = site.model.get_submodule(consumer)
    producers = {path: site.model.get_submodule(path) for path in site.producers}
    found = {
        route.producer: pair_problem(route, producers[route.producer], layer, x[route.producer], h, v)
        for route in site.routes
        if route.consumer == consumer
    }
    if len(producers) == 1:
        return next(iter(found.values()))
    parts = {path: (problem, maps) for path, (problem, maps, *_) in found.items()}
    one = _as_convolution(parts) or _as_linear(parts)
    entries: list[int] = []
    for path, producer in producers.items():
        weighted = layers.weighted(producer)
        count = weighted.filters()[0].numel() + (weighted.bias() is not None)
        entries += one.entries.get(path, [-1] * count)
    given, _, h, v = next(iter(found.values()))
    problem = replace(
        given,
        first=one.geometry,
        steps=given.steps if one.before_steps else (),
        input_size=tuple(one.maps.shape[2:]),
        channels=(one.maps.shape[1], *given.channels[1:]),
        first_bias=one.bias,
        entries=tuple(entries),
    )
    return problem, one.maps, h, v


@dataclass(frozen=True)
class _Joined:
    """Several producers as one.

    Attributes:
        geometry: of the one.
        maps: its input.
        bias: whether its patches carry a constant entry.
        entries: by producer, where its patches lie among those of the one.
        before_steps: whether what lies between producers and consumer is still to come.
    """

    geometry: Geometry
    maps: Tensor
    bias: bool
    entries: dict[str, list[int]]
    before_steps: bool


def _as_convolution(parts: Mapping[str, tuple[PairProblem, Tensor]]) -> _Joined | None:
    """One convolution that reads the inputs of all, each at its own channels; None where the geometries differ."""
    problems = [problem for problem, _ in parts.values()]
    wide = {problem.first for problem in problems if problem.first.taps > 1}
    if len(wide) > 1 or len({problem.steps for problem in problems}) > 1:
        return None
    geometry = wide.pop() if wide else linear_geometry(problems[0].first.axes)
    maps = {path: _on_grid_of(geometry, problem.first, x) for path, (problem, x) in parts.items()}
    sizes = {None if each is None else each.shape[2:] for each in maps.values()}
    if len(sizes) > 1 or (grid := sizes.pop()) is None:
        return None
    if {problem.first_output_size for problem in problems} != {geometry.output_size(tuple(grid))}:
        return None
    joined = torch.cat([each for each in maps.values() if each is not None], 1)
    centre = int(np.ravel_multi_index(geometry.identity_tap, geometry.kernel_size))
    entries: dict[str, list[int]] = {}
    channels = 0
    for path, (problem, x) in parts.items():
        taps = range(geometry.taps) if problem.first.taps > 1 else [centre]
        entries[path] = [
            channel * geometry.taps + tap for channel in range(channels, channels + x.shape[1]) for tap in taps
        ]
        entries[path] += [joined.shape[1] * geometry.taps] * problem.first_bias
        channels += x.shape[1]
    return _Joined(geometry, joined, any(problem.first_bias for problem in problems), entries, before_steps=True)


def _on_grid_of(geometry: Geometry, own: Geometry, x: Tensor) -> Tensor | None:
    """What a convolution of some geometry reads, with one tap alone, where a layer with its own geometry reads x."""
    if own.taps > 1:
        return x
    steps = [a // b for a, b in zip(own.stride, geometry.stride, strict=True)]
    fits = all(a == b * step for a, b, step in zip(own.stride, geometry.stride, steps, strict=True))
    if not fits or any(map(any, own.padding)) or not centred(geometry):
        return None
    return x[(slice(None), slice(None), *(slice(None, None, step) for step in steps))]


def _as_linear(parts: Mapping[str, tuple[PairProblem, Tensor]]) -> _Joined:
    """A linear layer on the grid of the consumer's input that reads the patches of all, constant entries included."""
    features: list[Tensor] = []
    entries: dict[str, list[int]] = {}
    for path, (problem, x) in parts.items():
        own = [problem.features(x)]
        if problem.first_bias:
            constant = problem.constant(x.dtype, x.device)
            own.append(constant.expand(x.shape[0], 1, *problem.hidden_size))
        begin = sum(each.shape[1] for each in features)
        features += own
        entries[path] = list(range(begin, begin + sum(each.shape[1] for each in own)))
    maps = torch.cat(features, 1)
    return _Joined(linear_geometry(maps.dim() - 2), maps, False, entries, before_steps=False)


def site_input(site: GrowthSite, consumer: str, x: Mapping[str, Tensor], h: Tensor, v: Tensor) -> Tensor:
    """The second of what `site_problem` gives."""
    return site_problem(site, consumer, x, h, v)[1]
