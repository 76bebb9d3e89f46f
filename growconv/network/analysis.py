"""Looking at a model: numbers, spaces, rehearsal and proof on a copy make sites, and reasons where there is none."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from growconv.errors import ArgumentTypeError, ArgumentValueError, SiteError, TraceError
from growconv.network import layers
from growconv.network.classes import Space, mark_copied, spaces_of
from growconv.network.failures import LookFailed
from growconv.network.layout import ENTRY, GROUP_IN, GROUP_OUT, IN, OUT, Key, Layout
from growconv.network.model import copied, example_arguments, module_at, same_chance, tensors_in, undisturbed, unwrapped
from growconv.network.numbers import Numbers
from growconv.network.plan import shared_names, tied_weights
from growconv.network.pretender import pretending
from growconv.network.proof import Proof, awake
from growconv.network.rehearsal import Example
from growconv.network.site import GrowthSite, Route, sizes_of
from growconv.network.steps import routes_of
from growconv.network.trace import look, owned_tensors
from growconv.network.widening import Widening

MODES = {"eval": False, "train": True}


@dataclass
class Analysis:
    """Everything that looking at a model tells.

    Attributes:
        model: the model itself; all work is done on a copy.
        numbers: of its channels.
        spaces: the channel spaces that were found; those that cannot grow have a reason.
        layout: where the channels of the others lie.
        outputs: per output axis that belongs to no space why not.
        of_space: by number of its space, the site of each that can grow.
    """

    model: nn.Module
    numbers: Numbers
    spaces: list[Space]
    layout: Layout
    outputs: dict[Key, str]
    of_space: dict[int, GrowthSite] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[GrowthSite, ...]:
        """All sites, in forward order."""
        return tuple(self.of_space.values())


def analyse(
    model: nn.Module, example_input: object, *, modes: Sequence[str] = ("eval", "train"), rehearse: bool = True
) -> Analysis:
    """Look at a model: the way behind `find_sites` and `explain_sites`."""
    model = unwrapped(model)
    if not modes or any(mode not in MODES for mode in modes):
        raise ArgumentValueError("a model has no such mode", expected="'eval' and 'train'", got=tuple(modes))
    inputs = example_input if isinstance(example_input, list) else [example_input]
    if not inputs:
        raise ArgumentTypeError("an example input is needed", got="an empty list", where="example_input")
    arguments = [example_arguments(each) for each in inputs]
    if rehearse and any(each.device.type == "meta" for each in (*model.parameters(), *tensors_in(arguments))):
        raise TraceError(
            "on the meta device nothing is computed, so that no site can be proved",
            fix="find the sites on a device with values: model.to_empty(device='cpu')",
        )
    examples = [Example(each, MODES[mode]) for each in arguments for mode in modes]
    twin = copied(model)
    with undisturbed(twin):
        numbers = Numbers(model.parameters())
        ways = _send(numbers, twin, examples)
        if not numbers.outputs:
            raise TraceError(
                "the model gives no tensor, so that nothing can tell whether growing changes what it does",
                where=type(model).__name__,
                fix="give an example or a mode in which it returns tensors, also inside of mappings or objects",
            )
        spaces, outputs = spaces_of(numbers)
        mark_copied(numbers, spaces)
        _refuse_layers(twin, numbers, spaces)
        widening = Widening(twin, ways, numbers, spaces)
        found = Analysis(model, numbers, spaces, widening.prove() if rehearse else widening.presume(), outputs)
        sites = _sites(found)
        for _ in range(len(spaces) if rehearse else 0):
            with awake(twin):
                failed = Proof(twin, examples, sites).failures()
            if not failed:
                break
            for number, reason in failed.items():
                spaces[number].reason = reason
            found.layout = widening.arrangement.relay()
            sites = _sites(found)
        found.of_space = _routed(sites, twin, examples)
    return found


def _send(numbers: Numbers, model: nn.Module, examples: list[Example]) -> list[Example]:
    """Send numbers through a copy, from every example in every mode; of those one for each way through the model.

    Examples that the training mode does not take are left out where it takes another.
    """
    ways: dict[tuple[int, tuple[str, ...]], Example] = {}
    waiting, refused = list(examples), dict[Example, Exception]()
    for example in waiting:  # which gets longer
        model.train(example.training)
        same_chance()
        before = len(numbers.cuts)
        try:
            example.trail = look(model, example.arguments, numbers)
            names = tuple(ran.name for ran in example.trail)
            if ways.setdefault((id(example.arguments), names), example) is not example:
                del numbers.cuts[before:]
        except LookFailed as failure:
            error = failure.failures[0].error
            if isinstance(error, TraceError):
                raise error from None
            if not (example.training and numbers.order):
                raise _no_run(model, example, error) from error
            given = tensors_in(example.arguments)
            if given and all(each.shape[:1] == (1,) for each in given):  # a batch of one in front of a batch norm
                example.arguments = tree_map(_twice, example.arguments)
                waiting.append(example)
                continue
            if _runs_without_values(model, example):
                ways[id(example.arguments), ("failed",)] = example  # rehearsal pretends its way through
                continue
            del numbers.cuts[before:]
            examples.remove(example)
            refused[example] = error
    if refused and not any(example.training for example in examples):
        example, error = next(iter(refused.items()))
        raise _no_run(model, example, error) from error
    return list(ways.values())


def _runs_without_values(model: nn.Module, example: Example) -> bool:
    """Whether a model that fails in training mode only fails on the values, as a batch norm of one value a channel."""
    try:
        same_chance()
        with pretending(model, Layout({}, (), {}), [], []):
            look(model, example.arguments, Numbers(), pretending=True)
    except LookFailed:
        return False
    return True


def _twice(leaf: object) -> object:
    """A sample and another one: batch norms blow up the rounding errors by which two of the same differ."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.cat([leaf, leaf.flip(-1) / 2 if leaf.is_floating_point() else leaf])


