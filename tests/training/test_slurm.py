"""Sweeps and single runs on a real Slurm: the one of this machine that tools/one_node_slurm.sh starts."""

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from growconv.cli import main
from growconv.training.checkpoint import read_checkpoint
from growconv.training.slurm import Queue

ROOT = Path(__file__).resolve().parents[2]
QUICK = [
    "trainer.epochs=3",
    "data.limit=160",
    "growth=random",
    "growth.times=2",
    "baselines=[]",
    "report=false",
    "trainer.progress=none",
]
GROWCONV = [sys.executable, "-m", "growconv"]


def cluster_is_there():
    """Whether the script's own cluster runs: nobody's real one gets jobs of a test."""
    running = Path("/run/growconv-slurm/slurmctld.pid")
    return running.is_file() and Path(f"/proc/{running.read_text().strip()}").exists()


needs_slurm = pytest.mark.skipif(
    not cluster_is_there(), reason="no Slurm for tests is there: as root, tools/one_node_slurm.sh up starts one"
)


@pytest.fixture(autouse=True)
def alone(tmp_path):
    """One test at a time: the cluster has two processors."""
    folder = os.open("/run/growconv-slurm" if cluster_is_there() else tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def environment():
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def ask(*command, code=0):
    answer = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert answer.returncode == code, answer.stdout + answer.stderr
    return answer.stdout + answer.stderr


def assert_equal_runs(one, two):
    """All tensors bit for bit, the same events, the same losses."""
    found = [read_checkpoint(run / "checkpoint" / "last.safetensors") for run in (one, two)]
    assert found[0].model.keys() == found[1].model.keys()
    assert all(torch.equal(tensor, found[1].model[name]) for name, tensor in found[0].model.items())
    assert [event.gains for event in found[0].history] == [event.gains for event in found[1].history]
    losses = [
        [json.loads(line)["train_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, two)
    ]
    assert losses[0] == losses[1]


def run_of(sweep, word):
    return next(folder for folder in sweep.iterdir() if word in folder.name.split(","))


def test_without_slurm_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["-m", "hydra/launcher=slurm", *QUICK, f"hydra.sweep.dir={tmp_path / 'sweep'}"]) == 1
    said = capsys.readouterr().err
    assert "hydra/launcher=slurm: Slurm does not accept jobs from here" in said
    assert "srun" in said


def test_a_job_has_ended_when_the_queue_says_so_or_has_forgotten_it():
    queue = Queue()
    for job in ("7_0", "7_1", "7_2", "8"):
        queue.register_job(job)
    told = queue.read_info("7_0|RUNNING\n7_1|CANCELLED\n8|CONFIGURING\n9|FAILED\n")
    assert {job: info["State"] for job, info in told.items()} == {
        "7_0": "RUNNING", "7_1": "CANCELLED", "7_2": "gone", "8": "RUNNING",
    }  # fmt: skip


@needs_slurm
@pytest.mark.slow
def test_a_sweep_on_cpu_nodes_with_one_failing_run_from_inside_a_job(tmp_path):
    """The settings as shipped. One run fails: it is named, the other one is kept, and equals a run without Slurm."""
    sweep = tmp_path / "sweep"
    command = [*GROWCONV, "-m", "hydra/launcher=slurm", *QUICK, f"hydra.sweep.dir={sweep}", "data.limit=160,1"]
    said = ask("srun", "--ntasks=1", *command, code=1)
    assert re.search(r"job \d+_0 \(.*data.limit=160.*\): best validation accuracy 0\.\d+", said)
    assert re.search(r"growconv: job \d+_1 \(.*data.limit=1 .*Training needs at least two samples", said, re.DOTALL)
    assert "sacct" not in said
    assert "Traceback" not in said
    assert main([*QUICK, f"hydra.run.dir={tmp_path / 'plain'}"]) == 0
    assert_equal_runs(run_of(sweep, "data.limit=160"), tmp_path / "plain")


@needs_slurm
def test_a_refused_sweep_is_one_message(tmp_path):
    command = [*GROWCONV, "-m", "hydra/launcher=slurm_gpu", *QUICK, f"hydra.sweep.dir={tmp_path / 'sweep'}", "seed=0,1"]
    said = ask(*command, code=1)
    assert "Slurm does not accept jobs from here" in said
    assert "hydra.launcher.partition" in said
    assert "Traceback" not in said
    said = ask(*command, "hydra/launcher=slurm", "hydra.launcher.tasks_per_node=2", code=1)
    assert "a job of a sweep must be one process" in said


def job_logs(sweep):
    return "".join(path.read_text() for path in sweep.glob(".submitit/*/*/*log*"))


def start_sweep(folder, *arguments, **more):
    """A sweep of one run, long enough to be interrupted; with further variables of the environment."""
    name = f"hydra.launcher.name={folder.name}"
    command = [*GROWCONV, "-m", "hydra/launcher=slurm", *QUICK, "trainer.epochs=60", name, *arguments]
    return subprocess.Popen(
        [*command, f"hydra.sweep.dir={folder}"], env=environment() | more, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(condition, process):
    """Until a condition holds; at most three minutes, and while the process runs."""
    end = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.args
        assert time.monotonic() < end
        time.sleep(0.2)


def requeue(folder, process, command, before):
    """Send the job named like this folder back to the queue, once it trains and was sent back so many times before."""

    def trains():
        job = ask("squeue", "--noheader", f"--name={folder.name}", "--format=%i %T").split()
        known = job and job[1] == "RUNNING" and f"Restarts={before} " in ask("scontrol", "show", "job", job[0])
        lines = [path.read_text().count("\n") for path in folder.rglob("metrics.jsonl")]
        return known and lines and lines[0] > 3 + 12 * before

    wait_for(trains, process)
    ask(*command, ask("squeue", "--noheader", f"--name={folder.name}", "--format=%i").strip())


@needs_slurm
@pytest.mark.slow
def test_a_job_sent_back_to_the_queue_goes_on_bit_for_bit(tmp_path):
    """First as at a time limit (submitit's signal: growconv saves, and asks for the queue), then by hand."""
    folder = tmp_path / "back"
    process = start_sweep(folder)
    requeue(folder, process, ("scancel", "--signal=USR2"), 0)
    requeue(folder, process, ("scontrol", "requeue"), 1)
    said = process.communicate(timeout=180)[0]
    assert process.returncode == 0, said
    said = job_logs(folder)
    assert "asked to end by SIGUSR2, and is saved" in said
    assert "asked to end by SIGTERM, and is saved" in said
    assert main([*QUICK, "trainer.epochs=60", f"hydra.run.dir={tmp_path / 'plain'}"]) == 0
    assert_equal_runs(run_of(folder, "data.limit=160"), tmp_path / "plain")


@needs_slurm
@pytest.mark.slow
def test_a_cancelled_job_is_told_and_the_sweep_ends(tmp_path):
    process = start_sweep(tmp_path / "cancelled")
    wait_for(lambda: list(tmp_path.glob("cancelled/*/metrics.jsonl")), process)
    ask("scancel", "--name=cancelled")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "ended without a result (state: CANCELLED)" in said
    assert "is saved" in job_logs(tmp_path / "cancelled")


def documented_script(folder, arguments):
    """The job script of the documentation, for two tasks of one process on this node."""
    page = (ROOT / "docs" / "how-to" / "sweeps.md").read_text()
    text = re.search(r"```bash\n(#!/bin/bash.*?)```", page, re.DOTALL)[1]
    for here, there in (
        ("--nodes=2 --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=32", f"--ntasks=2 --job-name={folder.name}"),
        ("run=runs/big", f"run={folder}"),
        ("data=cifar10 model=resnet18 trainer=gpu", " ".join(arguments)),
        ('--nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node=4', "--nnodes=2 --nproc-per-node=1"),
        (":29500", ":29511"),
    ):
        assert here in text
        text = text.replace(here, there)
    return text


@needs_slurm
@pytest.mark.slow
@pytest.mark.parametrize("sent_back", [False, True])
def test_two_tasks_of_srun_equal_two_processes_of_torchrun(sent_back, tmp_path):
    """The documentation's script; sent back to the queue on its way, it goes on bit for bit."""
    arguments = [*QUICK, f"trainer.epochs={60 if sent_back else 3}", "trainer.devices=2"]
    tasks = tmp_path / "tasks"
    (tmp_path / "run.sh").write_text(documented_script(tasks, arguments))
    job = subprocess.Popen(
        ["sbatch", "--wait", f"--output={tmp_path / 'log'}", str(tmp_path / "run.sh")],
        env=environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    if sent_back:
        requeue(tasks, job, ("scontrol", "requeue"), 0)
    assert job.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    ask(*torchrun, "--nproc-per-node=2", "-m", "growconv", *arguments, f"hydra.run.dir={tmp_path / 'processes'}")
    assert_equal_runs(tasks, tmp_path / "processes")


@needs_slurm
@pytest.mark.slow
def test_nothing_is_taken_from_a_job_unasked(tmp_path):
    """Two tasks are two runs: one has the directory, and equals a run without Slurm; the other is told."""
    answer = subprocess.run(
        ["srun", "--ntasks=2", "--kill-on-bad-exit=0", "--wait=0", "--label",
         *GROWCONV, *QUICK, f"hydra.run.dir={tmp_path / 'job'}"],
        capture_output=True, text=True, env=environment(), timeout=300,
    )  # fmt: skip
    assert answer.returncode == 1
    # Busy if the two met, taken if the first had ended before the second began.
    told = re.findall("Another process works in this run directory|already contains a run", answer.stderr)
    assert len(told) == 1, answer.stderr
    assert main([*QUICK, f"hydra.run.dir={tmp_path / 'plain'}"]) == 0
    assert_equal_runs(tmp_path / "job", tmp_path / "plain")


# What Python reads first in the jobs: every epoch waits, so that a run outlives its limit on a machine of any speed.
SLOW_EPOCHS = """
import time
from growconv.training.loop import Trainer
epoch = Trainer._epoch
Trainer._epoch = lambda self: (time.sleep(1), epoch(self))
"""


@needs_slurm
@pytest.mark.long
def test_a_time_limit_ends_no_run(tmp_path):
    """A limit of two minutes, and a run that needs longer: Slurm's own signal, half a minute before or earlier."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_EPOCHS)
    folder, epochs = tmp_path / "sweep", "trainer.epochs=150"
    limit = ("hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=30")
    process = start_sweep(folder, epochs, *limit, PYTHONPATH=f"{tmp_path}:{ROOT}")
    said = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, said
    assert "asked to end by SIGUSR2, and is saved" in job_logs(folder)
    assert main([*QUICK, epochs, f"hydra.run.dir={tmp_path / 'plain'}"]) == 0
    assert_equal_runs(run_of(folder, "data.limit=160"), tmp_path / "plain")
