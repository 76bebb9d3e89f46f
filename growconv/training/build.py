"""From a resolved config to the objects of a run: dataset, model, sites, optimizer, growth scheduler."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

import growconv.growth.scheduler as growing
from growconv.errors import ConfigError, GrowthError
from growconv.growth.widths import set_widths
from growconv.network.find import find_sites
from growconv.network.site import GrowthSite
from growconv.solvers.base import Solver, get_solver, refusal_of
from growconv.training.config import call_target, locate
from growconv.training.data import Dataset, load_data
from growconv.training.sources import CIFAR

Config = Mapping[str, Any]


def make_dataset(config: Config) -> Dataset:
    """The dataset of the group data, on the CPU."""
    return load_data(**{name: value for name, value in config.items() if name != "size"})


def data_shape(config: Config) -> tuple[int, int, int]:
    """Input channels, image size and classes (or output channels) of the group data's dataset, without reading it."""
    name = config["name"]
    if name == "synthetic":
        return config["channels"], config["image_size"], config["outputs"]
    if name == "images":
        return make_dataset(config).shape
    if name in CIFAR:
        return 3, 32, CIFAR[name].classes
    return 1, 8 if name == "digits" else 28, 10


def grows(config: Config) -> bool:
    """Whether the run of this config grows its model."""
    return config["growth"]["method"] != "none"


def make_model(config: Config, shape: tuple[int, int, int]) -> nn.Module:
    """The model as the run begins with it: the full one, or where it grows its small start.

    Args:
        shape: input channels, image size and classes.
    """
    model, growth = config["model"], config["growth"]
    grown = {"width": growth["start_width"], "hidden": growth["start"]} if grows(config) else {}
    offered = dict(zip(("in_channels", "image_size", "classes"), shape, strict=True))
    offered |= {name: model[name] * grown.get(name, 1) for name in ("width", "hidden")}
    offered |= {name: model[name] for name in ("norm", "activation", "name", "options") if name in model}
    target = locate(model["_target_"], "model._target_")
    built = call_target(target, model["args"], f"model.args of {model['_target_']}", offered)
    if not isinstance(built, nn.Module):
        expected = "torch.nn.Module"
        raise ConfigError("this does not build a model", where="model._target_", expected=expected, got=type(built))
    if model["widths"]:
        channels, image_size, _ = shape
        set_widths(built, find_sites(built, torch.zeros(2, channels, image_size, image_size)), model["widths"])
    return built


