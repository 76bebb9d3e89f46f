"""Learning rates as functions of the step, and the optimizers under conf/optimizer."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from growconv.errors import ConfigError
from growconv.linalg.optimizers import SGD, AdamW


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
