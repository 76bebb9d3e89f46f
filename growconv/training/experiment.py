"""From a config to finished runs: the run itself, the fixed models it is compared with, the table and the report."""

import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from growconv.errors import CheckpointError, ConfigError
from growconv.training import report
from growconv.training.build import (
    check_output,
    grows,
    make_dataset,
    make_loss,
    make_model,
    make_scheduler,
)
from growconv.training.checkpoint import Checkpoint, find_checkpoint
from growconv.training.config import differences
from growconv.training.data import Dataset, seed_for, steps_per_epoch
from growconv.training.devices import make_fabric, on_first
from growconv.training.loop import Trainer, global_batch_size
from growconv.training.progress import closing_table, make_console
from growconv.training.rundir import RunDirectory
from growconv.training.schedules import make_lr_schedule, make_optimizer
from growconv.training.tracking import make_tracker

BASELINES = ("small", "large")


def run(config: Mapping[str, Any], directory: str | Path, resume: bool = False, sweep: bool = False) -> dict[str, Any]:
    """Train what a config says, and the fixed models that it asks to be compared with.

    Args:
        config: the whole config, resolved.
        directory: the run directory; each baseline has one of its own inside.
        resume: go on with the run that lies there, from its newest good checkpoint; a finished part is not run again.
        sweep: the run is one of many: what lies in its directory is gone on with, so that a sweep can be started again,
            and baselines are trained only where the config names them.

    Returns:
        The summary of the run.

    Raises:
        GrowthError: what is wrong with config, data, model or directory.
    """
    fabric = make_fabric(config["trainer"])
    directory = Path(on_first(fabric, lambda: str(directory)))
    with _alone_in(directory, fabric):
        resume = resume or (sweep and on_first(fabric, lambda: _holds_same_run(RunDirectory(directory), config)))
        if config["trainer"]["deterministic"]:
            torch.use_deterministic_algorithms(True)
        dataset = make_dataset(config["data"]).to(fabric.device)
        named = baselines(config, sweep)
        title = f"grown, {config['growth']['method']}" if grows(config) else "fixed"
        results = [(title, run_one(config, directory, fabric, dataset, title, resume))]
        for name in named:
            fixed, title, inside = baseline_config(config, name), f"fixed {name}", directory / f"fixed_{name}"
            with _alone_in(inside, fabric):
                results.append((title, run_one(fixed, inside, fabric, dataset, title, resume)))
        if fabric.is_global_zero:
            if config["trainer"]["progress"] != "none":
                make_console().print(closing_table(results, "R²" if dataset.regression else "accuracy"))
            if config["report"]:
                report.main([str(directory)])
    return results[0][1]


@contextmanager
def _alone_in(directory: Path, fabric: Fabric) -> Iterator[None]:
    """Inside, rank 0 holds the lock of a run directory; where another process has it, every rank gets the error."""
    with ExitStack() as stack:
        on_first(fabric, lambda: stack.enter_context(RunDirectory(directory).locked()))
        yield


def run_one(
    config: Mapping[str, Any], directory: Path, fabric: Fabric, dataset: Dataset, title: str, resume: bool = False
) -> dict[str, Any]:
    """Train one model into one directory.

    Args:
        config: the whole config, resolved.
        directory: where it writes.
        fabric: device, precision and processes.
        dataset: on the device.
        title: what progress and tables call it.
        resume: go on with what lies there, if anything does.

    Returns:
        The summary.
    """
    files = RunDirectory(directory, active=fabric.is_global_zero)
    found: Checkpoint | None = None
    if resume and on_first(fabric, lambda: files.finished):
        return on_first(fabric, files.summary)
    if resume:
        found = on_first(fabric, lambda: _found(files, config))
    torch.manual_seed(seed_for(config["seed"], "weights"))
    model = make_model(config, (dataset.channels, dataset.image_size, dataset.classes)).to(fabric.device)
    if config["trainer"]["sync_batchnorm"] and fabric.world_size > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config["trainer"]["precision"] in ("bf16-true", "64-true"):
        model = model.to(torch.bfloat16 if config["trainer"]["precision"] == "bf16-true" else torch.float64)
    if config["trainer"]["channels_last"]:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    check_output(model, dataset)
    optimizer = make_optimizer(config["optimizer"], model)
    batch_size = global_batch_size(config, dataset, fabric.world_size)
    total = steps_per_epoch(len(dataset.train), batch_size) * config["trainer"]["epochs"]
    example = dataset.inputs(dataset.train, torch.arange(2)).to(next(model.parameters()).dtype)
    scheduler = make_scheduler(config, model, optimizer, example, total)
    loss = make_loss(dataset, config["trainer"]["label_smoothing"])
    lr_schedule = make_lr_schedule(config["lr_schedule"], total)
    if found is None:
        on_first(fabric, lambda: _start(files, config, fabric, resume))
    if fabric.is_global_zero:
        identity = found.state.get("tracker") if found is not None else None
        tracker = make_tracker(config["logger"], config, directory, directory.name, identity)
    else:
        tracker = make_tracker({"name": "none"}, config, directory, directory.name)
    trainer = Trainer(config, dataset, model, optimizer, scheduler, loss, lr_schedule, fabric, files, tracker, title)
    # From here on every process draws random numbers of its own (dropout).
    torch.manual_seed(seed_for(config["seed"], "training", fabric.global_rank))
    if found is not None:
        trainer.resume(found)
    summary = trainer.fit()
    files.finish(summary)
    tracker.finish(summary)
    return summary


