"""What a stored config may do without its reader's word: build growconv's and torch's own classes, reach no host.

A run directory may come from somebody else. Names in it are looked up in growconv and torch alone, so that no other
module is imported, and nothing is sent anywhere that the command line of now does not name.
"""

import importlib
import inspect
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import nn

from growconv.errors import ConfigError
from growconv.growth.decision import Policy
from growconv.reporting.records import flatten, is_below, read_yaml
from growconv.solvers.base import Solver

_OF_TORCH: dict[str, tuple[ModuleType, type]] = {
    "torch.nn": (torch.nn, nn.Module),
    "torch.optim": (torch.optim, torch.optim.Optimizer),
    "torch.optim.lr_scheduler": (torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler),
}
"""Modules of torch whose classes a stored config may name, and what these have to be."""

_NAMING_CLASSES = ("optimizer.name", "lr_schedule.name")
_LIBRARIES = "growconv.training.libraries"
_OF_LIBRARIES = ("timm", "torchvision", "transformers", "pytorchcv")
"""Builders of models among its functions."""


def is_known(name: str) -> bool:
    """Whether a dotted name is a class that growconv or torch.nn or torch.optim defines; imports nothing else."""
    module, _, last = name.rpartition(".")
    if last.startswith("_") or not all(part.isidentifier() for part in name.split(".")):
        return False
    if module in _OF_TORCH:
        home, kind = _OF_TORCH[module]
        return _is_kind(getattr(home, last, None), kind)
    if module.partition(".")[0] != "growconv":
        return False
    try:
        found = getattr(importlib.import_module(module), last, None)
    except ImportError:
        return False
    if inspect.isfunction(found):  # builders such as resnet20
        return module == found.__module__ and (
            module == "growconv.training.models" or (module == _LIBRARIES and last in _OF_LIBRARIES)
        )
    own = getattr(found, "__module__", "").startswith("growconv.")
    return own and _is_kind(found, (nn.Module, Policy, Solver))


def _is_kind(found: object, kind: type | tuple[type, ...]) -> bool:
    return inspect.isclass(found) and issubclass(found, kind)


def strange_names(tree: object) -> Iterator[tuple[str, str]]:
    """Every name in a config that would be imported and is not known, with the dotted key that it stands under.

    An option of another library's model that is a text, or asks for pretrained weights, counts as one: some name files
    of pickles, code on a hub, or hosts.
    """
    leaves = list(flatten(tree, lists=True))
    homes = [key for key, value in leaves if key.endswith("_target_") and str(value).startswith(f"{_LIBRARIES}.")]
    options = [f"{key.removesuffix('_target_')}{part}" for key in homes for part in ("options", "args")]
    for key, value in leaves:
        parts = key.split(".")
        named = "_target_" in parts or ("." in str(value) and (parts[-1] == "method" or key in _NAMING_CLASSES))
        asks = is_below(key, options) and (isinstance(value, str) or bool(value and "pretrained" in key))
        if asks or (named and not is_known(str(value))):
            yield key, str(value)


def require_trusted(
    config: Mapping[str, Any], file: Path, given: Mapping[str, Any], asked: Collection[str] = ()
) -> None:
    """Refuse a stored config that would run foreign code, or send anything to a host, without the user's word.

    Args:
        config: the stored config as it is about to be used.
        file: where it is stored.
        given: the config that the command line of now composes.
        asked: keys (or groups) that this command line sets.

    Raises:
        ConfigError: shows the line.
    """
    now = dict(flatten(given, lists=True))

    def repeated(key: str, value: object) -> bool:
        return is_below(key, asked) and key in now and str(now[key]) == str(value)

    for key, name in strange_names(config):
        if not repeated(key, name):
            fix = f"read that code; then say trust=true, or repeat the setting: {key}={name}"
            raise _strange(key, name, place(file, key), fix)
    logger = config.get("logger")
    if not isinstance(logger, Mapping) or not logger.get("wandb") or logger.get("mode") in ("offline", "disabled"):
        return
    for name in ("server", "mode"):
        key, value = f"logger.{name}", logger.get(name)
        if value is not None and not repeated(key, value):
            raise ConfigError(
                "This stored config sends your data and your wandb key to a host that this command line does not name.",
                where=place(file, key),
                got=f"{name}: {value}",
                fix=f"say trust=true, repeat it with {key}={value}, or send nothing with logger=none",
            )
    run = file.parent.parent if file.parent.name == ".hydra" else file.parent
    for settings in (run / "wandb" / "settings", run / ".wandb" / "settings"):
        if settings.exists():  # wandb reads it where the run directory is the working directory
            raise ConfigError(
                "This run directory contains settings for wandb, which may name another host.",
                where=str(settings),
                fix="delete the file, or say trust=true",
            )


def require_trusted_parts(config: Mapping[str, Any], file: Path, *parts: str) -> None:
    """Refuse groups of a checkpoint's config, such as the model's, where they are foreign code, by a ConfigError."""
    for key, name in strange_names({part: config[part] for part in parts}):
        fix = "read that code; then trust it: --trust, in Python load_run(run, trust=True)"
        raise _strange(key, name, f"{file}: {key}", fix)


def _strange(key: str, name: str, where: str, fix: str) -> ConfigError:
    return ConfigError(
        "This stored config runs code from outside growconv and torch, which you have not allowed.",
        where=where,
        expected="a model of growconv.training.models, a class of torch.nn or torch.optim, a policy or a method of "
        "growconv",
        got=f"{key.rpartition('.')[2]}: {name}",
        fix=fix,
    )


def require_trusted_file(file: Path, given: Collection[str]) -> None:
    """Refuse a config file that Hydra is about to read, as `require_trusted` does; but for keys given now."""
    if not file.is_file():
        return
    try:
        config = read_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        got = str(error).splitlines()[0]
        raise ConfigError("This is not a YAML file of settings.", where=str(file), got=got) from error
    if not isinstance(config, Mapping):
        return
    references = (key for key, value in flatten(config, lists=True) if isinstance(value, str) and "${" in value)
    for key in (*(key for key in ("hydra", "defaults") if key in config), *references):
        raise ConfigError(
            "Hydra would do more with this file than read settings, which you have not allowed.",
            where=place(file, key),
            fix="read the file; then say trust=true",
        )
    require_trusted(config, file, config, given)


def place(file: Path, key: str) -> str:
    """File, line and dotted key of a setting in a YAML file, as far as the file tells."""
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
        for part in key.split("."):
            if isinstance(node, yaml.SequenceNode):
                node = node.value[int(part)]
            elif isinstance(node, yaml.MappingNode):
                node = next(value for name, value in node.value if name.value == part)
    except (OSError, ValueError, IndexError, StopIteration, yaml.YAMLError):
        return f"{file}: {key}"
    return f"{file}: {key}" if node is None else f"{file}, line {node.start_mark.line + 1}: {key}"
