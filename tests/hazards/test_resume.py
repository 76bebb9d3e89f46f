"""Killed at any moment and resumed, a run ends bit for bit where the uninterrupted one does."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from growconv.cli import main
from growconv.errors import CheckpointError
from tests.forged import forge

DRIVER = Path(__file__).with_name("kill_driver.py")
QUICK = [
    "trainer.epochs=4",
    "data.limit=160",
    "growth.samples=96",
    "growth.batch_size=32",
    "growth.times=3",
    "growth.end=0.8",
    "trainer.checkpoint_every=2",
    "baselines=[]",
    "report=false",
]


def kill_at(moments, folder, overrides):
    answer = subprocess.run(
        [sys.executable, str(DRIVER), str(folder), *moments, "--", *overrides],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert answer.returncode == 0, answer.stderr
    whole, *records = [json.loads(line) for line in answer.stdout.splitlines()]
    assert whole["status"] == 0
    assert len(records) == len(moments)
    for record in records:
        assert record["status"] == 0, record
        assert record["equal"] == [True, True, True], record
    return whole["seconds"], records


@pytest.mark.slow
def test_three_kills(tmp_path):
    """Between two steps of training, inside a growth step, inside the writing of a checkpoint."""
    _, records = kill_at(["step:13", "growth:3", "write:6"], tmp_path, QUICK)
    assert all(record["killed"] for record in records)


@pytest.mark.long
def test_twenty_kills(tmp_path):
    draw = random.Random(0)
    seconds, _ = kill_at(["step:3"], tmp_path / "timing", QUICK)
    inside = [f"growth:{draw.randint(1, 6)}" for _ in range(3)] + [f"write:{draw.randint(1, 12)}" for _ in range(3)]
    inside += [f"rename:{draw.randint(2, 30)}" for _ in range(3)] + [f"metrics:{draw.randint(1, 4)}" for _ in range(2)]
    outside = [f"delay:{draw.uniform(0.0, 0.4 * seconds):.3f}" for _ in range(9)]  # a run has its directory by then
    _, records = kill_at(inside + outside, tmp_path / "kills", QUICK)
    assert [record["moment"] for record in records if not record["killed"]] == []
    assert len(records) == 20


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A finished run of two epochs whose summary is gone, so that it can be resumed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main([*QUICK, "growth=random", "trainer.epochs=2", f"hydra.run.dir={folder}", "trainer.progress=none"]) == 0
    return folder


def copied(run, tmp_path):
    import shutil

    target = tmp_path / "run"
    shutil.copytree(run, target)
    return target


def test_a_finished_run_is_left_as_it_is(interrupted, capsys):
    before = (interrupted / "summary.json").read_bytes()
    assert main([f"resume={interrupted}"]) == 0
    assert (interrupted / "summary.json").read_bytes() == before


@pytest.mark.parametrize("name", ["last.safetensors", "previous.safetensors"])
def test_damage_is_named_and_the_other_checkpoint_used(name, interrupted, tmp_path, capsys):
    run = copied(interrupted, tmp_path)
    expected = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    path = run / "checkpoint" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if name.startswith("last"):
        with pytest.warns(UserWarning, match=name):
            assert main([f"resume={run}"]) == 0
    else:
        assert main([f"resume={run}"]) == 0
    got = json.loads((run / "summary.json").read_text())
    assert got["test_loss"] == expected["test_loss"]


def test_everything_damaged(interrupted, tmp_path, capsys):
    run = copied(interrupted, tmp_path)
    (run / "summary.json").unlink()
    for path in (run / "checkpoint").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert main([f"resume={run}"]) == 1
    message = capsys.readouterr().err
    assert "every checkpoint is damaged" in message
    assert "last.safetensors" in message


@pytest.mark.parametrize(
    ("overrides", "word"),
    [(["optimizer.lr=0.1"], "optimizer.lr"), (["growth=gradmax"], "growth.method: 'random' -> 'gradmax'")],
)
def test_another_config_is_named(overrides, word, interrupted, tmp_path, capsys):
    run = copied(interrupted, tmp_path)
    (run / "summary.json").unlink()
    assert main([f"resume={run}", *overrides]) == 1
    message = capsys.readouterr().err
    assert "the run was made with another config" in message
    assert word in message


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["position"].update(step="3"),
        lambda state: state["position"].update(best="good"),
        lambda state: state["position"].update(metrics=[3]),
        lambda state: state["position"].update(wings=2),
        lambda state: state.update(position=None),
        lambda state: state.update(random={}),
        lambda state: state["random"]["0"].update(python=[3, [1], None]),
        lambda state: state["random"]["0"].update(numpy=["MT19937", [1], 0, 0, 0.0]),
        lambda state: state.update(config=None),
        lambda state: state["position"]["metrics"][0].update(train_loss="=HYPERLINK(1)"),
    ],
)
def test_a_forged_state_is_one_message(change, interrupted, tmp_path, capsys):
    run = copied(interrupted, tmp_path)
    (run / "summary.json").unlink()
    forge(run / "checkpoint" / "last.safetensors", change)
    assert main([f"resume={run}"]) == 1
    said = capsys.readouterr().err
    assert "last.safetensors: The checkpoint" in said


def test_an_edited_config_is_noticed(interrupted, tmp_path, capsys):
    run = copied(interrupted, tmp_path)
    (run / "summary.json").unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["seed"] = 7
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main([f"resume={run}"]) == 1
    assert "seed: 0 -> 7" in capsys.readouterr().err


def test_an_incomplete_config_is_noticed(interrupted, tmp_path, capsys):
    run = copied(interrupted, tmp_path)
    (run / "summary.json").unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["trainer"]["epochs"], config["optimizer"]["lr"], config["logger"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main([f"resume={run}"]) == 1
    message = capsys.readouterr().err
    assert all(name in message for name in ("logger", "trainer.epochs", "optimizer.lr", "config.yaml"))


def test_what_may_change_does(interrupted, tmp_path, capsys):
    run = copied(interrupted, tmp_path)
    (run / "summary.json").unlink()
    assert main([f"resume={run}", "trainer.progress=lines"]) == 0
    assert "  loss " not in capsys.readouterr().out  # nothing was left to train
    assert (run / "summary.json").is_file()


@pytest.mark.parametrize("content", [None, "", "{", "trainer"])
def test_no_run_or_a_broken_config(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    assert main([f"resume={tmp_path}"]) == 1
    assert "config.yaml" in capsys.readouterr().err


def test_a_run_does_not_write_over_another(interrupted, capsys):
    assert main([*QUICK, f"hydra.run.dir={interrupted}"]) == 1
    assert "already contains a run" in capsys.readouterr().err


def test_errors_keep_their_class():
    from growconv.training.checkpoint import find_checkpoint

    with pytest.raises(CheckpointError):
        find_checkpoint("/nowhere")
