"""The models of runs: `growconv.load_run`, and what the commands export and grow read."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growconv.errors import CheckpointError
from growconv.growth.validation import most_entries
from growconv.training.build import make_model
from growconv.training.checkpoint import AVERAGE, BEST, Checkpoint, find_checkpoint, restore
from growconv.training.config import stored_config
from growconv.training.devices import Devices
from growconv.training.rundir import CHECKPOINTS, RunDirectory
from growconv.training.trust import require_trusted_parts


def load_run(run: str | Path, *, best: bool = False, trust: bool = False) -> nn.Module:
    """The model of a run with its trained weights, in eval mode on the CPU.

    Args:
        run: the run directory, or one of its checkpoint files.
        best: the weights with the best validation accuracy instead of the last ones.
        trust: whether the run's config may build a model from outside growconv and torch.

    Returns:
        The model, grown as in the run; a plain `nn.Module`. If the run had trainer.ema, it has the averaged weights.

    Raises:
        CheckpointError: there is no run, or it is damaged.
        ConfigError: its model is not growconv's or torch's own, and `trust` is False.

    Example:
        >>> model = growconv.load_run("runs/mine")  # doctest: +SKIP
    """
    found = read_run(run, best)
    model = begun_model(found, trust)
    restore(found, model)
    prefix = f"{AVERAGE}module."
    average = {name.removeprefix(prefix): found.tensors[name] for name in found.tensors if name.startswith(prefix)}
    if average:
        try:
            model.load_state_dict(average)
        except RuntimeError as error:
            problem = "its weight average belongs to another model"
            raise CheckpointError(problem, where=str(found.path), got=error) from error
    return model.eval()


def read_run(run: str | Path, best: bool = False) -> Checkpoint:
    """The newest good checkpoint of a run, or its best one; a CheckpointError where there is none that a run wrote."""
    path = Path(run)
    if not path.exists():
        raise CheckpointError("there is no such run", where=str(path), fix="give the directory of a run")
    if path.is_dir() and not (path / CHECKPOINTS).is_dir() and path.name != CHECKPOINTS:
        RunDirectory(path).config()  # says that no run lies there
        fix = f"continue it: growconv resume={path}"
        raise CheckpointError("this run has no checkpoint yet", where=str(path), fix=fix)
    found = find_checkpoint(path / CHECKPOINTS / BEST if best and path.is_dir() else path)
    config: object = found.state.get("config")
    shape: Any = found.state.get("shape")
    usual = isinstance(shape, list) and len(shape) == 3 and all(type(size) is int and size > 0 for size in shape)
    if not isinstance(config, Mapping) or not usual or shape[0] * shape[1] ** 2 > most_entries(found.model.values()):
        raise CheckpointError(
            "this checkpoint was not written by a run of growconv",
            where=str(found.path),
            fix="build its model yourself, then growconv.load_checkpoint(path, model)",
        )
    return replace(found, state={**found.state, "config": stored_config(config, str(found.path))})


def begun_model(found: Checkpoint, trust: bool) -> nn.Module:
    """The model that a run began with, before any growth; draws no random number of the caller's.

    Args:
        found: what `read_run` gave.
        trust: whether it may be foreign code, or need far more memory than the checkpoint's tensors.
    """
    config, shape = found.state["config"], tuple(found.state["shape"])
    library = config["model"]["_target_"].startswith("growconv.training.libraries.")  # builds some not without memory
    if not trust:
        require_trusted_parts(config, found.path, "model")
    with torch.random.fork_rng(devices=[]):
        if not trust and not library:
            with torch.device("meta"):
                model = make_model({**config, "model": {**config["model"], "widths": {}}}, shape)
            needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
            if needed > (most := most_entries(found.model.values())):
                raise CheckpointError(
                    "The model of its config is far larger than what was saved.",
                    where=str(found.path),
                    expected=f"at most {most:,} entries",
                    got=f"{needed:,}",
                    fix="restore the file, or trust it: --trust, in Python load_run(run, trust=True)",
                )
        model = make_model(config, shape)
    return model.to(Devices(torch.device("cpu"), config["trainer"]["precision"]).dtype)


def distance(got: Tensor, wanted: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest entry of the second."""
    return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny))
