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


def compose(overrides: Sequence[str], hydra_too: bool = False) -> DictConfig:
    """A run's config from command-line overrides, without a run directory.

    Args:
        overrides: as on the command line, for example ["data=synthetic", "trainer.epochs=2"].
        hydra_too: keep Hydra's own settings, below hydra.

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
            return hydra_compose("config", list(overrides), return_hydra_config=hydra_too)
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


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ between two configs, but for those that may change on resume; one line each."""
    lines = []
    for key in [*stored, *(key for key in wanted if key not in stored)]:
        path = f"{prefix}{key}"
        if path in FREE_ON_RESUME:
            continue
        old, new = stored.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{path}.")
        elif old != new or (key in stored) != (key in wanted):
            lines.append(f"{path}: {old!r} -> {new!r}")
    return lines


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
    allowed = f"{length(stored)}:" if is_longer(stored, wanted) else None
    return [line for line in differences(stored, wanted) if allowed is None or not line.startswith(allowed)]


def stored_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config that was read from a run: complete, and every option of the type and within the limits of its schema.

    Args:
        config: what was read.
        where: the file that holds it, for the message.

    Returns:
        The same, with values of the schema's types.

    Raises:
        CheckpointError: names what is missing or does not fit.
    """
    groups = {entry.name: schema_of(entry.name, config.get(entry.name)) for entry in dataclass_fields(RunConfig)}
    missing = [name for name in groups if name not in config]
    for group, schema in groups.items():
        options = config.get(group)
        known = options if isinstance(options, Mapping) else {}
        names = [entry.name for entry in dataclass_fields(schema)] if schema is not None else []
        missing += [f"{group}.{name}" for name in names if name not in known]
    got = f"without {', '.join(missing)}"
    if not missing:
        try:
            return _typed(config, groups)
        except (ConfigError, TypeError, ValueError) as error:
            got = str(error)
    raise CheckpointError(
        "the run's config is incomplete or damaged, or was written by another version of growconv",
        where=where,
        got=got.replace("\n", "\n  "),
        fix="restore the file, or resume with the version that environment.json names",
    )


def _typed(config: Mapping[str, Any], groups: Mapping[str, type | None]) -> dict[str, Any]:
    for key, value in flatten(dict(config)):
        if "${" in str(value):
            raise ConfigError("this is a reference, which growconv never stores", where=key, got=value)
    merged: Any = OmegaConf.structured(RunConfig)
    for group, options in config.items():
        schema = groups.get(group)
        try:
            if schema is not None:
                merged[group] = OmegaConf.structured(schema)
            merged = OmegaConf.merge(merged, {group: options})
        except OmegaConfBaseException as error:
            raise ConfigError(str(error).splitlines()[0], where=str(error.full_key or group)) from error
    return plain(merged)


def locate(target: str, where: str) -> Any:
    """The class or function that a dotted path names.

    Args:
        target: for example "torch.nn.Sequential".
        where: the setting, for the message.

    Raises:
        ConfigError: there is none.
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


def call_target(target: Any, given: Mapping[str, Any], offered: Mapping[str, Any], where: str) -> Any:
    """Call a class or function with the arguments that were set, and with those on offer that it takes.

    Args:
        target: what to call.
        given: arguments that the user set; each must exist.
        offered: arguments passed only where the target has them.
        where: the setting, for the message.

    Raises:
        ConfigError: an argument that the target does not have or refuses, or one that it still lacks.
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
    arguments = {**{name: value for name, value in offered.items() if anything or name in known}, **given}
    lacking = [p.name for p in parameters if p.default is p.empty and p.name in known and p.name not in arguments]
    if lacking:
        raise ConfigError("arguments are missing", where=where, expected=", ".join(lacking), fix="set them in args")
    try:
        return target(**arguments)
    except TypeError as error:
        if not anything:
            raise
        raise ConfigError("it does not take these arguments", where=where, got=error) from error
