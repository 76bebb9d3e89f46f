"""What ends a run from outside: one line that says what, where and what to do; signals save first."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from growconv.cli import main
from growconv.training import failures
from growconv.training.loop import Trainer
from growconv.training.rundir import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
FIXED = ["data=digits", "data.limit=64", "growth=none", "trainer.epochs=1", "trainer.progress=none", "report=false"]
LONG = ["data.limit=160", "growth=random", "growth.times=2", "baselines=[]", "report=false", "trainer.epochs=30"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("edge") / "run"
    assert main([*FIXED, f"hydra.run.dir={run}"]) == 0
    return run


def told(capsys, code, *words):
    """The one message, checked."""
    err = capsys.readouterr().err
    assert code == 1
    assert err.count("growconv: ") == 1
    assert "Traceback" not in err
    assert all(word in err for word in words), err
    assert "what to do" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hydra.run.dir={run}/summary.json/x"], ["Not a directory", "summary.json/x"]),
        (["hydra.run.dir={tmp}/" + "d" * 300], ["File name too long", "shorter"]),
        (["hydra.run.dir=/proc/nothing"], ["/proc/nothing"]),
        (["resume=" + "d" * 5000], ["File name too long"]),
        (["report", "d" * 5000], ["File name too long"]),
        (["report", "{run}", "--output", "{tmp}/missing/report.html"], ["No such file", "missing"]),
        (["compare", "{run}", "--output", "{run}/summary.json"], ["File exists", "summary.json"]),
        (["sites", "model._target_=os.abort.none"], ["model._target_"]),
        (["data.name=synthetic", "data=synthetic", "data.samples=1000000000000"], ["not enough memory", "batch_size"]),
    ],
)
def test_the_operating_system_s_errors_are_one_line(arguments, words, finished, tmp_path, capsys):
    given = [argument.format(run=finished, tmp=tmp_path) for argument in arguments]
    command = given if given[0].startswith(("resume", "report", "compare", "sites")) else [*FIXED[2:], *given]
    if not any(argument.startswith("hydra.run.dir") for argument in command) and command[0] == FIXED[2]:
        command.append(f"hydra.run.dir={tmp_path / 'run'}")
    told(capsys, main(command), *words)


@pytest.mark.parametrize("stream", [None, "ascii"])
def test_an_odd_terminal_stops_nothing(stream, finished, tmp_path, monkeypatch, capsys):
    """No standard output at all, one that knows no accents, and a width that is none."""
    odd = None if stream is None else io.TextIOWrapper(io.BytesIO(), encoding=stream)
    monkeypatch.setenv("COLUMNS", "wide")
    monkeypatch.setattr(sys, "stdout", odd)
    assert main(["compare", str(finished), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""
    assert odd is None or b"mean ? std" in odd.buffer.getvalue()


def test_a_name_that_is_no_text_stops_no_report(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / os.fsdecode(b"r\xffun"))
    assert main(["report", str(run)]) == 0
    assert main(["compare", str(run), "--output", str(tmp_path / "out")]) == 0
    assert (run / "report.html").read_text(encoding="utf-8")


def test_a_directory_that_vanishes_is_said(tmp_path, monkeypatch, capsys):
    append = RunDirectory.append_metrics

    def vanish(self, record):
        shutil.rmtree(self.path)
        append(self, record)

    monkeypatch.setattr(RunDirectory, "append_metrics", vanish)
    told(capsys, main([*FIXED, f"hydra.run.dir={tmp_path / 'run'}"]), "No such file", "metrics.jsonl")


def test_a_trace_is_shown_to_who_asks(finished, tmp_path, monkeypatch, capsys):
    def fail(self):
        raise ZeroDivisionError("nobody expected\nthis \x1b]0;title\x07")

    monkeypatch.setattr(Trainer, "fit", fail)
    told(
        capsys, main([*FIXED, f"hydra.run.dir={tmp_path / 'a'}"]), "ZeroDivisionError: nobody expected", "FULL_ERROR=1"
    )
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert main([*FIXED, f"hydra.run.dir={tmp_path / 'b'}"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "ZeroDivisionError" in err.splitlines()[-2]
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (OSError(28, "No space left on device", "a.json"), "free some space"),
        (OSError(30, "Read-only file system", "run"), "hydra.run.dir"),
        (OSError("no number"), "unexpected error"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            "not enough memory",
        ),
    ],
)
def test_explanations(error, word):
    assert word in failures.explain(error)


def test_a_lost_process_is_said(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = failures.explain(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1"))
    assert "Another process of this run was lost" in said


# What Python reads first: one of two processes hangs in its fourth step, and the other waits for 20 seconds only.
HANGING = """
import datetime, os, time
from growconv.training import devices, loop
devices.PATIENCE = datetime.timedelta(seconds=20)
step = loop.Trainer._step
def hang(self, index):
    if self.position.step == 3 and os.environ["RANK"] == "1":
        time.sleep(10_000)
    step(self, index)
