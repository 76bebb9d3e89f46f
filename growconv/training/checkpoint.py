"""Checkpoints: one safetensors file with its state as JSON inside and a checksum over both; nothing is pickled.

A checkpoint of a grown model holds its growth history, so that it loads into the small model that the run began with.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from growconv.errors import ArgumentTypeError, CheckpointError
from growconv.growth.scheduler import GrowthScheduler
from growconv.growth.validation import history_from, rehearse
from growconv.network.entry_ages import follow_ages
from growconv.network.event import GrowthHistory
from growconv.network.optimizer import Journal, as_optimizers
from growconv.reporting.records import read_json, replacing
from growconv.training import optimizer_record

FORMAT = "growconv checkpoint 1"
AVERAGE = "average/"
"""Before the names of the tensors of a run's moving average."""
LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        path: the file that was read.
        model: the model's state_dict.
        optimizer: the optimizer's state_dict; None where none was saved.
        scheduler: the GrowthScheduler's state; None where none was saved.
        history: how the model grew; empty for a fixed one.
        state: whatever JSON-able mapping was saved along.
        tensors: whatever tensors were saved along.
    """

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    history: GrowthHistory = field(default_factory=GrowthHistory)
    state: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: GrowthScheduler | None = None,
    history: GrowthHistory | None = None,
    state: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save a model and what is needed to continue its training, atomically: a crash or a full disk leaves the old file.

    Args:
        path: the file to write, usually with the suffix .safetensors.
        model: the raw model.
        optimizer: its optimizer.
        scheduler: its growth scheduler, whose history is saved too.
        history: how the model grew, if no scheduler grew it: GrowthHistory([event, ...]).
        state: further JSON-able values.
        tensors: further tensors.

    Raises:
        CheckpointError: the file could not be written, or a value is not JSON-able.

    Example:
        >>> path = growconv.save_checkpoint(folder / "model.safetensors", model, optimizer)
    """
    path = Path(path)
    weights = model.state_dict()
    strange = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError("state that is no tensor cannot be saved", where=", ".join(strange[:5]))
    content = {f"model/{name}": tensor for name, tensor in weights.items()}
    content |= {f"tensors/{name}": tensor for name, tensor in (tensors or {}).items()}
    if history is None:
        history = scheduler.history if scheduler is not None else GrowthHistory()
    record: dict[str, Any] = {
        "history": json.loads(history.to_json()),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "optimizer": None,
        "state": dict(state or {}),
    }
    if optimizer is not None:
        record["optimizer"], moments = optimizer_record.split(optimizer.state_dict())
        content |= moments
    # Copies: safetensors refuses tensors that share storage, as tied weights do.
    content = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in content.items()
    }
    try:
        text = json.dumps(record)
    except TypeError as error:
        problem, fix = "a value to be saved cannot be written as JSON", "pass tensors in `tensors`, names for objects"
        raise CheckpointError(problem, where=str(path), got=error, fix=fix) from error
    metadata = {"format": FORMAT, "record": text, "sha256": _digest(text, content)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(content, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "the checkpoint could not be written; the old one is unchanged",
            where=str(path),
            got=error,
            fix="free some space or write elsewhere, then resume",
        ) from error
    return path


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read one checkpoint file and compare its checksum; a CheckpointError where it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("there is no such checkpoint", where=str(path), fix="give a file, or a run's directory")
    damaged = "restore the file, or resume from another checkpoint of the run"
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            content = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError("the file is truncated or damaged", where=str(path), got=error, fix=damaged) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            "this is not a checkpoint of growconv", where=str(path), expected=FORMAT, got=metadata.get("format")
        )
    text = metadata.get("record", "")
    if metadata.get("sha256") != _digest(text, content):
        raise CheckpointError("the file is damaged: its checksum differs", where=str(path), fix=damaged)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in content.items() if name.startswith(prefix)}

    try:
        record = read_json(text)
        optimizer, scheduler, history = record["optimizer"], record["scheduler"], record["history"]
        if not isinstance(record["state"], dict) or (
            scheduler is not None and scheduler["history"] != history["events"]
        ):
            raise ValueError("its parts do not belong together")
        history_from(history["events"])  # compares each field with its type
        return Checkpoint(
            path=path,
            model=part("model/"),
            optimizer=None if optimizer is None else optimizer_record.join(optimizer, part("optimizer/")),
            scheduler=scheduler,
            history=GrowthHistory.from_json(json.dumps(history)),
            state=record["state"],
            tensors=part("tensors/"),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, CheckpointError) as error:
        raise CheckpointError(
            "the file is damaged: its record cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            fix=damaged,
        ) from error


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The newest good checkpoint of a run: the last one, or the one before where the last is damaged (with a warning).

    Args:
        path: a run's directory, its checkpoint folder, or one file.

    Raises:
        CheckpointError: there is none, or all of them are damaged; names each file.
    """
    path = Path(path)
    if path.is_file():
        return read_checkpoint(path)
    folder = path / "checkpoint" if (path / "checkpoint").is_dir() else path
    failures: list[CheckpointError] = []
    for name in (LAST, PREVIOUS, BEST):
        if not (folder / name).is_file():
            continue
        try:
            found = read_checkpoint(folder / name)
        except CheckpointError as error:
            failures.append(error)
            continue
        for failure in failures:
            warnings.warn(f"{failure}\n  continuing from {found.path} instead", stacklevel=2)
        return found
    if failures:
        raise CheckpointError(
            "every checkpoint is damaged",
            where=str(folder),
            got="; ".join(f"{failure.where}: {failure.problem}" for failure in failures),
            fix="start the run again",
        ) from failures[0]
    raise CheckpointError("there is no checkpoint here", where=str(folder), expected=LAST, fix="start the run again")


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizer: Optimizer | None = None, scheduler: GrowthScheduler | None = None
) -> Checkpoint:
    """Load a checkpoint into a model, in place; the model may be the small one of the start or have the saved shapes.

    Args:
        path: a checkpoint file, a run's directory or its checkpoint folder.
        model: the raw model that the run began with, or the grown one.
        optimizer: a fresh optimizer of that model.
        scheduler: a fresh growth scheduler of both.

    Returns:
        What was read, including further state.

    Raises:
        CheckpointError: the file is damaged or belongs to another model, optimizer or schedule. Nothing has changed
            then.

    Example:
        >>> fresh = copy.deepcopy(model)
        >>> event = growconv.shrink(model, sites[0], [0])
        >>> history = growconv.GrowthHistory([event])
        >>> path = growconv.save_checkpoint(folder / "model.safetensors", model, history=history)
        >>> checkpoint = growconv.load_checkpoint(path, fresh)
        >>> fresh[0].out_channels
        3
    """
    found = find_checkpoint(path)
    restore(found, model, optimizer, scheduler)
    return found


def restore(
    found: Checkpoint, model: nn.Module, optimizer: Optimizer | None = None, scheduler: GrowthScheduler | None = None
) -> None:
    """What `load_checkpoint` does once the checkpoint is read."""
    where = str(found.path)
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("a model is needed", expected="torch.nn.Module", got=type(model).__name__)
    if optimizer is not None and found.optimizer is None:
        raise CheckpointError("no optimizer was saved", where=where, fix="load without one")
    if scheduler is not None and found.scheduler is None:
        raise CheckpointError("no growth scheduler was saved", where=where, fix="load without one")
    grown = not _mismatches(model, found.model)
    wrong = _mismatches(model if grown else rehearse(found.history, model, found.model.values()), found.model)
    if wrong:
        raise CheckpointError(
            "the checkpoint belongs to another model",
            where=where,
            got="; ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""),
            fix="build the model with the run's own settings, before any growth",
        )
    own = set(model.parameters())
    members = [] if optimizer is None else [each for group in optimizer.param_groups for each in group["params"]]
    if not own.issuperset(members):
        problem = "the optimizer holds parameters that the model does not have"
        raise CheckpointError(problem, where=where, fix="build it from this model's parameters")
    journal = Journal(model, as_optimizers(optimizer), [*model.parameters(), *model.buffers()])
    try:
        if not grown:
            found.history.replay(model, optimizer)
        if optimizer is not None and found.optimizer is not None:
            optimizer_record.check(found.optimizer, optimizer, where)
        if scheduler is not None and found.scheduler is not None:
            scheduler.check_state_dict(found.scheduler)
        model.load_state_dict(found.model)
        if optimizer is not None and found.optimizer is not None:
            optimizer.load_state_dict(optimizer_record.with_tuples(found.optimizer, optimizer))
            follow_ages([optimizer])
        if scheduler is not None and found.scheduler is not None:
            scheduler.load_state_dict(found.scheduler)
    except BaseException:
        journal.restore()
        raise


def replay(found: Checkpoint, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Give a fresh small model, and its optimizer, the shapes of a checkpoint; all or nothing. `restore` fills it."""
    rehearse(found.history, model, found.model.values())
    found.history.replay(model, optimizer)


