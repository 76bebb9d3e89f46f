"""Learning rates as functions of the step, and the optimizers under conf/optimizer."""

import inspect
import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from growconv.errors import ConfigError, did_you_mean
from growconv.linalg.optimizers import SGD, AdamW
from growconv.training.config import locate
from growconv.training.options import OWN_SCHEDULES

_UNSUITED = {
    "LBFGS": "an optimizer that needs nothing but gradients; LBFGS runs the model itself",
    "SparseAdam": "an optimizer of dense gradients",
    "ReduceLROnPlateau": "a schedule of the step alone; this one looks at a metric",
    **dict.fromkeys(("SequentialLR", "ChainedScheduler"), "a schedule of its own, not one of other schedules"),
    **dict.fromkeys(("LambdaLR", "MultiplicativeLR"), "a schedule of numbers; this one takes functions"),
}
"""Optimizers and schedules of torch that do not serve, with what would."""


def lr_factor(
    name: str,
    done: float | int,
    total: float | int,
    warmup: float = 0.0,
    final: float = 0.0,
    decay: float = 0.3,
    one: float | int = 1.0,
) -> float:
    """The learning rate of a step, as a factor on the top rate; for the shares of the run see `OwnScheduleConfig`.

    Args:
        name: "cosine", "trapezoid" (constant, then falling linearly) or "constant".
        done: optimizer steps or training FLOPs that lie behind, before the step.
        total: the whole run, in the same unit.
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


def make_lr_schedule(
    config: Mapping[str, Any], total: float | int, lr: float = 1.0, epoch_steps: int = 1
) -> Callable[[float | int, float | int], float]:
    """The factor on the rate `lr`, as a function of what is done of `total`, and of the size of the next step."""
    name = config["name"]
    if name not in OWN_SCHEDULES:
        return TorchSchedule(config, int(total), lr, epoch_steps if config["every"] == "epoch" else 1)
    shares = {key: config[key] for key in ("warmup", "final", "decay")}
    return lambda done, one: lr_factor(name, done, total, one=one, **shares)


MOST_TRIED = 1_000_000
"""Steps of one of torch's schedules that are gone through before a run, to see that it lasts."""


class TorchSchedule:
    """A schedule of torch.optim.lr_scheduler as a factor on the learning rate that it begins with.

    It steps an optimizer of its own that trains nothing, so that growth and resuming need not know of it.

    Args:
        total: optimizer steps of the run.
        period: optimizer steps of the run for each of the schedule's.

    Raises:
        ConfigError: there is no such schedule, it does not take these arguments, or it ends before the run.
    """

    def __init__(self, config: Mapping[str, Any], total: int, lr: float, period: int) -> None:
        self._config, self._lr, self._period = config, lr, period
        self._begin()
        try:
            self(min(total - 1, MOST_TRIED), 1)
        except ValueError as error:
            raise ConfigError("the schedule ends before the run", where="lr_schedule.args", got=error) from error

    def __call__(self, done: float | int, one: float | int) -> float:
        """The factor for the step after `done` others."""
        wanted = int(done) // self._period
        if wanted < self._reached:
            self._begin()
        while self._reached < wanted:
            self._optimizer.step()
            self._schedule.step()
            self._reached += 1
        return float(self._optimizer.param_groups[0]["lr"]) / self._lr

    def _begin(self) -> None:
        found = class_of(lr_scheduler, self._config["name"], LRScheduler, "lr_schedule.name")
        self._optimizer = SGD([nn.Parameter(torch.zeros(()))], lr=self._lr, momentum=0.9)
        self._schedule = _built(found, "lr_schedule.args", self._optimizer, **self._config["args"])
        self._reached = 0


def decay_begins(config: Mapping[str, Any]) -> float:
    """Where the group lr_schedule's rate begins to fall, as a share of the run; 1: it never does, or torch's does."""
    name = config["name"]
    return 1 - config["decay"] if name == "trapezoid" else config["warmup"] if name == "cosine" else 1.0


def make_optimizer(config: Mapping[str, Any], model: nn.Module) -> Optimizer:
    """The optimizer of the group optimizer: weights in one group, biases and norm layers without decay in another."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError("the model has no parameter to train", where=f"model={type(model).__name__}")
    name, decay = config["name"], config["weight_decay"]
    arguments = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.items()
        if key not in ("name", "weight_decay", "args")
    }
    if name == "sgd":
        kind, arguments["nesterov"] = SGD, config["nesterov"] and config["momentum"] > 0
    elif name == "adamw":
        kind = AdamW
    else:
        kind = class_of(torch.optim, name, Optimizer, "optimizer.name")
        arguments |= config["args"]
    decays = "weight_decay" in inspect.signature(kind).parameters
    if decay and not decays:
        raise ConfigError(f"{name} has no weight decay", where="optimizer.weight_decay", expected=0, got=decay)
    weights, others = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    groups = [
        {"params": members} | ({"weight_decay": rate} if decays else {})
        for members, rate in ((weights, decay), (others, 0.0))
        if members
    ]
    return _built(kind, "optimizer.args", groups, **arguments)


def class_of(module: ModuleType, name: str, kind: type, where: str) -> type[Any]:
    """A class of a kind that torch.optim or torch.optim.lr_scheduler offers; by its dotted path one of the user's own.

    A ConfigError about the option `where`, where there is none or it does not serve.
    """
    if "." in str(name):
        own = locate(name, where)
        if not inspect.isclass(own) or not issubclass(own, kind):
            expected = f"a subclass of {kind.__name__}"
            raise ConfigError("this class cannot be used here", where=where, got=name, expected=expected)
        if own is not getattr(module, own.__name__, None):
            return own
        name = own.__name__
    if name in _UNSUITED:
        raise ConfigError("this one cannot be used here", where=where, got=name, expected=_UNSUITED[name])
    found = {key: value for key, value in vars(module).items() if inspect.isclass(value) and issubclass(value, kind)}
    found = {key: value for key, value in found.items() if value is not kind and not key.startswith("_")}
    if name not in found:
        expected = ", ".join(sorted(found.keys() - _UNSUITED))
        fix = did_you_mean(name, found, f"{where}={{}}")
        raise ConfigError(f"{module.__name__} has no such class", where=where, expected=expected, got=name, fix=fix)
    return found[name]


def _built(kind: Callable[..., Any], where: str, *given: Any, **arguments: Any) -> Any:
    try:
        return kind(*given, **arguments)
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError) as error:
        expected = ", ".join(inspect.signature(kind).parameters)
        name = getattr(kind, "__name__", str(kind))
        raise ConfigError(f"{name} does not take this", where=where, expected=expected, got=error) from error
