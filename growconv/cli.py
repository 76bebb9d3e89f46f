"""The command line: train (with Hydra), resume, sites, search, family, and what reads finished runs: `growconv --help`.

What can be checked is checked before torch is loaded and before a run directory is made.
"""

import glob
import hashlib
import io
import itertools
import logging
import os
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import configure_log, run_job
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from growconv import __version__
from growconv.errors import ConfigError, TrainingError, near
from growconv.reporting.records import is_below
from growconv.reporting.terminal import make_console, printable, shown
from growconv.training import commands, failures
from growconv.training import config as settings
from growconv.training.commands import COMMANDS, MODULES, CommandParser

# Ranks above 0 leave no trace of their own.
SILENT = ("hydra.output_subdir=null", "hydra.run.dir=.", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled")
# With these flags the config comes from elsewhere, or none is made.
UNCHECKED = {"config_path", "config_name", "info", "hydra_help", "shell_completion"}
# Values of a sweep that are checked before its first run; the others are checked by their own run.
CHECKED_VARIANTS = 30


def run_name(overrides: str) -> str:
    """The folder of one run of a sweep: its overrides, shortened where a file system would refuse them."""
    name = overrides.replace("/", "_") or "defaults"
    return name if len(name) <= 120 else f"{name[:100]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"


OmegaConf.register_new_resolver("run_name", run_name, replace=True)
settings.register_schemas()


def main(argv: Sequence[str] | None = None) -> int:
    """The console script `growconv`.

    Args:
        argv: arguments; None reads the process's.

    Returns:
        0 when all went well, 1 after an error, 130 after Ctrl-C, 141 where standard output was closed, and 128 plus the
        signal's number after a signal.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    asked_for_trace = os.environ.get("HYDRA_FULL_ERROR") == "1"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal need not know every letter
    formatted = warnings.formatwarning
    warnings.formatwarning = lambda *about, **more: printable(formatted(*about, **more))
    try:
        _dispatch(arguments)
        _leave_processes()
        if sys.stdout is not None:  # closed before the start
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt as stop:
        if _rank() == 0:
            print(file=sys.stderr)
            failures.complain("; go on with:\n  ".join(["stopped", *_ways_on(stop)]))
        return 130
    except BrokenPipeError as error:  # as head does: nothing to complain of, but for a run that was cut short
        failures.leave_closed_pipe()
        for command in _ways_on(error):
            failures.complain(f"Standard output was closed before the end; go on with:\n  {command}")
        return 141
    except failures.Stopped as stop:
        failures.complain(stop.message)
        return 128 + stop.number
    except Exception as error:
        if asked_for_trace:
            traceback.print_exc()
        text = failures.explain(error)
        if isinstance(error, HydraException | OmegaConfBaseException):
            text = str(error) if error.__cause__ is None else f"{error}\n{error.__cause__}"
        failures.complain(text)
        return 1
    finally:
        warnings.formatwarning = formatted


def _ways_on(error: BaseException) -> list[str]:
    """The command that goes on with what an error ended, if one was noted: the last one is of the whole sweep."""
    return getattr(error, "__notes__", [])[-1:]


def _dispatch(arguments: Sequence[str]) -> None:
    named = bool(arguments) and not arguments[0].startswith(("-", "+", "~")) and "=" not in arguments[0]
    command, rest = (arguments[0], arguments[1:]) if named else ("train", arguments)
    if command not in COMMANDS:
        raise _no_command(command, rest)
    parser = CommandParser(command)
    if {"-h", "--help"} & set(rest):
        page = parser.format_help().rstrip() if command != "train" else commands.train_page()
        print(page if named else commands.first_page())
        return
    if command in MODULES:
        given = parser.parse_args(rest)  # before anything is imported
        import_module(MODULES[command]).main(given)
        return
    flags = vars(parser.parse_intermixed_args(rest))
    overrides = [text for text in flags.pop("overrides") if text not in ("trust=true", "trust=false")]
    flags = {name: value for name, value in flags.items() if value not in (None, False)}
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise _no_equals(text, command)
    trust = "trust=true" in rest
    resumed = [text for text in overrides if text.startswith("resume=")]
    if "shell_completion" in flags and _complete(flags["shell_completion"]):
        return
    if "version" in flags:
        print(f"growconv {__version__}")
    elif command == "sites":
        show_sites(overrides)
    elif command == "resume" and not resumed:
        raise ConfigError("a run is missing", where="resume", fix="name its directory: growconv resume=RUN")
    elif resumed:
        if len(resumed) > 1 or flags:
            raise ConfigError("one run is resumed at a time", where="resume", got=shlex.join(arguments))
        resume(resumed[0].removeprefix("resume="), [text for text in overrides if text not in resumed], trust)
    else:
        if "config_path" in flags and not trust:
            _require_trusted_path(flags, overrides)
        _train(command, overrides, flags, shlex.join(["growconv", *arguments]))


def _complete(asked: str) -> bool:
    """See to the completion of commands, which Hydra does not know; it does groups and options.

    Returns:
        Whether Hydra has nothing to add: behind a command that takes files, which bash and zsh complete by themselves.
    """
    if asked not in {f"{what}={shell}" for what in ("install", "uninstall", "query") for shell in ("bash", "fish")}:
        fix = """eval "$(growconv --shell-completion install=bash)", in zsh too; fish: install=fish, piped to source"""
        raise ConfigError("no such completion", where="--shell-completion", got=asked or None, fix=fix)
    words = os.environ.get("COMP_LINE", "").split(" ")
    if not asked.startswith("query") or len(words) < 2:
        return False
    if len(words) == 2:
        print(" ".join(command for command in COMMANDS if command.startswith(words[1])))
    elif words[1] in MODULES:
        if asked == "query=fish":
            print("\n".join(sorted(glob.glob(f"{glob.escape(words[-1])}*"))))
        return True
    elif words[1] in COMMANDS:
        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
    return False


def _no_command(word: str, rest: Sequence[str]) -> ConfigError:
    """The error of a first word that is no command: perhaps a flag without dashes, or a group without =."""
    meant = near(word, [*COMMANDS, "help", "version"])
    command = f"--{meant}" if meant in ("help", "version") else meant
    fix = f"did you mean: growconv {shlex.join([command, *rest])}" if command else None
    if word in commands.GROUPS and rest:
        fix = f"did you mean: growconv {shlex.join([f'{word}={rest[0]}', *rest[1:]])}"
    return ConfigError(
        f"there is no command {word!r}", expected=", ".join(COMMANDS), fix=fix or "growconv --help lists them"
    )


def _no_equals(text: str, command: str) -> ConfigError:
    group = next((group for group in commands.GROUPS if text in commands.group_names(group)), None)
    fix = f"did you mean {group}={text}?" if group else None
    if command == "resume" or Path(text).is_dir():
        fix = f"did you mean resume={text}?"
    return ConfigError("this argument has no '='", where=text, expected="GROUP=NAME or OPTION=VALUE", fix=fix)


def show_sites(overrides: Sequence[str]) -> None:
    """Print where the model of a config can grow, why not elsewhere, and which sites a method named here serves."""
    values = settings.plain(settings.compose(overrides))
    import torch

    from growconv.network.find import explain_sites
    from growconv.training.build import data_shape, make_model
    from growconv.training.progress import sites_table

    shape = data_shape(values["data"])
    model = make_model(values, shape)
    channels, size, _ = shape
    rows = explain_sites(model, torch.zeros(2, channels, size, size))
    method = values["growth"]["method"] if any(text.startswith("growth") for text in overrides) else "none"
    make_console().print(sites_table(rows, None if method == "none" else method))
    print(f"{sum(row.growable for row in rows)} of {len(rows)} layers can grow")
    if method != "none":
        sites = {row.site: row.grows for row in rows if row.grows is not None}
        served = sum(site.refusal(method) is None for site in sites.values())
        print(f"growth={method} serves {served} of {len(sites)} sites")


def resume(directory: str, overrides: Sequence[str], trust: bool = False) -> None:
    """Go on with a run where it stopped.

    Args:
        overrides: settings that change no number may differ from the run's, and what ends it may be more.
        trust: whether its config may run code from anywhere and reach the hosts that it names.
    """
    from growconv.training.rundir import RunDirectory
    from growconv.training.trust import require_trusted

    files = RunDirectory(directory)
    stored = settings.stored_config(files.config(), str(files.config_file))
    wanted = settings.plain(settings.compose(overrides))
    asked = {override.get_key_element() for override in OverridesParser.create().parse_overrides(list(overrides))}
    length = settings.length(stored)
    changed = [line for line in settings.changes(stored, wanted) if is_below(line.split(":")[0], asked)]
    fix = f"resume it as it was (growconv resume={directory}), prolong it ({length}=MORE), or start a new run"
    settings.require_unchanged(changed, Path(directory) / "config.yaml", fix)
    free = [key for key in (length, *settings.FREE_ON_RESUME) if key != length or key in asked]
    for name, key in itertools.product(asked, free):
        if is_below(name, [key]) or is_below(key, [name]):
            _copy_setting(wanted, stored, max(name, key, key=len).split("."))
    if not trust:
        require_trusted(stored, files.config_file, wanted, asked)
    _announce(stored, Path(directory))
    try:
        from growconv.training.experiment import run

        run(stored, directory, resume=True)
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        stop.add_note(_go_on(Path(directory)))
        raise


def _copy_setting(source: dict[str, Any], target: dict[str, Any], path: Sequence[str]) -> None:
    for key in path[:-1]:
        if key not in source or key not in target:
            return
        source, target = source[key], target[key]
    if path[-1] in source:
        target[path[-1]] = source[path[-1]]


def _train(command: str, overrides: list[str], flags: Mapping[str, Any], typed: str) -> None:
    """Check the settings of a training command, then hand them to Hydra, which makes the run directory."""
    sweep = "multirun" in flags
    if command == "search":
        overrides = ["experiment=search", *overrides]
    if sweep and command != "train":
        fix = "start it once for each setting"
        raise ConfigError("this command cannot run as a sweep", where=command, got="-m", fix=fix)
    alone = not flags and not any(text.lstrip("+").startswith("hydra.mode=") for text in overrides)
    if not alone and not UNCHECKED & flags.keys():
        folder = flags.get("config_dir")
        found = [f"hydra.searchpath=[file://{Path(folder).resolve()}]"] if folder else []
        for variant in itertools.islice(settings.variants(overrides) if sweep else [overrides], CHECKED_VARIANTS):
            config = settings.compose([*found, *variant])
            if "cfg" not in flags:
                settings.plain(config)
    errors: list[Exception] = []

    def task(config: DictConfig) -> float:
        """`train`; the error of a single run is kept for the end, since Hydra would print it in its own way."""
        if sweep:  # called by what differs from the other runs
            parsed = OverridesParser.create().parse_overrides(overrides)
            same = {override.get_key_element() for override in parsed if not override.is_sweep_override()}
            own = [text for text in HydraConfig.get().overrides.task if text.partition("=")[0] not in same]
            return train(config, typed, name=", ".join(own))
        try:
            return train(config, typed, command)
        except Exception as error:
            errors.append(error)
            return float("nan")

    words = [
        word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value) if word is not True
    ]
    try:
        if alone:
            _composed_once(overrides, task)
        else:
            _with_hydra([*words, *overrides], task)
    except KeyboardInterrupt as stop:
        if sweep:  # finished runs are left out when it is started again
            stop.add_note(typed)
        raise
    except failures.RunFailed as error:
        raise TrainingError(
            "Some runs of this sweep failed; the errors are above.",
            fix="fix what they name and start the same sweep again: finished runs are skipped",
        ) from error
    if errors:
        raise errors[0]


def train(config: DictConfig, typed: str, command: str = "train", name: str | None = None) -> float:
    """One run of a config that Hydra composed: its best validation accuracy, the objective of a sweep.

    Args:
        typed: the command line.
        command: what to do with the config: train, search or family.
        name: what tells the run from the others of its sweep.
    """
    context = HydraConfig.get()
    directory = Path(context.runtime.output_dir)
    sweep = context.mode == RunMode.MULTIRUN
    way_on = _go_on(directory) if command == "train" else f"{typed} {shlex.quote(f'hydra.run.dir={directory}')}"
    try:
        values = settings.plain(config)
        if OmegaConf.get_type(config) is not settings.RunConfig:  # a stored config, by --config-path
            values = settings.stored_config(values, "--config-path")
        _announce(values, directory)
        if command != "train":
            import_module(f"growconv.training.{command}").run(values, directory)
            return float("nan")
        from growconv.training.experiment import run

        return float(run(values, directory, sweep=sweep, name=name)["best_val_accuracy"])
    except KeyboardInterrupt as stop:
        stop.add_note(way_on)
        raise
    except Exception as error:
        _discard_unbegun(directory)
        if isinstance(error, BrokenPipeError) and (directory / "config.yaml").exists():
            error.add_note(way_on)
            raise
        if not sweep:
            raise
        text = failures.explain(error)
        failures.complain(f"{shown(directory)}: {text}")
        raise failures.RunFailed("A run of the sweep ended with an error.", where=str(directory), got=text) from error


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _announce(values: dict[str, Any], directory: Path) -> None:
    """Say what runs and where, before torch is loaded."""
    if values["trainer"]["progress"] == "none" or _rank() > 0:
        return
    model = values["model"]["_target_"].rpartition(".")[-1]
    method = values["growth"]["method"]
    growth = "fixed" if method == "none" else f"grown by {method}"
    epochs, flops = values["trainer"]["epochs"], values["trainer"]["flops"]
    passes = f"{epochs} epoch{'' if epochs == 1 else 's'}"
    length = passes if flops is None else f"{flops:.3g} training FLOPs"
    print(printable(f"growconv {__version__}: {model} on {values['data']['name']}, {growth}, {length}"))
    print(f"run directory: {shown(directory)}", flush=True)


def _go_on(directory: Path) -> str:
    """The command that resumes a run."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    nodes = [f"--nnodes={processes // here}"] if here < processes else []
    start = ["growconv"] if processes == 1 else ["torchrun", *nodes, f"--nproc-per-node={here}", "-m", "growconv"]
    return shlex.join([*start, f"resume={shown(directory)}"])


def _discard_unbegun(directory: Path) -> None:
    """Remove what Hydra wrote for a run that failed before it began, and folders that are empty then."""
    if (directory / "config.yaml").exists() or _rank() > 0:
        return
    for handler in list(logging.root.handlers):
        if Path(getattr(handler, "baseFilename", "/")).parent == directory:
            logging.root.removeHandler(handler)  # a launcher that logs later would ask for the file again
            handler.close()
    shutil.rmtree(directory / ".hydra", ignore_errors=True)
    for name in ("growconv.log", ".lock"):
        (directory / name).unlink(missing_ok=True)
    here = Path.cwd()
    for folder in (directory, *directory.parents):
        if folder == here or folder in here.parents:
            return
        try:
            folder.rmdir()
        except OSError:  # something lies in it
            return


def _leave_processes() -> None:
    """Close the process group of a torchrun start in good order; an exit with open connections can abort."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def _require_trusted_path(flags: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Look into the config that --config-path names, as the command in a report does, before Hydra acts on it."""
    from growconv.training.trust import require_trusted_file

    file = Path(flags["config_path"]) / f"{flags.get('config_name', 'config').removesuffix('.yaml')}.yaml"
    require_trusted_file(file, {text.split("=")[0].lstrip("+") for text in overrides})


def _composed_once(overrides: Sequence[str], task: Callable[[DictConfig], float]) -> None:
    """One run as Hydra makes it, of a config that is checked first: Hydra by itself would compose it twice more."""
    with _own_logging(), settings.composed([*overrides, *_silent()]) as config:
        settings.plain(settings.without_hydra(config))
        config.hydra.mode = RunMode.RUN
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        callbacks = Callbacks(config)
        callbacks.on_run_start(config=config, config_name="config")
        context = HydraContext(GlobalHydra.instance().config_loader(), callbacks)
        done = run_job(task, config, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context)
        callbacks.on_run_end(config=config, config_name="config", job_return=done)


def _silent() -> Sequence[str]:
    """What keeps a process that is not the first one from leaving traces."""
    if _rank() == 0:
        return ()
    logging.disable(logging.WARNING)
    return SILENT


@contextmanager
def _own_logging() -> Iterator[None]:
    """Remove afterwards what Hydra adds to Python's logging: its file may be gone with a run that never began."""
    handlers = list(logging.root.handlers)
    try:
        yield
    finally:
        for handler in [each for each in logging.root.handlers if each not in handlers]:
            logging.root.removeHandler(handler)
            handler.close()


def _with_hydra(arguments: Sequence[str], task: Callable[[DictConfig], float]) -> None:
    """Run Hydra on these arguments, with errors raised rather than printed."""
    arguments = [*arguments, *_silent()]
    before, shown = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [before[0] if before else "growconv", *arguments]
    decorate: Callable[[Any], Any] = hydra.main(
        version_base="1.3", config_path=str(settings.conf_dir()), config_name="config"
    )
    try:
        with _own_logging():
            decorate(task)()
    finally:
        sys.argv = before
        if shown is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = shown
