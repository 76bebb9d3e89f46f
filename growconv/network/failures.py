"""What fails while numbers are sent through a model at other widths, and going on after it.

An operation that fails gives what it gave at the model's own widths, so that the rest of the model runs and shows what
else fails. Each failure tells which numbers its operation met, and by how much its sizes differ from those at the
model's own widths: so it is known whose channels the code's literal sizes belong to.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from traceback import walk_tb
from types import CodeType, FrameType

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from growconv.network import operations
from growconv.network.companions import SPOILT, Companions, numbers_in
from growconv.network.literals import SIZED

Place = tuple[str, str, int]
"""Of an operation: the path of the module that was running, the name, and how often that was met before."""


@dataclass
class Ran:
    """What ran: a layer or an operation.

    Attributes:
        name: path of the layer, or name of the operation.
        place: of an operation, where that was.
        sizes: the whole numbers that the operation was given.
        gave: what it returned, with what makes zeros of its shape for each tensor.
    """

    name: str
    place: Place = ("", "", 0)
    sizes: list[int] = field(default_factory=list)
    gave: object = None

    def keep(self, output: object) -> None:
        """Remember what it returned, without its values."""
        self.gave = tree_map(lambda leaf: _zeros_like(leaf) if isinstance(leaf, Tensor) else leaf, output)

    def again(self) -> object:
        """What it returned, as zeros."""
        return tree_map(lambda leaf: leaf() if isinstance(leaf, partial) else leaf, self.gave)


def _zeros_like(tensor: Tensor) -> partial[Tensor]:
    return partial(torch.zeros, tensor.shape, dtype=tensor.dtype, device=tensor.device)


@dataclass(frozen=True)
class Failure:
    """An error in the model's code.

    Attributes:
        error: what was raised.
        numbers: those that the failing operation met; none where the code itself raised the error.
        near: those that the code held which called the operation; of an error of its own also the last operation's.
        more: by how much sizes that it was given differ from those at other widths.
        fixed: whether it was told all sizes, and the same ones as there, so that it is taken to take no other width.
        where: the module whose operation failed, with those of its attributes that have a size which that was told.
    """

    error: Exception
    numbers: set[int] = field(default_factory=set)
    near: set[int] = field(default_factory=set)
    more: set[int] = field(default_factory=set)
    fixed: bool = False
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


class Failures:
    """The failures of one forward pass.

    Args:
        companions: those of the pass; what is made of a failed operation's result is SPOILT.
        before: what ran at other widths.
        running: path and module of all that is running, outermost first.
        root: code of the function that runs the model.

    Attributes:
        found: the failures that are no consequence of earlier ones.
        last: companions of the last operation's tensors.
    """

    def __init__(
        self, companions: Companions, before: Iterable[Ran], running: Sequence[tuple[str, nn.Module]], root: CodeType
    ) -> None:
        self.found: list[Failure] = []
        self.last: list[Tensor] = []
        self._companions = companions
        self._before: Mapping[Place, Ran] = {ran.place: ran for ran in before}
        self._running = running
        self._root = root

    def operation(self, error: Exception, ran: Ran, sources: Sequence[Tensor], written: Tensor | None) -> object:
        """What an operation that fails gave at other widths, or what it was to write to; else the error is raised."""
        met, known = numbers_in(map(self._companions.of, sources)), self._before.get(ran.place)
        spoilt, numbers = SPOILT in met, met - {SPOILT}
        if known is None:
            self._add(Failure(error, numbers, where=self._where(ran)))
            raise error
        if not spoilt:
            sizes = list(zip(ran.sizes, known.sizes, strict=False))
            told = ran.name in operations.TOLD_ALL_SIZES and -1 not in ran.sizes and ran.sizes == known.sizes
            more = {now - before for now, before in sizes if now != before}
            self._add(Failure(error, numbers, self._near(), more, told, where=self._where(ran)))
        output = known.again() if written is None else written
        self.spoil(tensor for tensor in tree_leaves(output) if isinstance(tensor, Tensor))
        return output

    def ended(self, error: Exception, model: nn.Module) -> LookFailed:
        """All failures, once an error has ended the run: of an operation, or of the code of a module itself."""
        if any(error is each.error for each in self.found):
            return LookFailed(self.found)
        near = self._around(error)
        if near or not self.found:
            self.found.append(Failure(error, near=near))
        return LookFailed(self.found, _raised_in(error, model))

    def spoil(self, tensors: Iterable[Tensor]) -> None:
        """Note that tensors come from an operation which failed."""
        for tensor in tensors:
            self._companions.put(tensor, torch.full((), SPOILT))

    def _add(self, failure: Failure) -> None:
        """Note an error, unless an earlier one may have caused it."""
        if not self.found or failure.numbers or failure.more:
            self.found.append(failure)

    def _around(self, error: Exception) -> set[int]:
        """The numbers of the last operation and of what the innermost function of the model's code holds."""
        own = [frame for frame, _ in walk_tb(error.__traceback__) if _is_own(frame)]
        met = numbers_in([*self.last, *self._held(own[-1:])])
        return set() if SPOILT in met else met

    def _near(self) -> set[int]:
        """The numbers that the function holds which called the operation."""
        frame = sys._getframe()
        while frame is not None and frame.f_code is not self._root and not _is_own(frame):
            frame = frame.f_back
        own = [frame] if frame is not None and _is_own(frame) else []  # nothing of who looks at the model
        return numbers_in(self._held(own)) - {SPOILT}

    def _held(self, frames: Sequence[FrameType]) -> list[Tensor]:
        """The companions of what functions of the model's code hold."""
        return self._companions.among(tree_leaves([dict(frame.f_locals) for frame in frames]))

    def _where(self, ran: Ran) -> str:
        path, module = self._running[-1]
        sizes = {size for size in ran.sizes if size > 1} if ran.name in SIZED else set()
        own = {name: value for name, value in vars(module).items() if name[0] != "_" and type(value) is int}
        told = [f"{name}={value}" for name, value in own.items() if value in sizes]
        return (path or type(module).__name__) + (f", where {', '.join(told)}" if told else "")


def _is_own(frame: FrameType) -> bool:
    """Whether it runs code of the model, not of torch or of this package."""
    return str(frame.f_globals["__name__"]).split(".")[0] not in ("torch", "growconv")


def _raised_in(error: Exception, model: nn.Module) -> str:
    """Path of the innermost module of a model whose own code an error came through."""
    paths, found = {id(module): path for path, module in model.named_modules()}, ""
    for frame, _ in walk_tb(error.__traceback__):
        if not frame.f_globals["__name__"].startswith("torch."):
            found = paths.get(id(frame.f_locals.get("self")), found)
    return found
