"""What lies between the producers and consumers of sites, step by step, read off one recorded run."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from growconv.convolution.geometry import Geometry
from growconv.network import layers, operations
from growconv.network.layout import OUT
from growconv.network.model import Arguments, one_run, tensors_in
from growconv.network.routes import Activation, AdaptivePool, Depthwise, Flatten, Norm, Other, Pool, Route, Step
from growconv.network.seats import Region, region_of
from growconv.network.site import GrowthSite, sizes_of
from growconv.network.tape import LayerCall, Operation, Rewritten, Tape, hot_values

_NOTHING = frozenset(["clone", "_to_copy", "contiguous", "expand", "detach", "alias"])
_VIEWS = operations.VIEWS | {"squeeze", "unsqueeze", "flatten"}
_HOMOGENEOUS = frozenset(["relu", "leaky_relu", "prelu", "_prelu_kernel", "abs", "neg", "mul", "div"])
_WINDOWED = ("max_pool", "avg_pool")


def routes_of(
    model: nn.Module, arguments: Arguments, sites: Sequence[GrowthSite], training: bool = False
) -> dict[str, tuple[Route, ...]]:
    """The routes of sites, from one recorded run.

    Args:
        model: a copy of the model, which is run once; its mode and buffers may change.
        arguments: of its forward.
        sites: of that model, or of one with the same names.
        training: in which mode it is run.

    Returns:
        By name of the site, one route per producer and consumer that a chain of steps joins; pairs that are joined
        otherwise have a route with its problem.
    """
    tape = Tape(model.train(training))
    with torch.no_grad(), one_run(model, arguments) as (given, named), tape:
        output = model(*given, **named)
    returned = {tape.number(tensor) for tensor in tensors_in(output)}
    behind = _norms_behind(tape, returned)
    found, sizes = {}, sizes_of(model, sites[0].layout) if sites else None
    known: dict[frozenset[str] | None, dict[str, float | bool]] = {}
    for each in sites:
        site = each.of(model)
        routes = tuple(replace(r, behind=behind.get(r.consumer)) for r in recorded_routes(tape, site))
        if replace(site, routes=routes).closed_form:
            kinds = _kinds(routes) if len(site.producers) == 1 else None
            probed = known.get(kinds) or _at_zero(region_of(tape, site, sizes))
            if kinds is not None:
                known[kinds] = probed
            routes = tuple(replace(route, **probed) for route in routes)  # pyright: ignore[reportArgumentType]
        found[each.name] = routes
    return found


def _norms_behind(tape: Tape, returned: Iterable[int]) -> dict[str, str]:
    """Per layer the norm layer that alone takes what it gives, in every call, and takes nothing else."""
    found, outside = {}, set(returned)
    for path, own in tape.calls.items():
        takers = [tape.users[call.outputs[0]] for call in own]
        norms = {step.path if isinstance(step, LayerCall) else "" for each in takers for step in each}
        if len(norms) != 1 or any(len(each) != 1 for each in takers) or any(call.outputs[0] in outside for call in own):
            continue
        (norm,) = norms
        if norm and layers.is_norm(tape.model.get_submodule(norm)) and len(tape.calls[norm]) == len(own):
            found[path] = norm
    return found


def _kinds(routes: Sequence[Route]) -> frozenset[str] | None:
    """The kinds of steps on some routes, where they alone say what a constant gives; None where arguments matter."""
    steps = [step for route in routes for step in route.steps]
    plain = all(
        step.name == "relu" if isinstance(step, Activation) else isinstance(step, Norm | Pool | AdaptivePool | Flatten)
        for step in steps
    )
    return frozenset(type(step).__name__ for step in steps) if plain else None


def _at_zero(region: Region) -> dict[str, float | bool]:
    """What new channels of one constant value give: their value at 0, and whether all slopes are 0 at 0 and above."""
    new: dict[str, list[Tensor]] = {}  # two units of each: one at 0, one above
    axes: dict[str, int] = {}
    for path, numbers in region.outputs.items():
        module = region.site.model.get_submodule(path)
        heights = next(module.parameters()).new_tensor((0.0, 1e-3), dtype=torch.float64)
        heights = heights.repeat_interleave(region.places[path, OUT].shape[1])
        new[path] = []
        for shape in (region.shapes[number] for number in numbers):
            axes[path] = axis = layers.channel_axis(module, len(shape))
            across = heights.view(-1, *[1] * (len(shape) - axis - 1))
            new[path].append(across.expand(*shape[:axis], -1, *shape[axis + 1 :]).clone().requires_grad_())
    with torch.enable_grad():
        read = region.read(new)
        values = [each for calls in read.values() for each in calls]
        # any weights but equal ones, whose sum a norm over the locations of a sample leaves as it is
        draw = torch.Generator().manual_seed(0)
        weights = [torch.rand(each.shape, generator=draw, dtype=torch.float64).to(each) for each in values]
        total = torch.stack([(each * w).sum() for each, w in zip(values, weights, strict=True)]).sum()
        probes = [(path, each) for path, calls in new.items() for each in calls]
        slopes = [None] * len(probes)
        if total.requires_grad:
            slopes = torch.autograd.grad(total, [each for _, each in probes], allow_unused=True)
    halves = [slope.chunk(2, axes[path]) for (path, _), slope in zip(probes, slopes, strict=True) if slope is not None]
    moved = [any(bool((half[height] != 0).any()) for half in halves) for height in (0, 1)]
    at_zero = []
    for path, calls in read.items():
        module = region.site.model.get_submodule(path)
        at_zero += [each.detach().chunk(2, layers.channel_axis(module, each.dim()))[0].flatten() for each in calls]
    strongest = max((float(each[each.abs().argmax()]) for each in at_zero), key=abs)
    return {"dead_at_zero": not moved[0], "dead_above_zero": not moved[1], "at_zero": strongest}


def recorded_routes(tape: Tape, site: GrowthSite) -> tuple[Route, ...]:
    """The routes of one site on a recording."""
    walker = _Walker(tape, site)
    found: dict[tuple[str, str], Route] = {}
    for consumer in site.consumers:
        for call in tape.calls[consumer]:
            for steps, producer, problem in walker.back(call.inputs[0]):
                for path in site.producers if producer is None else (producer,):
                    route = Route(path, consumer, steps, problem)
                    known = found.setdefault((path, consumer), route)
                    if producer is not None and known != route:
                        route = Route(path, consumer, (), "several ways lead from one to the other")
                        found[path, consumer] = route
    return tuple(found.values())


Branch = tuple[tuple[Step, ...], str | None, str | None]
"""Steps in front of a value, the producer that they start from, and what keeps them from being a chain."""


class _Walker:
    """Goes back from a consumer's input to the producers that it comes from."""

    def __init__(self, tape: Tape, site: GrowthSite) -> None:
        self.tape = tape
        self.site = site
        self.hot, self.made = hot_values(tape, site)
        self.maker = tape.makers
        self.known: dict[int, list[Branch]] = {}

    def back(self, value: int) -> list[Branch]:
        """What leads to a value: one branch, or those of all that sums on the way add up."""
        start = value
        if start not in self.known:
            steps: list[Step] = []
            while value not in self.made:
                before = self._step(value, steps)
                if isinstance(before, str):
                    self.known[start] = [(tuple(reversed(steps)), None, before)]
                    break
                if isinstance(before, list):
                    own = tuple(reversed(steps))
                    branches = [branch for each in before for branch in self.back(each)]
                    self.known[start] = _told_apart([((*first, *own), path, why) for first, path, why in branches])
                    break
                value = before
            else:
                producer: str = self.maker[value].path  # pyright: ignore[reportAttributeAccessIssue]
                self.known[start] = [(tuple(reversed(steps)), producer, None)]
        return self.known[start]

    def _step(self, value: int, steps: list[Step]) -> int | list[int] | str:
        """The value before one, or those that it is the sum of, or what keeps it from having one; adds the steps."""
        maker = self.maker.get(value)
        if maker is None:
            return f"{self.tape.values[value].source} makes channels of its own"
        if isinstance(maker, Rewritten):
            steps.append(Other("a write in place"))
        elif isinstance(maker, LayerCall):
            steps += self._layer(maker)
        sources = list(dict.fromkeys(number for number in maker.inputs if number in self.hot))
        if not sources:
            return "a tensor that is written to makes channels of its own"
        if len(sources) == 1:
            if not isinstance(maker, Operation):
                return sources[0]
            found, before = self._operation(maker, sources[0], value)
            steps += found
            return before
        start = self._composite(value)
        if start is not None:
            steps.append(Activation(f"composite {maker.name.rstrip('_')}" if isinstance(maker, Operation) else ""))
            return start
        if isinstance(maker, Operation) and self._sums(maker, value, sources):
            return sources
        return f"{maker.name if isinstance(maker, Operation) else 'a write in place'} joins several producers"

    def _sums(self, maker: Operation, value: int, sources: Sequence[int]) -> bool:
        """Whether an operation adds values of one shape up as they are."""
        shapes = {self.tape.values[number].tensor.shape for number in (*sources, value)}
        return maker.name.rstrip("_") == "add" and maker.kwargs.get("alpha", 1) == 1 and len(shapes) == 1

    def _composite(self, value: int) -> int | None:
        """The single value from which an elementwise expression such as x·sigmoid(x) is computed, or None."""
        frontier = {value}
        while True:
            latest = max(frontier)
            maker = self.maker.get(latest)
            if latest in self.made or not isinstance(maker, Operation) or not operations.is_pointwise(maker.func):
                return None
            frontier.remove(latest)
            frontier |= {number for number in maker.inputs if number in self.hot}
            if any(self.tape.values[number].source is not None for number in frontier):
                return None
            if len(frontier) == 1:
                return next(iter(frontier))

    def _layer(self, call: LayerCall) -> list[Step]:
        module = self.site.model.get_submodule(call.path)
        if layers.is_weighted(module):
            if layers.is_transposed(module):
                return [Other(type(module).__name__)]
            return [Depthwise(call.path, Geometry.of(module))]
        if not layers.norm(module).normalises:
            return [Activation("prelu", call.path, homogeneous=True, alone=True)]
        return [Norm(call.path)]

    def _operation(self, step: Operation, source: int, value: int) -> tuple[list[Step], int]:
        """What an operation with one hot value is, and the value in front of it."""
        before, after = self.tape.values[source].tensor, self.tape.values[value].tensor
        name = step.name.rstrip("_")
        if name in _NOTHING and before.shape == after.shape:
            return [], source
        if name == "as_strided" and torch.equal(before, after):  # pooling to one location, in another memory format
            return [], source
        if operations.is_pointwise(step.func) and before.shape == after.shape:
            others = [self.tape.values[number].tensor for number in step.inputs if number != source]
            if any(tensor.numel() > 1 for tensor in others):
                return [Other(name)], source
            alone = step.module and not list(self.site.model.get_submodule(step.module).children())
            path = step.module if alone else None
            return [Activation(name, path, name in _HOMOGENEOUS, alone=all(each.dim() == 0 for each in others))], source
        if name == "squeeze":
            inner = self._one_axis_pool(source)
            if inner is not None:
                return inner
        if name in _VIEWS:
            return _view(name, before, after), source
        if name == "cat" and after.dim() > 1:
            axis = step.args[1] if len(step.args) > 1 else 0
            return [] if axis in (1, 1 - after.dim()) else [Other(name)], source
        return pooling(step, before, after) or [Other(name)], source

    def _one_axis_pool(self, value: int) -> tuple[list[Step], int] | None:
        """A pooling of one axis, which torch runs as one of two: unsqueeze, pooling, squeeze."""
        pool = self.maker.get(value)
        if not isinstance(pool, Operation) or len(pool.inputs) != 1:
            return None
        start = self.maker.get(pool.inputs[0])
        if not isinstance(start, Operation) or start.name != "unsqueeze" or start.inputs[0] not in self.hot:
            return None
        before, after = (self.tape.values[number].tensor for number in (pool.inputs[0], value))
        found = pooling(pool, before, after)
        if found is None or len(found) != 1 or before.dim() != 4:
            return None
        return [_one_axis(found[0])], start.inputs[0]


