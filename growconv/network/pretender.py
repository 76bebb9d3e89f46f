"""A copy of a model that looks wider and computes nothing, for a while."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_map

from growconv.errors import SurgeryError
from growconv.network import layers, operations
from growconv.network.companions import broadcasts, has_memory
from growconv.network.layout import FILL, OUT, Layout
from growconv.network.model import module_at, named_modules

_Value = TypeVar("_Value")


@contextmanager
def pretending(
    model: nn.Module, layout: Layout, now: Sequence[int], units: Sequence[int], shapes: layers.Shapes | None = None
) -> Iterator[None]:
    """Inside, the layers of a model compute nothing but give outputs of the right shape, at other widths.

    Its tensors have the shapes of a wider model too, and sizes in attributes follow.

    Args:
        model: a copy that may be changed.
        layout: where the channels lie.
        now: units of every space as the model has them.
        units: units that they are to have.
        shapes: of what its layers give, as far as they are known from earlier times; None: of none.
    """
    shapes = {} if shapes is None else shapes
    added, made = dict[str, dict[str, int]](), dict[tuple[int, int, Fraction], Tensor]()
    with ExitStack() as undo:
        for _, module in named_modules(model):
            if layers.is_norm(module) or layers.is_plain_dropout(module):
                _put(undo, vars(module), "forward", _unchanged)
            elif layers.is_weighted(module):
                _put(undo, vars(module), "forward", partial(_pretend, module, shapes))
        for (path, side), runs in layout.axes.items():
            old, new = (sum(run.length(each) for run in runs) for each in (now, units))
            if path in layout.dims:
                _lengthen(undo, model, path, layout.dims[path], Fraction(new, old), made)
            elif side != FILL:
                added.setdefault(path, {})[side] = new - old
                for slot in layers.adapter(module_at(model, path)).slots(side):
                    _lengthen(undo, model, f"{path}.{slot.name}", slot.axis, Fraction(new, old), made)
        for path, more in added.items():
            module = module_at(model, path)
            try:
                counts = layers.adapter(module).counts(more)
            except SurgeryError:  # no whole groups of a norm: its numbers tell
                continue
            for name, count in counts.items():
                _put(undo, vars(module), name, count)
        for each in layout.attributes:
            kept = vars(module_at(model, each.path))
            more = sum(rate * (units[space] - now[space]) for space, rate in each.rates.items())
            _put(undo, kept, each.name, each.enlarged(kept[each.name], more))
        yield


def _pretend(module: nn.Module, shapes: layers.Shapes, x: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    outputs = None if layers.in_whole_groups(module) else layers.size(module, OUT)
    return layers.pretended(module, x, shapes, outputs)


def _unchanged(x: Tensor, *_args: object, **_kwargs: object) -> Tensor:
    return x.clone() if any(x.stride()) else x.view_as(x)  # zeros on the memory of one stay so


def _put(undo: ExitStack, holder: dict[str, _Value], name: str, value: _Value) -> None:
    """Put a value in the place of another, for as long as the stack is open."""
    if name in holder:
        undo.callback(holder.__setitem__, name, holder[name])
    else:
        undo.callback(holder.pop, name)
    holder[name] = value


def _lengthen(
    undo: ExitStack,
    model: nn.Module,
    path: str,
    axis: int,
    factor: Fraction,
    made: dict[tuple[int, int, Fraction], Tensor],
) -> None:
    """Let a parameter or buffer look as if it had so many times the entries; those that layers share stay shared."""
    parent, _, name = path.rpartition(".")
    module = module_at(model, parent)
    learnt = name in module._parameters
    holder = cast(dict[str, Tensor], module._parameters if learnt else module._buffers)
    tensor = holder[name]
    longer = tensor.detach().narrow(axis, 0, 1)  # the first entry again and again takes no memory
    longer = longer.expand(*tensor.shape[:axis], int(tensor.shape[axis] * factor), *tensor.shape[axis + 1 :])
    longer = nn.Parameter(longer, False) if learnt else longer.clone()
    _put(undo, holder, name, made.setdefault((id(tensor), axis, factor), longer))


def computed(func: OpOverload, args: tuple, kwargs: dict[str, object], sources: Sequence[Tensor]) -> object:
    """What an operation gives on outputs of pretending layers, which are one entry again and again.

    What is computed entry by entry of those alone is so too; before something else is written to one it gets memory.
    """
    writes = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
    if sources and operations.is_pointwise(func) and all(map(_is_one_entry, sources)):
        shape = max((each.shape for each in sources), key=lambda shape: (len(shape), math.prod(shape)))
        fits = all(broadcasts(each.shape, shape) for each in sources) and (not writes or shape == args[0].shape)
    else:
        shape, fits = torch.Size(), False

    def first(value: object) -> object:
        return value.as_strided([1] * value.dim(), [1] * value.dim()) if isinstance(value, Tensor) else value

    if fits:
        output = func(*map(first, args), **{name: first(value) for name, value in kwargs.items()})
        return args[0] if writes else tree_map(lambda leaf: leaf.expand(shape), output)
    if writes and isinstance(args[0], Tensor) and not has_memory(args[0]):
        args[0].set_(args[0].contiguous())  # pyright: ignore[reportArgumentType]
    return func(*args, **kwargs)


def _is_one_entry(tensor: Tensor) -> bool:
    return all(size == 1 or stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
