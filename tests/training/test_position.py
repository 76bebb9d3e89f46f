"""Where a run stands goes into a checkpoint and comes back; what is no position is refused."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from growconv.errors import CheckpointError
from growconv.training.checkpoint import Checkpoint
from growconv.training.position import Position, position_of

STANDS = Position(step=7, epoch=2, loss_sum=1.5, best=None, metrics=[{"step": 3, "train_loss": 0.5}])


def checkpoint(state: dict[str, Any]) -> Checkpoint:
    return Checkpoint(Path("last.safetensors"), {}, state=state)


def test_a_position_comes_back_as_it_was() -> None:
    assert position_of(checkpoint({"position": asdict(STANDS)})) == STANDS


@pytest.mark.parametrize(
    "changed",
    [
        {"step": 7.0}, {"epoch": True}, {"loss_sum": "1.5"}, {"best": "none"}, {"metrics": {}}, {"metrics": [3]},
        {"metrics": [{"train_loss": "low"}]}, {"metrics": [{"step": True}]}, {"speed": 3},
    ],
)  # fmt: skip
def test_what_no_run_has_written_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="does not say where its run stands"):
        position_of(checkpoint({"position": asdict(STANDS) | changed}))


def test_a_checkpoint_of_no_run_is_refused() -> None:
    with pytest.raises(CheckpointError, match="does not say where its run stands"):
        position_of(checkpoint({}))