def _told_apart(branches: Sequence[Branch]) -> list[Branch]:
    """The branches, where all come from different producers; else one that says so."""
    several = len({producer for _, producer, _ in branches}) < len(branches)
    return [((), None, "several ways lead from one producer to one consumer")] if several else list(branches)


def pooling(step: Operation, before: Tensor, after: Tensor) -> list[Step] | None:
    """The steps that a pooling of the grid is; None for any other operation."""
    name, axes = step.name, before.dim() - 2
    if name in ("mean", "amax") and axes > 0:
        given = step.args[1] if len(step.args) > 1 else step.kwargs.get("dim")
        dims = {dim % before.dim() for dim in ([given] if isinstance(given, int) else given or ())}  # pyright: ignore
        if dims != set(range(2, before.dim())):
            return None
        pool = AdaptivePool((1,) * axes, average=name == "mean")
        return [pool] if after.dim() == before.dim() else [Flatten((1,) * axes), pool]
    if name.lstrip("_").startswith("adaptive_"):
        return [AdaptivePool(tuple(after.shape[2:]), average="avg" in name)]
    if not name.startswith(_WINDOWED) or "unpool" in name:
        return None
    average = name.startswith("avg")
    names = ("self", "kernel_size", "stride", "padding", *(_AVERAGE if average else _MAXIMUM))
    given = {**dict(zip(names, step.args, strict=False)), **step.kwargs}

    def spread(label: str, default: Sequence[int]) -> tuple[int, ...]:
        found = list(given.get(label) or ())  # pyright: ignore[reportArgumentType]
        return tuple(found * axes if len(found) == 1 else found or default)

    kernel = spread("kernel_size", ())
    padding = tuple((side, side) for side in spread("padding", (0,) * axes))
    geometry = Geometry(
        kernel,
        spread("stride", kernel),
        spread("dilation", (1,) * axes),
        padding,
        ceil_mode=bool(given.get("ceil_mode")),
    )
    return [Pool(geometry, average, average and bool(given.get("count_include_pad", True)))]


_AVERAGE = ("ceil_mode", "count_include_pad", "divisor_override")
_MAXIMUM = ("dilation", "ceil_mode")


def _view(name: str, before: Tensor, after: Tensor) -> list[Step]:
    """A change of shape: nothing, a flattened grid, or something else."""
    if before.shape == after.shape:
        return []
    if before.dim() > 2 and after.dim() == 2 and before.shape[0] == after.shape[0]:
        return [Flatten(tuple(before.shape[2:]))]
    return [Other(name)]


def _one_axis(step: Step) -> Step:
    """A pooling of two axes of which the first has one entry, as one of the second."""
    if isinstance(step, AdaptivePool):
        return AdaptivePool(step.output_size[1:], step.average)
    if isinstance(step, Pool):
        own = step.geometry
        geometry = Geometry(
            own.kernel_size[1:], own.stride[1:], own.dilation[1:], own.padding[1:], ceil_mode=own.ceil_mode
        )
        return Pool(geometry, step.average, step.counts_padding)
    return step
