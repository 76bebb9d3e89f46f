"""Moving an optimizer's groups and state from replaced parameters to their successors."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from growconv.errors import ArgumentTypeError, SurgeryError
from growconv.network.bias_correction import BORN, births, follow_births

Resize = Callable[[Tensor, tuple[bool, ...]], Tensor]  # a tensor shaped like the parameter (some axes of length 1)


def as_optimizers(optimizer: Any) -> tuple[Any, ...]:
    """The optimizers given: none, one or several.

    Raises:
        ArgumentTypeError: for something without parameter groups and state.
    """
    if optimizer is None:
        return ()
    given = tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
    for each in given:
        if not hasattr(each, "param_groups") or not hasattr(each, "state"):
            raise ArgumentTypeError(
                "this is no optimizer",
                expected="a torch.optim.Optimizer, a sequence of them or None",
                got=type(each).__name__,
            )
    return given


def check_optimizers(optimizers: Sequence[Any], replaced: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Check that the optimizers own the parameters and that their state can follow.

    Args:
        optimizers: those that will be changed.
        replaced: path and Parameter of everything that will be replaced.

    Raises:
        SurgeryError: for a trainable parameter that no optimizer has, or state of a shape that cannot be enlarged.
    """
    if not optimizers:
        return
    owned = {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]}
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
            for name, value in _state(each, parameter).items():
                if _axes_like(value, parameter) is None:
                    raise SurgeryError(
                        f"the state {name} of {type(each).__name__} cannot be enlarged",
                        where=path,
                        expected=f"a number, or a tensor of the parameter's shape {tuple(parameter.shape)}",
                        got=f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__,
                        fix="grow with optimizer=None and build the optimizer again",
                    )


def migrate(optimizers: Sequence[Any], old: nn.Parameter, new: nn.Parameter, resize: Resize) -> None:
    """Put a new parameter in the place of an old one: same group, same position, state resized.

    New entries of the state are zero, and Adam corrects their bias by their own age (`bias_correction`).

    Args:
        optimizers: those that may hold the old parameter.
        old: the replaced parameter.
        new: its successor.
        resize: how a state tensor becomes one for the successor; told which axes it shares with the parameter.
    """
    for each in optimizers:
        betas = None
        for group in each.param_groups:
            if any(parameter is old for parameter in group["params"]):
                betas = group.get("betas")
                group["params"][:] = [new if parameter is old else parameter for parameter in group["params"]]
        state = _state(each, old)
        if state:
            moved = {}
            for name, value in state.items():
                axes = _axes_like(value, old)
                moved[name] = resize(value, axes) if isinstance(value, Tensor) and axes and any(axes) else value
            young = births(each.state[old], betas, old.shape, resize)
            each.state[new] = moved if young is None else {**moved, BORN: young}
            if young is not None:
                follow_births()
        if old in each.state:
            del each.state[old]


def mark_replaced(old: nn.Parameter, path: str) -> None:
    """Let a later step of an optimizer that still trains the old parameter fail instead of training an orphan."""
    global _guard
    old._replaced_by_growth = path  # pyright: ignore[reportAttributeAccessIssue]
    if _guard is None:
        _guard = register_optimizer_step_pre_hook(_refuse_orphans)


_guard: Any = None


def _refuse_orphans(optimizer: Any, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            path = getattr(parameter, "_replaced_by_growth", None)
            if path is not None:
                raise SurgeryError(
                    f"{type(optimizer).__name__} still trains a parameter that growth has replaced",
                    where=path,
                    fix="pass every optimizer of the model to grow (a list for several), or build this one again",
                )


def _state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Any]:
    return {name: value for name, value in optimizer.state.get(parameter, {}).items() if name != BORN}


def _axes_like(value: Any, parameter: Tensor) -> tuple[bool, ...] | None:
    """Which axes of a state tensor are those of the parameter; () for a number; None where it fits neither way."""
    if not isinstance(value, Tensor):
        return () if isinstance(value, (int, float, bool, type(None))) else None
    if value.dim() == parameter.dim() and value.dim() > 0:
        pairs = list(zip(value.shape, parameter.shape, strict=True))
        if all(mine in (theirs, 1) for mine, theirs in pairs):
            return tuple(mine == theirs for mine, theirs in pairs)
    return () if value.numel() == 1 else None


def keep_identity(old: nn.Parameter, data: Tensor, grad: Tensor | None) -> nn.Parameter:
    """A Parameter with new data that keeps the old one's requires_grad, hooks and attributes."""
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    for name, value in vars(old).items():
        setattr(new, name, value)
    if old._backward_hooks:
        new._backward_hooks = old._backward_hooks
    accumulated = getattr(old, "_post_accumulate_grad_hooks", None)
    if accumulated:
        new._post_accumulate_grad_hooks = accumulated  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        new.grad = grad
    return new
