"""Producers and a consumer: all that the statistics need to know of them, and their tensors in one layout."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from growconv.convolution.geometry import Geometry
from growconv.convolution.unfold import pad, unfold, windows
from growconv.errors import StatisticsError
from growconv.network import layers
from growconv.network.site import AdaptivePool, Depthwise, Flatten, GrowthSite, Pool, Route

GridStep = Pool | AdaptivePool | Depthwise
"""Steps of a route that change the grid; norms and activations count as the identity, a flattening only renames."""


@dataclass(frozen=True)
class PairProblem:
    """Shapes and geometry of one (producer, consumer) pair on one image size. Letters as in the einsum legend.

    Attributes:
        first: geometry of the producer, whose patches have A entries.
        second: geometry of the consumer, B taps.
        steps: what changes the grid in between; linear on the channels' values.
        input_size: grid of the producer's input x.
        hidden_size: grid of the consumer's input h.
        channels: C0, C1, C2, of x, h and v.
        first_bias: whether patches of the producer carry a constant entry, last in A.
        second_bias: whether patches of the consumer carry one, last in D.
        entries: of several producers taken as one: for each entry of the site's axis a, its entry among the patches
            here, −1 where it does not reach the consumer. None: the axes are the same.
    """

    first: Geometry
    second: Geometry
    steps: tuple[GridStep, ...]
    input_size: tuple[int, ...]
    hidden_size: tuple[int, ...]
    channels: tuple[int, int, int]
    first_bias: bool
    second_bias: bool
    entries: tuple[int, ...] | None = None

    @property
    def patch_entries(self) -> int:
        """Entries of the producer's patch without the constant one."""
        return self.channels[0] * self.first.taps

    @property
    def consumer_entries(self) -> int:
        """Entries of the consumer's own patch without the constant one."""
        return self.channels[1] * self.second.taps

    @property
    def output_size(self) -> tuple[int, ...]:
        """Grid of the consumer's output, m."""
        return self.second.output_size(self.hidden_size)

    @property
    def first_output_size(self) -> tuple[int, ...]:
        """Grid of the producer's output, before any step in between."""
        return self.first.output_size(self.input_size)

    @property
    def local(self) -> bool:
        """Whether the producer's output grid is the consumer's input grid."""
        return not self.steps

    @property
    def projection_entries(self) -> int:
        """Entries A·B·D of P, the largest statistic."""
        d = self.consumer_entries + self.second_bias
        return self._site_entries * self.second.taps * d

    @property
    def full_entries(self) -> int:
        """Entries (A·B)² of S_full."""
        return (self._site_entries * self.second.taps) ** 2

    @property
    def _site_entries(self) -> int:
        return self.patch_entries + self.first_bias if self.entries is None else len(self.entries)

    def on_site(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the patches here as sums over the site's axis a.

        Args:
            sums: by the name of the statistic.
        """
        if self.entries is None:
            return dict(sums)
        taps, found = self.second.taps, {}
        for name, value in sums.items():
            placed = value.unflatten(1, (-1, taps)).unflatten(0, (-1, taps)) if name == "S_full" else value
            for axis in {"S": (0, 1), "S_full": (0, 2), "N_raw": (0,), "P": (0,)}.get(name, ()):
                placed = self._along(axis, placed)
            found[name] = placed.flatten(2).flatten(0, 1) if name == "S_full" else placed
        return found

    def _along(self, axis: int, value: Tensor) -> Tensor:
        """The entries of the site along an axis of entries here."""
        entries = torch.tensor(self.entries, device=value.device)
        shape = [-1 if each == axis else 1 for each in range(value.dim())]
        return value.index_select(axis, entries.clamp_min(0)) * (entries >= 0).view(shape)

    def here(self, filters: Float[Tensor, "k a"]) -> Float[Tensor, "k e"]:
        """Filters over the site's axis a as filters over the patches here."""
        if self.entries is None:
            return filters
        index = torch.tensor(self.entries, device=filters.device)
        found = filters.new_zeros(len(filters), self.patch_entries + self.first_bias)
        return found.index_add(1, index[index >= 0], filters[:, index >= 0])

    def between(self, maps: Float[Tensor, "n k *grid"]) -> Float[Tensor, "n k *hidden"]:
        """The linear part of what lies between producer and consumer.

        Args:
            maps: values on the producer's output grid.

        Returns:
            Values on the consumer's input grid: poolings average, depthwise convolutions are their identity tap.
        """
        for step in self.steps:
            maps = _apply(step, maps)
        return maps

    def features(self, x: Float[Tensor, "n c *size"]) -> Float[Tensor, "n a *hidden"]:
        """Patches U as maps on the consumer's input grid, without the constant entry.

        Args:
            x: input of the producer.
        """
        patches = unfold(x, self.first)
        return self.between(patches.view(*patches.shape[:2], *self.first_output_size))

    def first_patches(self, x: Float[Tensor, "n c *size"]) -> Float[Tensor, "n a l"]:
        """Patches on the producer's own output grid, before any step in between, with the constant entry."""
        patches = unfold(x, self.first)
        return torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1) if self.first_bias else patches

    def constant(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " *hidden"]:
        """What the producer's bias entry, 1 at every location, is on the consumer's input grid."""
        return self.between(torch.ones(1, 1, *self.first_output_size, dtype=dtype, device=device))[0, 0]


