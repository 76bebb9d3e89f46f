"""From a config to finished runs: the run itself, the fixed models it is compared with, the table and the report."""

import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from growconv import __version__
from growconv.errors import CheckpointError
from growconv.growth.distributed import from_first
from growconv.growth.scheduler import GrowthScheduler
from growconv.growth.when import too_late
from growconv.network.event import count_parameters
from growconv.reporting.terminal import make_console, shown
from growconv.training.build import check_output, grows, make_dataset, make_model
from growconv.training.checkpoint import Checkpoint, find_checkpoint
from growconv.training.config import changes, differences, is_longer, require_unchanged
from growconv.training.data import Dataset, require_kornia, seed_for
from growconv.training.devices import Devices, make_devices, seed_global_generators
from growconv.training.libraries import load_weights
from growconv.training.loop import Trainer, weight_shapes
from growconv.training.progress import closing_table
from growconv.training.rundir import RunDirectory
from growconv.training.schedules import decay_begins
from growconv.training.tracking import make_trackers, require_installed


def run(
    config: Mapping[str, Any], directory: str | Path, resume: bool = False, sweep: bool = False, name: str | None = None
) -> dict[str, Any]:
    """Train what a config says, and the fixed models that it asks to be compared with.

    Args:
        config: the whole config, resolved.
        directory: the run directory; each baseline has one of its own inside.
        resume: go on with the run that lies there, from its newest good checkpoint; a finished part is not run again.
        sweep: the run is one of many: what lies in its directory is gone on with, so that a sweep can be started again,
            and baselines are trained only where the config names them.
        name: what a sweep calls the run; None takes its directory's name.
    """
    require_installed(config["logger"])
    require_kornia(config)
    devices = make_devices(config["trainer"])
    directory = Path(from_first(lambda: str(directory)))
    with alone_in(directory, devices), ExitStack() as stack:
        if config["trainer"]["deterministic"] and not torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(True)  # only where it is wanted: a call imports torch._dynamo
            stack.callback(torch.use_deterministic_algorithms, False)
        resume = resume or (sweep and from_first(lambda: _holds_same_run(RunDirectory(directory), config)))
        dataset = make_dataset(config["data"]).to(devices.device)
        if devices.is_first and config["trainer"]["progress"] != "none":
            sizes = f"{len(dataset.train)} training, {len(dataset.validation)} validation, {len(dataset.test)} test"
            print(f"data: {sizes} samples", flush=True)
        title = f"grown, {config['growth']['method']}" if grows(config) else "fixed"
        if sweep:
            title = name or directory.name
        results = [(title, run_one(config, directory, devices, dataset, title, resume))]
        for size in baselines(config, sweep):
            fixed, title, inside = baseline_config(config, size), f"fixed {size}", directory / f"fixed_{size}"
            with alone_in(inside, devices):
                results.append((title, run_one(fixed, inside, devices, dataset, title, resume)))
        if devices.is_first:
            make_console().print(closing_table(results, dataset.score))
            if config["report"]:
                from growconv.reporting.report import write_report  # matplotlib is for the end

                print(f"report: {shown(write_report(directory))}")
    return results[0][1]


@contextmanager
def alone_in(directory: Path, devices: Devices) -> Iterator[None]:
    """Inside, rank 0 holds the lock of a run directory; where another process has it, every rank gets the error."""
    with ExitStack() as stack:
        from_first(lambda: stack.enter_context(RunDirectory(directory).locked()))
        yield


def run_one(
    config: Mapping[str, Any],
    directory: Path,
    devices: Devices,
    dataset: Dataset,
    title: str,
    resume: bool = False,
    origin: Path | None = None,
) -> dict[str, Any]:
    """Train one model of a whole config into one directory.

    Args:
        dataset: on the device.
        title: what progress and tables call it.
        resume: go on with what lies there, if anything does.
        origin: directory of a finished run whose last state this one begins with, lengths and rates being its own.
    """
    devices = devices.for_one_run()
    files = RunDirectory(directory, active=devices.is_first)
    found: Checkpoint | None = None
    if resume and from_first(lambda: files.finished and not is_longer(files.config(), config)):
        return from_first(files.summary)
    if resume:
        found = from_first(lambda: _found(files, config))
    begins = found is None
    if begins and origin is not None:
        found = from_first(lambda: find_checkpoint(origin))
    model = _placed_model(config, dataset, devices)
    weights = config["model"]["weights"]
    drawn = load_weights(model, weights, dataset.classes) if weights is not None and found is None else []
    trainer = Trainer(config, dataset, model, devices, files, title, found)
    if begins:
        about = {**environment(), "processes": devices.world_size, "layers": weight_shapes(model)}
        from_first(lambda: _start(files, config, about, resume))
    else:
        from_first(lambda: files.prolong(config))
    if devices.is_first:
        trainer.trackers = make_trackers(config, directory, None if begins else found)
    # From here on every process draws random numbers of its own, as for dropout.
    seed_global_generators(seed_for(config["seed"], "training", devices.rank))
    if found is not None:
        trainer.resume(found)
    sites = "" if trainer.scheduler is None else f", {len(trainer.scheduler.sites)} sites to grow"
    trainer.progress.say(f"{title}: {count_parameters(model):,} parameters{sites}")
    if drawn:
        trainer.progress.say(f"as drawn, since the weights are of other classes: {', '.join(drawn)}")
    for caution in () if trainer.scheduler is None else cautions(config, trainer.scheduler, trainer.total):
        trainer.progress.say(f"caution: {caution}")
    summary = trainer.fit()
    files.finish(summary)
    for tracker in trainer.trackers:
        tracker.finish(summary)
    return summary


