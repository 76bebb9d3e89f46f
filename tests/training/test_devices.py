"""Two gloo processes grow and train as one does; precision, accumulation, memory format and compilation."""

import json
import os
import shutil
import socket
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


# Runs one after the other, each in a process group of its own: the first meets at torchrun's store, which then knows
# it, so that the other meets at a port of its own.
IN_TURN = """
import json, os, pathlib, sys
from growconv.cli import main

for port, arguments in json.loads(sys.argv[1]):
    if port:
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    code = main(arguments)
    if code != 0:
        sys.exit(code)
print(f"rank {os.environ['RANK']}:", *(path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")))
"""
WITHOUT_NORM = [*QUICK, "model.norm=none", "trainer.precision=64-true", "growth.times=2", "seed=3"]


def torchrun(script, runs):
    """What two processes print that run one after the other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script), json.dumps(runs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert answer.returncode == 0, answer.stderr[:6000]
    return answer.stdout


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes leave and print: a run without norm, then one with batch norm, which two others resume."""
    folder = tmp_path_factory.mktemp("two")
    script = folder.with_suffix(".py")
    script.write_text(IN_TURN)
    with socket.create_server(("localhost", 0)) as held:
        port = held.getsockname()[1]
    runs = [
        [None, [*WITHOUT_NORM, "trainer.devices=2", f"hydra.run.dir={folder / 'plain'}"]],
        [port, [*QUICK, "growth=random", "trainer.epochs=2", "growth.times=2", f"hydra.run.dir={folder / 'norm'}"]],
    ]
    said = torchrun(script, runs)
    (folder / "norm" / "summary.json").unlink()
    (folder / "norm" / "checkpoint" / "last.safetensors").rename(folder / "norm" / "checkpoint" / "gone")
    torchrun(script, [[None, [f"resume={folder / 'norm'}"]]])
    return folder, said


@pytest.mark.slow
def test_two_processes_equal_one(two, tmp_path):
    """Five growth events, no norm, float64: growing and training agree far below 1e-5."""
    folder, said = two
    assert main([*WITHOUT_NORM, f"hydra.run.dir={tmp_path / 'one'}"]) == 0
    # Threads of the process group end with it: one that outlives it can abort the process as it ends.
    assert "rank 1:" in said
    assert "gloo" not in said
    one, both = final(tmp_path / "one"), final(folder / "plain")
    assert len(one.history) == len(both.history) >= 5
    for name, tensor in one.model.items():
        torch.testing.assert_close(both.model[name], tensor, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(losses(folder / "plain"), losses(tmp_path / "one"), rtol=1e-7, atol=0)
    # One run directory, and nothing of rank 1's anywhere.
    assert sorted(path.name for path in folder.iterdir()) == ["norm", "plain"]


@pytest.mark.slow
def test_two_processes_resume_with_batch_norm(two):
    folder = two[0] / "norm"
    expected = read_checkpoint(folder / "checkpoint" / "gone")
    for name, tensor in final(folder).model.items():
        assert torch.equal(tensor, expected.model[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"), [("plain", "torchrun --nproc-per-node=2"), ("norm", "expected: 2 processes")]
)
def test_another_number_of_processes_is_refused_on_resume(name, words, two, tmp_path, capfd):
    """The one asked for 2 devices, the other took those that torchrun gave."""
    run = shutil.copytree(two[0] / name, tmp_path / "run")
    (run / "summary.json").unlink()
    assert main([f"resume={run}"]) == 1
    assert words in capfd.readouterr().err


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
