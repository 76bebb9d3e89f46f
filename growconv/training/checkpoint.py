"""Checkpoints: one safetensors file with its state as JSON inside and a checksum over both; nothing is pickled.

A checkpoint of a grown model holds its growth history, so that it loads into the small model that the run began with.
"""

import copy
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from growconv.errors import ArgumentTypeError, CheckpointError
from growconv.growth.history import GrowthHistory
from growconv.growth.scheduler import GrowthScheduler
from growconv.network.optimizer import follow_ages

FORMAT = "growconv checkpoint 1"
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
    """Write a model and what its training needs to go on, in one step: a crash or a full disk leaves the old file.

    Args:
        path: the file to write, by custom with the suffix .safetensors.
        model: the raw model.
        optimizer: its optimizer.
        scheduler: its growth scheduler, whose history is saved too.
        history: how the model grew, where no scheduler grew it: GrowthHistory([event, ...]).
        state: further JSON-able values.
        tensors: further tensors.

    Returns:
        The path.

    Raises:
        CheckpointError: the file could not be written, or a value is not JSON-able.
    """
    path = Path(path)
    content = {f"model/{name}": tensor for name, tensor in _model_state(model).items()}
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
        record["optimizer"], moments = _split_optimizer(optimizer.state_dict())
        content |= moments
    # Copies: safetensors refuses tensors that share storage, as tied weights do.
    content = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in content.items()
    }
    try:
        text = json.dumps(record)
    except TypeError as error:
        raise CheckpointError(
            "a value to be saved is not JSON",
            where=str(path),
            got=error,
            fix="pass tensors in `tensors`, names for objects",
        ) from error
    metadata = {"format": FORMAT, "record": text, "sha256": _digest(text, content)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(content, temporary, metadata)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            "the checkpoint could not be written; what was there before still is",
            where=str(path),
            got=error,
            fix="free some space or write elsewhere, then resume",
        ) from error
    return path


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read one checkpoint file and compare its checksum.

    Args:
        path: the file.

    Raises:
        CheckpointError: missing, truncated, altered or no checkpoint of growconv.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("there is no such checkpoint", where=str(path), fix="give a file, or a run's directory")
    damaged = "restore the file, or resume from another checkpoint of the run"
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            content = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError("truncated or damaged", where=str(path), got=error, fix=damaged) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError("no checkpoint of growconv", where=str(path), expected=FORMAT, got=metadata.get("format"))
    text = metadata.get("record", "")
    if metadata.get("sha256") != _digest(text, content):
        raise CheckpointError("damaged: its checksum differs", where=str(path), fix=damaged)
    record = json.loads(text)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in content.items() if name.startswith(prefix)}

    optimizer = record["optimizer"]
    return Checkpoint(
        path=path,
        model=part("model/"),
        optimizer=None if optimizer is None else _join_optimizer(optimizer, part("optimizer/")),
        scheduler=record["scheduler"],
        history=GrowthHistory.from_json(json.dumps(record["history"])),
        state=record["state"],
        tensors=part("tensors/"),
    )


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
            warnings.warn(f"{failure}\n  going on from {found.path} instead", stacklevel=2)
        return found
    if failures:
        raise CheckpointError(
            "every checkpoint is damaged",
            where=str(folder),
            got="; ".join(f"{failure.where}: {failure.problem}" for failure in failures),
            fix="start the run again",
        ) from failures[0]
    raise CheckpointError("no checkpoint here", where=str(folder), expected=LAST, fix="start the run again")


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: GrowthScheduler | None = None,
) -> Checkpoint:
    """Bring a model, fresh and small or of the saved shapes, to where the checkpoint was saved; in place.

    Args:
        path: a checkpoint file, a run's directory or its checkpoint folder.
        model: the raw model as the run began with it, or already grown.
        optimizer: a fresh optimizer of that model.
        scheduler: a fresh growth scheduler of both.

    Returns:
        What was read, further state included.

    Raises:
        CheckpointError: damaged, or of another model, optimizer or schedule. Nothing has changed then.
    """
    found = find_checkpoint(path)
    restore(found, model, optimizer, scheduler)
    return found