def _refuse_layers(model: nn.Module, numbers: Numbers, spaces: Sequence[Space]) -> None:
    """Reasons that lie in the layers themselves: what they are, and who else may read their channels."""
    uncalled = {
        path: {layers.size(module, IN)}
        for path, module in model.named_modules()
        if layers.is_weighted(module) and path not in numbers.calls and layers.adapter(module).problem() is None
    }
    owned = owned_tensors(model)[0]
    for path, parameter in model.named_parameters():
        if id(parameter) not in owned and path not in numbers.shapes:
            uncalled[path] = set(parameter.shape)
    problems: dict[str, str | None] = {}
    for space in spaces:
        weights = set(space.paths(OUT, IN))
        for path in space.paths(OUT, IN, GROUP_IN, GROUP_OUT, ENTRY):
            if path in numbers.shapes:
                continue
            if path not in problems:
                problems[path] = layers.adapter(module_at(model, path)).problem()
            problem = problems[path]
            if path in weights and not numbers.trained.get(path, True):
                problem = problem or (
                    "no gradient reaches it, as under torch.no_grad or in front of detach(), so that new channels "
                    "would never train"
                )
            if problem is not None:
                space.reason = space.reason or f"{path}: {problem}"
        widths = {len(numbers.columns[path, IN]) for path in space.paths(IN)}
        widths |= {len(space.roots) * count for (_, side), count in space.counts.items() if side == IN}
        unused = next((path for path, sizes in uncalled.items() if sizes & widths), None)
        if unused is not None:
            space.reason = space.reason or (
                f"{unused} is used by none of the examples and may read these channels: give an example that uses it, "
                "as in find_sites(model, [x, (x, True)])"
            )


