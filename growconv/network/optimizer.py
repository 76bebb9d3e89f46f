"""Moving an optimizer's groups and state from replaced parameters to their successors.

State of old entries stays as it is. State of new entries is what a new optimizer would begin with, and `entry_ages`
sees to it that they train as under one. An optimizer that growconv is never told about goes on holding the replaced
parameters; they get no gradients any more, so that its steps do nothing to them. torch keeps no list of optimizers, so
this cannot be noticed: pass all of them (a list for several), or build them after growth.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode

from growconv.errors import ArgumentTypeError, SurgeryError
from growconv.network import layers
from growconv.network.entry_ages import AGES, ages_after, follow_ages
from growconv.network.tensors import Change


def as_optimizers(optimizer: object) -> tuple[Optimizer, ...]:
    """The optimizers given, none, one or several; ArgumentTypeError for something without groups and state."""
    if optimizer is None:
        return ()
    given = tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
    for each in given:
        if not hasattr(each, "param_groups") or not hasattr(each, "state"):
            expected, got = "a torch.optim.Optimizer, a sequence of them or None", type(each).__name__
            raise ArgumentTypeError("this is no optimizer", expected=expected, got=got)
    return cast(tuple[Optimizer, ...], given)


def check_optimizers(optimizers: Sequence[Optimizer], replaced: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Check that the optimizers own the parameters that will be replaced, and that their state can follow.

    Raises:
        SurgeryError: for a trainable parameter that no optimizer has, or state of a shape that cannot be enlarged.
    """
    if not optimizers:
        return
    owned = owned_by(optimizers)
    for path, parameter in replaced:
        if parameter.requires_grad and id(parameter) not in owned:
            raise SurgeryError(
                "the optimizer does not own this parameter",
                where=path,
                expected="an optimizer over the model's trainable parameters",
                got=f"{type(optimizers[0]).__name__} without it",
                fix="pass the optimizer (or a list of all) that trains the model; optimizer=None if none exists yet",
            )
        for each in optimizers:
            if isinstance(each, torch.optim.LBFGS) and each.state and _groups(each, parameter):
                raise SurgeryError(
                    "the state d of LBFGS cannot be enlarged: it is one flat history of all parameters",
                    where=path,
                    expected="an optimizer with state of its own for every parameter",
                    got="LBFGS after its first step",
                    fix="grow with optimizer=None and build the LBFGS again; its history would not fit anyway",
                )
            for name, value in each.state.get(parameter, {}).items():
                if name != AGES and _axes_like(value, parameter) is None:
                    raise SurgeryError(
                        f"the state {name} of {type(each).__name__} cannot be enlarged",
                        where=path,
                        expected=f"a number, or a tensor of the parameter's shape {tuple(parameter.shape)}",
                        got=f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__,
                        fix="grow with optimizer=None and build the optimizer again",
                    )


def owned_by(optimizers: Iterable[Optimizer]) -> set[int]:
    """The identities of all parameters that optimizers train."""
    return {id(each) for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]}


def migrate(optimizers: Sequence[Any], old: nn.Parameter, new: nn.Parameter, change: Change) -> None:
    """Put a new parameter in the place of an old one: same group, same position, state resized.

    New entries of the state begin as in a new optimizer; in one that growconv does not know, tensors begin at zero and
    numbers stay. Call `follow_ages` when all parameters have been moved.
    """
    for each in optimizers:
        groups = _groups(each, old)
        for group in groups:
            for index, parameter in enumerate(group["params"]):
                if parameter is old:
                    group["params"][index] = new
        state = each.state.pop(old, None)
        if not state:
            continue
        moved: dict[str, Any] = {}
        for name, value in state.items():
            axes = _axes_like(value, old) if name != AGES else None
            if isinstance(value, Tensor) and axes and any(axes):
                moved[name] = change.resized(value, fill=False, axes=axes)
                begins = _begins_as(each, groups[0] if groups else {}, name, new)
                if begins is not None:
                    is_new = change.resized(torch.ones_like(value), fill=False, axes=axes) == 0
                    moved[name] = torch.where(is_new, begins, moved[name])
            elif name != AGES:
                moved[name] = value
        ages = ages_after(each, groups[0], state, change) if groups else None
        each.state[new] = moved if ages is None else {**moved, AGES: ages}


def add_parameters(
    optimizers: Sequence[Any], like: nn.Parameter, new: Iterable[nn.Parameter], where: str | None = None
) -> None:
    """Let new parameters, which have no state yet, join the groups that a parameter is in; with none, check only.

    Raises:
        SurgeryError: when no optimizer owns `like`, which lies at `where`.
    """
    groups = [group for each in optimizers for group in _groups(each, like)]
    if optimizers and not groups:
        raise SurgeryError(
            "the optimizer does not own this layer's weight, so that new parameters have no group to join",
            where=where,
            fix="pass the optimizer that trains the layer, or optimizer=None",
        )
    added = list(new)
    for group in groups:
        group["params"].extend(added)
        if "param_names" in group:
            start = len(group["param_names"])
            group["param_names"].extend(f"added.{start + index}" for index in range(len(added)))