def make_loss(dataset: Dataset, label_smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean squared error for a regression, cross-entropy with label smoothing for classes."""
    if dataset.regression:
        return functional.mse_loss

    def cross_entropy(output: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(output, targets, label_smoothing=label_smoothing)

    return cross_entropy


def resized(images: Tensor, pixels: int | None) -> Tensor:
    """Images (n, channels, height, width) scaled to squares of so many pixels; None: as they are."""
    if pixels is None:
        return images
    return functional.interpolate(images, (pixels, pixels), mode="bilinear", antialias=True)


def check_output(model: nn.Module, dataset: Dataset, pixels: int | None = None) -> None:
    """Refuse a model whose output does not fit the dataset's targets, before any training, by a ConfigError.

    Args:
        pixels: side to which the images are scaled; None: as they are.
    """
    inputs, targets = dataset.batch(dataset.train, torch.arange(2))
    inputs, where = resized(inputs, pixels), type(model).__name__
    mode = model.training
    try:
        with torch.no_grad():
            output = model.eval()(inputs.to(next(model.parameters()).dtype))
    except RuntimeError as error:
        problem = "the model does not accept these inputs"
        raise ConfigError(problem, where=where, expected=tuple(inputs.shape), got=error) from error
    finally:
        model.train(mode)
    wanted = tuple(targets.shape) if dataset.regression else (len(targets), dataset.classes, *targets.shape[1:])
    if tuple(output.shape) != wanted:
        raise ConfigError(
            f"the model's output does not fit data={dataset.name}",
            where=where,
            expected=wanted,
            got=tuple(output.shape),
            fix="choose another model or dataset; models whose output is a map (unet, conv_pair) need data=synthetic",
        )


def choose_sites(config: Config, sites: Sequence[GrowthSite]) -> tuple[GrowthSite, ...]:
    """The sites that the run of a whole config grows, of all sites of its model; a ConfigError where none is left."""
    growth = config["growth"]
    patterns = growth["sites"]
    if patterns is None:
        patterns = ["*"] if growth["start_width"] < 1 else config["model"]["hidden_sites"]
    named = [site for site in sites if any(fnmatchcase(site.name, pattern) for pattern in patterns)]
    solver = _solver(growth)
    refusals = {site.name: refusal_of(solver, site) for site in named}
    chosen = tuple(site for site in named if refusals[site.name] is None)
    if not chosen:
        raise ConfigError(
            "no site is left that may grow" if named else "no site has such a name",
            where="growth.sites",
            expected="patterns of: " + "; ".join(site.name for site in sites),
            got="; ".join(f"{name}: {reason}" for name, reason in refusals.items()) or patterns,
            fix=f"see `growconv sites growth={growth['method']}` for names and reasons",
        )
    return chosen


def _solver(growth: Config) -> Solver:
    with _named("growth.method"):
        get_solver(growth["method"])
    with _named("growth.solver"):
        return get_solver(growth["method"], **growth["solver"])


def make_policy(node: Any, where: str) -> Any:
    """A policy of growconv.growth from {_target_: its dotted path, option: value, ...}, or a list of them.

    Options may be policies; anything else is passed on. A ConfigError names the setting `where`.
    """
    if isinstance(node, list | tuple):
        return [make_policy(entry, where) for entry in node]
    if not isinstance(node, Mapping):
        return node
    if not isinstance(node.get("_target_"), str):
        expected = "{_target_: growconv.growth.NAME, option: value}"
        raise ConfigError("This is not a policy.", where=where, expected=expected, got=node)
    options = {key: make_policy(value, where) for key, value in node.items() if key != "_target_"}
    target = locate(node["_target_"], f"{where}._target_")
    with _named(where):
        return call_target(target, options, f"{where} ({node['_target_']})")


@contextmanager
def _named(option: str) -> Iterator[None]:
    """A block whose errors name the option that was set, before the class that refused it."""
    try:
        yield
    except ConfigError:
        raise
    except GrowthError as error:
        where = f"{option} ({error.where})" if error.where else option
        raise ConfigError(error.problem, where=where, expected=error.expected, got=error.got, fix=error.fix) from error


def growth_flops(config: Config, total: float | int) -> list[float]:
    """The training FLOPs, of `total`, at which the rounds of the group growth come when they are spread evenly."""
    times, begin, end = config["times"], config["begin"], config["end"]
    return [total * (begin + (end - begin) * index / max(1, times - 1)) for index in range(times)]


def growth_steps(config: Config, total: int) -> list[int]:
    """The steps, of `total`, at which the rounds of the group growth come when they are spread evenly."""
    times = config["times"]
    first, last = (max(1, round(config[share] * total)) for share in ("begin", "end"))
    steps = sorted({first + round(index * (last - first) / max(1, times - 1)) for index in range(times)})
    if len(steps) < times:
        raise ConfigError(
            "the run is too short for this many growth rounds",
            where="growth.times",
            expected=f"at most {last - first + 1} rounds between step {first} and {last} of {total}",
            got=times,
            fix="train for more epochs, or grow less often",
        )
    return steps


def make_scheduler(
    config: Config, model: nn.Module, optimizer: Optimizer, example: Tensor, total: int
) -> growing.GrowthScheduler | None:
    """The growth scheduler of the run of a whole config; None where it does not grow.

    Args:
        example: inputs of a few samples.
        total: optimizer steps of the run, where `trainer.flops` does not end it.
    """
    if not grows(config):
        return None
    from growconv.growth.stop import Budget
    from growconv.growth.when import AtFlops, AtSteps

    growth, flops = config["growth"], config["trainer"]["flops"]
    when = make_policy(growth["when"], "growth.when")
    if when is None and growth["every"] is None:
        when = AtSteps(growth_steps(growth, total)) if flops is None else AtFlops(growth_flops(growth, flops))
    limits = growth["budget"]
    budget = Budget(**limits) if any(limit is not None for limit in limits.values()) else None
    fixed = {key: make_policy(growth[key], f"growth.{key}") for key in ("amount", "where", "stop")}
    fixed |= {key: growth[key] for key in ("every", "times", "amplitude")}
    fixed |= {"method": _solver(growth), "when": when, "budget": budget, "seed": config["seed"]}
    further = dict(growth["scheduler"])
    for key, value in further.items():
        if key in fixed:
            problem = "this setting has an option of its own"
            raise ConfigError(problem, where="growth.scheduler", got=key, expected=f"growth.{key}")
        if isinstance(value, Mapping) and "_target_" in value:
            further[key] = make_policy(value, f"growth.scheduler.{key}")
    sites = choose_sites(config, find_sites(model, example))
    given = {"model": model, "optimizer": optimizer, "sites": sites, **fixed, **further}
    return call_target(growing.GrowthScheduler, given, "growth.scheduler")
