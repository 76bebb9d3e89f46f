"""One run, one process: a second one is told at once, a dead one is in nobody's way."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from growconv.cli import main
from growconv.errors import CheckpointError
from growconv.training.rundir import LOCK, RunDirectory

ROOT = Path(__file__).resolve().parents[2]
QUICK = [
    "data.limit=160",
    "growth=random",
    "growth.times=2",
    "baselines=[]",
    "trainer.progress=none",
    "trainer.checkpoint_every=2",
    "report=false",
]
HOLDER = """
import sys, time
from growconv.training.rundir import RunDirectory
with RunDirectory(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def start(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_resumes_at_once_leave_whole_files(tmp_path, capsys):
    """A run is killed; two processes resume it: one goes on, the other is told, no line stands in a file twice."""
    run = tmp_path / "run"
    first = start("-m", "growconv", *QUICK, "trainer.epochs=5", f"hydra.run.dir={run}")
    while first.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it holds the lock for as long as it lives
    assert main([f"resume={run}"]) == 1
    said = capsys.readouterr().err
    assert "Another process works in this run directory" in said
    assert str(run) in said
    assert "Traceback" not in said
    first.send_signal(signal.SIGKILL)
    first.communicate()
    both = [start("-m", "growconv", f"resume={run}") for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes, said
    assert all(code == 0 or "Another process" in text for code, text in zip(codes, said, strict=True)), said
    epochs = [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, 6))


def test_a_start_and_a_baseline_are_refused_too(tmp_path, capsys):
    command = [*QUICK, "trainer.epochs=1", "growth.times=1", "baselines=[small]", "growth.amount=1"]
    for held in ("run", "run/fixed_small"):
        (tmp_path / held).mkdir(parents=True, exist_ok=True)
        with FileLock(tmp_path / held / LOCK):
            assert main([*command, f"hydra.run.dir={tmp_path / 'run'}"]) == 1
        assert "Another process works" in capsys.readouterr().err
    assert not (tmp_path / "run" / "fixed_small" / "metrics.jsonl").exists()


def test_a_killed_process_holds_nothing(tmp_path):
    holder = start("-c", HOLDER, str(tmp_path))
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match="Another process"), RunDirectory(tmp_path).locked():
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with RunDirectory(tmp_path).locked():
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="without locks"), RunDirectory(tmp_path).locked():
        pass


def test_other_errors_of_the_file_system_stay(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), RunDirectory(tmp_path / "file" / "run").locked():
        pass
