"""Watching a model run: the calls of its layers, and the operations between them."""

import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from growconv.network import layers
from growconv.network.model import named_modules, tensors_in


class Watch(TorchDispatchMode):
    """Sees what a model runs inside a `with` block: only in this thread, and only hooks on this model.

    A layer with weights, a norm layer or a dropout is seen as one call, whatever it does inside; everything else as the
    aten operations that reach the dispatcher.

    Args:
        model: the model that will be called.

    Attributes:
        running: path and module of all that is running, outermost first; layers that are one call are not among them.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True imports torch._dynamo, for seconds

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.running: list[tuple[str, nn.Module]] = [("", model)]
        self._given: list[Tensor | None] = []  # what the layers that are running were given
        self._paths: dict[nn.Module, str] = {}
        self._hooks: list[RemovableHandle] = []
        self._thread = threading.get_ident()

    def _is_one_call(self, module: nn.Module) -> bool:
        return layers.is_weighted(module) or layers.is_norm(module) or layers.is_plain_dropout(module)

    def _started(self, module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        """A module that is no layer is about to run."""

    @abstractmethod
    def _called(self, path: str, module: nn.Module, given: Tensor, output: object) -> None:
        """A layer was called."""

    @abstractmethod
    def _operated(self, func: OpOverload, args: tuple, kwargs: dict[str, object]) -> object:
        """Run an operation between the layers."""

    def __enter__(self) -> "Watch":
        """Put hooks on every module and start to watch."""
        for path, module in named_modules(self.model):
            if isinstance(module, torch.jit.ScriptModule):
                continue  # those take no hooks, and hide what is inside
            self._paths[module], enter, leave = path, self._pushed, self._popped
            if self._is_one_call(module):
                enter, leave = self._entered, self._left
            elif not path:
                continue
            self._hooks.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(leave, always_call=True))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching, and take the hooks off."""
        super().__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        """Run an operation."""
        kwargs = dict(kwargs or {})
        return func(*args, **kwargs) if self._given else self._operated(func, args, kwargs)

    def _foreign(self) -> bool:
        return threading.get_ident() != self._thread

    def _pushed(self, module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        if not self._foreign():
            self.running.append((self._paths[module], module))
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():  # this is not watched
                self._started(module, args, kwargs)

    def _popped(self, *_: object) -> None:
        if not self._foreign() and len(self.running) > 1:
            self.running.pop()

    def _entered(self, _module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        if not self._foreign():
            self._given.append(next(iter(tensors_in([args, kwargs])), None))

    def _left(self, module: nn.Module, _args: tuple, output: object) -> None:
        if self._foreign() or not self._given:
            return
        given = self._given.pop()
        if not self._given and given is not None and output is not None:  # None: it raised an error
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                self._called(self._paths[module], module, given, output)
