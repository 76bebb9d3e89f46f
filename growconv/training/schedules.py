"""Learning rates as functions of the step, and the optimizers under conf/optimizer."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from growconv.errors import ConfigError

SCHEDULES = ("cosine", "trapezoid", "constant")


def lr_factor(name: str, step: int, total: int, warmup: float = 0.0, final: float = 0.0, decay: float = 0.3) -> float:
    """The learning rate at a step, as a factor on the top rate.

    Args:
        name: "cosine", "trapezoid" (constant, then falling linearly) or "constant".
        step: optimizer steps done, 0 to total - 1.
        total: optimizer steps of the run.
        warmup: share of the run in which the rate rises linearly.
        final: factor at the end (cosine, trapezoid).
        decay: share of the run in which the rate falls (trapezoid).
    """
    rising = warmup * total
    if step < rising:
        return (step + 1) / (rising + 1)
    if name == "constant":
        return 1.0
    if name == "trapezoid":
        falling = decay * total
        return 1.0 if total - step > falling else final + (1 - final) * (total - step) / (falling + 1)
    progress = (step - rising) / max(1.0, total - rising)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_lr_schedule(config: Mapping[str, Any], total: int) -> Callable[[int], float]:
    """The factor as a function of the step.

    Args:
        config: the group lr_schedule.
        total: optimizer steps of the run.

    Raises:
        ConfigError: an unknown name, or shares outside [0, 1].
    """
    name = config["name"]
    if name not in SCHEDULES:
        raise ConfigError(
            "there is no such schedule", where="lr_schedule.name", expected=", ".join(SCHEDULES), got=name
        )
    shares = {key: config[key] for key in ("warmup", "final", "decay")}
    for key, value in shares.items():
        if not 0 <= value <= 1:
            raise ConfigError("this is a share", where=f"lr_schedule.{key}", expected="0 to 1", got=value)
    return lambda step: lr_factor(name, step, total, **shares)


def make_optimizer(config: Mapping[str, Any], model: nn.Module) -> Optimizer:
    """The optimizer of a model, weights in one group, biases and norm layers without decay in another.

    Args:
        config: the group optimizer.
        model: the model.

    Raises:
        ConfigError: an unknown name or a number out of its range.
    """
    for key in ("lr", "weight_decay"):
        if not (math.isfinite(config[key]) and config[key] >= 0) or (key == "lr" and config[key] == 0):
            raise ConfigError("out of range", where=f"optimizer.{key}", expected="a positive number", got=config[key])
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
        return torch.optim.SGD(groups, lr=config["lr"], momentum=momentum, nesterov=nesterov)
    if config["name"] == "adamw":
        first, second = config["betas"]
        return torch.optim.AdamW(groups, lr=config["lr"], betas=(first, second), eps=config["eps"])
    raise ConfigError("there is no such optimizer", where="optimizer.name", expected="sgd or adamw", got=config["name"])