def restore(
    found: Checkpoint, model: nn.Module, optimizer: Optimizer | None = None, scheduler: GrowthScheduler | None = None
) -> None:
    """What `load_checkpoint` does once the checkpoint is read."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("a model is needed", expected="torch.nn.Module", got=type(model).__name__)
    if optimizer is not None and found.optimizer is None:
        raise CheckpointError("no optimizer was saved", where=str(found.path), fix="load without one")
    if scheduler is not None and found.scheduler is None:
        raise CheckpointError("no growth scheduler was saved", where=str(found.path), fix="load without one")
    grown = not _mismatches(model, found.model)
    if not grown:
        _rehearse(found, model)
    if optimizer is not None:
        _check_optimizer(found, model, optimizer)
    if not grown:
        old = {id(parameter): name for name, parameter in model.named_parameters()}
        found.history.replay(model)
        if optimizer is not None:
            _follow(optimizer, old, dict(model.named_parameters()))
    model.load_state_dict(found.model)
    if optimizer is not None and found.optimizer is not None:
        optimizer.load_state_dict(_with_tuples(found.optimizer, optimizer))
        follow_ages([optimizer])
    if scheduler is not None and found.scheduler is not None:
        scheduler.load_state_dict(found.scheduler)


class CheckpointFolder:
    """The last, the previous and the best checkpoint of a run.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, best: bool, **content: Any) -> None:
        """Write a new last checkpoint; at no moment is there none that is whole.

        Args:
            best: whether it is the best so far, too.
            **content: arguments of `save_checkpoint` but for the path.
        """
        last, fresh = self.folder / LAST, self.folder / f".{LAST}.fresh"
        save_checkpoint(fresh, **content)
        if last.exists():
            _replace_by_copy(last, self.folder / PREVIOUS)
        if best:
            _replace_by_copy(fresh, self.folder / BEST)
        os.replace(fresh, last)


def _replace_by_copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.writing")
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            "the checkpoint could not be copied", where=str(target), got=error, fix="free some space, then resume"
        ) from error


def _model_state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError("state that is no tensor cannot be saved", where=", ".join(strange[:5]))
    return state


def _rehearse(found: Checkpoint, model: nn.Module) -> None:
    """Replay the history on a copy, to know that it fits before anything changes."""
    twin = copy.deepcopy(model)
    found.history.replay(twin)
    wrong = _mismatches(twin, found.model)
    if wrong:
        raise CheckpointError(
            "the checkpoint belongs to another model",
            where=str(found.path),
            got="; ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""),
            fix="build the model with the run's own settings, before any growth",
        )


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


def _check_optimizer(found: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    if found.optimizer is None:
        return
    saved = [len(group["params"]) for group in found.optimizer["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if saved != own:
        raise CheckpointError(
            "the optimizer's groups differ from the saved ones",
            where=str(found.path),
            expected=f"groups of {saved} parameters",
            got=own,
            fix="build the optimizer as the run did",
        )
    known = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) not in known for group in optimizer.param_groups for parameter in group["params"]):
        raise CheckpointError(
            "the optimizer holds parameters that the model does not have",
            where=str(found.path),
            fix="build it from this model's parameters",
        )


def _follow(optimizer: Optimizer, old: Mapping[int, str], new: Mapping[str, nn.Parameter]) -> None:
    """Put the replayed parameters in the places that the small ones had in the optimizer's groups."""
    for group in optimizer.param_groups:
        group["params"][:] = [new[old[id(parameter)]] for parameter in group["params"]]


def _split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The optimizer's state as a JSON-able record and its tensors."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        plain[str(index)] = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                plain[str(index)][key] = value
    return {"state": plain, "param_groups": state["param_groups"]}, tensors


def _join_optimizer(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in record["state"].items()}
    for name, tensor in tensors.items():
        index, key = name.split("/", 1)
        state[int(index)][key] = tensor
    return {"state": state, "param_groups": record["param_groups"]}


def _with_tuples(saved: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """JSON knows no tuples: options that are tuples in the optimizer (betas) become tuples again."""

    def restored(group: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        return {key: tuple(value) if isinstance(own.get(key), tuple) else value for key, value in group.items()}

    groups = zip(saved["param_groups"], optimizer.param_groups, strict=True)
    return {"state": saved["state"], "param_groups": [restored(group, own) for group, own in groups]}


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for chunk in _chunks(tensors):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    for name in sorted(tensors):
        tensor = tensors[name]
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
