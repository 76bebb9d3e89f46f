"""Two gloo processes grow and train as one does; precision, accumulation, memory format and compilation."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from growconv.cli import main
from growconv.training.checkpoint import read_checkpoint
from growconv.training.devices import make_fabric

QUICK = [
    "trainer.epochs=3",
    "data.limit=160",
    "growth.samples=128",
    "growth.batch_size=32",
    "growth.end=0.9",
    "baselines=[]",
    "report=false",
    "trainer.progress=none",
]


def final(folder):
    return read_checkpoint(folder / "checkpoint" / "last.safetensors")


def losses(folder):
    return [json.loads(line)["train_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def torchrun(arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "growconv", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_two_processes_equal_one(tmp_path):
    """Five growth events, no norm, float64: growing and training agree far below 1e-5."""
    arguments = [*QUICK, "model.norm=none", "trainer.precision=64-true", "growth.times=2", "seed=3"]
    assert main([*arguments, f"hydra.run.dir={tmp_path / 'one'}"]) == 0
    answer = torchrun([*arguments, "trainer.devices=2", f"hydra.run.dir={tmp_path / 'two'}"])
    assert answer.returncode == 0, answer.stderr[-3000:]
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    assert len(one.history) == len(two.history) >= 5
    for name, tensor in one.model.items():
        torch.testing.assert_close(two.model[name], tensor, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-7, atol=0)
    # One run directory, and nothing of rank 1's anywhere.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    # The other world sizes are refused on resume.
    (tmp_path / "two" / "summary.json").unlink()
    assert main([f"resume={tmp_path / 'two'}"]) == 1


def test_two_processes_resume_with_batch_norm(tmp_path, capfd):
    folder = tmp_path / "run"
    arguments = [*QUICK, "growth=random", "trainer.epochs=2", "growth.times=2", f"hydra.run.dir={folder}"]
    answer = torchrun(arguments)
    assert answer.returncode == 0, answer.stderr[-3000:]
    expected = final(folder)
    (folder / "summary.json").unlink()
    (folder / "checkpoint" / "last.safetensors").rename(folder / "checkpoint" / "gone")
    answer = torchrun([f"resume={folder}"])
    assert answer.returncode == 0, answer.stderr[-3000:]
    for name, tensor in final(folder).model.items():
        assert torch.equal(tensor, expected.model[name]), name
    (folder / "summary.json").unlink()
    assert main([f"resume={folder}"]) == 1
    assert "expected: 2 processes" in capfd.readouterr().err


def test_fewer_processes_than_asked_for(tmp_path, capsys):
    assert main([*QUICK, "trainer.devices=4", f"hydra.run.dir={tmp_path}"]) == 1
    assert "torchrun --nproc-per-node=4" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([*QUICK, "trainer.accelerator=cuda", f"hydra.run.dir={tmp_path}"]) == 1
        assert "fewer GPUs" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_every_precision_trains_and_grows(precision, tmp_path):
    arguments = [*QUICK, f"trainer.precision={precision}", "growth.times=2", f"hydra.run.dir={tmp_path / 'run'}"]
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["growth_events"] >= 4
    assert summary["train_loss"] < 0.9 * summary["first_train_loss"]
    dtypes = {
        tensor.dtype for name, tensor in final(tmp_path / "run").model.items() if "conv" in name or "features" in name
    }
    expected = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert expected in dtypes
    if precision == "16-mixed":
        assert final(tmp_path / "run").state["scaler"]["scale"] > 0


def test_accumulated_parts_give_the_whole_batch_gradient(tmp_path):
    arguments = [*QUICK, "model.norm=none", "trainer.precision=64-true", "trainer.epochs=2", "growth.times=1"]
    assert main([*arguments, f"hydra.run.dir={tmp_path / 'whole'}"]) == 0
    assert main([*arguments, "trainer.accumulate=3", f"hydra.run.dir={tmp_path / 'parts'}"]) == 0
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    for name, tensor in whole.model.items():
        torch.testing.assert_close(parts.model[name], tensor, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "options", [["trainer.channels_last=true"], ["trainer.compile=aot_eager"], ["trainer.clip_gradient=100"]]
)
def test_what_only_makes_it_faster_changes_nothing(options, tmp_path):
    arguments = [*QUICK, "model.norm=none", "trainer.precision=64-true", "trainer.epochs=2", "growth.times=2"]
    assert main([*arguments, f"hydra.run.dir={tmp_path / 'plain'}"]) == 0
    assert main([*arguments, *options, f"hydra.run.dir={tmp_path / 'fast'}"]) == 0
    plain, fast = final(tmp_path / "plain"), final(tmp_path / "fast")
    assert len(fast.history) == len(plain.history) > 0
    for name, tensor in plain.model.items():
        torch.testing.assert_close(fast.model[name], tensor, rtol=1e-6, atol=1e-9)


def test_slurm_decides_nothing_unasked(tmp_path, monkeypatch):
    """Neither an installed srun (Fabric would warn) nor the variables of a job (Fabric would wait for its tasks)."""
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\nexit 1\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    job = {
        "NTASKS": "4",
        "JOB_ID": "7",
        "JOB_NAME": "growing",
        "PROCID": "2",
        "LOCALID": "2",
        "NODEID": "1",
        "NNODES": "2",
    }
    for name, value in (job | {"STEP_ID": "0", "NODELIST": "a[1-2]", "NTASKS_PER_NODE": "2"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    fabric = make_fabric({"accelerator": "cpu", "precision": "32-true", "devices": None, "sync_batchnorm": False})
    assert (fabric.world_size, fabric.global_rank, fabric.local_rank) == (1, 0, 0)


@pytest.mark.long
def test_a_signal_to_two_processes_saves_once_and_whole(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", "growconv", *QUICK, "trainer.epochs=300", f"hydra.run.dir={run}"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert "asked to end, and is saved" in err, err[-3000:]
    assert final(run).state["position"]["step"] > 0
    assert not (run / "summary.json").exists()
