"""Which attributes of a model's modules tell sizes that its code uses: split sizes, shapes of views, widths of heads.

The code of a module may keep a number of channels that no layer tells. Sizes that operations are given are held against
the attributes of the modules that are running; one that is equal, and counts entries of several channels, may have to
follow when there are more of them (`layout.SizeAttribute`).
"""

from collections.abc import Iterator, Sequence
from typing import TypeGuard

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from growconv.network import layers
from growconv.network.companions import Companions, along, several
from growconv.network.numbers import Literals, Numbers
from growconv.network.operations import VIEWS

SIZED = VIEWS | {"split_with_sizes", "split", "slice", "expand"}
"""Structural operations that are told sizes."""


class LiteralSizes:
    """Sizes that a model's code uses in one forward pass, held against the attributes of its modules.

    Args:
        numbers: what is found goes to its `literals`, `compared` and `cuts`.
        companions: those of the pass.
        running: path and module of all that is running, outermost first; none where attributes are not looked at.
    """

    def __init__(self, numbers: Numbers, companions: Companions, running: Sequence[tuple[str, nn.Module]]) -> None:
        self._numbers = numbers
        self._companions = companions
        self._running = running

    def counted(self, numbers: list[int]) -> None:
        """How many entries there are, by their numbers."""
        self._note([len(numbers)], [numbers])

    def length(self, companion: Tensor, axis: int) -> None:
        """The length of an axis, where it has several channels."""
        own = along(companion, axis)
        if several(own):
            self.counted(own)

    def told(self, name: str, args: tuple, whole: Tensor, results: Sequence[Tensor]) -> None:
        """The sizes that an operation was given.

        Args:
            whole: the companion of its first argument.
            results: what it gave.
        """
        if name in ("split_with_sizes", "split"):
            given = list(args[1]) if isinstance(args[1], list | tuple) else [int(args[1])]
            dim = args[2] if args[2:] else 0
            parts = [along(self._companions.of(each), dim % each.dim()) for each in results]
            if any(max(part, default=-1) >= 0 for part in parts):
                self._numbers.cuts += parts
                self._note(given, parts)
                self.counted(along(whole, dim % whole.dim()))  # what is told may be a part of it, as half
        elif name == "slice":
            dim = args[1] if args[1:] else 0
            start, end = (*args[2:4], None, None)[:2]
            own = along(whole, dim % whole.dim())
            if several(own):
                self._numbers.cuts.append(along(self._companions.of(results[0]), dim % whole.dim()))
            for edge in (start, end):
                if isinstance(edge, int) and 0 < edge < len(own) and max(own) >= 0:
                    self.counted(own[:edge])
        elif name in SIZED:
            for axis, size in enumerate(args[1] if isinstance(args[1], list | tuple) else ()):
                if isinstance(size, int) and size > 1:
                    self.length(self._companions.of(results[0]), axis)

    def sliced(self, tensor: Tensor, index: object) -> None:
        """The sizes that slices were told which take all there is: those are no operations."""
        items = index if isinstance(index, tuple) else (index,)
        if any(not (item is None or item is Ellipsis or type(item) in (int, slice)) for item in items):
            return
        axis, taken = 0, sum(isinstance(item, int | slice) for item in items)
        for item in items:
            axis += (tensor.dim() - taken) * (item is Ellipsis)
            if isinstance(item, slice) and item.stop == tensor.shape[axis]:
                self.length(self._companions.of(tensor), axis)
            axis += isinstance(item, int | slice)

    def given(self, arguments: object) -> None:
        """The sizes of what the innermost module is given, which its code may compare with its attributes."""
        for path, module in self._running[-1:]:
            kept = {value for value in vars(module).values() if type(value) is int}
            for tensor in tree_leaves(arguments) if kept else ():
                for axis, size in enumerate(tensor.shape) if isinstance(tensor, Tensor) else ():
                    own = along(self._companions.of(tensor), axis) if size in kept else []
                    if several(own):
                        _tells(path, module, [size], [own], self._numbers.compared)

    def _note(self, sizes: Sequence[int], parts: Sequence[list[int]]) -> None:
        """Sizes of parts, where attributes of the innermost module that has some tell them."""
        for level in self._levels():
            told = [_tells(*each, sizes, parts, self._numbers.literals) for each in level]  # all of them
            if any(told):
                return

    def _levels(self) -> Iterator[list[tuple[str, nn.Module]]]:
        """The modules that are running, from the innermost on, each by itself, then those right inside of it."""
        for each in reversed(self._running):
            yield [each]
        for outer, module in self._running[
            -1:
        ]:  # code may ask the modules inside, whose layers know their sizes anyway
            inside = [(f"{outer}.{name}".lstrip("."), child) for name, child in module.named_children()]
            yield [each for each in inside if not (layers.is_weighted(each[1]) or layers.is_norm(each[1]))]


def _tells(path: str, module: nn.Module, sizes: Sequence[int], parts: Sequence[list[int]], found: Literals) -> bool:
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
