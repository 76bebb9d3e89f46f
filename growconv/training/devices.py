"""Devices, precision and processes of a run: torch's autocast, gradient scaling and DistributedDataParallel.

Processes are those that torchrun started and describes in the environment (RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE); nothing else of the environment is read, so that a run inside a Slurm job is what it is elsewhere.
"""

import os
import random
import resource
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np

# numpy loads it when it is first asked for, which would be the first save: Cython drops a Ctrl-C that comes meanwhile.
import numpy.random as numpy_random
import torch
import torch.distributed as dist

# Its defaults hold the process group that is there when it is imported. Were that after the group is made (as
# DistributedDataParallel would do), gloo's threads would outlive the group, and some abort the process as it ends.
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from growconv.errors import ConfigError
from growconv.training.config import no_sync_batchnorm

PATIENCE = timedelta(minutes=30)
"""How long the processes of a run wait for one another before they give up."""

_PARAMETERS = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Devices:
    """Where and how a process of a run computes."""

    device: torch.device  # its device
    precision: str = "32-true"  # as trainer.precision
    rank: int = 0  # number of this process, from 0
    world_size: int = 1  # processes of the run
    scaler: torch.amp.GradScaler | None = None  # keeps small float16 gradients from vanishing; see `for_one_run`

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def for_one_run(self) -> "Devices":
        """The same with a scaler that no other run has used."""
        return replace(self, scaler=torch.amp.GradScaler(self.device.type) if self.precision == "16-mixed" else None)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        return _PARAMETERS.get(self.precision, torch.float32)

    def wrap(self, model: nn.Module, backend: str | None) -> nn.Module:
        """The model as it is trained: gradients averaged over all processes, and compiled, unless `backend` is None."""
        if self.world_size > 1:
            model = DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)
        return torch.compile(model, backend=backend) if backend else model  # pyright: ignore[reportReturnType]

    def forward(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """The model's output in this precision, as float32 or finer for the loss.

        The forward pass runs under autocast, or makes its own tensors in the parameters' dtype.
        """
        before = torch.get_default_dtype()
        mixed = _AUTOCAST.get(self.precision)
        torch.set_default_dtype(_PARAMETERS.get(self.precision, before))
        try:
            with nullcontext() if mixed is None else torch.autocast(self.device.type, mixed):
                output = model(inputs)
        finally:
            torch.set_default_dtype(before)
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def accumulating(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """A block whose gradients stay with this process: all parts of a batch but the last."""
        return wrapped.no_sync() if self.world_size > 1 else nullcontext()  # pyright: ignore[reportCallIssue]

    def backward(self, loss: Tensor) -> None:
        """The backward pass of a loss, scaled where the precision needs it."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, optimizer: Optimizer, clip: float | None) -> None:
        """One step on the gradients that lie there, clipped to a norm unless it is None; they are gone afterwards."""
        if clip:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, clip)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        optimizer.zero_grad()

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank rank 0's buffers (running statistics of norm layers), which each rank has of its own."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def peak_memory(self) -> int:
        """The most bytes that this process has held so far: allocated by torch on a GPU, else resident in all."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def random_states(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The random states of all ranks: torch's as tensors, NumPy's and Python's as JSON-able values."""
        torchs = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            torchs["cuda"] = torch.cuda.get_rng_state()
        version, state, gauss = random.getstate()
        numpy: Any = numpy_random.get_state()  # noqa: NPY002 (whatever draws from it has to go on)
        own = torchs, {"python": [version, list(state), gauss], "numpy": [numpy[0], numpy[1].tolist(), *numpy[2:]]}
        gathered: list[Any] = [own] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(gathered, own)
        tensors: dict[str, Tensor] = {}
        for rank, (states, _) in enumerate(gathered):
            tensors |= {f"random/{rank}/{name}": states[name] for name in states}
        return tensors, {str(rank): values for rank, (_, values) in enumerate(gathered)}

    def set_random_states(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over this rank's part of what `random_states` gave."""
        rank = self.rank
        torch.set_rng_state(tensors[f"random/{rank}/cpu"])
        if self.device.type == "cuda" and f"random/{rank}/cuda" in tensors:
            torch.cuda.set_rng_state(tensors[f"random/{rank}/cuda"])
        version, state, gauss = values[str(rank)]["python"]
        random.setstate((version, tuple(state), gauss))
        name, keys, *rest = values[str(rank)]["numpy"]
        numpy_random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002


def seed_global_generators(seed: int) -> None:
    """Seed what models and data may draw from without a generator of their own: torch, numpy and Python."""
    torch.manual_seed(seed)
    numpy_random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def make_devices(trainer: Mapping[str, Any]) -> Devices:
    """Device, precision and processes of the group trainer, or a ConfigError; joins the processes of torchrun."""
    accelerator, gpus, backend = trainer["accelerator"], torch.cuda.device_count(), trainer["compile"]
    if accelerator == "auto":
        accelerator = "cuda" if gpus else "cpu"
    world, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if trainer["devices"] is not None and trainer["devices"] != world:
        raise ConfigError(
            "the number of processes differs from trainer.devices",
            where="trainer.devices",
            expected=trainer["devices"],
            got=world,
            fix=f"start it with: torchrun --nproc-per-node={trainer['devices']} -m growconv ...",
        )
    if accelerator == "cuda" and gpus < here:
        raise ConfigError(
            "there are fewer GPUs than processes",
            where="trainer.accelerator",
            expected=f"{here} GPUs" if here > 1 else "a GPU",
            got=gpus,
            fix="start fewer processes, or set trainer.accelerator=cpu",
        )
    if trainer["sync_batchnorm"] and accelerator != "cuda":
        raise no_sync_batchnorm(accelerator)
    if backend and backend not in torch.compiler.list_backends(exclude_tags=None):
        raise ConfigError(
            "torch.compile has no such backend",
            where="trainer.compile",
            expected=f"{', '.join(torch.compiler.list_backends())}, or null to compile nothing",
            got=backend,
            fix="trainer.compile=inductor",
        )
    device = torch.device("cpu")
    if accelerator == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if accelerator == "cuda" else "gloo", timeout=PATIENCE)
    return Devices(device, trainer["precision"], int(os.environ.get("RANK", "0")), world)
