"""How a config is composed, checked, compared and read again, and what its dotted paths name."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from growconv.errors import CheckpointError, ConfigError, did_you_mean
from growconv.reporting.records import flatten
from growconv.training.checks import check_options, check_together, explain
from growconv.training.options import SCHEMAS, RunConfig, schema_of

PACKAGE = Path(__file__).resolve().parents[1]
# What may change when a run is resumed: nothing of it touches a number that the run computes.
FREE_ON_RESUME = ("resume", "logger", "trainer.progress", "trainer.checkpoint_every", "data.root", "data.download")


def register_schemas() -> None:
    """Make the schemas known to Hydra; safe to repeat."""
    store = ConfigStore.instance()
    for (group, name), schema in SCHEMAS.items():
        store.store(group=group, name=name, node=schema)


def conf_dir() -> Path:
    """The folder of YAML files: inside an installed package, or beside the package in a checkout."""
    for folder in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError("the configuration files are missing", where=str(PACKAGE / "conf"), fix="install growconv again")


def compose(overrides: Sequence[str]) -> DictConfig:
    """A run's config from command-line overrides such as "trainer.epochs=2", without a run directory.

    Raises:
        ConfigError: an override that does not fit, with what was probably meant.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        try:
            return hydra_compose("config", list(overrides))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise explain(error, overrides, GlobalHydra.instance().config_loader()) from error


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as nested dictionaries with every reference resolved; what config.yaml holds.

    Raises:
        ConfigError: an option that nothing reads, that needs a value, or whose value cannot be used.
    """
    check_options(config)
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # pyright: ignore[reportAssignmentType]
    check_together(values)
    return values


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Settings that differ between two configs, but for those that may change on resume; one line each."""
    old, new = dict(flatten(dict(stored))), dict(flatten(dict(wanted)))
    same = {key for key in old if key in new and old[key] == new[key]}
    free = {key for key in {**old, **new} if f"{key}.".startswith(tuple(f"{name}." for name in FREE_ON_RESUME))}
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in {**old, **new} if key not in same | free]


def length(config: Mapping[str, Any]) -> str:
    """The option that says when a run ends; the only one of a run that may grow."""
    return "trainer.epochs" if config["trainer"]["flops"] is None else "trainer.flops"


def is_longer(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a config asks for more of what ends a run than another."""
    name = length(stored).partition(".")[2]
    before, after = (config["trainer"][name] for config in (stored, wanted))
    numbers = all(isinstance(each, int | float) for each in (before, after))
    return length(wanted) == length(stored) and numbers and after > before


def changes(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The `differences` that a resumed run may not have: all but a greater length."""
    longer = is_longer(stored, wanted)
    return [line for line in differences(stored, wanted) if not (longer and line.startswith(f"{length(stored)}:"))]


def stored_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config that was read from a run's file, with values of the types that its schemas have.

    Raises:
        CheckpointError: an option is missing, unknown, of another type or outside its limits; names it.
    """
    groups = {entry.name: schema_of(entry.name, config.get(entry.name)) for entry in dataclass_fields(RunConfig)}
    missing = [name for name in groups if name not in config]
    typed: Any = OmegaConf.structured(RunConfig)
    for group, schema in groups.items():
        if schema is not None:
            options = config.get(group)
            known = options if isinstance(options, Mapping) else {}
            missing += [f"{group}.{entry.name}" for entry in dataclass_fields(schema) if entry.name not in known]
            typed[group] = OmegaConf.structured(schema)
    try:
        if missing:
            raise ValueError(f"without {', '.join(missing)}")
        for key, value in flatten(dict(config)):
            if "${" in str(value):
                raise ValueError(f"{key} is a reference, which growconv never stores: {value}")
        for group, options in config.items():
            typed = OmegaConf.merge(typed, {group: options})
        return plain(typed)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        place = f"{error.full_key or group}: " if isinstance(error, OmegaConfBaseException) else ""
        raise CheckpointError(
            "the run's config is incomplete or damaged, or was written by another version of growconv",
            where=where,
            got=place + str(error).partition("\n    full_key")[0].replace("\n", "\n  "),
            fix="restore the file, or resume with the version that environment.json names",
        ) from error


def locate(target: str, where: str) -> Any:
    """The class or function that a dotted path names, for example "torch.nn.Sequential".

    Raises:
        ConfigError: there is none; names the setting `where`.
    """
    module, _, name = target.rpartition(".")
    names: list[str] = []
    try:
        home = importlib.import_module(module)
        names = dir(home)
        found = getattr(home, name)
    except (ImportError, AttributeError, ValueError) as error:
        fix = did_you_mean(name, names, f"{module}.{{}}") or str(error)
        raise ConfigError(
            "this names no class or function", where=where, got=target, expected="package.module.Name", fix=fix
        ) from error
    if not callable(found):
        raise ConfigError("this cannot be called", where=where, got=target, expected="a class or function")
    return found


def call_target(target: Any, given: Mapping[str, Any], where: str, offered: Mapping[str, Any] | None = None) -> Any:
    """Call a class or function with the arguments that were set, and with those on offer that it takes.

    Raises:
        ConfigError: an argument that was set and that the target does not have or refuses, or one that it still lacks.
    """
    parameters = inspect.signature(target).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    unknown = [name for name in given if name not in known and not anything]
    if unknown:
        raise ConfigError(
            f"there is no option {unknown[0]!r}",
            where=where,
            expected=", ".join(known) or "none",
            got=", ".join(unknown),
            fix=did_you_mean(unknown[0], known, "'{}'"),
        )
    arguments = {name: value for name, value in (offered or {}).items() if anything or name in known} | dict(given)
    lacking = [p.name for p in parameters if p.default is p.empty and p.name in known and p.name not in arguments]
    if lacking:
        raise ConfigError("arguments are missing", where=where, expected=", ".join(lacking), fix="set them in args")
    try:
        return target(**arguments)
    except TypeError as error:
        if not anything:
            raise
        raise ConfigError("it does not take these arguments", where=where, got=error) from error
