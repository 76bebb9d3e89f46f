"""Where a run stands, and how a checkpoint tells it."""

from dataclasses import asdict, dataclass, field
from typing import Any

from growconv.errors import CheckpointError
from growconv.training.checkpoint import Checkpoint


@dataclass
class Position:
    """Where a run stands; all of it goes into the checkpoint.

    Attributes:
        step: optimizer steps done.
        epoch: finished epochs.
        batch: batches of the present epoch done.
        loss_sum: training loss summed over the present epoch's samples, as of the checkpoint.
        hits: correct answers among them.
        step_flops: FLOPs of all training steps so far.
        growth_flops: FLOPs of all growth rounds so far, of all processes.
        deepened: rounds of growth in depth so far.
        seconds: wall-clock seconds of training, evaluation and growth.
        growth_seconds: those spent on growing.
        best: best validation accuracy so far.
        first_loss: training loss of the first batch, to measure progress against.
        metrics: the lines of metrics.jsonl.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    hits: float = 0.0
    step_flops: float = 0.0
    growth_flops: float = 0.0
    deepened: int = 0
    seconds: float = 0.0
    growth_seconds: float = 0.0
    best: float | None = None
    first_loss: float | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)


def position_of(found: Checkpoint) -> Position:
    """Where a checkpoint's run stands, each number of the type that it has in a run.

    Raises:
        CheckpointError: it does not say so.
    """
    try:
        position = Position(**found.state["position"])
    except (KeyError, TypeError) as error:
        raise damaged_state(found, error) from error
    for name, value in asdict(position).items():
        kinds: dict[str, tuple[type, ...]] = {"metrics": (list,)}
        kinds |= dict.fromkeys(("step", "epoch", "batch", "deepened"), (int,))
        kinds |= dict.fromkeys(("best", "first_loss"), (int, float, type(None)))
        if not isinstance(value, kinds.get(name, (int, float))) or isinstance(value, bool):
            raise damaged_state(found, f"{name}: {value!r}")
    for line in position.metrics:
        if not isinstance(line, dict) or not all(type(value) in (int, float) for value in line.values()):
            raise damaged_state(found, "metrics that are no numbers")
    return position


def damaged_state(found: Checkpoint, got: object) -> CheckpointError:
    """The error for a checkpoint whose state is no run's.

    Args:
        got: what it holds instead.
    """
    return CheckpointError(
        "The checkpoint does not say where its run stands.",
        where=str(found.path),
        got=got,
        fix="restore the file, or load its weights with growconv.load_checkpoint",
    )
