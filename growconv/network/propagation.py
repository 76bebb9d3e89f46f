"""What becomes of channels' numbers in each operation.

Structural operations are run on the companions themselves, so that no operation needs a rule of its own; elementwise
operations and reductions unify the numbers that they compute together; whatever else meets a number blocks it, and its
name is the reason.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map

from growconv.network import operations
from growconv.network.companions import (
    NONE,
    Companions,
    along,
    broadcasts,
    compact,
    has_memory,
    has_numbers,
    narrowed,
    varies,
)
from growconv.network.layout import FILL
from growconv.network.literals import LiteralSizes
from growconv.network.numbers import Numbers


@dataclass(frozen=True, eq=False)
class Call:
    """An operation that has run.

    Attributes:
        func: the operation, and its `name`.
        args: what it was given by position.
        kwargs: what it was given by name.
        given: the tensors among these.
        results: the tensors that it gave.
    """

    func: OpOverload
    name: str
    args: tuple
    kwargs: dict
    given: Sequence[Tensor]
    results: Sequence[Tensor]


class Propagation:
    """Follows the numbers of one forward pass through its operations.

    Args:
        numbers: they are tied and blocked here.
        companions: those of the pass.
        sizes: is told what sizes the operations are given.
        running: path and module of all that is running, outermost first.
    """

    def __init__(
        self, numbers: Numbers, companions: Companions, sizes: LiteralSizes, running: Sequence[tuple[str, nn.Module]]
    ) -> None:
        self._numbers = numbers
        self._of = companions.of
        self._put = companions.put
        self._sizes = sizes
        self._running = running
        self._fills: dict[str, int] = {}

    def follow(self, call: Call) -> None:
        """Give what an operation gave its companions, and tie or block the numbers that it computes with."""
        turns = torch.Tag.inplace_view in call.func.tags
        rule = Propagation._turn if turns else _RULES.get(call.name, Propagation._compute)
        try:
            rule(self, call)
        except (RuntimeError, IndexError, ValueError) as error:
            self._block(call, f"{call.name} is not followed ({str(error).splitlines()[0]})")

    def _block(self, call: Call, reason: str) -> None:
        for tensor in call.given:
            self._numbers.block(self._of(tensor), reason)

    # ------------------------------------------------------------------------------------------ moved

    def _move(self, call: Call) -> None:
        """Entries move and nothing is computed: the same is done to the numbers."""
        func, name, args, results = call.func, call.name, call.args, call.results
        own = self._of(call.given[0])
        if name in ("index", "gather", "index_select"):
            if any(has_numbers(self._of(each)) for each in call.given if each is not args[0]):
                self._block(call, f"{name} chooses entries by their values")
            found: object = func(own, *args[1:], **call.kwargs)
        elif name in operations.ALIASES or name in ("clone", "_to_copy"):
            found = own if name in operations.ALIASES or 0 in own.stride() else own.clone()
        elif name == "constant_pad_nd":
            found = self._padded(own, args[1])
        elif name == "as_strided":  # reads memory, laid out as that of the tensor
            memory = torch.empty_strided(args[0].shape, args[0].stride(), dtype=torch.long)
            found = func(memory.copy_(own), *args[1:], **call.kwargs)
        elif name in ("cat", "stack"):
            dim = args[1] if args[1:] else call.kwargs.get("dim", 0)
            found = self._joined([self._of(tensor) for tensor in args[0]], dim, results[0].shape, name)
        elif name in operations.VIEWS:
            found = own.reshape(results[0].shape)
        else:
            swapped = tree_map(lambda leaf: self._of(leaf) if isinstance(leaf, Tensor) else leaf, (args, call.kwargs))
            found = func(*swapped[0], **swapped[1])
        for result, each in zip(results, tree_leaves(found), strict=True):
            self._put(result, each)
        self._sizes.told(name, args, own, results)

    def _turn(self, call: Call) -> None:
        """A tensor gets other axes in place: unsqueeze_, transpose_, ..."""
        target = call.args[0]
        own = self._of(target)
        own = own.contiguous() if call.name == "as_strided_" else own  # this one reads memory
        self._put(target, getattr(own, call.name.removesuffix("_"))(*call.args[1:], **call.kwargs))

    def _filled(self, shape: Sequence[int], axis: int) -> Tensor:
        """Fresh numbers along an axis, for entries that come from no channel: zeros that fill it up."""
        path = self._running[-1][0]
        self._fills[path] = self._fills.get(path, 0) + 1
        first = self._numbers.fresh((f"{path} #{self._fills[path]}", FILL), shape[axis])
        numbers = torch.arange(first, first + shape[axis])
        self._sizes.counted(numbers.tolist())
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
            space = axis > 1 and varies(companion, 1)  # as behind a PixelShuffle
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
        if name == "cat" and any(map(has_numbers, parts)):
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

    def _write(self, call: Call) -> None:
        """Entries of one tensor are put into another."""
        name, args, target = call.name, call.args, self._of(call.args[0])
        mask = args[1][0] if name.endswith(("index_put_", "index_put_impl_")) else None
        if mask is not None and mask.shape == target.shape and not has_numbers(self._of(args[2])):
            self._numbers.unify(target, self._of(mask))  # chosen entry by entry
        elif name not in ("copy_", "index_put_", "_index_put_impl_"):
            self._block(call, f"{name} is not followed")
        elif name == "copy_":
            source = self._of(args[1]).expand(target.shape)
            if has_memory(target):
                target.copy_(source)
            else:
                self._numbers.unify(target, source)
        elif has_memory(target):
            call.func(target, args[1], self._of(args[2]), *args[3:])
        else:
            self._block(call, "entries of it are written by index")

    # ------------------------------------------------------------------------------------------ taken together

    def _resize(self, call: Call) -> None:
        """Pooling and interpolation: each location reads many of the same channel."""
        own, cutting = self._of(call.args[0]), call.name in operations.CUTTING
        for other in call.given[1:]:
            if call.name.startswith("max_unpool"):
                self._numbers.unify(own, self._of(other))
            else:
                self._numbers.block(self._of(other), f"{call.name} takes places from it")
        leading = _same_leading(own.shape, call.results[0].shape)
        axes = [axis for axis in range(own.dim()) if axis != 1] if cutting else range(leading, own.dim())
        first = self._numbers.unify_along(axes, compact(own))
        for result in call.results:
            if result.dim() == call.results[0].dim():
                self._put(result, first)

    def _reduce(self, call: Call) -> None:
        """Entries along some axes are computed together."""
        name, args, own = call.name, call.args, self._of(call.args[0])
        position = operations.REDUCING[name]
        dims = args[position] if len(args) > position else call.kwargs.get("dim")
        if isinstance(dims, bool) or dims is None or dims == []:
            dims = -1 if name in operations.ALONG_LAST else range(own.dim())
        dims = [dim % max(own.dim(), 1) for dim in ([dims] if isinstance(dims, int) else dims)]
        narrow = compact(own)
        value = narrow.amax(dims, keepdim=True) if dims else narrow
        several = operations.is_repeatable(call.func, args, call.kwargs) and any(varies(narrow, dim) for dim in dims)
        # where some of each remain, they are taken pair by pair; what is made of all channels is of none
        loosely = several and not any(varies(value, axis) for axis in range(value.dim()))
        self._numbers.unify_along(dims, narrow, loosely)
        for result in call.results if not loosely else ():
            self._put(result, value if result.dim() == own.dim() else value.squeeze(dims))

    def _scale(self, call: Call) -> None:
        """A functional batch norm: one entry of every further tensor for each entry of axis 1."""
        own = self._of(call.args[0])
        columns = compact(own.movedim(1, 0), keep=(0,)).flatten(1)
        first = self._numbers.unify_along([1], columns).flatten()
        for other in call.args[1:5]:
            if isinstance(other, Tensor):
                self._numbers.unify(self._of(other), first)
        for result in call.results:
            if result.shape == own.shape:
                self._put(result, own)
            elif result.dim() == 1 and len(result) == len(first):
                self._put(result, first)

    def _normalize(self, call: Call) -> None:
        """A layer norm: all entries of the last axes together, with a scale and a shift for each."""
        own = self._of(call.args[0])
        for other in call.args[2:4]:
            if isinstance(other, Tensor):
                self._numbers.unify(own, self._of(other).expand(own.shape))
        axes = range(own.dim() - len(call.args[1]), own.dim())
        self._numbers.unify_along(axes, compact(own), loosely=True)
        for axis in axes:
            self._sizes.length(own, axis)
        self._put(call.results[0], own)

    def _multiply(self, call: Call) -> None:
        """A matrix product: rows and columns keep their numbers where nothing along the contracted axis has any."""
        first, second = map(self._of, call.args[-2:])
        row, column = compact(first).amax(-1), compact(second).amax(-2)
        mixed = bool((first.amin(-1) != first.amax(-1)).any()) or bool((second.amin(-2) != second.amax(-2)).any())
        if mixed or call.name in ("addmm", "baddbmm"):
            self._block(call, f"{call.name} multiplies its channels with each other")
            return
        self._put(call.results[0], self._combined([row[..., None], column[..., None, :]], call.results[0].shape))

    # ------------------------------------------------------------------------------------------ entry by entry

    def _compute(self, call: Call) -> None:
        """What none of the other rules is for."""
        args = call.args
        if call.name == "convolution" and args[8] == args[0].shape[1] == args[1].shape[0] == call.results[0].shape[1]:
            self._filter(call)
        elif operations.is_pointwise(call.func):
            self._pointwise(call)
        else:
            self._block(call, f"{call.name} is not followed")

    def _filter(self, call: Call) -> None:
        """A convolution outside of layers with one kernel for each channel, as a blur."""
        own = self._of(call.args[0])
        first = self._numbers.unify_along(range(2, own.dim()), compact(own, keep=(1,)))
        self._sizes.counted(along(own, 1))
        for other in (self._of(each) for each in call.args[1:3] if each is not None):
            if varies(other, 0):  # else a single one for all, however many
                each = self._numbers.unify_along(range(1, other.dim()), compact(other, keep=(0,)))
                self._numbers.unify(first, each.view(1, -1, *[1] * (own.dim() - 2)).expand_as(first))
        self._put(call.results[0], first)

    def _pointwise(self, call: Call) -> None:
        shape = call.results[0].shape
        fitting = [self._of(tensor) for tensor in call.given if broadcasts(tensor.shape, shape)]
        if not fitting:
            return
        base = self._combined(fitting, shape)
        target = call.args[0]
        if isinstance(target, Tensor) and call.results[0] is target and has_memory(self._of(target)):
            self._of(target).copy_(base)
            return
        for result in call.results:
            if result.shape == shape:
                self._put(result, base)

    def _combined(self, parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """The companion of what is computed entry by entry of tensors with these companions, which broadcast."""
        sizes = [math.inf if part.shape == shape else compact(part).numel() for part in parts]
        order = sorted(range(len(parts)), key=lambda place: sizes[place], reverse=True)
        base = parts[order[0]].expand(shape)
        for own in (parts[place] for place in order[1:]):
            spread = own.expand(shape)
            if not has_numbers(own):
                continue
            lead = len(shape) - own.dim()
            repeated = [d for d in range(len(shape)) if shape[d] > 1 and (d < lead or own.shape[d - lead] == 1)]
            varying = {d for d in range(len(shape)) if varies(base, d)}
            if varying & set(repeated):
                # several entries of one channel may share it; where there is but one channel, those to come may too
                tied = self._numbers.tied(base) if varying - set(repeated) else base
                kept = {d for d in varying if varies(tied, d)}
                if not kept or kept & set(repeated):
                    self._numbers.block(own, self._broadcast(base, own))
                    continue
            across = {d for d in range(len(shape)) if varies(spread, d)}
            if varying - across and across - varying:
                self._numbers.block(own, "it is multiplied or added to channels along another axis")
                continue
            self._numbers.unify(base, spread)
            if bool((compact(base) == NONE).any()):
                a, b = narrowed(base, spread)
                base = torch.where(a == NONE, b, a).expand(shape)
        return base

    def _broadcast(self, base: Tensor, own: Tensor) -> str:
        """Why what is computed of `base` and of `own`, which is the same for several entries of it, cannot grow."""
        roots = self._numbers.tied(torch.cat([compact(each).flatten() for each in (base, own)]))
        if bool((roots == roots[0]).all()):  # as channels that are divided by their sum
            return "its channels depend on each other"
        return "it is multiplied or added to other channels by broadcasting"


def _rules(*kinds: tuple[Callable[[Propagation, Call], None], Iterable[str]]) -> dict[str, Callable]:
    return {name: rule for rule, names in kinds for name in names}


_RULES = _rules(
    (Propagation._move, operations.STRUCTURAL),
    (Propagation._write, operations.WRITING),
    (Propagation._resize, operations.RESIZING | operations.CUTTING),
    (Propagation._reduce, operations.REDUCING),
    (Propagation._scale, operations.NORMALIZING),
    (Propagation._normalize, operations.LAYER_NORMS),
    (Propagation._multiply, operations.PRODUCTS),
)
"""By name of an operation what is done; what is named nowhere may be computed entry by entry."""


def _same_leading(first: torch.Size, second: torch.Size) -> int:
    """How many leading axes (samples, channels) a pooling or an interpolation leaves alone."""
    count = min(2, len(first), len(second))
    return next((axis for axis in range(count) if first[axis] != second[axis]), count)
