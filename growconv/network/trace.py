"""Channels, found by sending their numbers through the model.

While a model runs, every tensor has a companion that holds the numbers of its entries. Weighted layers cut: what they
are given is consumed, and their outputs get fresh numbers. Structural operations are run on the companions themselves,
so that no operation needs a rule of its own; elementwise operations and reductions unify the numbers that they compute
together; whatever else meets a number blocks it, and its name is the reason.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from traceback import walk_tb
from types import FrameType
from typing import TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from growconv.errors import TraceError
from growconv.network import layers, operations
from growconv.network.layout import ENTRY, FILL, GROUP_IN, GROUP_OUT, IN, OUT
from growconv.network.model import Arguments, module_at, named_modules, one_run, tensors_in
from growconv.network.numbers import NONE, SPOILT, Literals, Numbers, compact, narrowed
from growconv.network.watch import Watch

SIZED = operations.VIEWS | {"split_with_sizes", "split", "slice", "expand"}
"""Structural operations that are told sizes."""


@dataclass
class Ran:
    """What ran: a layer or an operation.

    Attributes:
        name: path of the layer, or name of the operation.
        place: of an operation: the path of the module that was running, the name, and how often that was met before.
        sizes: the whole numbers that the operation was given.
        gave: what it returned, with what makes zeros of its shape for each tensor.
    """

    name: str
    place: tuple[str, str, int] = ("", "", 0)
    sizes: list[int] = field(default_factory=list)
    gave: object = None


@dataclass(frozen=True)
class Failure:
    """An error in the model's code.

    Attributes:
        error: what was raised.
        numbers: those that the failing operation met; of an error in the code itself, those around it.
        near: those that the code held which called the operation.
        more: by how much sizes that it was given differ from those at other widths.
        fixed: whether it was told all sizes, and the same ones as there, so that it is taken to take no other width.
        supposed: whether it is only supposed that these numbers are to blame, since the code itself raised the error.
        where: the module whose operation failed, with those of its attributes that have a size which that was told.
    """

    error: Exception
    numbers: set[int] = field(default_factory=set)
    near: set[int] = field(default_factory=set)
    more: set[int] = field(default_factory=set)
    fixed: bool = False
    supposed: bool = False
    where: str = ""


class LookFailed(Exception):
    """The model's code raised errors while numbers were sent through it.

    Attributes:
        failures: those that are no consequence of earlier ones, in order.
        stopped: path of the module whose own code, no operation in it, raised the error that ended the run; None where
            there is none.
    """

    def __init__(self, failures: Sequence[Failure], stopped: str | None = None) -> None:
        super().__init__(failures[0].error)
        self.failures = failures
        self.stopped = stopped


def look(
    model: nn.Module, arguments: Arguments, numbers: Numbers, pretending: bool = False, before: Sequence[Ran] = ()
) -> list[Ran]:
    """Send numbers through one forward pass.

    Args:
        model: in the mode that is to be looked at; hooks are put on its layers and taken off again.
        arguments: of its forward.
        numbers: what is found goes here; those of earlier passes stay.
        pretending: its layers compute nothing. Else it is noted which of them get gradients, and which attributes of
            modules tell sizes.
        before: what ran at other widths. An operation that fails then gives what it gave there, so that the rest of the
            model runs and shows what else fails.

    Returns:
        What ran.

    Raises:
        LookFailed: the model's code raised an error.
    """
    mode = _Mode(model, numbers, before, pretending)
    with torch.set_grad_enabled(not pretending), one_run(model, arguments) as (given, named):
        try:
            with mode, _Functions(mode):
                output = model(*given, **named)
        except Exception as error:
            if any(error is each.error for each in mode.failures):
                raise LookFailed(mode.failures) from error
            mode.fail(Failure(error, mode.around(error), supposed=True))
            raise LookFailed(mode.failures, _raised_in(error, model)) from error
        if mode.failures:
            raise LookFailed(mode.failures) from mode.failures[0].error
        for tensor in tensors_in(output):
            numbers.outputs += 1
            numbers.block(mode.companion(tensor), "it is the model's output")
        if not pretending:
            _note_trained(model, numbers, mode, output)
    for path, count in mode.calls.items():
        numbers.calls[path] = max(numbers.calls.get(path, 0), count)
    return mode.trail


def _raised_in(error: Exception, model: nn.Module) -> str:
    """Path of the innermost module of a model whose own code an error came through."""
    paths, found = {id(module): path for path, module in model.named_modules()}, ""
    for frame, _ in walk_tb(error.__traceback__):
        if not frame.f_globals["__name__"].startswith("torch."):
            found = paths.get(id(frame.f_locals.get("self")), found)
    return found


def _note_trained(model: nn.Module, numbers: Numbers, mode: "_Mode", output: object) -> None:
    """Note which of the layers that were called get a gradient."""
    outputs = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    weights = {path: list(module_at(model, path).parameters()) for path in mode.calls}
    leaves = _leaves(outputs)
    for path, own in weights.items():
        if any(parameter.requires_grad for parameter in own):
            numbers.trained[path] = numbers.trained.get(path, False) or any(id(each) in leaves for each in own)
    if all(numbers.trained.values()):
        return
    try:  # what a checkpoint or a function with a derivative of its own computes shows only here
        torch.autograd.backward(outputs, [torch.ones_like(tensor) for tensor in outputs])
        trained = {path for path, own in weights.items() if any(each.grad is not None for each in own)}
    except RuntimeError:  # a step of the model has no derivative, or what it needs was overwritten
        trained = mode.differentiable
    numbers.trained |= dict.fromkeys(trained & numbers.trained.keys(), True)
    for parameter in model.parameters():
        parameter.grad = None


def _leaves(outputs: Iterable[Tensor]) -> set[int]:
    """The parameters that the gradients of some tensors go to, by identity."""
    waiting = [tensor.grad_fn for tensor in outputs]
    found, seen = set[int](), set(waiting)
    while waiting:
        step = waiting.pop()
        if step is not None:
            found.add(id(getattr(step, "variable", None)))
            new = {each for each, _ in step.next_functions} - seen
            seen |= new
            waiting += new
    return found


class _Mode(Watch):
    """Runs every operation on the tensors and on their companions."""

    def __init__(self, model: nn.Module, numbers: Numbers, before: Sequence[Ran], pretending: bool) -> None:
        super().__init__(model)
        self.numbers = numbers
        self.pretending = pretending
        self.differentiable: set[str] = set()
        self.failures: list[Failure] = []
        self.trail: list[Ran] = []
        self._before = {ran.place: ran for ran in before}
        self._met: dict[tuple[str, str], int] = defaultdict(int)
        self._last: list[Tensor] = []  # companions of the last operation's tensors
        self.calls: dict[str, int] = {}
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        self._owned, self._alias = owned_tensors(model)
        self._bare: dict[int, str] = {}
        for path, module in named_modules(model):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and id(tensor) not in self._owned:
                    self._bare.setdefault(id(tensor), f"{path}.{name}".lstrip("."))
        self._fills: dict[str, int] = defaultdict(int)

    # ------------------------------------------------------------------------------------------ companions

    def companion(self, tensor: Tensor) -> Tensor:
        """The numbers of a tensor's entries."""
        if id(tensor) not in self._known:
            path = self._bare.get(id(tensor))
            if path is not None and tensor.numel() and tensor.is_floating_point():
                first = self.numbers.fresh((path, ENTRY), tensor.numel())
                self.numbers.shapes[path] = tensor.shape
                found = torch.arange(first, first + tensor.numel()).view(tensor.shape)
                for axis, size in enumerate(tensor.shape):
                    self._note([size], [_along(found, axis)])
            else:
                found = torch.full(tuple(tensor.shape), NONE)
            self._known[id(tensor)] = tensor, found
        return self._known[id(tensor)][1]

    def _put(self, tensor: Tensor, companion: Tensor) -> None:
        if companion.shape != tensor.shape:
            companion = companion.expand(tensor.shape)
        self._known[id(tensor)] = tensor, companion

    # ------------------------------------------------------------------------------------------ layers

    def _called(self, path: str, module: nn.Module, given: Tensor, output: object) -> None:
        numbers = self.numbers
        if not isinstance(output, Tensor):
            numbers.block(self.companion(given), f"{path} gives no single tensor")
            return
        if not given.numel():  # as what is cut out for boxes where there are none: it shows nothing
            return
        self.calls[path] = self.calls.get(path, 0) + 1
        self.trail.append(Ran(path))
        if path not in numbers.order:
            numbers.order.append(path)
        if output.requires_grad:
            self.differentiable.add(path)
        companion = self.companion(given)
        axis = layers.channel_axis(module, given.dim())
        columns = compact(companion.movedim(axis, 0), keep=(0,)).flatten(1)
        if layers.is_norm(module):
            self._normalize(path, module, columns)
            self._put(output, companion)
            return
        if len(columns) > 1 and _varies(columns, 1) and bool((columns == columns[:1]).all()):
            numbers.across |= dict.fromkeys(columns[0].tolist(), path)
            columns = torch.full_like(columns, NONE)
        if len(columns) == 1 and _varies(columns, 1) and _varies(numbers.tied(columns), 1):
            text = "takes them one after the other as its only input"
            numbers.block(columns, f"its channels depend on each other: {path} {text}")
        into, out = (GROUP_IN, GROUP_OUT) if layers.in_whole_groups(module) else (IN, OUT)
        numbers.consume((path, into), columns)
        out_axis = layers.channel_axis(module, output.dim())
        count = output.shape[out_axis]
        first = numbers.fresh((path, out), count)
        if path in self._alias:
            self._share(path, into, out)
        if out == GROUP_OUT:
            # a copy may pretend to have more of them
            groups = columns.shape[0] * layers.groups_of(module) // layers.size(module, IN)
            self._carry(groups, numbers.columns[path, GROUP_IN], first, count, path)
        shape = [1] * output.dim()
        shape[out_axis] = count
        self._put(output, torch.arange(first, first + count).view(shape))

    def _share(self, path: str, into: str, out: str) -> None:
        """Tie the channels of a layer to those of an earlier one that has the same weight."""
        numbers, earlier = self.numbers, self._alias[path]
        own = numbers.range_of((path, out))
        first = numbers.fresh((earlier, out), len(own))
        numbers.tie(range(first, first + len(own)), own)
        numbers.consume((earlier, into), torch.from_numpy(numbers.columns[path, into])[:, None])

    def _normalize(self, path: str, module: nn.Module, columns: Tensor) -> None:
        self.numbers.consume((path, ENTRY), columns)
        for group in layers.norm(module).groups(columns.shape[0]):
            known = self.numbers.columns[path, ENTRY][group]
            known = known[known >= 0]
            self.numbers.tie(known[:-1], known[1:])

    def _carry(self, groups: int, given: NDArray[np.int64], first: int, count: int, path: str) -> None:
        """Tie what every group reads to what it writes."""
        read = given[: len(given) // groups * groups].reshape(groups, -1)
        written = np.arange(first, first + count // groups * groups).reshape(groups, -1)
        together = np.concatenate([read, written], 1)
        known, ahead = together >= 0, np.broadcast_to(written[:, :1], together.shape)
        self.numbers.tie(together[known], ahead[known])
        partly = torch.from_numpy(together[~known.all(1)])
        self.numbers.block(partly, f"the grouped {path} reads channels that cannot grow")

    # ------------------------------------------------------------------------------------------ operations

    def _operated(self, func: OpOverload, args: tuple, kwargs: dict[str, object]) -> object:
        """Run an operation, then on the companions of its tensors."""
        name = operations.name_of(func)
        leaves = _leaves_in([args, kwargs])
        sources = [item for item in leaves if isinstance(item, Tensor)]
        where = self.running[-1][0], "view" if name in operations.VIEWS else name  # which of them, memory tells
        ran = Ran(name, (*where, self._met[where]), [item for item in leaves if type(item) is int])
        self._met[where] += 1
        if name not in operations.ALIASES:  # whether gradients are asked for changes those
            self.trail.append(ran)
        for tensor in sources:
            if id(tensor) in self.numbers.strange:
                raise TraceError(
                    "a copy of the model runs layers of the model itself, so that nothing can be tried on it",
                    where=self.running[-1][0] or type(self.model).__name__,
                    fix="let no lambda, closure or hook hold on to the model: use methods, which are copied with it",
                )
            owner = self._owned.get(id(tensor))
            if owner is not None and name not in operations.ALIASES:
                self.numbers.used_outside.setdefault(owner, name)
        steps = operations.in_steps(func)
        if steps is not None and any(_is_followed(self.companion(tensor)) for tensor in sources):
            TorchDispatchMode.__enter__(self)  # no new hooks
            try:
                return steps(*args, **kwargs)
            finally:
                TorchDispatchMode.__exit__(self, None, None, None)
        try:
            output = _computed(func, args, kwargs, sources) if self.pretending else func(*args, **kwargs)
        except Exception as error:
            return self._as_before(error, ran, sources, args[0] if func._schema.is_mutable else None)
        if not self.pretending:
            ran.gave = tree_map(lambda leaf: _zeros_like(leaf) if isinstance(leaf, Tensor) else leaf, output)
        results = [item for item in _leaves_in(output) if isinstance(item, Tensor)]
        question = all(
            result.dim() == 0 and result.dtype is torch.bool for result in results
        )  # as whether all is finite
        if not question and name not in operations.CREATING:
            self._follow(func, name, args, kwargs, sources, results)
        return output

    def fail(self, failure: Failure) -> None:
        """Note an error, unless an earlier one may have caused it."""
        if not self.failures or failure.numbers or failure.more:
            self.failures.append(failure)

    def around(self, error: Exception) -> set[int]:
        """The numbers of the last operation and of what the innermost function of the model's code holds."""
        own = [frame for frame, _ in walk_tb(error.__traceback__) if _is_own(frame)]
        near = [*self._last, *(self._held(own[-1]) if own else ())]
        met = {number for companion in near for number in torch.unique(compact(companion)).tolist()} - {NONE}
        return set() if SPOILT in met else met

    def _held(self, frame: FrameType) -> list[Tensor]:
        """The companions of what a function of the model's code holds."""
        return [self._known[id(each)][1] for each in tree_leaves(frame.f_locals) if id(each) in self._known]

    def _near(self) -> set[int]:
        """The numbers that the function holds which called the operation."""
        frame = sys._getframe()
        while frame is not None and frame.f_code is not look.__code__ and not _is_own(frame):
            frame = frame.f_back
        held = self._held(frame) if frame is not None and _is_own(frame) else []  # nothing of who looks at the model
        return {number for companion in held for number in torch.unique(compact(companion)).tolist() if number >= 0}

    def reshaped(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A reshape that refuses its sizes, as the operations that it turns into and that are watched."""
        if tensor.is_contiguous():
            return torch.ops.aten.view(tensor, shape)
        return torch.ops.aten._unsafe_view(tensor.clone(memory_format=torch.contiguous_format), shape)

    def sliced(self, tensor: Tensor, index: object) -> None:
        """Note the sizes that slices were told which take all there is: those are no operations."""
        items = index if isinstance(index, tuple) else (index,)
        if any(not (item is None or item is Ellipsis or type(item) in (int, slice)) for item in items):
            return
        axis, taken = 0, sum(isinstance(item, int | slice) for item in items)
        for item in items:
            axis += (tensor.dim() - taken) * (item is Ellipsis)
            if isinstance(item, slice) and item.stop == tensor.shape[axis]:
                along = _along(self.companion(tensor), axis)
                if _several(along):
                    self._note([len(along)], [along])
            axis += isinstance(item, int | slice)

    def _as_before(self, error: Exception, ran: Ran, sources: Sequence[Tensor], written: Tensor | None) -> object:
        """What an operation that fails gave at other widths, or what it was to write to."""
        met = {number for tensor in sources for number in torch.unique(compact(self.companion(tensor))).tolist()}
        known = self._before.get(ran.place)
        if known is None:
            self.fail(Failure(error, {number for number in met if number >= 0}, where=self._where(ran)))
            raise error
        if SPOILT not in met:
            sizes = list(zip(ran.sizes, known.sizes, strict=False))
            told = ran.name in operations.TOLD_ALL_SIZES and -1 not in ran.sizes and ran.sizes == known.sizes
            more = {now - before for now, before in sizes if now != before}
            numbers = {number for number in met if number >= 0}
            self.fail(Failure(error, numbers, self._near(), more, told, where=self._where(ran)))
        output = written
        if output is None:
            output = tree_map(lambda leaf: leaf() if isinstance(leaf, partial) else leaf, known.gave)
        self._spoil(tensor for tensor in tree_leaves(output) if isinstance(tensor, Tensor))
        return output

    def _where(self, ran: Ran) -> str:
        path, module = self.running[-1]
        sizes = {size for size in ran.sizes if size > 1} if ran.name in SIZED else set()
        own = {name: value for name, value in vars(module).items() if name[0] != "_" and type(value) is int}
        told = [f"{name}={value}" for name, value in own.items() if value in sizes]
        return (path or type(module).__name__) + (f", where {', '.join(told)}" if told else "")

    def _spoil(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._put(tensor, torch.full((), SPOILT))

    def _follow(
        self, func: OpOverload, name: str, args: tuple, kwargs: dict, sources: list[Tensor], results: list[Tensor]
    ) -> None:
        companions = {id(tensor): self.companion(tensor) for tensor in sources}
        self._last = list(companions.values())
        if torch.Tag.inplace_view in func.tags:  # unsqueeze_, transpose_, ...
            own = companions[id(args[0])]
            own = own.contiguous() if name == "as_strided_" else own  # this one reads memory
            self._put(args[0], getattr(own, name.removesuffix("_"))(*args[1:], **kwargs))
            return
        structural = name in operations.STRUCTURAL
        if not structural and not any(map(_has_numbers, companions.values())):
            if self.failures and any(bool((compact(each) == SPOILT).any()) for each in companions.values()):
                self._spoil(results)
            return
        try:
            if structural:
                self._structural(func, name, args, kwargs, companions, results)
            elif name in operations.WRITING:
                self._write(func, name, args, companions)
            elif name in operations.RESIZING | operations.CUTTING:
                for other in sources[1:]:
                    if name.startswith("max_unpool"):
                        self.numbers.unify(companions[id(args[0])], companions[id(other)])
                    else:
                        self.numbers.block(companions[id(other)], f"{name} takes places from it")
                self._resize(companions[id(args[0])], results, name in operations.CUTTING)
            elif name in operations.REDUCING:
                self._reduce(func, args, kwargs, companions[id(args[0])], results)
            elif name in operations.NORMALIZING:
                self._scale(args, companions, results)
            elif name in operations.LAYER_NORMS:
                self._normalize_layers(args, companions, results)
            elif name in operations.PRODUCTS:
                self._multiply(name, args, companions, results)
            elif name == "convolution" and args[8] == args[0].shape[1] == args[1].shape[0] == results[0].shape[1]:
                self._filter(args, companions, results)
            elif operations.is_pointwise(func):
                self._pointwise(args, sources, companions, results)
            else:
                self._block(companions.values(), f"{name} is not followed")
        except (RuntimeError, IndexError, ValueError) as error:
            self._block(companions.values(), f"{name} is not followed ({str(error).splitlines()[0]})")

    def _block(self, companions: Iterable[Tensor], reason: str) -> None:
        for companion in companions:
            self.numbers.block(companion, reason)

    def _structural(
        self, func: Callable, name: str, args: tuple, kwargs: dict, companions: dict[int, Tensor], results: list[Tensor]
    ) -> None:
        if name in ("index", "gather", "index_select"):
            whole = companions[id(args[0])]
            if any(_has_numbers(each) for key, each in companions.items() if key != id(args[0])):
                self._block(companions.values(), f"{name} chooses entries by their values")
            found: object = func(whole, *args[1:], **kwargs)
        elif name in operations.ALIASES or name in ("clone", "_to_copy"):
            own = companions[id(args[0])]
            found = own if name in operations.ALIASES or 0 in own.stride() else own.clone()
        elif name == "constant_pad_nd":
            found = self._padded(companions[id(args[0])], args[1])
        elif name == "as_strided":  # reads memory, laid out as that of the tensor
            own = torch.empty_strided(args[0].shape, args[0].stride(), dtype=torch.long)
            found = func(own.copy_(companions[id(args[0])]), *args[1:], **kwargs)
        elif name in ("cat", "stack"):
            dim = args[1] if args[1:] else kwargs.get("dim", 0)
            found = self._joined([companions[id(tensor)] for tensor in args[0]], dim, results[0].shape, name)
        elif name in operations.VIEWS:
            found = companions[id(args[0])].reshape(results[0].shape)
        else:

            def swap(item: object) -> object:
                return companions[id(item)] if isinstance(item, Tensor) else item

            found = func(*tree_map(swap, args), **tree_map(swap, kwargs))
        for result, each in zip(results, tree_leaves(found), strict=True):
            self._put(result, each)
        if name in SIZED:
            self._sizes(name, args, companions[id(args[0])], results)

    # ------------------------------------------------------------------------------------------ sizes

    def _started(self, module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        """What the code of a module may compare the sizes of its arguments with."""
        kept = set() if self.pretending else {value for value in vars(module).values() if type(value) is int}
        for tensor in tree_leaves((args, kwargs)) if kept else ():
            for axis, size in enumerate(tensor.shape) if isinstance(tensor, Tensor) else ():
                along = _along(self.companion(tensor), axis) if size in kept else []
                if _several(along):
                    self._note([size], [along], self.numbers.compared, 1)

    def _sizes(self, name: str, args: tuple, whole: Tensor, results: list[Tensor]) -> None:
        """Sizes that the operation was given, held against the attributes of the modules that are running."""
        if name in ("split_with_sizes", "split"):
            given = list(args[1]) if isinstance(args[1], list | tuple) else [int(args[1])]
            dim = args[2] if args[2:] else 0
            parts = [_along(self.companion(each), dim % each.dim()) for each in results]
            if any(max(part, default=NONE) >= 0 for part in parts):
                self.numbers.cuts += parts
                self._note(given, parts)
                along = _along(whole, dim % whole.dim())
                self._note([len(along)], [along])  # what is told may be a part of it, as half
        elif name == "slice":
            dim = args[1] if args[1:] else 0
            start, end = (*args[2:4], None, None)[:2]
            along = _along(whole, dim % whole.dim())
            if _several(along):
                self.numbers.cuts.append(_along(self.companion(results[0]), dim % whole.dim()))
            for edge in (start, end):
                if isinstance(edge, int) and 0 < edge < len(along) and max(along) >= 0:
                    self._note([edge], [along[:edge]])
        else:
            for axis, size in enumerate(args[1] if isinstance(args[1], list | tuple) else ()):
                along = _along(self.companion(results[0]), axis)
                if isinstance(size, int) and size > 1 and _several(along):
                    self._note([size], [along])

    def _note(
        self, sizes: list[int], parts: list[list[int]], found: Literals | None = None, depth: int | None = None
    ) -> None:
        """Sizes of parts, where an attribute of the innermost module that runs, or of one right inside, tells them.

        Args:
            found: what they are added to; None for `literals`.
            depth: how many of the modules that are running, from the innermost on; None for all.
        """
        found = self.numbers.literals if found is None else found
        near = [] if self.pretending else [[each] for each in self.running[::-1][:depth]]
        if near and depth is None:  # code may ask the modules inside, whose layers know their sizes anyway
            ((outer, module),) = near[0]
            inside = [(f"{outer}.{name}".lstrip("."), child) for name, child in module.named_children()]
            near.append([each for each in inside if not (layers.is_weighted(each[1]) or layers.is_norm(each[1]))])
        for level in near:
            told = [_tells(*each, sizes, parts, found) for each in level]  # all of them
            if any(told):
                return

    def _filled(self, shape: Sequence[int], axis: int) -> Tensor:
        """Fresh numbers along an axis, for entries that come from no channel: zeros that fill it up."""
        path = self.running[-1][0]
        self._fills[path] += 1
        first = self.numbers.fresh((f"{path} #{self._fills[path]}", FILL), shape[axis])
        numbers = torch.arange(first, first + shape[axis])
        self._note([shape[axis]], [numbers.tolist()])
        return numbers.view(-1, *[1] * (len(shape) - 1 - axis)).expand(*shape)

    def _padded(self, companion: Tensor, pads: Sequence[int]) -> Tensor:
        """Padding along an axis that is constant belongs to the channel; elsewhere new entries get new numbers."""
        for index, (low, high) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
            axis = companion.dim() - 1 - index
            shape = list(companion.shape)
            shape[axis] += low + high
            if companion.stride(axis) == 0 or (companion.shape[axis] == 1 and axis > 1):
                companion = companion.narrow(axis, 0, 1).expand(shape)
                continue
            companion = companion.narrow(axis, max(-low, 0), companion.shape[axis] + min(low, 0) + min(high, 0))
            space = axis > 1 and _varies(companion, 1)  # as behind a PixelShuffle
            around = [[*companion.shape[:axis], count, *companion.shape[axis + 1 :]] for count in (low, high)]
            sides = [
                torch.full((), NONE).expand(each) if space else self._filled(each, axis)
                for each in around
                if each[axis] > 0
            ]
            parts = [*sides[: low > 0], companion, *sides[low > 0 :]]
            companion = self._joined(parts, axis, torch.Size(shape), "pad")
        return companion

    def _joined(self, parts: list[Tensor], dim: int, shape: torch.Size, name: str) -> Tensor:
        parts = [part for part in parts if part.dim() == parts[-1].dim()]  # cat takes empty tensors of shape (0,)
        count = parts[0].dim()
        dim = dim % (count + (name == "stack"))
        if name == "cat" and any(map(_has_numbers, parts)):
            parts = [
                self._filled(part.shape, dim) if part.shape[dim] and bool((compact(part) == NONE).all()) else part
                for part in parts
            ]
        for axis in range(count):
            if (name == "stack" or axis != dim) and all(
                part.stride(axis) == 0 or part.shape[axis] == 1 for part in parts
            ):
                parts = [part.narrow(axis, 0, 1) for part in parts]
        joined = torch.stack(parts, dim) if name == "stack" else torch.cat(parts, dim)
        return joined.expand(shape)

    def _write(self, func: Callable, name: str, args: tuple, companions: dict[int, Tensor]) -> None:
        target = companions[id(args[0])]
        mask = args[1][0] if name.endswith(("index_put_", "index_put_impl_")) else None
        if mask is not None and mask.shape == target.shape and not _has_numbers(companions[id(args[2])]):
            self.numbers.unify(target, companions[id(mask)])  # chosen entry by entry
        elif name not in ("copy_", "index_put_", "_index_put_impl_"):
            self._block(companions.values(), f"{name} is not followed")
        elif name == "copy_":
            source = companions[id(args[1])].expand(target.shape)
            if _writable(target):
                target.copy_(source)
            else:
                self.numbers.unify(target, source)
        elif _writable(target):
            func(target, args[1], companions[id(args[2])], *args[3:])
        else:
            self._block(companions.values(), "entries of it are written by index")

    def _resize(self, companion: Tensor, results: list[Tensor], cutting: bool) -> None:
        leading = _same_leading(companion.shape, results[0].shape)
        axes = [axis for axis in range(companion.dim()) if axis != 1] if cutting else range(leading, companion.dim())
        first = self.numbers.unify_along(axes, compact(companion))
        for result in results:
            if result.dim() == results[0].dim():
                self._put(result, first)

    def _reduce(self, func: OpOverload, args: tuple, kwargs: dict, companion: Tensor, results: list[Tensor]) -> None:
        name = operations.name_of(func)
        position = operations.REDUCING[name]
        dims = args[position] if len(args) > position else kwargs.get("dim")
        if isinstance(dims, bool) or dims is None or dims == []:
            dims = -1 if name in operations.ALONG_LAST else range(companion.dim())
        dims = [dim % max(companion.dim(), 1) for dim in ([dims] if isinstance(dims, int) else dims)]
        narrow = compact(companion)
        value = narrow.amax(dims, keepdim=True) if dims else narrow
        several = operations.is_repeatable(func, args, kwargs) and any(_varies(narrow, dim) for dim in dims)
        # where some of each remain, they are taken pair by pair; what is made of all channels is of none
        loosely = several and not any(_varies(value, axis) for axis in range(value.dim()))
        self.numbers.unify_along(dims, narrow, loosely)
        for result in results if not loosely else ():
            self._put(result, value if result.dim() == companion.dim() else value.squeeze(dims))

    def _scale(self, args: tuple, companions: dict[int, Tensor], results: list[Tensor]) -> None:
        """A functional batch norm: one entry of every further tensor for each entry of axis 1."""
        own = companions[id(args[0])]
        columns = compact(own.movedim(1, 0), keep=(0,)).flatten(1)
        first = self.numbers.unify_along([1], columns).flatten()
        for other in args[1:5]:
            if isinstance(other, Tensor):
                self.numbers.unify(companions[id(other)], first)
        for result in results:
            if result.shape == own.shape:
                self._put(result, own)
            elif result.dim() == 1 and len(result) == len(first):
                self._put(result, first)

    def _filter(self, args: tuple, companions: dict[int, Tensor], results: list[Tensor]) -> None:
        """A convolution outside of layers with one kernel for each channel, as a blur."""
        own, kernels = companions[id(args[0])], companions[id(args[1])]
        first = self.numbers.unify_along(range(2, own.dim()), compact(own, keep=(1,)))
        self._note([args[8]], [_along(own, 1)])
        for other in (kernels, companions.get(id(args[2]))):
            if other is not None and _varies(other, 0):  # else a single one for all, however many
                each = self.numbers.unify_along(range(1, other.dim()), compact(other, keep=(0,)))
                self.numbers.unify(first, each.view(1, -1, *[1] * (own.dim() - 2)).expand_as(first))
        self._put(results[0], first)

    def _normalize_layers(self, args: tuple, companions: dict[int, Tensor], results: list[Tensor]) -> None:
        """A layer norm: all entries of the last axes together, with a scale and a shift for each."""
        own = companions[id(args[0])]
        for other in args[2:4]:
            if isinstance(other, Tensor):
                self.numbers.unify(own, companions[id(other)].expand(own.shape))
        axes = range(own.dim() - len(args[1]), own.dim())
        self.numbers.unify_along(axes, compact(own), loosely=True)
        for axis in axes:
            along = _along(own, axis)
            if _several(along):
                self._note([len(along)], [along])
        self._put(results[0], own)

    def _multiply(self, name: str, args: tuple, companions: dict[int, Tensor], results: list[Tensor]) -> None:
        """A matrix product: rows and columns keep their numbers where nothing along the contracted axis has any."""
        first, second = (companions[id(tensor)] for tensor in args[-2:])
        row, column = compact(first).amax(-1), compact(second).amax(-2)
        mixed = bool((first.amin(-1) != first.amax(-1)).any()) or bool((second.amin(-2) != second.amax(-2)).any())
        if mixed or name in ("addmm", "baddbmm"):
            self._block(companions.values(), f"{name} multiplies its channels with each other")
            return
        self._put(results[0], self._combined([row[..., None], column[..., None, :]], results[0].shape))

    def _pointwise(
        self, args: tuple, sources: list[Tensor], companions: dict[int, Tensor], results: list[Tensor]
    ) -> None:
        shape = results[0].shape
        fitting = [companions[id(tensor)] for tensor in sources if _broadcasts(tensor.shape, shape)]
        if not fitting:
            return
        base = self._combined(fitting, shape)
        if isinstance(args[0], Tensor) and results[0] is args[0]:
            target = companions[id(args[0])]
            if _writable(target):
                target.copy_(base)
                return
        for result in results:
            if result.shape == shape:
                self._put(result, base)

    def _combined(self, parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """The companion of what is computed entry by entry of tensors with these companions, which broadcast."""
        sizes = [math.inf if part.shape == shape else compact(part).numel() for part in parts]
        order = sorted(range(len(parts)), key=lambda place: sizes[place], reverse=True)
        base = parts[order[0]].expand(shape)
        for own in (parts[place] for place in order[1:]):
            spread = own.expand(shape)
            if not _has_numbers(own):
                continue
            lead = len(shape) - own.dim()
            repeated = [d for d in range(len(shape)) if shape[d] > 1 and (d < lead or own.shape[d - lead] == 1)]
            varying = {d for d in range(len(shape)) if _varies(base, d)}
            if varying & set(repeated):
                # several entries of one channel may share it; where there is but one channel, those to come may too
                tied = self.numbers.tied(base) if varying - set(repeated) else base
                kept = {d for d in varying if _varies(tied, d)}
                if not kept or kept & set(repeated):
                    self.numbers.block(own, self._broadcast(base, own))
                    continue
            across = {d for d in range(len(shape)) if _varies(spread, d)}
            if varying - across and across - varying:
                self.numbers.block(own, "it is multiplied or added to channels along another axis")
                continue
            self.numbers.unify(base, spread)
            if bool((compact(base) == NONE).any()):
                a, b = narrowed(base, spread)
                base = torch.where(a == NONE, b, a).expand(shape)
        return base

    def _broadcast(self, base: Tensor, own: Tensor) -> str:
        """Why what is computed of `base` and of `own`, which is the same for several entries of it, cannot grow."""
        roots = [set(torch.unique(compact(self.numbers.tied(each))).tolist()) for each in (base, own)]
        if roots[0] == roots[1] and len(roots[0]) == 1:  # as channels that are divided by their sum
            return "its channels depend on each other"
        return "it is multiplied or added to other channels by broadcasting"


def _tells(path: str, module: nn.Module, sizes: list[int], parts: list[list[int]], found: Literals) -> bool:
    """Whether attributes of a module are sizes of some parts; they are added to what was found."""
    for name, value in vars(module).items():
        if _are_sizes(value) and len(value) == len(sizes) > 1 and list(value) == sizes:
            for index, part in enumerate(parts):
                found.setdefault((path, name, index), part)
            return True
    told = False
    for size, part in zip(sizes, parts, strict=False):
        for name, value in vars(module).items():
            if name.startswith("_") or isinstance(value, bool):
                continue
            if isinstance(value, int) and value == size:
                found.setdefault((path, name, None), part)
                told = True
            elif _are_sizes(value) and size in value:
                found.setdefault((path, name, len(value) - 1 - list(value)[::-1].index(size)), part)
                told = True
    return told


def _are_sizes(value: object) -> TypeGuard[Sequence[int]]:
    return isinstance(value, list | tuple) and all(type(each) is int for each in value)


def _is_own(frame: FrameType) -> bool:
    """Whether it runs code of the model, not of torch or of this package."""
    return str(frame.f_globals["__name__"]).split(".")[0] not in ("torch", "growconv")


def _leaves_in(value: object) -> list[object]:
    """What nested tuples, lists and mappings hold, as `tree_leaves`, many times as fast for an operation's few."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, tuple | list):
        return [value]
    found: list[object] = []
    for item in value:
        found += _leaves_in(item) if isinstance(item, tuple | list | dict) else (item,)
    return found


def _computed(func: OpOverload, args: tuple, kwargs: dict[str, object], sources: Sequence[Tensor]) -> object:
    """What an operation gives on outputs of pretending layers, which are one entry again and again.

    What is computed entry by entry of those alone is so too; before something else is written to one it gets memory.
    """
    writes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
    if sources and operations.is_pointwise(func) and all(map(_is_one_entry, sources)):
        shape = max((each.shape for each in sources), key=lambda shape: (len(shape), math.prod(shape)))
        fits = all(_broadcasts(each.shape, shape) for each in sources) and (not writes or shape == args[0].shape)
    else:
        shape, fits = torch.Size(), False

    def first(value: object) -> object:
        return value.as_strided([1] * value.dim(), [1] * value.dim()) if isinstance(value, Tensor) else value

    if fits:
        output = func(*map(first, args), **{name: first(value) for name, value in kwargs.items()})
        return args[0] if writes else tree_map(lambda leaf: leaf.expand(shape), output)
    if writes and isinstance(args[0], Tensor) and not _writable(args[0]):
        args[0].set_(args[0].contiguous())  # pyright: ignore[reportArgumentType]
    return func(*args, **kwargs)


def _is_one_entry(tensor: Tensor) -> bool:
    return all(size == 1 or stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _zeros_like(tensor: Tensor) -> Callable[[], Tensor]:
    return partial(torch.zeros, tensor.shape, dtype=tensor.dtype, device=tensor.device)


class _Functions(TorchFunctionMode):
    """Sees what the dispatcher does not: slices that take all there is, and reshapes that refuse their sizes."""

    def __init__(self, mode: _Mode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        """Run a function."""
        kwargs = dict(kwargs or {})
        if func not in (Tensor.reshape, torch.reshape):
            output = func(*args, **kwargs)
            if func is Tensor.__getitem__ and not self.mode.pretending:
                with torch._C._DisableTorchDispatch():
                    self.mode.sliced(*args)
            return output
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            return self.mode.reshaped(args[0], tree_leaves(kwargs.get("shape", args[1:])))


def _has_numbers(companion: Tensor) -> bool:
    return bool((compact(companion) >= 0).any())


def _is_followed(companion: Tensor) -> bool:
    """Whether there are numbers, or would be if no operation had failed."""
    return bool((compact(companion) != NONE).any())


def _writable(companion: Tensor) -> bool:
    return not any(size > 1 and stride == 0 for size, stride in zip(companion.shape, companion.stride(), strict=True))


def _varies(companion: Tensor, axis: int) -> bool:
    """Whether numbers differ along an axis."""
    if companion.shape[axis] < 2 or companion.stride(axis) == 0:
        return False
    narrow = compact(companion, keep=(axis,))
    return bool((narrow.amax(axis) != narrow.amin(axis)).any())


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def _same_leading(first: torch.Size, second: torch.Size) -> int:
    """How many leading axes (samples, channels) a pooling or an interpolation leaves alone."""
    count = min(2, len(first), len(second))
    return next((axis for axis in range(count) if first[axis] != second[axis]), count)


def _along(companion: Tensor, axis: int) -> list[int]:
    """The numbers along one axis, at the first entry of the others."""
    for other in range(companion.dim()):
        if other != axis and companion.shape[other] > 1:
            companion = companion.narrow(other, 0, 1)
    return companion.flatten().tolist()


def _several(numbers: Sequence[int]) -> bool:
    """Whether they are of more than one channel."""
    return max(numbers, default=NONE) >= 0 and len(set(numbers)) > 1


def owned_tensors(model: nn.Module) -> tuple[dict[int, str], dict[str, str]]:
    """The tensors of layers, by identity, with their layer; and layers that have an earlier one's weight."""
    owned: dict[int, str] = {}
    alias: dict[str, str] = {}
    weights: dict[int, nn.Module] = {}
    paths: dict[nn.Module, str] = {}
    for path, module in named_modules(model):
        if not (layers.is_weighted(module) or layers.is_norm(module)):
            continue
        paths[module] = path
        own = [*module._parameters.items(), *module._buffers.items()]
        if module._modules:  # as those of a parametrization
            own = [*module.named_parameters(), *module.named_buffers()]
        for name, tensor in own:
            if tensor is None:
                continue
            owned[id(tensor)] = path
            if layers.is_weighted(module) and "weight" in name:
                earlier = weights.setdefault(id(tensor), module)
                alike = type(module) is type(earlier) and layers.size(module, OUT) == layers.size(earlier, OUT)
                if earlier is not module and alike:
                    alias[path] = paths[earlier]
    return owned, alias