def replace_parameters(
    optimizers: Sequence[Any], removed: Sequence[tuple[str, nn.Parameter]], added: Iterable[nn.Parameter]
) -> None:
    """Drop parameters and their state; what comes takes the place of the first, but for what is there already."""
    gone = {id(parameter) for _, parameter in removed}
    added = list(added)
    for each in optimizers:
        known = owned_by([each])
        more = [parameter for parameter in added if id(parameter) not in known]
        for group in each.param_groups:
            members: list[nn.Parameter] = group["params"]
            names: list[Any] = group.get("param_names") or [None] * len(members)
            at = next((index for index, parameter in enumerate(members) if id(parameter) in gone), None)
            if at is None:
                continue
            kept = [(member, name) for member, name in zip(members, names, strict=True) if id(member) not in gone]
            kept[at:at] = [(parameter, f"added.{at + index}") for index, parameter in enumerate(more)]
            members[:] = [member for member, _ in kept]
            if "param_names" in group:
                group["param_names"][:] = [name for _, name in kept]
            more = []
        for _, parameter in removed:
            each.state.pop(parameter, None)


def _groups(optimizer: Optimizer, parameter: nn.Parameter) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if id(parameter) in map(id, group["params"])]


def _axes_like(value: object, parameter: Tensor) -> tuple[bool, ...] | None:
    """Which axes of a state tensor are those of the parameter; () for a number; None where it fits neither way."""
    if not isinstance(value, Tensor):
        return () if isinstance(value, (int, float, bool, type(None))) else None
    if value.dim() == parameter.dim() and value.dim() > 0:
        pairs = list(zip(value.shape, parameter.shape, strict=True))
        if all(mine in (theirs, 1) for mine, theirs in pairs):
            return tuple(mine == theirs for mine, theirs in pairs)
    return () if value.numel() == 1 else None


def _begins_as(optimizer: Optimizer, group: dict[str, Any], name: str, parameter: nn.Parameter) -> Tensor | None:
    """What a state tensor of a new optimizer begins with, as a tensor that broadcasts to it; None for zeros."""
    if isinstance(optimizer, torch.optim.Rprop) and name == "step_size":
        return torch.full_like(parameter, float(group["lr"]))
    if isinstance(optimizer, torch.optim.Adagrad) and name == "sum":
        return torch.full_like(parameter, group["initial_accumulator_value"])
    if isinstance(optimizer, torch.optim.ASGD) and name == "ax":
        return parameter.detach()
    return None


class Journal:
    """What a model and its optimizers are made of, so that it can be put back.

    Remembered are the modules with their parameters, buffers and attributes, every parameter's .grad and attributes,
    and the optimizers with groups, state and hooks. No tensor is copied but those named.

    Args:
        optimizers: all optimizers that train it.
        values: tensors whose values may be overwritten.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer] = (), values: Iterable[Tensor] = ()) -> None:
        optimizers, parameters = list(optimizers), list(model.parameters())
        mappings: list[dict] = []
        lists: list[list] = []
        for owner in (*model.modules(), *optimizers):
            attributes = vars(owner)
            mappings += [attributes, *(value for value in attributes.values() if isinstance(value, dict))]  # with hooks
        for optimizer in optimizers:
            mappings += [state for state in optimizer.state.values() if isinstance(state, dict)]
            mappings += optimizer.param_groups
            lists += [optimizer.param_groups, *(group["params"] for group in optimizer.param_groups)]
        self._mappings = [(each, dict(each)) for each in (*mappings, *map(vars, parameters))]
        self._lists = [(each, list(each)) for each in lists]
        self._gradients = [(each, each.grad, each.requires_grad) for each in parameters]
        self._values: list[tuple[Tensor, Tensor]] = []
        self.keep(values)
        self._grad_mode = torch.is_grad_enabled()
        self._dispatch_modes = len(_get_current_dispatch_mode_stack())

    def keep(self, values: Iterable[Tensor]) -> None:
        """Remember the values of tensors, as they are now."""
        self._values += [(tensor, tensor.detach().clone()) for tensor in values]

    def restore(self) -> None:
        """Put everything back. Doing it twice does no harm."""
        while len(_get_current_dispatch_mode_stack()) > self._dispatch_modes:  # an interrupt amid the end of a `with`
            _pop_mode()
        for mapping, saved in self._mappings:
            mapping.update(saved)
            if list(map(id, mapping)) != list(map(id, saved)):  # more than before, or in another order
                mapping.clear()
                mapping.update(saved)
        for entries, saved_entries in self._lists:
            entries[:] = saved_entries
        for parameter, gradient, needed in self._gradients:
            parameter.requires_grad_(needed)
            parameter.grad = gradient
        for tensor, value in reversed(self._values):
            tensor.detach().copy_(value)
        torch.set_grad_enabled(self._grad_mode)  # an interrupt may come where a `with torch.no_grad()` ends


def exchange(
    model: nn.Module,
    changes: Sequence[Change],
    attributes: Mapping[tuple[str, str], object],
    optimizers: Sequence[Optimizer],
) -> None:
    """Carry out validated changes: all new tensors are built first, then put in place; optimizers follow.

    Args:
        attributes: per module path and name the value to set.
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
    """The tensor of the new shape that takes a tensor's place; a Parameter keeps its hooks and attributes."""
    old = change.tensor
    data = change.resized(old.detach() if change.revised is None else change.revised.to(old.detach()))
    if not isinstance(old, nn.Parameter):
        return data
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    for name, value in vars(old).items():
        setattr(new, name, value)
    if old._backward_hooks:
        new._backward_hooks = old._backward_hooks
    accumulated = getattr(old, "_post_accumulate_grad_hooks", None)
    if accumulated:
        new._post_accumulate_grad_hooks = accumulated  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        new.grad = None if old.grad is None else change.resized(old.grad.detach(), fill=False)
    return new