def _placed_model(config: Mapping[str, Any], dataset: Dataset, devices: Devices) -> nn.Module:
    """The model as it begins, on the device; its outputs are checked for every size of the images."""
    seed_global_generators(seed_for(config["seed"], "weights"))
    model = make_model(config, dataset.shape).to(devices.device)
    if config["trainer"]["sync_batchnorm"] and devices.world_size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(devices.dtype)
    if config["trainer"]["channels_last"]:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for pixels in (None, *(int(side) for _, side in config["data"]["size"])):
        check_output(model, dataset, pixels)
    return model


def cautions(config: Mapping[str, Any], scheduler: GrowthScheduler, total: float | int) -> list[str]:
    """What is known to speak against the recipe of a run, before it begins; `total` is its length by its schedule."""
    marks = getattr(scheduler.when, "steps", None) or getattr(scheduler.when, "flops", None)
    late = too_late(marks[-1] / total, decay_begins(config["lr_schedule"])) if marks else None
    return [*([] if late is None else [late]), *scheduler.cautions()]


def baselines(config: Mapping[str, Any], sweep: bool) -> list[str]:
    """Names of the fixed models to train for comparison."""
    if config["baselines"] is not None:
        return list(config["baselines"])
    quick = config["data"]["name"] == "digits" and "name" not in config["model"] and not sweep
    return ["small", "large"] if quick and grows(config) else []


def baseline_config(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config of a fixed model: "small" is where the grown one starts, "large" the full model."""
    model, growth = config["model"], config["growth"]
    if name == "small":
        small = {"width": model["width"] * growth["start_width"], "hidden": model["hidden"] * growth["start"]}
        model = {**model, **small}
    return {**config, "model": model, "growth": {**growth, "method": "none"}, "baselines": []}


def environment() -> dict[str, Any]:
    """What tells, besides the config, how a run was made."""
    packages = ("torch", "numpy", "hydra-core", "safetensors")
    return {
        "command": sys.argv,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"growconv": __version__} | {name: version(name) for name in packages},
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    def ask(*command: str) -> str:
        git = ["git", "-C", str(Path(__file__).parent), *command]
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        modified = bool(ask("status", "--porcelain", "--untracked-files=no"))
        return {"commit": ask("rev-parse", "HEAD"), "modified": modified}
    except (OSError, subprocess.SubprocessError):
        return None


def _holds_same_run(files: RunDirectory, config: Mapping[str, Any]) -> bool:
    """Whether a run of this config lies in a directory of a sweep, finished or not."""
    if not (files.path / "config.yaml").is_file():
        return False
    fix = "give the sweep a directory of its own: hydra.sweep.dir=runs/NAME"
    require_unchanged(differences(files.config(), config), files.path, fix)
    return True


def _start(files: RunDirectory, config: Mapping[str, Any], about: Mapping[str, Any], resume: bool) -> None:
    if resume:  # killed before its first checkpoint: from the beginning, in the same place
        for name in ("metrics.jsonl", "growth.jsonl"):
            (files.path / name).unlink(missing_ok=True)
    files.start(config, about)


def _found(files: RunDirectory, config: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint to go on from; None where the run was stopped before it wrote one."""
    if not any(files.checkpoints.glob("*.safetensors")):
        return None
    found = find_checkpoint(files.path)
    stored, where = found.state.get("config"), str(found.path)
    if not isinstance(stored, Mapping):
        got = type(stored).__name__
        raise CheckpointError("The checkpoint contains no config of a run.", where=where, got=got)
    fix = "resume with the settings that the run was started with, or start a new run"
    require_unchanged(changes(stored, config), where, fix)
    return found
