"""Channels, found by sending their numbers through the model.

While a model runs, every tensor has a companion that holds the numbers of its entries. Weighted layers cut: what they
are given is consumed, and their outputs get fresh numbers. Between them, numbers go through the operations
(`propagation`), sizes that these are given are held against attributes (`literals`), and what fails is gone past
(`failures`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from growconv.errors import TraceError
from growconv.network import layers, operations
from growconv.network.companions import NONE, SPOILT, Companions, along, compact, has_numbers, numbers_in, varies
from growconv.network.failures import Failures, LookFailed, Ran
from growconv.network.layout import ENTRY, GROUP_IN, GROUP_OUT, IN, OUT
from growconv.network.literals import LiteralSizes
from growconv.network.model import Arguments, module_at, named_modules, one_run, tensors_in
from growconv.network.numbers import Numbers
from growconv.network.pretender import computed
from growconv.network.propagation import Call, Propagation
from growconv.network.watch import Watch


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
            raise mode.failures.ended(error, model) from error
        if mode.failures.found:
            raise LookFailed(mode.failures.found) from mode.failures.found[0].error
        for tensor in tensors_in(output):
            numbers.outputs += 1
            numbers.block(mode.companions.of(tensor), "it is the model's output")
        if not pretending:
            _note_trained(model, numbers, mode, output)
    for path, count in mode.calls.items():
        numbers.calls[path] = max(numbers.calls.get(path, 0), count)
    return mode.trail


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
    """Runs every layer and operation on the tensors and on their companions."""

    def __init__(self, model: nn.Module, numbers: Numbers, before: Iterable[Ran], pretending: bool) -> None:
        super().__init__(model)
        self.numbers = numbers
        self.pretending = pretending
        self.differentiable: set[str] = set()
        self.trail: list[Ran] = []
        self.calls: dict[str, int] = {}
        self.companions = Companions(self._begin)
        self.sizes = LiteralSizes(numbers, self.companions, () if pretending else self.running)
        self.failures = Failures(self.companions, before, self.running, look.__code__)
        self._propagation = Propagation(numbers, self.companions, self.sizes, self.running)
        self._met: dict[tuple[str, str], int] = defaultdict(int)
        self._owned, self._alias = owned_tensors(model)
        self._bare: dict[int, str] = {}
        for path, module in named_modules(model):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and id(tensor) not in self._owned:
                    self._bare.setdefault(id(tensor), f"{path}.{name}".lstrip("."))

    def _begin(self, tensor: Tensor) -> Tensor:
        """The companion of a tensor that no operation has given: a bare parameter's entries have fresh numbers."""
        path = self._bare.get(id(tensor))
        if path is None or not tensor.numel() or not tensor.is_floating_point():
            return torch.full(tuple(tensor.shape), NONE)
        first = self.numbers.fresh((path, ENTRY), tensor.numel())
        self.numbers.shapes[path] = tensor.shape
        found = torch.arange(first, first + tensor.numel()).view(tensor.shape)
        for axis in range(tensor.dim()):
            self.sizes.counted(along(found, axis))
        return found

    # ------------------------------------------------------------------------------------------ layers

    def _called(self, path: str, module: nn.Module, given: Tensor, output: object) -> None:
        numbers = self.numbers
        if not isinstance(output, Tensor):
            numbers.block(self.companions.of(given), f"{path} gives no single tensor")
            return
        if layers.is_dropout(module):
            self.companions.put(output, self.companions.of(given))
            return
        if not given.numel():  # as what is cut out for boxes where there are none: it shows nothing
            return
        self.calls[path] = self.calls.get(path, 0) + 1
        self.trail.append(Ran(path))
        if path not in numbers.order:
            numbers.order.append(path)
        if output.requires_grad:
            self.differentiable.add(path)
        companion = self.companions.of(given)
        axis = layers.channel_axis(module, given.dim())
        columns = compact(companion.movedim(axis, 0), keep=(0,)).flatten(1)
        if layers.is_norm(module):
            self._normalize(path, module, columns)
            self.companions.put(output, companion)
            return
        if len(columns) > 1 and varies(columns, 1) and bool((columns == columns[:1]).all()):
            numbers.across |= dict.fromkeys(columns[0].tolist(), path)
            columns = torch.full_like(columns, NONE)
        if len(columns) == 1 and varies(columns, 1) and varies(numbers.tied(columns), 1):
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
        self.companions.put(output, torch.arange(first, first + count).view(shape))

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
        if steps is not None and numbers_in(map(self.companions.of, sources)):
            TorchDispatchMode.__enter__(self)  # no new hooks
            try:
                return steps(*args, **kwargs)
            finally:
                TorchDispatchMode.__exit__(self, None, None, None)
        try:
            output = computed(func, args, kwargs, sources) if self.pretending else func(*args, **kwargs)
        except Exception as error:
            return self.failures.operation(error, ran, sources, args[0] if func._schema.is_mutable else None)
        if not self.pretending:
            ran.keep(output)
        results = [item for item in _leaves_in(output) if isinstance(item, Tensor)]
        question = all(
            result.dim() == 0 and result.dtype is torch.bool for result in results
        )  # as whether all is finite
        if not question and name not in operations.CREATING:
            self._follow(Call(func, name, args, kwargs, sources, results))
        return output

    def _follow(self, call: Call) -> None:
        """Send numbers through an operation, where there are any."""
        self.failures.last = [self.companions.of(tensor) for tensor in call.given]
        if call.name in operations.STRUCTURAL or any(map(has_numbers, self.failures.last)):
            self._propagation.follow(call)
        elif self.failures.found and SPOILT in numbers_in(self.failures.last):
            self.failures.spoil(call.results)

    def _started(self, module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        self.sizes.given((args, kwargs))


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
                    self.mode.sizes.sliced(*args)
            return output
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            return _reshaped(args[0], tree_leaves(kwargs.get("shape", args[1:])))


def _reshaped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A reshape that refuses its sizes, as the operations that it turns into and that are watched."""
    if tensor.is_contiguous():
        return torch.ops.aten.view(tensor, shape)
    return torch.ops.aten._unsafe_view(tensor.clone(memory_format=torch.contiguous_format), shape)


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