@dataclass
class Position:
    """Where a run stands; all of it goes into the checkpoint."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # finished epochs
    batch: int = 0  # batches of the present epoch done
    loss_sum: float = 0.0  # training loss summed over the present epoch's samples, as of the checkpoint
    hits: float = 0.0  # correct answers among them
    step_flops: float = 0.0  # FLOPs of all training steps so far
    growth_flops: float = 0.0  # FLOPs of all growth rounds so far, of all processes
    deepened: int = 0  # rounds of growth in depth so far
    seconds: float = 0.0  # wall-clock seconds of training, evaluation and growth
    growth_seconds: float = 0.0  # those spent on growing
    best: float | None = None  # best validation accuracy so far
    first_loss: float | None = None  # training loss of the first batch, to measure progress against
    metrics: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics.jsonl


_JSON: dict[Any, Any] = {int: int, float: int | float, float | None: int | float | None, list[dict[str, Any]]: list}


def position_of(found: Checkpoint) -> Position:
    """Where a checkpoint's run stands, each number of the type that it has in a run; else a CheckpointError."""
    try:
        position = Position(**found.state["position"])
    except (KeyError, TypeError) as error:
        raise damaged_state(found, error) from error
    for entry in fields(Position):
        value = getattr(position, entry.name)
        if not isinstance(value, _JSON[entry.type]) or isinstance(value, bool):
            raise damaged_state(found, f"{entry.name}: {value!r}")
    for line in position.metrics:
        if not isinstance(line, dict) or not all(type(value) in (int, float) for value in line.values()):
            raise damaged_state(found, "metrics that are no numbers")
    return position


