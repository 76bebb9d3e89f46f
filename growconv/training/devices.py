"""Devices, precision and processes of a run, through lightning-fabric."""

import os
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.plugins.precision import MixedPrecision
from torch import Tensor

from growconv.errors import ConfigError

T = TypeVar("T")

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")


def process_count() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def make_fabric(trainer: Mapping[str, Any]) -> Fabric:
    """Fabric for the devices and the precision of the group trainer, launched.

    Args:
        trainer: the group trainer.

    Raises:
        ConfigError: fewer devices or processes than asked for, an unknown accelerator or precision.
    """
    accelerator, precision = trainer["accelerator"], trainer["precision"]
    if accelerator not in ("auto", "cpu", "cuda"):
        raise ConfigError("unknown", where="trainer.accelerator", expected="auto, cpu or cuda", got=accelerator)
    if precision not in PRECISIONS:
        raise ConfigError("unknown", where="trainer.precision", expected=", ".join(PRECISIONS), got=precision)
    gpus = torch.cuda.device_count()
    if accelerator == "auto":
        accelerator = "cuda" if gpus else "cpu"
    world, here = process_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if trainer["devices"] is not None and trainer["devices"] != world:
        raise ConfigError(
            "the number of processes is not the one asked for",
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
        raise ConfigError(
            "SyncBatchNorm exists on CUDA only",
            where="trainer.sync_batchnorm",
            got=f"trainer.accelerator={accelerator}",
            fix="leave it false, or use model.norm=group, which does not depend on the batch",
        )
    # Named, so that Fabric looks for none: neither a Slurm job's variables nor an installed srun decide anything.
    elastic = "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ
    environment = TorchElasticEnvironment() if elastic else LightningEnvironment()
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed" and accelerator == "cpu":
        # Fabric turns this into bfloat16 in silence; torch's CPU autocast and scaler do have float16.
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]}
    nodes = max(1, world // max(1, here))
    strategy = "ddp" if world > 1 else "auto"
    options["plugins"] = [*options.get("plugins", []), environment]
    fabric = Fabric(accelerator=accelerator, devices=here, num_nodes=nodes, strategy=strategy, **options)
    fabric.launch()
    return fabric


def sum_over_ranks(fabric: Fabric, value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, the same on each."""
    if fabric.world_size > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def on_first(fabric: Fabric, compute: Callable[[], T]) -> T:
    """What rank 0 computes, on every rank; an error there is raised on every rank."""
    if fabric.world_size == 1:
        return compute()
    outcome: list[Any] = [None, None]
    if fabric.global_rank == 0:
        try:
            outcome[0] = compute()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def share_buffers(fabric: Fabric, model: torch.nn.Module) -> None:
    """Give every rank rank 0's buffers (running statistics of norm layers), which each rank has of its own."""
    if fabric.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def random_states(fabric: Fabric) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The random states of all ranks: torch's as tensors, NumPy's and Python's as JSON-able values."""
    python = random.getstate()
    numpy: Any = np.random.get_state()  # noqa: NPY002 (whatever draws from it has to go on)
    own = (
        {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if fabric.device.type == "cuda" else {}),
        {
            "python": [python[0], list(python[1]), python[2]],
            "numpy": [numpy[0], numpy[1].tolist(), *numpy[2:]],
        },
    )
    gathered: list[Any] = [own]
    if fabric.world_size > 1:
        gathered = [None] * fabric.world_size
        dist.all_gather_object(gathered, own)
    tensors = {
        f"random/{rank}/{name}": state for rank, (states, _) in enumerate(gathered) for name, state in states.items()
    }
    return tensors, {str(rank): values for rank, (_, values) in enumerate(gathered)}


def set_random_states(fabric: Fabric, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Take over this rank's part of what `random_states` gave."""
    rank = fabric.global_rank
    torch.set_rng_state(tensors[f"random/{rank}/cpu"])
    if fabric.device.type == "cuda" and f"random/{rank}/cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"random/{rank}/cuda"])
    own = values[str(rank)]
    version, state, gauss = own["python"]
    random.setstate((version, tuple(state), gauss))
    name, keys, *rest = own["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
