"""What lies between the producers and consumers of sites, step by step, read off one recorded run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from growconv.convolution.geometry import Geometry
from growconv.network import layers, operations
from growconv.network.between import is_narrow, region_of
from growconv.network.layout import OUT
from growconv.network.model import Arguments, module_at, one_run, tensors_in
from growconv.network.seats import Region
from growconv.network.site import (
    Activation,
    AdaptivePool,
    Depthwise,
    Flatten,
    GrowthSite,
    Norm,
    Other,
    Pool,
    Route,
    Step,
    sizes_of,
)
from growconv.network.tape import LayerCall, Operation, Rewritten, Tape, hot_values
from growconv.network.tape import Step as Recorded

_NOTHING = frozenset(["clone", "_to_copy", "contiguous", "expand", "detach", "alias"])
_VIEWS = operations.VIEWS | {"squeeze", "unsqueeze", "flatten"}
_HOMOGENEOUS = frozenset(["relu", "leaky_relu", "prelu", "_prelu_kernel", "abs", "neg", "mul", "div"])
_WINDOWED = ("max_pool", "avg_pool")
SEVERAL_WAYS = "several ways lead from one to the other"


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
        routes = recorded_routes(tape, site, behind)
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


Ways = tuple[dict[str | None, tuple[Step, ...]], str | None]
"""The steps in front of a value by the producer that they start from, and what keeps those under None from starting."""


def recorded_routes(tape: Tape, site: GrowthSite, behind: Mapping[str, str] | None = None) -> tuple[Route, ...]:
    """The routes of one site on a recording; `behind` says which norm lies behind a consumer."""
    (ways, narrow), found = _ways(tape, site), dict[tuple[str, str], Route]()
    for consumer in site.consumers:
        norm = None if behind is None else behind.get(consumer)
        alone = all(call.inputs[0] in narrow for call in tape.calls[consumer])
        for call in tape.calls[consumer]:
            chains, broken = ways.get(call.inputs[0]) or _beginning(tape, call.inputs[0])
            for producer, steps in chains.items():
                problem = broken if producer is None else None
                for path in site.producers if producer is None else (producer,):
                    known = found.get((path, consumer))
                    if known is None:
                        found[path, consumer] = Route(path, consumer, steps, problem, alone, norm)
                    elif producer is not None and (known.steps, known.problem) != (steps, problem):
                        found[path, consumer] = Route(path, consumer, (), SEVERAL_WAYS, alone, norm)
    return tuple(found.values())


def _beginning(tape: Tape, value: int) -> Ways:
    return {None: ()}, f"{tape.values[value].source} makes channels of its own"


def _ways(tape: Tape, site: GrowthSite) -> tuple[dict[int, Ways], set[int]]:
    """Per value with channels of the site how it comes from the producers: one way, or those that a sum adds up.

    Also the values up to which every step treats channels one by one.
    """
    hot, made = hot_values(tape, site)
    ways, narrow = dict[int, Ways](), set(made)
    # per value those from which alone it is computed entry by entry, nearest first
    alike: dict[int, dict[int, None]] = {}
    for value in sorted(hot):  # in the order in which they were made
        step = tape.makers.get(value)
        if step is None:
            continue
        if value in made:
            ways[value] = {step.path: ()}, None  # pyright: ignore[reportAttributeAccessIssue]
            continue
        sources = list(dict.fromkeys(number for number in step.inputs if number in hot))
        for number in sources:
            ways.setdefault(number, _beginning(tape, number))
        if sources and narrow.issuperset(sources) and is_narrow(tape, step, hot, site):
            narrow.add(value)
        common = dict[int, None]()
        if sources and isinstance(step, Operation) and operations.is_pointwise(step.func):
            first, *others = [alike.get(n, {} if tape.values[n].source else {n: None}) for n in sources]
            common = {each: None for each in first if all(each in line for line in others)}
        alike[value] = {value: None, **common}
        before, steps, problem = sources, (), None
        if len(sources) == 1:
            before, steps = _steps(tape, step, sources[0], value, site)
        elif common:
            before, steps = [next(iter(common))], [Activation(f"composite {_name(step)}")]
        elif not sources:
            problem = "a tensor that is written to makes channels of its own"
        elif not _sums(tape, step, value, sources):
            problem = f"{_name(step)} joins several producers"
        found, why = dict[str | None, tuple[Step, ...]](), None
        for own, broken in (ways[each] for each in before):
            if not found.keys().isdisjoint(own):
                problem = problem or "several ways lead from one producer to one consumer"
            found, why = found | own, why or broken
        if steps:
            found = {path: (*first, *steps) for path, first in found.items()}
        ways[value] = (found, why) if problem is None else ({None: ()}, problem)
    return ways, narrow


def _name(step: Recorded) -> str:
    """What an operation is called, in place or not."""
    return step.name.rstrip("_") if isinstance(step, Operation) else "a write in place"


def _sums(tape: Tape, step: Recorded, value: int, sources: Sequence[int]) -> bool:
    """Whether a step adds values of one shape up as they are."""
    shapes = {tape.values[number].tensor.shape for number in (*sources, value)}
    return (
        isinstance(step, Operation) and _name(step) == "add" and step.kwargs.get("alpha", 1) == 1 and len(shapes) == 1
    )


def _steps(tape: Tape, step: Recorded, source: int, value: int, site: GrowthSite) -> tuple[list[int], Sequence[Step]]:
    """The value that another is made of, as a list, and the steps between them."""
    name, before, after = _name(step), tape.values[source].tensor, tape.values[value].tensor
    found: Sequence[Step] = ()
    if isinstance(step, LayerCall):
        module = module_at(site.model, step.path)
        if layers.is_transposed(module):
            found = [Other(type(module).__name__)]
        elif layers.is_weighted(module):
            found = [Depthwise(step.path, Geometry.of(module))]
        elif layers.norm(module).normalises:
            found = [Norm(step.path)]
        else:
            found = [Activation("prelu", step.path, homogeneous=True)]
    elif isinstance(step, Rewritten):
        found = [Other(name)]
    elif (name in _NOTHING and before.shape == after.shape) or (name == "as_strided" and torch.equal(before, after)):
        pass  # pooling to one location comes as as_strided in another memory format
    elif operations.is_pointwise(step.func) and before.shape == after.shape:
        others = [tape.values[number].tensor for number in step.inputs if number != source]
        if any(tensor.numel() > 1 for tensor in others):
            found = [Other(name)]
        else:
            own = step.module and not list(site.model.get_submodule(step.module).children())
            found = [Activation(name, step.module if own else None, name in _HOMOGENEOUS)]
    elif name == "squeeze" and (pool := _one_axis_pool(tape, source)):
        return pool
    elif name in _VIEWS:
        flat = before.dim() > 2 and after.dim() == 2 and before.shape[0] == after.shape[0]
        if before.shape != after.shape:
            found = [Flatten(tuple(before.shape[2:]))] if flat else [Other(name)]
    elif name != "cat" or after.dim() < 2 or (*step.args, 0)[1] not in (1, 1 - after.dim()):
        found = pooling(step, before, after) or [Other(name)]
    return [source], found


def _one_axis_pool(tape: Tape, value: int) -> tuple[list[int], list[Step]] | None:
    """A pooling of one axis, which torch runs as one of two: unsqueeze, pooling, squeeze."""
    pool = tape.makers.get(value)
    start = tape.makers.get(pool.inputs[0]) if isinstance(pool, Operation) and len(pool.inputs) == 1 else None
    if not isinstance(pool, Operation) or not isinstance(start, Operation) or start.name != "unsqueeze":
        return None
    before, after = (tape.values[number].tensor for number in (pool.inputs[0], value))
    found = pooling(pool, before, after) or []
    if len(found) != 1 or before.dim() != 4:
        return None
    (only,) = found
    if isinstance(only, AdaptivePool):
        return [start.inputs[0]], [AdaptivePool(only.output_size[1:], only.average)]
    if not isinstance(only, Pool):
        return None
    own = only.geometry
    sizes = (own.kernel_size[1:], own.stride[1:], own.dilation[1:], own.padding[1:])
    geometry = Geometry(*sizes, ceil_mode=own.ceil_mode)
    return [start.inputs[0]], [Pool(geometry, only.average, only.counts_padding)]


def pooling(step: Operation, before: Tensor, after: Tensor) -> list[Step] | None:
    """The steps that a pooling of the grid is; None for any other operation."""
    name, axes = step.name, before.dim() - 2
    given = {each.name: value for each, value in zip(step.func._schema.arguments, step.args, strict=False)}
    given |= step.kwargs
    if name in ("mean", "amax") and axes > 0:
        dims = given.get("dim") or ()
        if {dim % before.dim() for dim in ([dims] if isinstance(dims, int) else dims)} != set(range(2, before.dim())):
            return None
        pool = AdaptivePool((1,) * axes, average=name == "mean")
        return [pool] if after.dim() == before.dim() else [pool, Flatten((1,) * axes)]
    if name.lstrip("_").startswith("adaptive_"):
        return [AdaptivePool(tuple(after.shape[2:]), average="avg" in name)]
    if not name.startswith(_WINDOWED) or "unpool" in name or given.get("divisor_override") is not None:
        return None

    def spread(label: str, default: Sequence[int]) -> tuple[int, ...]:
        found = list(given.get(label) or ())
        return tuple(found * axes if len(found) == 1 else found or default)

    kernel, average = spread("kernel_size", ()), name.startswith("avg")
    padding = tuple((side, side) for side in spread("padding", (0,) * axes))
    sizes = (kernel, spread("stride", kernel), spread("dilation", (1,) * axes), padding)
    geometry = Geometry(*sizes, ceil_mode=bool(given.get("ceil_mode")))
    return [Pool(geometry, average, average and bool(given.get("count_include_pad", True)))]
