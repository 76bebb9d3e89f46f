"""How a config is composed, checked, compared and read again; what is said of a command line that does not fit.

Nothing here needs torch: a mistake is answered before anything heavy is loaded.
"""

import copy
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from growconv.errors import CheckpointError, ConfigError, did_you_mean, near
from growconv.reporting.records import flatten, is_below
from growconv.training.options import OWN_SCHEDULES, SCHEMAS, RunConfig, schema_of

PACKAGE = Path(__file__).resolve().parents[1]
# What may change when a run is resumed: nothing of it touches a number that the run computes.
FREE_ON_RESUME = ("resume", "logger", "trainer.progress", "trainer.checkpoint_every", "data.root", "data.download")


@cache
def register_schemas() -> None:
    """Make the schemas known to Hydra, once for the process; safe to repeat."""
    store = ConfigStore.instance()
    for (group, name), schema in SCHEMAS.items():
        store.store(group=group, name=name, node=schema)


def conf_dir() -> Path:
    """The folder of YAML files: inside an installed package, or beside the package in a checkout."""
    for folder in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError("the configuration files are missing", where=str(PACKAGE / "conf"), fix="install growconv again")


@contextmanager
def composed(overrides: Sequence[str]) -> Iterator[DictConfig]:
    """A run's config from overrides such as "trainer.epochs=2", with Hydra's own part; inside, Hydra is at work.

    Raises:
        ConfigError: what does not fit, `explain`ed.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir()), job_name="growconv"):
        try:
            config = hydra_compose("config", list(overrides), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise explain(error, overrides, GlobalHydra.instance().config_loader()) from error
        yield config


def compose(overrides: Sequence[str]) -> DictConfig:
    """The same without Hydra's part, so that there is no run directory."""
    with composed(overrides) as config:
        return without_hydra(config)


def without_hydra(config: DictConfig) -> DictConfig:
    """A copy of a config without Hydra's part."""
    config = copy.copy(config)
    with open_dict(config):
        del config["hydra"]
    return config


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as nested dictionaries with every reference resolved, checked; what config.yaml holds."""
    check_options(config)
    values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # pyright: ignore[reportAssignmentType]
    check_together(values)
    return values


def check_options(node: DictConfig, prefix: str = "") -> None:
    """Refuse options that nothing reads, that are missing or outside their limits, by a ConfigError that names one.

    Hydra's + adds any key; only the open mappings (args, solver, ...) may have keys of their own.
    """
    schema = OmegaConf.get_type(node)
    known = {entry.name: entry for entry in dataclass_fields(schema)} if is_dataclass(schema) else None
    for name in map(str, node):
        path = f"{prefix}{name}"
        if known is not None and name not in known:
            raise _no_option(path, known)
        if OmegaConf.is_missing(node, name):
            raise ConfigError("this option needs a value", where=path, fix=f"set it: {path}=...")
        got = node[name]
        if isinstance(got, DictConfig):
            check_options(got, f"{path}.")
        limits = known[name].metadata.get("limits") if known is not None else None
        if limits is not None and not limits.allow(got):
            fix = did_you_mean(got, limits.choices, f"{path}={{}}") if isinstance(got, str) else None
            raise ConfigError("this value cannot be used", where=path, expected=limits, got=got, fix=fix)


def check_together(config: Mapping[str, Any]) -> None:
    """Refuse options of a whole config that contradict each other, by a ConfigError that names them."""
    growth, trainer, schedule = config["growth"], config["trainer"], config["lr_schedule"]["name"]
    grows = growth["method"] != "none"
    spread = grows and growth["every"] is None and growth["when"] is None
    if spread and growth["begin"] > growth["end"]:
        got = f"{growth['begin']} and {growth['end']}"
        where = "growth.begin, growth.end"
        raise ConfigError("growth begins after it ends", where=where, expected="begin up to end", got=got)
    if spread and growth["times"] is None:
        raise ConfigError("growing needs a number of rounds", where="growth.times", expected="1 or more", got="null")
    sizes, depth = config["data"]["size"], growth["depth"]["at"]
    fits = all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, int | float) for x in pair) for pair in sizes
    )
    shares = [pair[0] for pair in sizes] if fits else []
    if not fits or shares != sorted(set(shares)) or any(not 0 < share <= 1 or side < 1 for share, side in sizes):
        problem = "image sizes are [share of the run, pixels] pairs, ascending"
        raise ConfigError(problem, where="data.size", expected="for example [[0.25, 14]]", got=sizes)
    if depth != sorted(set(depth)) or not all(0 < share < 1 for share in depth):
        problem = "depth must grow at shares of the run"
        raise ConfigError(problem, where="growth.depth.at", expected="for example [0.4]", got=depth)
    if config["baselines"] and not grows:
        fix = "choose a growth, or leave baselines out"
        raise ConfigError("a fixed run cannot have baselines", where="baselines", got=config["baselines"], fix=fix)
    if schedule not in OWN_SCHEDULES and trainer["flops"] is not None:
        raise ConfigError(
            "torch's schedules count steps, and a run limited by FLOPs does not know how many it will have",
            where="lr_schedule",
            got=f"lr_schedule.name={schedule}, trainer.flops={trainer['flops']:g}",
            fix=f"choose one of {', '.join(OWN_SCHEDULES)}, or set trainer.epochs instead of trainer.flops",
        )
    if trainer["sync_batchnorm"] and trainer["accelerator"] == "cpu":
        raise no_sync_batchnorm("cpu")


def no_sync_batchnorm(accelerator: str) -> ConfigError:
    """The error of SyncBatchNorm away from CUDA."""
    return ConfigError(
        "SyncBatchNorm exists on CUDA only",
        where="trainer.sync_batchnorm",
        got=f"trainer.accelerator={accelerator}",
        fix="leave it false, or use model.norm=group, which does not depend on the batch",
    )


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Settings that differ between two configs, but for those that may change on resume; one line each."""
    old, new = dict(flatten(dict(stored))), dict(flatten(dict(wanted)))
    same = {key for key in old if key in new and old[key] == new[key]}
    changed = [key for key in {**old, **new} if key not in same and not is_below(key, FREE_ON_RESUME)]
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed]


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