loop.Trainer._step = hang
"""


@pytest.mark.long
def test_a_process_that_hangs_is_given_up(tmp_path):
    """The other one says so after its patience, torchrun ends both, and the run goes on from its checkpoint."""
    (tmp_path / "sitecustomize.py").write_text(HANGING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "growconv"]
    options = [*LONG[:-1], "trainer.epochs=2", "trainer.progress=none", "trainer.checkpoint_every=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    answer = subprocess.run(
        [*torchrun, *options, f"hydra.run.dir={tmp_path / 'run'}"], env=environment, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert answer.returncode != 0
    assert "Another process of this run was lost, or hangs." in answer.stderr
    assert "growconv resume=" in answer.stderr
    answer = subprocess.run(
        [*torchrun, f"resume={tmp_path / 'run'}"], env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "run" / "summary.json").exists()


def start(run, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "growconv", *LONG, *arguments, f"hydra.run.dir={run}"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main([*LONG, "trainer.progress=none", f"hydra.run.dir={run}"]) == 0
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=pytest.mark.slow if number is signal.SIGTERM else pytest.mark.long)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    ],
)
def test_a_signal_saves_before_the_end(number, uninterrupted, tmp_path, capsys):
    run = tmp_path / "run"
    process = start(run, "trainer.progress=none")
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert f"asked to end by {signal.Signals(number).name}, and is saved" in err
    assert f"growconv resume={run}" in err
    assert "Traceback" not in err
    assert not (run / "summary.json").exists()
    assert main([f"resume={run}"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test_loss"] == uninterrupted["test_loss"]


@pytest.mark.slow
def test_a_closed_pipe_is_said(uninterrupted, tmp_path):
    run = tmp_path / "run"
    process = start(run, "trainer.progress=lines")
    while "epoch " not in process.stdout.readline() and process.poll() is None:
        pass
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141, err
    assert "Standard output was closed" in err
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert main([f"resume={run}"]) == 0
    assert json.loads((run / "summary.json").read_text())["test_loss"] == uninterrupted["test_loss"]


def test_signals_that_others_handle_are_left_alone():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with failures.noted_signals() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert noted == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_launcher_s_handler_waits_for_the_checkpoint_but_not_for_ever(monkeypatch):
    called = []
    launchers = failures.SavesFirst(lambda number, _: called.append(number))
    before = signal.signal(signal.SIGUSR2, launchers)
    monkeypatch.setattr(failures, "PATIENCE", 1)
    try:
        with failures.noted_signals() as noted:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.1)
            assert noted == [signal.SIGUSR2]
            assert called == []
        time.sleep(1.2)
        assert called == []  # the run came to its end in time
        with failures.noted_signals():
            os.kill(os.getpid(), signal.SIGUSR2)
            end = time.monotonic() + 60
            while not called and time.monotonic() < end:
                time.sleep(0.1)
        assert called == [signal.SIGUSR2]
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.01)
        assert len(called) == 2  # nothing is being trained: at once
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_stopped_run_crosses_processes():
    stop = pickle.loads(pickle.dumps(failures.Stopped(signal.SIGTERM, "saved")))
    assert (stop.code, stop.number, stop.message) == (143, signal.SIGTERM, "saved")
