"""Two gloo processes grow and train as one does; precision, accumulation, memory format and compilation."""

import json
import os
import subprocess
import sys

import pytest
import torch

from growconv.cli import main
from growconv.training.checkpoint import read_checkpoint
from growconv.training.config import compose, plain
from growconv.training.devices import Devices, make_devices

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


AND_THREADS = """
import os, pathlib, sys
from growconv.cli import main

code = main(sys.argv[1:])
print(f"rank {os.environ['RANK']}:", *(path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")))
sys.exit(code)
"""


def torchrun(arguments, processes=2, start=("-m", "growconv")):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *start, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_two_processes_equal_one(tmp_path):
    """Five growth events, no norm, float64: growing and training agree far below 1e-5."""
    arguments = [*QUICK, "model.norm=none", "trainer.precision=64-true", "growth.times=2", "seed=3"]
    assert main([*arguments, f"hydra.run.dir={tmp_path / 'one'}"]) == 0
    script = tmp_path.with_suffix(".py")
    script.write_text(AND_THREADS)
    answer = torchrun([*arguments, "trainer.devices=2", f"hydra.run.dir={tmp_path / 'two'}"], start=[script])
    assert answer.returncode == 0, answer.stderr[-3000:]
    # Threads of the process group end with it: one that outlives it can abort the process as it ends.
    assert "rank 1:" in answer.stdout
    assert "gloo" not in answer.stdout
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


EXACT = [*QUICK, "model.norm=none", "trainer.precision=64-true", "trainer.epochs=2", "growth.times=2"]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """The last checkpoint of a run with nothing of the options below."""
    folder = tmp_path_factory.mktemp("plain")
    assert main([*EXACT, f"hydra.run.dir={folder}"]) == 0
    return final(folder)


@pytest.mark.parametrize(
    "option",
    ["trainer.accumulate=3", "trainer.channels_last=true", "trainer.compile=aot_eager", "trainer.clip_gradient=100"],
)
def test_what_only_changes_how_it_computes_changes_nothing(option, plain_run, tmp_path):
    assert main([*EXACT, option, f"hydra.run.dir={tmp_path}"]) == 0
    other = final(tmp_path)
    assert len(other.history) == len(plain_run.history) > 0
    for name, tensor in plain_run.model.items():
        torch.testing.assert_close(other.model[name], tensor, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("backend", ["true", "indutcor"])
def test_a_backend_that_torch_does_not_have_is_named(backend, tmp_path, capsys):
    assert main([*QUICK, f"trainer.compile={backend}", f"hydra.run.dir={tmp_path / 'run'}"]) == 1
    assert "what to do: trainer.compile=inductor" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_nothing_is_taken_from_slurm(monkeypatch):
    """A run inside a Slurm job is one process, as long as torchrun says nothing else."""
    for key, value in {"NTASKS": "4", "PROCID": "3", "LOCALID": "3", "JOB_ID": "7", "NODELIST": "a,b"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    devices = make_devices(plain(compose(["trainer.accelerator=cpu"]))["trainer"])
    assert (devices.world_size, devices.rank, devices.is_first) == (1, 0, True)
    assert not torch.distributed.is_initialized()


class Seen(torch.nn.Module):
    """Remembers the dtypes of what it makes and computes."""

    def __init__(self, dtype):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2).to(dtype)

    def forward(self, inputs):
        result = self.layer(inputs)
        self.made, self.computed = torch.zeros(1).dtype, result.dtype
        return result


@pytest.mark.parametrize(
    ("precision", "made", "computed", "output"),
    [
        ("32-true", torch.float32, torch.float32, torch.float32),
        ("64-true", torch.float64, torch.float64, torch.float64),
        ("bf16-true", torch.bfloat16, torch.bfloat16, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16, torch.float32),
        ("16-mixed", torch.float32, torch.float16, torch.float32),
    ],
)
def test_each_precision_computes_in_its_dtype(precision, made, computed, output):
    devices = Devices(torch.device("cpu"), precision)
    model = Seen(devices.dtype)
    result = devices.forward(model, torch.ones(3, 2, dtype=devices.dtype))
    assert (model.made, model.computed, result.dtype) == (made, computed, output)
    assert torch.get_default_dtype() == torch.float32


def test_a_scaled_gradient_is_clipped_at_its_true_norm_and_no_scaler_is_shared():
    devices = Devices(torch.device("cpu"), "16-mixed").for_one_run()
    assert devices.scaler is not None
    assert devices.for_one_run().scaler is not devices.scaler
    assert Devices(torch.device("cpu")).for_one_run().scaler is None
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    devices.backward((weight * torch.tensor([3.0, 4.0, 0.0, 0.0])).sum())
    assert float(weight.grad.norm()) == pytest.approx(5 * devices.scaler.get_scale())
    devices.step(optimizer, clip=0.5)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.3, -0.4, 0.0, 0.0]))
    assert weight.grad is None