def baselines(config: Mapping[str, Any], sweep: bool) -> list[str]:
    """Names of the fixed models to train for comparison.

    Raises:
        ConfigError: an unknown name, or a run that does not grow.
    """
    wanted = config["baselines"]
    if wanted is None:
        quick = config["data"]["name"] == "digits" and not sweep
        return list(BASELINES) if quick and grows(config) else []
    unknown = [name for name in wanted if name not in BASELINES]
    if unknown:
        raise ConfigError("there is no such baseline", where="baselines", expected=", ".join(BASELINES), got=unknown)
    if wanted and not grows(config):
        raise ConfigError(
            "a fixed run has no baselines", where="baselines", got=wanted, fix="choose a growth, or baselines=[]"
        )
    return list(wanted)


def baseline_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config of a fixed model: "small" is where the grown one starts, "large" the full model.

    Args:
        config: the config of the growing run.
        name: an entry of BASELINES.
    """
    model, growth = dict(config["model"]), dict(config["growth"])
    if name == "small":
        model |= {"width": model["width"] * growth["start_width"], "hidden": model["hidden"] * growth["start"]}
    growth["method"] = "none"
    return {**config, "model": model, "growth": growth, "baselines": []}


def environment() -> dict[str, Any]:
    """What tells, besides the config, how a run was made."""
    packages = ("growconv", "torch", "numpy", "lightning-fabric", "safetensors")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in packages},
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    folder = Path(__file__).resolve().parent

    def ask(*command: str) -> str:
        answer = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=True
        )
        return answer.stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "modified": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _holds_same_run(files: RunDirectory, config: Mapping[str, Any]) -> bool:
    """Whether a run of this config lies in a directory of a sweep, finished or not."""
    if not (files.path / "config.yaml").is_file():
        return False
    changed = differences(files.config(), config)
    if changed:
        raise ConfigError(
            "a run with other settings lies in this directory of the sweep",
            where=str(files.path),
            got="\n    ".join(["", *changed]),
            fix="give the sweep a directory of its own: hydra.sweep.dir=runs/NAME",
        )
    return True


def _start(files: RunDirectory, config: Mapping[str, Any], fabric: Fabric, resume: bool) -> None:
    if resume:  # killed before its first checkpoint: from the beginning, in the same place
        files.path.mkdir(parents=True, exist_ok=True)
        files.rewind([], [])
        (files.path / "metrics.jsonl").unlink()
        (files.path / "growth.jsonl").unlink()
    files.start(config, {**environment(), "processes": fabric.world_size})


def _found(files: RunDirectory, config: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint to go on from; None where the run was stopped before it wrote one."""
    if not files.checkpoints.is_dir() or not any(files.checkpoints.glob("*.safetensors")):
        return None
    found = find_checkpoint(files.path)
    stored = found.state.get("config")
    if not isinstance(stored, Mapping):
        raise CheckpointError(
            "The checkpoint holds no config of a run.", where=str(found.path), got=type(stored).__name__
        )
    changed = differences(stored, config)
    if changed:
        raise CheckpointError(
            "the run was made with another config",
            where=str(found.path),
            got="\n    ".join(["", *changed]),
            fix="resume with the settings that the run was started with, or start a new run",
        )
    return found