def damaged_state(found: Checkpoint, got: object) -> CheckpointError:
    """The error for a checkpoint whose state is no run's."""
    return CheckpointError(
        "The checkpoint does not say where its run stands.",
        where=str(found.path),
        got=got,
        fix="restore the file, or load its weights with growconv.load_checkpoint",
    )


def save_in_turn(folder: Path, best: bool, **content: Any) -> None:
    """Write the last checkpoint of a run, and keep the one before it; at no moment is there none that is whole."""
    last, fresh = folder / LAST, folder / f".{LAST}.fresh"
    save_checkpoint(fresh, **content)
    copies = [(last, PREVIOUS)] if last.exists() else []
    for source, name in [*copies, (fresh, BEST)] if best else copies:
        try:
            with replacing(folder / name) as temporary:
                shutil.copyfile(source, temporary)
        except OSError as error:
            problem, fix = "the checkpoint could not be copied", "free some space, then resume"
            raise CheckpointError(problem, where=str(folder / name), got=error, fix=fix) from error
    os.replace(fresh, last)


def _mismatches(model: nn.Module, saved: Mapping[str, Tensor]) -> list[str]:
    own = model.state_dict()
    lines = [f"{name} is missing in the checkpoint" for name in own if name not in saved]
    lines += [f"{name} is unknown to the model" for name in saved if name not in own]
    lines += [
        f"{name} is {tuple(saved[name].shape)} in the checkpoint, {tuple(tensor.shape)} in the model"
        for name, tensor in own.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    return lines


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()
