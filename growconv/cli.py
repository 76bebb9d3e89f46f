"""The command line: train (with Hydra), resume, sites, search, family, and what reads finished runs: `growconv --help`.

What can be checked is checked before torch is loaded and before a run directory is made.
"""

import argparse
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
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from growconv import __version__
from growconv.errors import CheckpointError, ConfigError, TrainingError, did_you_mean, near
from growconv.reporting.terminal import printable, shown
from growconv.training import config as settings
from growconv.training import failures, usage
from growconv.training.commands import PARSERS

# Ranks above 0 leave no trace of their own.
SILENT = ("hydra.output_subdir=null", "hydra.run.dir=.", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled")
# Hydra's flags by the short name, and those of them that a value follows.
FLAGS = {
    "-h": "--help",
    "-m": "--multirun",
    "-c": "--cfg",
    "-cd": "--config-dir",
    "-cp": "--config-path",
    "-cn": "--config-name",
    "-p": "--package",
    "-i": "--info",
    "-r": "--run",
    "-sc": "--shell-completion",
}
WITH_VALUE = {"--cfg", "--config-dir", "--config-path", "--config-name", "--package", "--shell-completion"}
KNOWN_FLAGS = {*FLAGS.values(), *WITH_VALUE, "--resolve", "--hydra-help", "--version"}
# With these the config comes from elsewhere, or none is made.
UNCHECKED = {"--config-path", "--config-name", "--info", "--hydra-help", "--shell-completion"}
# Values of a sweep that are checked before its first run; the others are checked by their own run.
CHECKED_VARIANTS = 30


class Stopped(KeyboardInterrupt):
    """Ctrl-C during a run, with the command that goes on."""


class Unheard(BrokenPipeError):
    """Standard output was closed during a run, with the command that goes on."""


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
        with suppress(SystemExit) if {"-h", "--help"} & set(arguments) else nullcontext():
            _dispatch(arguments)
        _leave_processes()
        if sys.stdout is not None:  # closed before the start
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt as stop:
        if _rank() == 0:
            print(file=sys.stderr)
            failures.complain(f"stopped; go on with:\n  {stop.args[0]}" if stop.args else "stopped")
        return 130
    except BrokenPipeError as error:  # as head does: nothing to complain of, but for a run that was cut short
        failures.leave_closed_pipe()
        if isinstance(error, Unheard):
            failures.complain(f"Standard output was closed before the end; go on with:\n  {error.args[0]}")
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


def _dispatch(arguments: list[str]) -> None:
    command, rest = "train", arguments
    if arguments and not arguments[0].startswith(("-", "+", "~")) and "=" not in arguments[0]:
        command, rest = arguments[0], arguments[1:]
    if command not in usage.COMMANDS:
        raise _no_command(command, rest)
    if command in PARSERS:
        parser, module = PARSERS[command]
        arguments_read = parser().parse_args(rest)
        import_module(module).main(arguments_read)
    elif command == "resume" and rest and not rest[0].startswith("-") and "=" not in rest[0]:
        fix = f"did you mean: growconv {shlex.join([f'resume={rest[0]}', *rest[1:]])}"
        raise ConfigError("name the run with '='", where="resume", got=rest[0], fix=fix)
    else:
        trust = "trust=true" in rest
        rest = [text for text in rest if text not in ("trust=true", "trust=false")]
        overrides, flags = _split(rest)
        resumed = [text for text in overrides if text.startswith("resume=")]
        if "--shell-completion" in flags and complete(flags["--shell-completion"]):
            return
        if "--version" in flags:
            print(f"growconv {__version__}")
        elif "--help" in flags:
            print(_page(command if arguments[0] == command else None))
        elif command == "sites":
            if flags:
                raise ConfigError("there is no such flag", where="sites", got=", ".join(flags))
            show_sites(overrides)
        elif command == "resume" and not resumed:
            raise ConfigError("a run is missing", where="resume", fix="name its directory: growconv resume=RUN")
        elif resumed:
            if len(resumed) > 1 or flags:
                raise ConfigError("one run is resumed at a time", where="resume", got=shlex.join(arguments))
            others = [text for text in overrides if text not in resumed]
            resume(resumed[0].removeprefix("resume="), others, trust)
        else:
            if not trust:
                _require_trusted_path(rest)
            if command == "search":
                _require_one_run(command, flags)
                _train(["experiment=search", *rest], ["experiment=search", *overrides], flags, search)
            elif command == "family":
                _require_one_run(command, flags)
                _train(rest, overrides, flags, family)
            else:
                _train(rest, overrides, flags)


def complete(asked: str) -> bool:
    """Check what is asked of Hydra's completion of groups and options, and see to the commands, which it does not know.

    Args:
        asked: install=SHELL, uninstall=SHELL or query=SHELL.

    Returns:
        Whether Hydra has nothing to add: behind a command that takes files, which bash and zsh complete by themselves.

    Raises:
        ConfigError: something else.
    """
    if asked not in {f"{what}={shell}" for what in ("install", "uninstall", "query") for shell in ("bash", "fish")}:
        fix = """eval "$(growconv --shell-completion install=bash)", in zsh too; fish: install=fish, piped to source"""
        raise ConfigError("no such completion", where="--shell-completion", got=asked or None, fix=fix)
    words = os.environ.get("COMP_LINE", "").split(" ")
    if not asked.startswith("query") or len(words) < 2:
        return False
    if len(words) == 2:
        print(" ".join(command for command in usage.COMMANDS if command.startswith(words[1])))
    elif words[1] in PARSERS:
        if asked == "query=fish":
            print("\n".join(sorted(glob.glob(f"{glob.escape(words[-1])}*"))))
        return True
    elif words[1] in usage.COMMANDS:
        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
    return False


def _no_command(word: str, rest: Sequence[str]) -> ConfigError:
    """The error of a first word that is no command: perhaps a flag without dashes, or a group without =."""
    meant = near(word, [*usage.COMMANDS, "help", "version"])
    command = f"--{meant}" if meant in ("help", "version") else meant
    fix = f"did you mean: growconv {shlex.join([command, *rest])}" if command else None
    if word in usage.GROUPS and rest:
        fix = f"did you mean: growconv {shlex.join([f'{word}={rest[0]}', *rest[1:]])}"
    return ConfigError(
        f"there is no command {word!r}", expected=", ".join(usage.COMMANDS), fix=fix or "growconv --help lists them"
    )


def _page(command: str | None) -> str:
    if command is None:
        return usage.first_page()
    return usage.train_page() if command == "train" else usage.command_page(command)


def _split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Overrides, and flags by their long names with their values.

    Raises:
        ConfigError: an unknown flag, or an argument that is neither.
    """
    overrides: list[str] = []
    flags: dict[str, str] = {}
    waiting = iter(arguments)
    for text in waiting:
        if text.startswith("-"):
            name, _, value = text.partition("=")
            name = FLAGS.get(name, name)
            if name not in KNOWN_FLAGS:
                fix = did_you_mean(name, KNOWN_FLAGS) or "growconv --help lists them"
                raise ConfigError(f"there is no flag {text!r}", fix=fix)
            flags[name] = value or (next(waiting, "") if name in WITH_VALUE else "")
        elif "=" in text or text.startswith("~"):
            overrides.append(text)
        elif "--info" in flags and not flags["--info"]:
            flags["--info"] = text
        else:
            raise _no_equals(text)
    return overrides, flags


def _no_equals(text: str) -> ConfigError:
    group = next((group for group in usage.GROUPS if text in usage.group_names(group)), None)
    fix = f"did you mean {group}={text}?" if group else None
    if Path(text).is_dir():
        fix = f"did you mean resume={text}?"
    return ConfigError("this argument has no '='", where=text, expected="GROUP=NAME or OPTION=VALUE", fix=fix)


def show_sites(overrides: Sequence[str]) -> None:
    """Print where the model of a config can grow, why not elsewhere, and which sites a method named here serves.

    Args:
        overrides: as for a run.
    """
    values = settings.plain(settings.compose(overrides))
    import torch

    from growconv.network.find import explain_sites
    from growconv.reporting.terminal import make_console
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
        directory: the run directory.
        overrides: further overrides; settings that change no number may differ, and what ends the run may be more.
        trust: whether its config may run code from anywhere and reach the hosts that it names.

    Raises:
        CheckpointError: no run lies there, or an override differs from its config.
        ConfigError: its config asks for what `training.trust` refuses.
    """
    from growconv.training.rundir import RunDirectory
    from growconv.training.trust import require_trusted

    files = RunDirectory(directory)
    stored = settings.stored_config(files.config(), str(files.config_file))
    wanted = settings.plain(settings.compose(overrides))
    asked = {override.get_key_element() for override in OverridesParser.create().parse_overrides(list(overrides))}
    length = settings.length(stored)
    changed = [
        line
        for line in settings.changes(stored, wanted)
        if any(line.split(":")[0] == key or line.startswith(f"{key}.") for key in asked)
    ]
    if changed:
        raise CheckpointError(
            "the run was made with another config",
            where=str(Path(directory) / "config.yaml"),
            got="\n    ".join(["", *changed]),
            fix=f"resume it as it was (growconv resume={directory}), prolong it ({length}=MORE), or start a new run",
        )
    if length in asked:
        _copy_setting(wanted, stored, length.split("."))
    for name in asked:
        for free in settings.FREE_ON_RESUME:
            if name == free or name.startswith(f"{free}."):
                _copy_setting(wanted, stored, name.split("."))
            elif free.startswith(f"{name}."):
                _copy_setting(wanted, stored, free.split("."))
    if not trust:
        require_trusted(stored, files.config_file, wanted, asked)
    _announce(stored, Path(directory))
    try:
        from growconv.training.experiment import run

        run(stored, directory, resume=True)
    except KeyboardInterrupt as stop:
        raise Stopped(_go_on(Path(directory))) from stop
    except BrokenPipeError as error:
        raise Unheard(_go_on(Path(directory))) from error


def _copy_setting(source: dict[str, Any], target: dict[str, Any], path: Sequence[str]) -> None:
    for key in path[:-1]:
        if key not in source or key not in target:
            return
        source, target = source[key], target[key]
    if path[-1] in source:
        target[path[-1]] = source[path[-1]]


def search(values: dict[str, Any], directory: Path) -> None:
    """Find widths for a budget by short growing."""
    from growconv.training.experiment import run
    from growconv.training.search import require_budget, write_found

    require_budget(values)
    run(values, directory, resume=(directory / "config.yaml").exists())
    if _rank() == 0:
        write_found(directory)


def family(values: dict[str, Any], directory: Path) -> None:
    """Train several sizes from one trunk."""
    from growconv.training.family import run_family

    run_family(values, directory)


def _require_one_run(command: str, flags: dict[str, str]) -> None:
    if "--multirun" in flags:
        raise ConfigError(
            "this command cannot run as a sweep", where=command, got="-m", fix="start it once for each setting"
        )


def _train(
    arguments: Sequence[str],
    overrides: list[str],
    flags: dict[str, str],
    job: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    """Check a command line, then hand it to Hydra, which makes the run directory and calls `train`."""
    sweep = "--multirun" in flags
    if not UNCHECKED & set(flags):
        folder = flags.get("--config-dir")
        found = [f"hydra.searchpath=[file://{Path(folder).resolve()}]"] if folder else []
        for variant in itertools.islice(settings.variants(overrides) if sweep else [overrides], CHECKED_VARIANTS):
            config = settings.compose([*found, *variant])
            if "--cfg" not in flags:
                settings.plain(config)
    errors: list[Exception] = []
    parsed = OverridesParser.create().parse_overrides(overrides)
    same = {override.get_key_element() for override in parsed if not override.is_sweep_override()}

    def one_of_many(config: DictConfig) -> float:
        """`train`, called by what differs from the other runs of the sweep."""
        task = HydraConfig.get().overrides.task
        return train(config, ", ".join(text for text in task if text.partition("=")[0] not in same))

    def one_run(config: DictConfig) -> float:
        """`train`, whose error is kept for the end: Hydra would print it in its own way."""
        try:
            return train(config, job=job)
        except Exception as error:
            errors.append(error)
            return float("nan")

    try:
        _with_hydra(arguments, one_of_many if sweep else one_run)
    except KeyboardInterrupt as stop:
        if sweep:  # finished runs are left out when it is started again
            raise Stopped(shlex.join(["growconv", *arguments])) from stop
        raise
    except failures.RunFailed as error:
        raise TrainingError(
            "Some runs of this sweep failed; the errors are above.",
            fix="fix what they name and start the same sweep again: finished runs are skipped",
        ) from error
    if errors:
        raise errors[0]


def train(
    config: DictConfig, name: str | None = None, job: Callable[[dict[str, Any], Path], None] | None = None
) -> float:
    """One run of a config that Hydra composed.

    Args:
        name: what tells it from the others of its sweep.
        job: what to do with its values and directory; None trains.

    Returns:
        The best validation accuracy: the objective of a sweep.
    """
    context = HydraConfig.get()
    directory = Path(context.runtime.output_dir)
    try:
        values = settings.plain(config)
        if OmegaConf.get_type(config) is not settings.RunConfig:  # a stored config, by --config-path
            values = settings.stored_config(values, "--config-path")
        _announce(values, directory)
        if job is not None:
            job(values, directory)
            return float("nan")
        from growconv.training.experiment import run

        sweep = context.mode == RunMode.MULTIRUN
        return float(run(values, directory, sweep=sweep, name=name)["best_val_accuracy"])
    except KeyboardInterrupt as stop:
        again = shlex.join(["growconv", *sys.argv[1:], f"hydra.run.dir={directory}"])
        raise Stopped(_go_on(directory) if job is None else again) from stop
    except Exception as error:
        _discard_unbegun(directory)
        if isinstance(error, BrokenPipeError) and (directory / "config.yaml").exists():
            raise Unheard(_go_on(directory)) from error
        if context.mode != RunMode.MULTIRUN:
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


def _require_trusted_path(arguments: Sequence[str]) -> None:
    """Look into the config that --config-path names, as the command in a report does, before Hydra acts on it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn", default="config")
    given, others = parser.parse_known_args(list(arguments))
    if given.config_path is not None:
        from growconv.training.trust import require_trusted_file

        file = Path(given.config_path) / f"{given.config_name.removesuffix('.yaml')}.yaml"
        require_trusted_file(file, {argument.split("=")[0].lstrip("+") for argument in others})


def _with_hydra(arguments: Sequence[str], task: Callable[[DictConfig], float]) -> None:
    """Run Hydra on these arguments, with errors raised rather than printed."""
    if _rank() > 0:
        arguments = [*arguments, *SILENT]
        logging.disable(logging.WARNING)
    before, shown, handlers = sys.argv, os.environ.get("HYDRA_FULL_ERROR"), list(logging.root.handlers)
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [before[0] if before else "growconv", *arguments]
    decorate: Callable[[Any], Any] = hydra.main(
        version_base="1.3", config_path=str(settings.conf_dir()), config_name="config"
    )
    try:
        decorate(task)()
    finally:
        sys.argv = before
        for handler in [each for each in logging.root.handlers if each not in handlers]:
            logging.root.removeHandler(handler)  # its file may be gone with a run that never began
            handler.close()
        if shown is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = shown
