"""A forward pass as a list of aten operations, recorded once for all sites of a model.

Layers with weights and norm layers are recorded as calls, by module path and without what they do inside; everything
else as the operations that reached the dispatcher. A value is what a tensor held at one moment: an operation in place
makes a new value of the tensor that it overwrites, and of every other tensor on the same memory. So a recording can be
read like a program without side effects, and run again with true writes in place.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor, is_gradtrackingtensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

from growconv.network import layers, operations
from growconv.network.layout import ENTRY, GROUP_IN
from growconv.network.site import GrowthSite
from growconv.network.watch import Watch

Memory = tuple[int, int, torch.Size, tuple[int, ...], torch.dtype]
"""Which entries of which storage a tensor shows, and as what: tensors that agree in it hold the same."""

_RANDOM = frozenset(["bernoulli", "bernoulli_"])
_NOISE_STAYS = frozenset(["div", "div_", "mul", "mul_", "view", "expand", "clone", "_to_copy"])


@dataclass(frozen=True)
class Ref:
    """Stands for a value among the arguments of an operation."""

    value: int


@dataclass(frozen=True, eq=False)
class Operation:
    """An aten operation.

    Attributes:
        func: the operation.
        args: its positional arguments; a Ref for every tensor.
        kwargs: its keyword arguments, likewise.
        outputs: the values that it makes, in order; for one in place the new value of what it overwrites.
        writes: whether it overwrites an argument.
        module: path of the innermost module that was running.
    """

    func: OpOverload
    args: tuple
    kwargs: Mapping[str, object]
    outputs: tuple[int, ...]
    writes: bool
    module: str

    @property
    def name(self) -> str:
        """Name without namespace and overload: "relu_"."""
        return operations.name_of(self.func)

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """The values that it is given."""
        return tuple(leaf.value for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Ref))

    def __reduce__(self) -> tuple:
        """By name, since operations cannot be pickled."""
        name = (self.func._schema.name, self.func._overloadname)
        return _operation, (*name, self.args, self.kwargs, self.outputs, self.writes, self.module)


def _operation(name: str, overload: str, *rest: object) -> Operation:
    space, packet = name.split("::")
    return Operation(getattr(getattr(getattr(torch.ops, space), packet), overload), *rest)  # pyright: ignore


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer with weights or of a norm layer: its path, the value that it was given, and the one it gave."""

    path: str
    inputs: tuple[int]
    outputs: tuple[int]


@dataclass(frozen=True)
class Rewritten:
    """A tensor has a new value because an operation in place wrote through another tensor on the same memory.

    Its inputs are what the tensor held, and what wrote to it.
    """

    inputs: tuple[int, int]
    outputs: tuple[int]


Step = Operation | LayerCall | Rewritten


@dataclass(eq=False)
class Value:
    """What a tensor held at one moment.

    Attributes:
        tensor: the tensor; a copy once an operation in place is about to change it. One without entries, on the meta
            device, where the tape holds none.
        storage: which memory it was on.
        source: path of the parameter or buffer that it is; None for other tensors.
        noise: whether it is random numbers that a dropout multiplies with.
    """

    tensor: Tensor
    storage: int
    source: str | None = None
    noise: bool = False


