"""The command line: train (with Hydra), sites, compare, report.

growconv data=fashion_mnist model=resnet20 growth=functional
growconv -m growth=tiny,random seed=0,1,2
growconv resume=RUN_DIR [trust=true]
growconv sites model=resnet20
growconv compare RUN_DIR...
growconv report RUN_DIR
"""

import argparse
import hashlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from growconv.errors import CheckpointError, ConfigError
from growconv.training import config as settings
from growconv.training import failures

# Ranks above 0 leave no trace of their own.
SILENT = (
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
)


def run_name(overrides: str) -> str:
    """The folder of one run of a sweep: its overrides, shortened where a file system would refuse them."""
    name = overrides.replace("/", "_") or "defaults"
    return name if len(name) <= 120 else f"{name[:100]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"


OmegaConf.register_new_resolver("run_name", run_name, replace=True)
settings.register_schemas()


def train(config: DictConfig) -> float:
    """One run of a config that Hydra composed.

    Args:
        config: the config.

    Returns:
        The best validation accuracy: the objective of a sweep.
    """
    from growconv.training.experiment import run

    values = settings.plain(config)
    context = HydraConfig.get()
    sweep = context.mode == RunMode.MULTIRUN
    return float(run(values, context.runtime.output_dir, sweep=sweep)["best_val_accuracy"])


def resume(directory: str, overrides: Sequence[str], trust: bool = False) -> None:
    """Go on with a run where it stopped.

    Args:
        directory: the run directory.
        overrides: further overrides; only settings that change no number may differ.
        trust: whether its config may run code from anywhere and reach the hosts that it names.

    Raises:
        CheckpointError: no run lies there, or an override differs from its config.
        ConfigError: its config asks for what `training.trust` refuses.
    """
    from growconv.training.experiment import run
    from growconv.training.rundir import RunDirectory
    from growconv.training.trust import require_trusted

    files = RunDirectory(directory)
    stored = files.config()
    settings.require_complete(stored, directory)
    wanted = settings.plain(settings.compose(list(overrides)))
    asked = {override.key_or_group for override in OverridesParser.create().parse_overrides(list(overrides))}
    changed = [
        line
        for line in settings.differences(stored, wanted)
        if any(line.split(":")[0] == key or line.startswith(f"{key}.") for key in asked)
    ]
    if changed:
        raise CheckpointError(
            "the run was made with another config",
            where=str(Path(directory) / "config.yaml"),
            got="\n    ".join(["", *changed]),
            fix=f"resume it as it was (growconv resume={directory}), or start a new run",
        )
    for name in asked:
        for free in settings.FREE_ON_RESUME:
            if name == free or name.startswith(f"{free}."):
                _copy_setting(wanted, stored, name.split("."))
            elif free.startswith(f"{name}."):
                _copy_setting(wanted, stored, free.split("."))
    if not trust:
        require_trusted(stored, files.config_file, wanted, asked)
    run(stored, directory, resume=True)


def _copy_setting(source: dict[str, Any], target: dict[str, Any], path: Sequence[str]) -> None:
    for key in path[:-1]:
        if key not in source or key not in target:
            return
        source, target = source[key], target[key]
    if path[-1] in source:
        target[path[-1]] = source[path[-1]]


def show_sites(overrides: Sequence[str]) -> None:
    """Print where the model of a config can grow, and why not elsewhere.

    Args:
        overrides: as for a run.
    """
    if set(overrides) & {"-h", "--help"}:
        print("usage: growconv sites [OVERRIDE...]\n\nfor example: growconv sites model=resnet20 data=cifar10")
        return
    import torch

    from growconv.network.explain import explain_sites
    from growconv.training.build import data_shape, make_model

    values = settings.plain(settings.compose(list(overrides)))
    shape = data_shape(values["data"])
    model = make_model(values, shape)
    channels, size, _ = shape
    print(explain_sites(model, torch.zeros(2, channels, size, size)))


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
    try:
        code = _dispatch(arguments)
        _leave_processes()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("stopped; go on with: growconv resume=RUN_DIR", file=sys.stderr)
        return 130
    except BrokenPipeError:
        failures.leave_closed_pipe()
        _complain("Standard output was closed before the end; a run goes on with growconv resume=RUN_DIR")
        return 141
    except failures.Stopped as error:
        _complain(str(error))
        return error.code
    except Exception as error:
        if asked_for_trace:
            traceback.print_exc()
        if isinstance(error, HydraException | OmegaConfBaseException):
            cause = f"\n{error.__cause__}" if error.__cause__ is not None else ""
            return _complain(f"{error}{cause}")
        return _complain(failures.explain(error))


def _leave_processes() -> None:
    """Close the process group of a torchrun start in good order; an exit with open connections can abort."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] == "sites":
        show_sites(arguments[1:])
        return 0
    if arguments and arguments[0] == "compare":
        from growconv.training.compare import main as compare

        return compare(arguments[1:]) or 0
    if arguments and arguments[0] == "report":
        from growconv.training.report import main as report

        return report(arguments[1:]) or 0
    trust = "trust=true" in arguments
    arguments = [argument for argument in arguments if argument not in ("trust=true", "trust=false")]
    resumed = [argument for argument in arguments if argument.startswith("resume=")]
    if resumed:
        others = [argument for argument in arguments if argument not in resumed]
        if len(resumed) > 1 or any(argument.startswith("-") for argument in others):
            raise ConfigError("one run is resumed at a time", where="resume", got=" ".join(arguments))
        resume(resumed[0].removeprefix("resume="), others, trust)
        return 0
    if not trust:
        _require_trusted_path(arguments)
    _with_hydra(arguments)
    return 0


def _require_trusted_path(arguments: list[str]) -> None:
    """Look into the config that --config-path names, as the command in a report does, before Hydra acts on it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn", default="config")
    given, others = parser.parse_known_args(arguments)
    if given.config_path is not None:
        from growconv.training.trust import require_trusted_file

        file = Path(given.config_path) / f"{given.config_name.removesuffix('.yaml')}.yaml"
        require_trusted_file(file, {argument.split("=")[0].lstrip("+") for argument in others})


def _with_hydra(arguments: list[str]) -> None:
    """Run Hydra on these arguments, with errors raised rather than printed."""
    if int(os.environ.get("RANK", "0")) > 0:
        arguments = [*arguments, *SILENT]
        logging.disable(logging.WARNING)
    before, shown = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [before[0] if before else "growconv", *arguments]
    decorate: Callable[[Any], Any] = hydra.main(
        version_base="1.3", config_path=str(settings.conf_dir()), config_name="config"
    )
    try:
        decorate(train)()
    finally:
        sys.argv = before
        if shown is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = shown


def _complain(text: str) -> int:
    shown = "".join(letter for letter in text if letter.isprintable() or letter == "\n")
    with suppress(OSError):  # the terminal may be gone
        print(f"growconv: {shown}", file=sys.stderr, flush=True)
    return 1
