"""Learning rates as functions of the step, and the optimizers under conf/optimizer."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from growconv.errors import ConfigError


class _WithoutDynamo(Optimizer):
    """Torch's optimizers import torch._dynamo at their first call, to keep torch.compile out of their own code.

    That import takes as long as torch itself. A run compiles at most its model, so the bare methods serve it as well.
    """

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class SGD(_WithoutDynamo, torch.optim.SGD):
    """torch.optim.SGD without the import of torch._dynamo."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class AdamW(_WithoutDynamo, torch.optim.AdamW):
    """torch.optim.AdamW without the import of torch._dynamo."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def lr_factor(
    name: str,
    done: float | int,
    total: float | int,
    warmup: float = 0.0,
    final: float = 0.0,
    decay: float = 0.3,
    one: float | int = 1.0,
) -> float:
    """The learning rate of a step, as a factor on the top rate.

    The run is measured in optimizer steps, or in training FLOPs.

    Args:
        name: "cosine", "trapezoid" (constant, then falling linearly) or "constant".
        done: how much of the run lies behind, before the step.
        total: the whole run.
        warmup: share of the run in which the rate rises linearly.
        final: factor at the end (cosine, trapezoid).
        decay: share of the run in which the rate falls (trapezoid).
        one: the step itself, in the same unit.
    """
    rising = warmup * total
    if done < rising:
        return (done + one) / (rising + one)
    if name == "constant":
        return 1.0
    if name == "trapezoid":
        falling = decay * total
        return 1.0 if total - done > falling else final + (1 - final) * max(0.0, total - done) / (falling + one)
    progress = (done - rising) / max(one, total - rising)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_lr_schedule(config: Mapping[str, Any], total: float | int) -> Callable[[float | int, float | int], float]:
    """The factor as a function of what is done, and of the size of the next step.

    Args:
        config: the group lr_schedule.
        total: optimizer steps or training FLOPs of the run.
    """
    name, shares = config["name"], {key: config[key] for key in ("warmup", "final", "decay")}
    return lambda done, one: lr_factor(name, done, total, one=one, **shares)


def decay_begins(config: Mapping[str, Any]) -> float:
    """Where the learning rate begins to fall, as a share of the run; 1 where it never does.

    Args:
        config: the group lr_schedule.
    """
    return {"constant": 1.0, "trapezoid": 1 - config["decay"], "cosine": config["warmup"]}[config["name"]]


def make_optimizer(config: Mapping[str, Any], model: nn.Module) -> Optimizer:
    """The optimizer of a model, weights in one group, biases and norm layers without decay in another.

    Args:
        config: the group optimizer.
        model: the model.

    Raises:
        ConfigError: the model has no parameter.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config["weight_decay"]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ConfigError("the model has no parameter to train", where=f"model={type(model).__name__}")
    if config["name"] == "sgd":
        momentum = config["momentum"]
        nesterov = config["nesterov"] and momentum > 0
        return SGD(groups, lr=config["lr"], momentum=momentum, nesterov=nesterov)
    first, second = config["betas"]
    return AdamW(groups, lr=config["lr"], betas=(first, second), eps=config["eps"])