class Tape(Watch):
    """Records what runs inside a `with` block.

    Dropout is recorded as what it is without training: the identity. What is needed later is taken out of a tape
    (`network.seats.Region`), and the tape is let go.

    Args:
        model: the model that will be called.
        holds: whether every tensor stays alive as long as the tape does; else parameters, buffers and single numbers.

    Attributes:
        steps: what has run, in order.
        values: all values, by their numbers.
        calls: the calls of every layer that was called, by its path, in order.
        users: per value the steps that it is given to.
        makers: per value the step that made it.
        on_memory: per memory the values that were on it at any time.
    """

    def __init__(self, model: nn.Module, holds: bool = True) -> None:
        super().__init__(model)
        self.holds = holds
        self.steps: list[Step] = []
        self.values: list[Value] = []
        self.calls: defaultdict[str, list[LayerCall]] = defaultdict(list)
        self.users: defaultdict[int, list[Step]] = defaultdict(list)
        self.makers: dict[int, Step] = {}
        self.on_memory: defaultdict[int, list[int]] = defaultdict(list)
        self._known: dict[int, dict[Memory, int]] = {}  # per memory the present values of all tensors on it
        self._alive: list[StorageWeakRef] = []  # keep the addresses of memories from being given to others
        self._sources = {
            _memory(tensor): path for path, tensor in [*model.named_parameters(), *model.named_buffers()]
            if _has_memory(tensor)
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------ layers

    def _called(self, path: str, module: nn.Module, given: Tensor, output: object) -> None:
        if not isinstance(output, Tensor) or not given.numel():
            return
        number = self.number(given)
        if not layers.is_dropout(module):
            call = LayerCall(path, (number,), (self._add(output),))
            self.calls[path].append(call)
            self._record(call)
        elif _memory(output) != _memory(given):
            self._copied(number, output, path)

    def _copied(self, given: int, output: Tensor, path: str) -> None:
        """A dropout: what comes out is what goes in."""
        number = self._add(output)
        self._record(Operation(torch.ops.aten.clone.default, (Ref(given),), {}, (number,), False, path))

    def _record(self, step: Step, position: int | None = None) -> None:
        """Put down a step, at the end if nothing else is said."""
        self.steps.insert(len(self.steps) if position is None else position, step)
        for number in dict.fromkeys(step.inputs):
            self.users[number].append(step)
        self.makers |= dict.fromkeys(step.outputs, step)

    # ------------------------------------------------------------------------------------------ values

    def number(self, tensor: Tensor) -> int:
        """The number of what a tensor holds now; a tensor from outside gets one."""
        memory = _memory(tensor)
        found = self._known.get(memory[0], {}).get(memory)
        return self._add(tensor, self._sources.get(memory)) if found is None else found

    def _add(self, tensor: Tensor, source: str | None = None) -> int:
        memory = _memory(tensor)
        if memory[0] not in self._known:
            self._known[memory[0]] = {}
            self._alive.append(StorageWeakRef(tensor.untyped_storage()))
        number = self._known[memory[0]][memory] = len(self.values)
        if not self.holds and source is None and tensor.dim():
            tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        self.values.append(Value(tensor, memory[0], source))
        self.on_memory[memory[0]].append(number)
        return number

    def _secure(self, tensor: Tensor) -> dict[int, Tensor]:
        """Copy all values on a memory that is about to be written to; returns the tensors themselves."""
        known = self._known.get(_memory(tensor)[0], {})
        found = {number: self.values[number].tensor for number in known.values()}
        for number, shown in found.items():
            self.values[number].tensor = shown.clone()
        return found

    def _overwrite(self, tensor: Tensor, shown: Mapping[int, Tensor]) -> int:
        """New values of everything on the memory of a tensor that was written to."""
        memory = _memory(tensor)
        values = self._known[memory[0]]
        before = values.get(memory)  # none where the operation has set its strides anew
        number = self._add(tensor, None if before is None else self.values[before].source)
        for key, old in values.items():
            if key != memory:
                values[key] = len(self.values)
                self.values.append(Value(shown[old], memory[0], self.values[old].source))
                self.on_memory[memory[0]].append(values[key])
                self._record(Rewritten((old, number), (values[key],)))
        return number

    # ------------------------------------------------------------------------------------------ operations

    def _operated(self, func: OpOverload, args: tuple, kwargs: dict[str, object]) -> object:
        """Run an operation and write it down."""
        if not all(_has_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)):
            return func(*args, **kwargs)
        refs = tree_map(lambda leaf: Ref(self.number(leaf)) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        entries = _entries(args[0]) if func._schema.name.startswith("aten::as_strided") else None
        written = written_arguments(func, args, kwargs)
        shown = {number: each for tensor in written for number, each in self._secure(tensor).items()}
        output = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        for tensor in written:
            if not any(_memory(tensor) == _memory(each) for each in outputs):
                self._known[_memory(tensor)[0]].clear()  # as the running statistics of a functional batch norm
        if not outputs or not all(map(_has_memory, outputs)):
            return output
        operation = Operation(func, refs[0], refs[1], (), bool(written), self.running[-1][0])
        name, inputs = operation.name, [self.values[number] for number in operation.inputs]
        if name in operations.ALIASES and not written:
            return output  # the same memory: the same value
        if entries is not None and entries == _entries(outputs[0]):  # so too, with other strides of axes of length 1
            self._known[_memory(outputs[0])[0]][_memory(outputs[0])] = operation.inputs[0]
            return output
        noisy = name in _RANDOM or (name in _NOISE_STAYS and bool(inputs) and all(each.noise for each in inputs))
        multiplied = name in ("mul", "mul_") and any(each.noise for each in inputs)
        if not noisy and (multiplied or name == "native_dropout"):  # what comes out without training
            kept = next(number for number in operation.inputs if not self.values[number].noise)
            if written:
                self._known[_memory(outputs[0])[0]][_memory(outputs[0])] = kept
            else:
                self._copied(kept, outputs[0], operation.module)
            return output
        position, numbers = len(self.steps), []
        for tensor in outputs:
            inplace = any(tensor is each or _memory(tensor) == _memory(each) for each in written)
            numbers.append(self._overwrite(tensor, shown) if inplace else self._add(tensor))
            self.values[numbers[-1]].noise = noisy
        self._record(replace(operation, outputs=tuple(numbers)), position)  # in front of what it has rewritten
        return output


def written_arguments(func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Tensor]:
    """The tensors that an operation overwrites."""
    if not func._schema.is_mutable:
        return []
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    return found


def _has_memory(tensor: Tensor) -> bool:
    nested = is_batchedtensor(tensor) or is_gradtrackingtensor(tensor)
    return tensor.layout is torch.strided and tensor.device.type != "meta" and not nested


def _memory(tensor: Tensor) -> Memory:
    address, offset = tensor.untyped_storage()._cdata, int(tensor.storage_offset())
    return address, offset, tensor.shape, tuple(tensor.stride()), tensor.dtype


def _entries(tensor: Tensor) -> tuple[object, ...]:
    """Which entries of a storage a tensor shows, in order."""
    address, offset, shape, strides, dtype = _memory(tensor)
    return address, offset, shape, dtype, [each for each, size in zip(strides, shape, strict=True) if size > 1]


def hot_values(tape: Tape, site: GrowthSite) -> tuple[set[int], set[int]]:
    """The values of a recording that have channels of a site, and among them those that its producers made.

    Everything on a memory that an operation on such values writes to is among them, from its creation on.
    """
    own, bare = set(site.axes), site.layout.dims
    made = {call.outputs[0] for path in site.producers if path not in bare for call in tape.calls[path]}
    hot = set(made)
    if bare:
        hot |= {n for n, value in enumerate(tape.values) if value.source in bare and (value.source, ENTRY) in own}
    waiting, seen = list(hot), set(hot)
    while waiting:
        for step in tape.users[waiting.pop()]:
            if isinstance(step, LayerCall) and not {(step.path, ENTRY), (step.path, GROUP_IN)} & own:
                continue  # layers with weights cut
            hot.update(step.outputs)
            touched = list(step.outputs)
            if isinstance(step, Operation) and step.writes:
                touched += [each for number in step.outputs for each in tape.on_memory[tape.values[number].storage]]
            waiting += [number for number in touched if number not in seen]
            seen.update(touched)
    return hot, made