def _sites(found: Analysis) -> dict[int, GrowthSite]:
    """A site, without routes, for every space that can grow and whose width can be read off the layers."""
    sites: dict[int, GrowthSite] = {}
    names: Counter[str] = Counter()
    sizes, shared = sizes_of(found.model, found.layout), shared_names(found.model)
    for number, space in enumerate(found.spaces):
        if space.reason is not None:
            continue
        producers, consumers = space.paths(OUT), space.paths(IN)
        name = f"{_joined(producers, ' + ')} -> {_joined(consumers, ', ')}"
        followers, kind = space.paths(ENTRY, GROUP_IN, GROUP_OUT), _kind(found, number, space)
        calls = {path: found.numbers.calls.get(path, 0) for path in (*producers, *consumers)}
        each = GrowthSite(
            found.model, name, kind, producers, followers, consumers, (), calls, found.layout, number, space.copied
        )
        try:
            each.check(sizes=sizes)
            space.reason = tied_weights(each, shared)
        except SiteError as error:
            space.reason = error.problem
        if space.reason is None:
            names[name] += 1
            if names[name] > 1:  # the same layers have other channels of theirs apart
                each = replace(each, name=f"{name} ({names[name]})")
            sites[number] = each
    return sites


def _kind(found: Analysis, number: int, space: Space) -> str:
    model, producers, consumers = found.model, space.paths(OUT), space.paths(IN)
    modules = [module_at(model, path) for path in (*producers, *consumers)]
    if len(producers) > 1:
        return "stream"
    others = [run for path in consumers for run in found.layout.axes.get((path, IN), ()) if run.space != number]
    if others:
        return "concatenation"
    grouped = space.paths(GROUP_IN)
    if grouped or any(layers.groups_of(module) > 1 for module in modules):
        return "depthwise" if found.layout.channels[number] == 1 else "grouped"
    if any(layers.is_transposed(module) for module in modules):
        return "transposed"
    if len(consumers) > 1:
        return "fan"
    return "linear" if any(not layers.weighted(module).kernel_size for module in modules) else "pair"


def _routed(sites: Mapping[int, GrowthSite], twin: nn.Module, examples: Sequence[Example]) -> dict[int, GrowthSite]:
    """The sites with what lies between: of each consumer from the first example that calls it."""
    routes: dict[int, tuple[Route, ...]] = dict.fromkeys(sites, ())
    for example in examples:
        open_ = {n: each for n, each in sites.items() if set(each.consumers) - {r.consumer for r in routes[n]}}
        if not open_:
            break
        try:
            seen = routes_of(twin, example.arguments, list(open_.values()), example.training)
        except Exception:
            if not example.training:
                raise
            continue  # a batch of one in front of a batch norm, mostly
        for number, each in open_.items():
            known = {route.consumer for route in routes[number]}
            routes[number] += tuple(route for route in seen[each.name] if route.consumer not in known)
    return {number: replace(each, routes=routes[number]) for number, each in sites.items()}


def _joined(paths: Sequence[str], by: str) -> str:
    return by.join(paths) if len(paths) <= 3 else f"{paths[0]}{by}{len(paths) - 1} more"


def _no_run(model: nn.Module, example: Example, error: Exception) -> TraceError:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    given = tensors_in(example.arguments)
    if any(not tensor.numel() for tensor in given):
        error = ValueError("a tensor of it is empty, and an empty one shows nothing of the channels")
    tensors = [f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in given]
    held = f"; its parameters are {parameter.dtype} on {parameter.device}" if parameter is not None else ""
    fix = "pass an example with the shape, dtype and device that the model is trained with"
    if example.training:
        fix = (
            "give an example for the training mode too, as find_sites(model, [x, (x, targets)]), or modes=('eval',), "
            "where nothing tells what training reads"
        )
    return TraceError(
        f"the model does not run on the example input{' in training mode' if example.training else ''}: {error}",
        expected=f"an input that {type(model).__name__} accepts{held}",
        got=", ".join(tensors) or "no tensor",
        where=type(model).__name__,
        fix=fix,
    )