def require_unchanged(changed: Sequence[str], where: object, fix: str) -> None:
    """Refuse to go on with a run under other settings: what `differences` or `changes` found."""
    if changed:
        got = "\n    ".join(["", *changed])
        raise CheckpointError("the run was made with another config", where=str(where), got=got, fix=fix)


def stored_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config read from a run's file, with values of the types that its schemas have; else a CheckpointError."""
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
    """The class or function that a dotted path names; a ConfigError about the setting `where`, where there is none."""
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
    """Call a class or function with the arguments that were set, and those on offer that it takes; or a ConfigError."""
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


def explain(error: Exception, overrides: Sequence[str], loader: ConfigLoader) -> ConfigError:
    """What is wrong with overrides that Hydra could not compose; its loader knows the groups."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = [option for option in loader.get_group_options(group) if not option.endswith("_schema")]
        if options:
            problem, fix = f"there is no {group} called {name!r}", did_you_mean(name, options, f"{group}={{}}")
            return ConfigError(problem, where=group, expected=", ".join(options), got=name, fix=fix)
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as unreadable:
            return ConfigError(
                "this argument cannot be read",
                where=text,
                expected="GROUP=NAME or GROUP.OPTION=VALUE",
                got=str(unreadable).splitlines()[0],
                fix="""values with special characters need quotes inside quotes: 'data.root="a b"'""",
            )
        if override.is_sweep_override():
            where, fix = override.key_or_group, f"growconv -m {text}"
            return ConfigError("several values need a sweep", where=where, got=text, fix=fix)
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return _refused(cause, overrides)
    return ConfigError("the options do not fit together", where=" ".join(overrides) or None, got=error)


# What omegaconf says of a value of the wrong type, and what it wanted.
_TYPES = {
    "converted to Integer": "a whole number",
    "converted to Float": "a number",
    "not a valid bool": "true or false",
    "converted to String": "text",
}


def _refused(error: OmegaConfBaseException, overrides: Sequence[str]) -> ConfigError:
    """What omegaconf did not take: a key that is not there, or a value of another type."""
    path, problem = str(error.full_key), str(error.msg).splitlines()[0]
    if isinstance(error, AttributeError | KeyError):
        asked = next((text for text in overrides if is_below(text.lstrip("+~").partition("=")[0], [path])), path)
        parent = error.parent_node
        return _no_option(path, parent if isinstance(parent, DictConfig) else {}, asked)
    wanted = next((words for phrase, words in _TYPES.items() if phrase in problem), None)
    if wanted is None:
        return ConfigError("this option cannot be set like that", where=path, got=problem)
    whole = isinstance(error.value, float) and error.value.is_integer()
    fix = f"write {path}={error.value:.0f}" if whole else None
    return ConfigError("this value has the wrong type", where=path, expected=wanted, got=error.value, fix=fix)


def _no_option(path: str, known: Mapping[Any, Any], asked: str | None = None) -> ConfigError:
    """The error of an option that is not there, from what lies beside it and the whole override, to be repeated."""
    before, _, name = path.rpartition(".")
    siblings = [str(key) for key in known if key != "hydra"]
    found = near(name, siblings)
    if found is None and isinstance(known, DictConfig):  # in a group beside it: trainer.epochs for epochs
        groups = [key for key in siblings if not OmegaConf.is_missing(known, key) and OmegaConf.is_dict(known[key])]
        elsewhere = [f"{key}.{name}" for key in groups if name in known[key]]
        found = elsewhere[0] if len(elsewhere) == 1 else None
    found = f"{before}.{found}".lstrip(".") if found else None
    fix = f"did you mean {(asked or path).lstrip('+').replace(path, found, 1)}?" if found else None
    if isinstance(known, DictConfig) and OmegaConf.get_type(known) is dict and not found:
        fix = f"to pass it on all the same: +{asked}"
    return ConfigError("there is no such option", where=path, expected=", ".join(siblings) or None, got=name, fix=fix)


def variants(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of a sweep's first run, then with each other value in place of the first, one at a time."""
    choices = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:  # `explain` says what is wrong with it
            choices.append([text])
            continue
        if override.is_discrete_sweep():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        elif not override.is_sweep_override():  # an interval is for a sweeper of its own
            choices.append([text])
    first = [values[0] for values in choices]
    yield first
    for index, values in enumerate(choices):
        for value in values[1:]:
            yield [*first[:index], value, *first[index + 1 :]]