def folded(problem: PairProblem, x: Float[Tensor, "n c *size"]) -> tuple[PairProblem, Float[Tensor, "n c *folded"]]:
    """The same pair with what changes the grid in between taken into the producer, where that is exact.

    An average over a window of the producer's outputs is an output for an averaged input; keeping every s-th output is
    a larger stride. So a pooling without padding, and a depthwise convolution that keeps the grid's origin, disappear.

    Args:
        x: input of the producer.

    Returns:
        A local problem and its input; both unchanged where some step cannot be taken in.
    """
    steps = [_as_window(step) for step in problem.steps]
    if problem.local or any(step is None or step.geometry.axes != problem.first.axes for step in steps):
        return problem, x
    first, maps = problem.first, pad(x, problem.first)
    for step in steps:
        if step is None:
            continue
        geometry = step.geometry
        if isinstance(step, Pool):
            dilation = tuple(a * b for a, b in zip(first.stride, geometry.dilation, strict=True))
            window = replace(geometry, stride=(1,) * geometry.axes, dilation=dilation)
            maps = windows(maps, window).mean(dim=tuple(range(2, 2 + geometry.axes)))
        stride = tuple(a * b for a, b in zip(first.stride, geometry.stride, strict=True))
        first = replace(first, stride=stride)
    first = replace(first, padding=((0, 0),) * first.axes, padding_mode="zeros")
    local = replace(problem, first=first, steps=(), input_size=tuple(maps.shape[2:]))
    fits = first.output_size(local.input_size) == problem.hidden_size
    return (local, maps) if fits else (problem, x)


