"""Growing on several devices: the same decision on all ranks, and a check that their models stay equal."""

import dataclasses
import hashlib
import io
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from growconv.errors import GrowthError, ScheduleError
from growconv.statistics.pair import PairStatistics
from growconv.statistics.samples import KeptBatch

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that grow the model together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that solves and writes."""
    return world_size() == 1 or dist.get_rank() == 0


def from_first(compute: Callable[[], T], device: torch.device | None = None) -> T:
    """Compute on rank 0 alone and give every rank the answer, through its device and with tensors there.

    Args:
        device: of this rank; None where the answer has no tensors: under NCCL the current GPU.

    Raises:
        Exception: on rank 0, what `compute` raised.
        GrowthError, OSError: the same on the others; for anything else a ScheduleError that tells of it.
    """
    if world_size() == 1:
        return compute()
    box, failure = [b""], None
    if is_first():
        outcome: tuple[Any, Exception | None] = None, None
        try:
            outcome = compute(), None
        except Exception as error:
            known = isinstance(error, GrowthError | OSError)
            told = error if known else ScheduleError("rank 0 failed", got=repr(error), where="rank 0")
            outcome, failure = (None, told), error
        stream = io.BytesIO()
        torch.save(outcome, stream)
        box[0] = stream.getvalue()
    dist.broadcast_object_list(box, src=0, device=None if device is None or device.type == "cpu" else device)
    answer, told = torch.load(io.BytesIO(box[0]), map_location=device or "cpu", weights_only=False)
    if told is not None:
        raise failure or told
    return answer


def summed(value: Tensor) -> Tensor:
    """The sum of a tensor, detached, over all ranks, the same bits on each."""
    if world_size() == 1:
        return value.detach()
    total = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def agreed(compute: Callable[[], T]) -> T:
    """Compute on every rank, without communication; what fails on one is raised on all: none waits for ever."""
    if world_size() == 1:
        return compute()
    answer, error = None, None
    try:
        answer = compute()
    except Exception as caught:
        error = caught
    messages: list[Any] = [None] * world_size()
    dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if failed:
        raise ScheduleError("growth failed on another rank", got=messages[failed[0]], where=f"rank {failed[0]}")
    return answer  # pyright: ignore[reportReturnType]


def require_same(value: object, what: str, fix: str | None = None) -> None:
    """Raise a ScheduleError on every rank where a value, which `what` names, is not the same on all."""
    if world_size() == 1:
        return
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    different = [rank for rank, other in enumerate(values) if other != values[0]]
    if different:
        ranks = ", ".join(map(str, different))
        raise ScheduleError(
            f"the ranks have different {what}",
            expected=f"the same on every rank: {values[0]}",
            got=f"rank {ranks} differs from rank 0: {values[different[0]]}",
            where=what,
            fix=fix,
        )


def reduce_statistics(statistics: dict[str, PairStatistics]) -> dict[str, PairStatistics]:
    """The statistics over the samples of all ranks, the same bits on each.

    They equal those of one process with all the samples up to rounding. Every rank has the same sites and quantities.
    Kept samples are joined on rank 0, which solves, in order of rank; the others keep their own.
    """
    if world_size() == 1:
        return statistics
    return {name: _reduced(statistics[name]) for name in sorted(statistics)}


def _reduced(own: PairStatistics) -> PairStatistics:
    device = next(own.growth_site.model.get_submodule(own.consumers[0].consumer).parameters()).device
    total = int(summed(torch.tensor(float(own.samples), dtype=torch.float64, device=device)).item())
    share = own.samples / total

    def average(value: Tensor) -> Tensor:
        return summed(value * share)

    consumers = []
    for held in own.consumers:
        each = held.settled()
        energy = torch.tensor(each.gradient_energy, dtype=torch.float64, device=device)
        moments = {key: average(each.moments[key]) for key in sorted(each.moments)}
        each = dataclasses.replace(each, samples=total, moments=moments, gradient_energy=float(average(energy)))
        if held.held is not None and each.N is not None:  # P has served
            moments = {key: each.moments[key] for key in held.moments} | {"N": each.N}
            each = dataclasses.replace(each, moments=moments)
        consumers.append(each)
    kept = own.samples_kept
    if kept is not None:
        batches = _gathered(kept.batches, own.growth_site.model, device)
        kept = dataclasses.replace(kept, batches=batches, consumers={each.consumer: each for each in consumers})
    return dataclasses.replace(
        own,
        samples=total,
        consumers=tuple(consumers),
        patch_mean=None if own.patch_mean is None else average(own.patch_mean),
        patch_gram=None if own.patch_gram is None else average(own.patch_gram),
        samples_kept=kept,
    )


class _Pickler(pickle.Pickler):
    """Pickles values without their tensors, which travel apart, and without modules, which every rank has."""

    def __init__(self, stream: io.BytesIO, model: nn.Module) -> None:
        super().__init__(stream)
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: object) -> tuple[str, int | str] | None:
        """What stands for a tensor or module."""
        if isinstance(value, Tensor):
            self.tensors.append(value.detach().cpu().clone())  # of a view the memory of all would travel
            return "tensor", len(self.tensors) - 1
        return ("module", self.paths[id(value)]) if id(value) in self.paths else None


class _Unpickler(pickle.Unpickler):
    """The way back, on a device and with this rank's own modules."""

    def __init__(self, stream: io.BytesIO, model: nn.Module, tensors: list[Tensor], device: torch.device) -> None:
        super().__init__(stream)
        self.model, self.tensors, self.device = model, tensors, device

    def persistent_load(self, stands_for: tuple[str, Any]) -> Tensor | nn.Module:
        """The tensor or module."""
        kind, which = stands_for
        return self.model.get_submodule(which) if kind == "module" else self.tensors[which].to(self.device)


def _gathered(batches: tuple[KeptBatch, ...], model: nn.Module, device: torch.device) -> tuple[KeptBatch, ...]:
    """On rank 0, which solves, the kept batches of all ranks in order; on the others their own."""
    stream = io.BytesIO()
    pickler = _Pickler(stream, model)
    pickler.dump(batches)
    parts: list[Any] | None = [None] * world_size() if is_first() else None
    dist.gather_object((stream.getvalue(), pickler.tensors), parts)
    if parts is None:
        return batches
    others = [_Unpickler(io.BytesIO(text), model, tensors, device).load() for text, tensors in parts[1:]]
    return tuple(batch for part in (batches, *others) for batch in part)


def parameter_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of all parameters: equal models have equal hashes."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_equal_parameters(model: nn.Module) -> None:
    """Raise a ScheduleError on every rank where the parameters of one differ."""
    if world_size() > 1:
        fix = "build the model from the same seed on every rank, and grow it through the scheduler on all of them"
        require_same(parameter_hash(model), "parameters", fix)


def rewrap(wrapper: DistributedDataParallel) -> DistributedDataParallel:
    """Wrap the grown model again: DDP only reduces gradients of parameters that existed when it was built."""
    own: dict[str, Any] = {} if wrapper.broadcast_buffers else {"broadcast_buffers": False}
    return DistributedDataParallel(
        wrapper.module,
        device_ids=wrapper.device_ids,
        output_device=wrapper.output_device,
        process_group=wrapper.process_group,
        find_unused_parameters=wrapper.find_unused_parameters,
        gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
        static_graph=wrapper.static_graph,
        **own,
    )
