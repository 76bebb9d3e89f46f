"""Looking at a model without a trace: mode, buffers, gradients and random numbers are as before afterwards."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from growconv.network.optimizer import follow_ages


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model may be run, differentiated and switched; afterwards everything but its parameters is as before.

    Kept: train or eval mode of every module, the values of all buffers (running statistics of norm layers), every
    parameter's .grad and requires_grad, and the random number generators of Python, NumPy and torch (CPU and
    the model's GPUs).

    Args:
        model: the model to protect.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    gradients = {parameter: (parameter.grad, parameter.requires_grad) for parameter in model.parameters()}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (the user's data may draw from it)
    gpus = sorted({tensor.device.index for tensor in [*gradients, *buffers] if tensor.device.type == "cuda"})
    for parameter in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for parameter, (gradient, needed) in gradients.items():
            parameter.grad = gradient
            parameter.requires_grad_(needed)


@contextmanager
def all_or_nothing(model: nn.Module, optimizers: Iterable[Any], logs: Iterable[list]) -> Iterator[None]:
    """Surgery inside either happens as a whole, or an error leaves model and optimizers as they were.

    Args:
        model: the model that is operated on.
        optimizers: all optimizers that train it.
        logs: the lists of growths that sites keep.
    """
    optimizers = list(optimizers)
    modules = [
        (module, dict(module._parameters), dict(module._buffers), dict(module.__dict__)) for module in model.modules()
    ]
    tensors = [*model.parameters(), *model.buffers()]
    values = [(tensor, tensor.detach().clone(), tensor.grad) for tensor in tensors]
    groups = [(group, list(group["params"])) for each in optimizers for group in each.param_groups]
    states = [(each, {parameter: dict(state) for parameter, state in each.state.items()}) for each in optimizers]
    lengths = [(log, list(log)) for log in logs]
    try:
        yield
    except BaseException:
        for module, parameters, buffers, attributes in modules:
            for name, value in attributes.items():
                if isinstance(value, int | tuple | bool):
                    module.__dict__[name] = value
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value, gradient in values:
                tensor.copy_(value)
                tensor.grad = gradient
        for group, members in groups:
            group["params"][:] = members
        for each, state in states:
            each.state.clear()
            each.state.update(state)
        follow_ages(optimizers)
        for log, entries in lengths:
            log[:] = entries
        raise