def thinned(
    problem: PairProblem, x: Float[Tensor, "n c *size"], h: Float[Tensor, "n d *grid"]
) -> tuple[PairProblem, tuple[Tensor, Tensor]]:
    """The same pair without the hidden locations between those that a consumer of one tap reads, on axes with a stride.

    Args:
        problem: a pair; one that is not local stays as it is.
        x: input of the producer.
        h: input of the consumer.

    Returns:
        A pair whose producer takes the consumer's stride too, and x and h for it.
    """
    second = problem.second
    axes = zip(second.kernel_size, second.padding, second.stride, strict=True)
    steps = tuple(stride if taps == 1 and sides == (0, 0) else 1 for taps, sides, stride in axes)
    if not problem.local or set(steps) == {1}:
        return problem, (x, h)
    fewer = h[(..., *(slice(None, None, step) for step in steps))]
    first = replace(problem.first, stride=tuple(a * b for a, b in zip(problem.first.stride, steps, strict=True)))
    second = replace(second, stride=tuple(a // b for a, b in zip(second.stride, steps, strict=True)))
    return replace(problem, first=first, second=second, hidden_size=tuple(fewer.shape[2:])), (x, fewer)


def _as_window(step: GridStep) -> Pool | Depthwise | None:
    """A step that is the same at every location, None where it is not."""
    if isinstance(step, AdaptivePool):
        return None
    geometry = step.geometry
    if isinstance(step, Pool):
        return None if any(map(any, geometry.padding)) or geometry.ceil_mode else step
    return step if centred(geometry) else None


def centred(geometry: Geometry) -> bool:
    """Whether the identity tap at output location m reads the input at stride·m."""
    taps = zip(geometry.padding, geometry.dilation, geometry.identity_tap, strict=True)
    return all(low == step * tap for (low, _), step, tap in taps)


def _apply(step: GridStep, maps: Tensor) -> Tensor:
    if isinstance(step, AdaptivePool):
        pools = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
        return pools[maps.dim() - 2](maps, step.output_size)
    view = windows(pad(maps, step.geometry), step.geometry)
    kernel = range(2, 2 + step.geometry.axes)
    if isinstance(step, Depthwise):
        return view[(slice(None), slice(None), *step.geometry.identity_tap)]
    if isinstance(step, Pool) and step.counts_padding:
        return view.mean(dim=tuple(kernel))
    inside = windows(pad(torch.ones_like(maps[:1, :1]), step.geometry), step.geometry)
    return view.sum(dim=tuple(kernel)) / inside.sum(dim=tuple(kernel))


def batched(tensor: Tensor, layer: nn.Module) -> Tensor:
    """Input or output of a layer with its batch axis; torch's layers also take single samples.

    Args:
        tensor: what the layer read or wrote.
        layer: convolution or linear layer.
    """
    axes = len(layers.weighted(layer).kernel_size) + 1
    return tensor.unsqueeze(0) if tensor.dim() == axes else tensor


def linear_geometry(axes: int) -> Geometry:
    """A linear layer on a grid: one tap, nothing else."""
    return Geometry((1,) * axes, (1,) * axes, (1,) * axes, ((0, 0),) * axes)


def pair_problem(
    route: Route, producer: nn.Module, consumer: nn.Module, x: Tensor, h: Tensor, v: Tensor
) -> tuple[PairProblem, Tensor, Tensor, Tensor]:
    """Shapes and geometry of a batch, and its tensors as maps (n, channels, *grid).

    Args:
        route: the steps from producer to consumer.
        producer: convolution or linear layer.
        consumer: convolution or linear layer.
        x: input of the producer, as the module saw it, with a batch axis.
        h: input of the consumer, likewise.
        v: desired change of the consumer's output, likewise.

    Returns:
        The problem, x, h and v as maps.

    Raises:
        StatisticsError: where the tensors do not fit the route.
    """
    where = f"{route.producer} -> {route.consumer}"
    if not layers.weighted(producer).kernel_size:
        x = _channels_first(x)
        first = linear_geometry(x.dim() - 2)
    else:
        first = Geometry.of(producer)
    second, h, v = _consumed(route, consumer, h, v, where)
    problem = PairProblem(
        first=first,
        second=second,
        steps=_grid_steps(route, first.output_size(x.shape[2:])),
        input_size=tuple(x.shape[2:]),
        hidden_size=tuple(h.shape[2:]),
        channels=(x.shape[1], h.shape[1], v.shape[1]),
        first_bias=layers.weighted(producer).bias() is not None,
        second_bias=layers.weighted(consumer).bias() is not None,
    )
    grid = tuple(problem.constant(torch.float32, torch.device("cpu")).shape)
    if (
        grid != problem.hidden_size
        or problem.output_size != tuple(v.shape[2:])
        or not (x.shape[0] == h.shape[0] == v.shape[0])
    ):
        raise StatisticsError(
            "the tensors of producer and consumer do not fit the route between them",
            where=where,
            expected=f"{x.shape[0]} samples on a grid {grid}",
            got=f"a consumer input of shape {tuple(h.shape)} and output of shape {tuple(v.shape)}",
            fix="check the site's steps: print(site), site.routes",
        )
    return problem, x, h, v


def _consumed(
    route: Route | None, consumer: nn.Module, h: Tensor, v: Tensor, where: str
) -> tuple[Geometry, Tensor, Tensor]:
    """A consumer as a convolution, and its input and output as maps; the route, if any, tells what was flattened."""
    flattened = next((step.grid for step in route.steps if isinstance(step, Flatten)), None) if route else None
    if layers.weighted(consumer).kernel_size:
        return Geometry.of(consumer), h, v
    if flattened is None:
        h, v = _channels_first(h), _channels_first(v)
        return linear_geometry(h.dim() - 2), h, v
    return Geometry.covering(flattened), _unflattened(h, flattened, where), v.reshape(*v.shape, *(1,) * len(flattened))


def _grid_steps(route: Route, size: tuple[int, ...]) -> tuple[GridStep, ...]:
    """Steps that change the grid; an adaptive pooling that divides it evenly becomes a plain one."""
    steps: list[GridStep] = []
    for step in route.steps:
        if isinstance(step, AdaptivePool):
            if not any(have % want for have, want in zip(size, step.output_size, strict=True)):
                window = tuple(have // want for have, want in zip(size, step.output_size, strict=True))
                axes = len(window)
                steps.append(Pool(Geometry(window, window, (1,) * axes, ((0, 0),) * axes), step.average))
            else:
                steps.append(step)
            size = step.output_size
        elif isinstance(step, Pool | Depthwise):
            steps.append(step)
            size = step.geometry.output_size(size)
    return tuple(steps)


def _unflattened(h: Tensor, grid: Sequence[int], where: str) -> Tensor:
    locations = math.prod(grid)
    if h.dim() != 2 or h.shape[1] % locations:
        raise StatisticsError(
            "a linear layer does not read the flattened grid of its site",
            where=where,
            expected=f"(samples, channels·{locations}) from a grid {tuple(grid)}",
            got=f"an input of shape {tuple(h.shape)}",
            fix="give the site by hand: growconv.site(...)",
        )
    return h.reshape(h.shape[0], -1, *grid)


def _channels_first(tensor: Tensor) -> Tensor:
    """(n, F) or (n, *grid, F) as maps with at least one axis."""
    return tensor.unsqueeze(-1) if tensor.dim() == 2 else tensor.movedim(-1, 1)


def site_problem(
    site: GrowthSite, consumer: str, x: Mapping[str, Tensor], h: Tensor, v: Tensor
) -> tuple[PairProblem, Tensor, Tensor, Tensor]:
    """The problem of a site and one of its consumers, as `pair_problem` gives it.

    Without producers it is that of the consumer behind one that reads no channels.

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
    if not site.producers:
        route = next((each for each in site.routes if each.consumer == consumer), None)
        second, h, v = _consumed(route, layer, h, v, site.name)
        size = tuple(h.shape[2:])
        channels, bias = (0, h.shape[1], v.shape[1]), layers.weighted(layer).bias() is not None
        return PairProblem(linear_geometry(len(size)), second, (), size, size, channels, False, bias), h[:, :0], h, v
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


def widest_of(site: GrowthSite) -> dict[str, str]:
    """Per consumer one that reads all that it reads, through the same kernel on the same grid; itself, or another.

    S and S_full of both are the same, as far as what the one reads goes: what the layers give is not in them.
    """
    read: dict[str, dict[str, tuple[object, ...]]] = {path: {} for path in site.consumers}
    for route in site.routes:
        steps = tuple(step for step in route.steps if isinstance(step, Pool | AdaptivePool | Depthwise | Flatten))
        read[route.consumer][route.producer] = steps
    kernels = {path: _kernel(site.model.get_submodule(path)) for path in site.consumers}
    found: dict[str, str] = {}
    for path in sorted(site.consumers, key=lambda each: -len(read[each])):
        others = (each for each in dict.fromkeys(found.values()) if kernels[each] == kernels[path])
        found[path] = next((each for each in others if read[path].items() <= read[each].items()), path)
    return found


def _kernel(layer: nn.Module) -> Geometry | None:
    """The geometry of a convolution; None for a linear layer, whose grid is that of its input."""
    return Geometry.of(layer) if layers.weighted(layer).kernel_size else None


def reaches(site: GrowthSite, consumer: str) -> Bool[Tensor, " a"]:
    """Which entries of a site's axis a reach a consumer."""
    read = {route.producer for route in site.routes if route.consumer == consumer}
    found: list[bool] = []
    for path in site.producers:
        weighted = layers.weighted(site.model.get_submodule(path))
        found += [path in read] * (weighted.filters()[0].numel() + (weighted.bias() is not None))
    return torch.tensor(found)


def site_input(site: GrowthSite, consumer: str, x: Mapping[str, Tensor], h: Tensor, v: Tensor) -> Tensor:
    """The second of what `site_problem` gives."""
    return site_problem(site, consumer, x, h, v)[1]
