"""A model as it is given: unwrapped, addressed by path, run on examples, and left as it was."""

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from growconv.errors import ArgumentTypeError, SurgeryError, TraceError

Arguments = tuple[tuple, dict[str, object]]
"""Positional and keyword arguments of a model's forward."""


def unwrapped(model: object) -> nn.Module:
    """The model itself; ArgumentTypeError for what is none, or a compiled or data-parallel wrapper around one."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("a model is needed", expected="torch.nn.Module", got=type(model).__name__)
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentTypeError(
            "a scripted model cannot be grown: its code is fixed",
            expected="the raw torch.nn.Module",
            got=type(model).__name__,
            fix="pass the module that was scripted, and script it again after growing",
        )
    inside = next((name for name in ("_orig_mod", "_forward_module") if name in model._modules), None)
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if inside is None and (isinstance(model, parallel) or type(model).__name__ == "FullyShardedDataParallel"):
        inside = "module"
    if inside is not None:
        name = "module" if inside == "_forward_module" else inside
        raise ArgumentTypeError(
            "a wrapped model cannot be grown: the wrapper keeps what it knows of the old shapes",
            expected="the raw torch.nn.Module",
            got=type(model).__name__,
            fix=f"pass model.{name}, and wrap it again after growing",
        )
    return model


def found_at(model: nn.Module, path: str) -> Tensor | nn.Module | None:
    """The module, parameter or buffer at a dotted path, the model itself for ""; None where there is none."""
    value: object = model
    for part in path.split(".") if path else ():
        inside = value._modules.get(part) if isinstance(value, nn.Module) else None
        value = getattr(value, part, None) if inside is None else inside
    return value if isinstance(value, Tensor | nn.Module) else None


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path, as `model.get_submodule` gives it, ten times as fast."""
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        module = module._modules.get(part) if module is not None else None
    return model.get_submodule(path) if module is None else module


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules with their paths, as `model.named_modules()` gives them, several times as fast."""
    found, met, waiting = list[tuple[str, nn.Module]](), set[nn.Module](), [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module not in met:
            met.add(module)
            found.append((path, module))
            ahead = f"{path}." if path else ""
            children = [(ahead + name, child) for name, child in module._modules.items() if child is not None]
            waiting += reversed(children)
    return found


def attribute(model: nn.Module, path: str) -> Tensor | nn.Module:
    """The module, parameter or buffer at a dotted path, the model itself for ""; AttributeError where there is none."""
    found = found_at(model, path)
    if found is None:
        raise AttributeError(f"{type(model).__name__} has no module, parameter or buffer {path}")
    return found


def tensor_at(model: nn.Module, path: str) -> Tensor:
    """A parameter or buffer of a model; SurgeryError where there is none."""
    found = found_at(model, path)
    if not isinstance(found, Tensor):
        raise SurgeryError("this parameter does not exist", where=path, fix="name parameters or buffers of the model")
    return found


def example_arguments(example_input: object) -> Arguments:
    """Arguments of the model's forward.

    Args:
        example_input: a tensor, a tuple or list of arguments, or a mapping of keyword arguments. A tuple whose last
            entry is a mapping after others gives both.

    Raises:
        ArgumentTypeError: for anything else.
    """
    if isinstance(example_input, Tensor):
        return (example_input,), {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, Sequence) and not isinstance(example_input, str):
        return tuple(example_input), {}
    raise ArgumentTypeError(
        "the example input must be what the model's forward takes",
        expected="a tensor, a tuple of arguments or a mapping of keyword arguments",
        got=type(example_input).__name__,
    )


def tensors_in(value: object) -> list[Tensor]:
    """All tensors of a nested input or output, in order; of an object those of its attributes."""
    return list(_tensors(value, set()))


def _tensors(value: object, met: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    parts: list[object] = []
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif not callable(value):  # as the outputs of some libraries' models, or distributions
        slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
        parts = [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]
    if parts and id(value) not in met:
        met.add(id(value))
        for part in parts:
            yield from _tensors(part, met)


_OWN = frozenset(vars(nn.Module())) - {"_buffers"}
"""What torch itself keeps on a module beside its buffers."""


@contextmanager
def one_run(model: nn.Module, arguments: Arguments) -> Iterator[Arguments]:
    """Inside, a copy of a model may be run once, on copies of its arguments; the next run finds what this one found.

    Put back afterwards: buffers and plain attributes of modules, their values and the lists and mappings among them, as
    the state of a recurrent layer, counters and moving averages.
    """
    kept, tensors, holders = [], [], []
    for _, module in named_modules(model):
        plain = {name: value for name, value in vars(module).items() if name not in _OWN}
        kept.append((module, plain))
        tensors += [value for value in (*module._buffers.values(), *plain.values()) if isinstance(value, Tensor)]
        holders += [(value, value.copy()) for value in plain.values() if type(value) in (dict, list, set)]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield tree_map(_fresh, arguments)
    finally:
        for module, plain in kept:
            for name in vars(module).keys() - plain.keys() - _OWN:
                del vars(module)[name]
            vars(module).update(plain)
        for holder, value in holders:
            holder.clear()
            (holder.extend if isinstance(holder, list) else holder.update)(value)
        _put_back(values)


def _fresh(value: object) -> object:
    """A copy of an argument that may be written to."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return copy.deepcopy(value) if tensors_in(value) else value


def _put_back(values: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in values:
            if tensor.shape != value.shape:
                tensor.resize_(value.shape)
            tensor.copy_(value)


def same_chance() -> None:
    """Let the generators of Python, NumPy and torch start from the same place, inside of `undisturbed`."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the model may draw from it, as from drop path)
    torch.default_generator.manual_seed(0)  # torch.manual_seed writes down the call stack for devices not in use
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(0)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model may be run, differentiated and switched; afterwards everything but its parameters is as before.

    Kept: train or eval mode of every module, the values of all buffers (running statistics of norm layers), every
    parameter's .grad and requires_grad, and the random number generators of Python, NumPy and torch (CPU and
    the model's GPUs).
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    leaves = [parameter for parameter in model.parameters() if parameter.is_leaf]  # copies of scripted ones are none
    gradients = {parameter: (parameter.grad, parameter.requires_grad) for parameter in leaves}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (the user's data may draw from it)
    gpus = sorted({each.device.index for each in (*gradients, *model.buffers()) if each.device.type == "cuda"})
    for parameter in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        _put_back(buffers)
        for parameter, (gradient, needed) in gradients.items():
            parameter.grad = gradient
            parameter.requires_grad_(needed)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _foreign(value: object) -> Iterator[object]:
    """What hangs on a module beside tensors, modules, numbers and names: hooks, trainers, loggers."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        for each in value:
            yield from _foreign(each)
    elif not isinstance(value, nn.Module | Tensor | int | float | complex | str | bytes | None):
        yield value


def copied(model: nn.Module, instead: Mapping[int, object] | None = None) -> nn.Module:
    """A copy of a model to work on; what cannot be copied of one that a trainer holds (trainer, hooks) is shared.

    `instead` says by `id` what the copy has in place of objects. TraceError where tensors cannot be copied.
    """
    try:
        return copy.deepcopy(model, dict(instead or {}))
    except Exception:
        shared = {id(each): each for module in model.modules() for each in _foreign(list(vars(module).values()))}
    try:
        return copy.deepcopy(model, shared | dict(instead or {}))
    except Exception as error:
        raise TraceError(
            f"the model cannot be copied to be looked at: {error}",
            where=type(model).__name__,
            fix="remove from the model what copy.deepcopy cannot copy, such as tensors that have a history",
        ) from error
