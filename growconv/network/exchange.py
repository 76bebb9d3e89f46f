"""New tensors and modules in the place of old ones, and back again: surgery happens as a whole or not at all."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode

from growconv.network import layers
from growconv.network.optimizer import follow_ages, keep_identity, migrate
from growconv.network.plan import Change


class Journal:
    """What a model and its optimizers are made of, so that it can be put back.

    Remembered are the modules with their parameters, buffers and attributes, every parameter's .grad and attributes,
    and the optimizers with groups, state and hooks. No tensor is copied but those named.

    Args:
        model: the model.
        optimizers: all optimizers that train it.
        values: tensors whose values may be overwritten.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer] = (), values: Iterable[Tensor] = ()) -> None:
        self._mappings: list[tuple[dict, dict]] = []
        self._lists: list[tuple[list, list]] = []
        for module in model.modules():
            inside = [value for value in vars(module).values() if isinstance(value, dict)]  # hooks among them
            self._mappings += [(mapping, dict(mapping)) for mapping in (vars(module), *inside)]
        for optimizer in optimizers:
            self._remember(optimizer)
        parameters = list(model.parameters())
        self._mappings += [(vars(each), dict(vars(each))) for each in parameters]
        self._gradients = [(each, each.grad, each.requires_grad) for each in parameters]
        self._values = [(tensor, tensor.detach().clone()) for tensor in values]
        self._grad_mode = torch.is_grad_enabled()
        self._dispatch_modes = len(_get_current_dispatch_mode_stack())

    def _remember(self, optimizer: Optimizer) -> None:
        attributes = vars(optimizer)
        inside = [value for value in attributes.values() if isinstance(value, dict)]
        inside += [state for state in optimizer.state.values() if isinstance(state, dict)]
        self._mappings += [(mapping, dict(mapping)) for mapping in (attributes, *inside, *optimizer.param_groups)]
        lists = (optimizer.param_groups, *(group["params"] for group in optimizer.param_groups))
        self._lists += [(each, list(each)) for each in lists]

    def restore(self) -> None:
        """Put everything back. Doing it twice does no harm."""
        while len(_get_current_dispatch_mode_stack()) > self._dispatch_modes:  # an interrupt amid the end of a `with`
            _pop_mode()
        for mapping, saved in self._mappings:
            mapping.update(saved)
            if [id(key) for key in mapping] != [id(key) for key in saved]:  # more than before, or in another order
                mapping.clear()
                mapping.update(saved)
        for entries, saved_entries in self._lists:
            entries[:] = saved_entries
        for parameter, gradient, needed in self._gradients:
            parameter.requires_grad_(needed)
            parameter.grad = gradient
        for tensor, value in self._values:
            tensor.detach().copy_(value)
        torch.set_grad_enabled(self._grad_mode)  # an interrupt may come where a `with torch.no_grad()` ends


def exchange(
    model: nn.Module,
    changes: Sequence[Change],
    attributes: Mapping[tuple[str, str], object],
    optimizers: Sequence[Optimizer],
) -> None:
    """Carry out validated changes: all new tensors are built first, then put in place.

    Args:
        model: the model.
        changes: of its tensors.
        attributes: per module path and name the value to set.
        optimizers: their groups and state follow.
    """
    places: dict[int, list[tuple[dict, str]]] = {}
    for module in model.modules():
        for registered in (module._parameters, module._buffers):
            for name, value in registered.items():
                places.setdefault(id(value), []).append((registered, name))
    built = [(change, _successor(change)) for change in changes if change.resizes]
    for change, new in built:
        for registered, name in places[id(change.tensor)]:
            registered[name] = new
        if isinstance(change.tensor, nn.Parameter) and isinstance(new, nn.Parameter):
            migrate(optimizers, change.tensor, new, change)
    follow_ages(optimizers)
    for change in changes:
        if change.revised is not None and not change.resizes:
            change.tensor.detach().copy_(change.revised)
    for (path, name), value in attributes.items():
        setattr(model.get_submodule(path), name, value)


def refresh(model: nn.Module) -> None:
    """Let layers derive anew what they keep beside their stored tensors, once all of those have been exchanged."""
    for module in model.modules():
        if module._forward_pre_hooks and layers.is_weighted(module):
            layers.adapter(module).refresh()


def _successor(change: Change) -> Tensor:
    """The tensor of the new shape that takes a tensor's place."""
    old = change.tensor
    data = change.resized(old.detach() if change.revised is None else change.revised.to(old.detach()))
    grad = None if old.grad is None else change.resized(old.grad.detach(), fill=False)
    return keep_identity(old, data, grad) if isinstance(old, nn.Parameter) else data


def overwritten(changes: Sequence[Change]) -> list[Tensor]:
    """The tensors whose values `exchange` overwrites in place."""
    return [change.tensor for change in changes if not change.resizes]
