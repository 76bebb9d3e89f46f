"""The command line as a user types it: runs, sites, sweeps, and errors that say what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from growconv.cli import main

QUICK = [
    "trainer.epochs=2",
    "data.limit=160",
    "growth.samples=64",
    "growth.batch_size=32",
    "growth.times=2",
    "report=false",
]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def summary(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def test_a_run_leaves_what_the_readme_promises(here, capsys):
    assert main([*QUICK, "hydra.run.dir=run", "baselines=[large]", "report=true"]) == 0
    out = capsys.readouterr().out
    assert "grown, tiny" in out
    assert "fixed large" in out
    assert "next growth at step" in out
    run = here / "run"
    for name in ("config.yaml", "metrics.jsonl", "growth.jsonl", "summary.json", "environment.json", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["epochs"] == 2
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == [1, 2]
    promised = {"step", "epoch", "train_loss", "val_accuracy", "parameters", "train_flops", "seconds", "learning_rate"}
    assert promised <= set(metrics[0])
    assert metrics[0]["parameters"] < metrics[1]["parameters"]
    events = [json.loads(line) for line in (run / "growth.jsonl").read_text().splitlines()]
    result = summary(run)
    promised = {
        "test_accuracy",
        "best_val_accuracy",
        "parameters",
        "train_flops",
        "seconds",
        "growth_events",
        "seed",
        "method",
    }
    assert promised | {"growth_seconds"} <= set(result)
    assert result["growth_events"] == len(events) > 0
    assert result["parameters"] == events[-1]["parameters_after"] == metrics[-1]["parameters"]
    assert 0 < result["growth_seconds"] < result["seconds"]
    large = summary(run / "fixed_large")
    assert large["parameters"] > result["parameters"]
    assert large["growth_events"] == 0


def test_same_seed_same_numbers(here, capsys):
    for name in ("first", "second"):
        assert main([*QUICK, f"hydra.run.dir={name}", "baselines=[]", "data.augmentation=crop"]) == 0
    assert main([*QUICK, "hydra.run.dir=other", "baselines=[]", "data.augmentation=crop", "seed=1"]) == 0
    timed = ("seconds", "growth_seconds")

    def lines(name):
        records = [json.loads(line) for line in (here / name / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in record.items() if key not in timed} for record in records]

    assert lines("first") == lines("second")
    assert lines("first") != lines("other")


def test_fixed_training_flops_are_twice_the_macs(here, capsys):
    """One linear algebra away from torch: forward 2·MACs, backward twice that but for the first layer's input."""
    assert main([*QUICK, "growth=none", "hydra.run.dir=run", "trainer.progress=none"]) == 0
    # convolutions: 8x8 (1->32), 4x4 (32->64), 2x2 (64->64), linear 64->10
    forward = [2 * 64 * 9 * 32, 2 * 16 * 9 * 32 * 64, 2 * 4 * 9 * 64 * 64, 2 * 64 * 10]
    expected = sum(3 * flops for flops in forward) - forward[0]
    steps = summary("run")["steps"]
    assert summary("run")["train_flops"] == expected * 32 * steps


def test_a_model_from_elsewhere(here, capsys, monkeypatch):
    (here / "mymodels.py").write_text(
        "from torch import nn\n"
        "def net(in_channels, classes, channels=6):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, channels, 3), nn.ReLU(), nn.Conv2d(channels, classes, 3),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(here)
    command = [*QUICK, "model._target_=mymodels.net", "+model.args.channels=4", "baselines=[]", "growth.amount=2"]
    assert main([*command, "hydra.run.dir=run"]) == 0
    assert summary("run")["widths"] == {"0 -> 2": 8}


def test_policies_are_composed_in_yaml(here, capsys):
    command = [
        *QUICK,
        "growth.when={policy: AnyOf, policies: [{policy: AtSteps, steps: [2]}, {policy: Every, interval: 4}]}",
        "growth.amount={policy: ToWidth, target: 2.0, rounds: 2}",
        "growth.where={policy: Greedy, per: parameter}",
        "growth.stop=[{policy: NoGain, threshold: 1e-9}]",
        "growth.budget.parameters=20000",
        "baselines=[]",
        "hydra.run.dir=run",
    ]
    assert main(command) == 0
    assert summary("run")["growth_events"] > 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.epoch=3"], ["trainer.epoch"]),
        (["trainer.epochs=0"], ["trainer.epochs", "1 or more"]),
        (["trainer.epochs=three"], ["trainer.epochs"]),
        (["model=resnet21"], ["resnet21", "resnet20"]),
        (["model._target_=torch.nn.Nothing"], ["model._target_", "torch.nn.Nothing"]),
        (["+model.args.levels=2", "model=unet", "data=synthetic", "+model.args.level=1"], ["level"]),
        (["growth.method=tiney"], ["tiney", "tiny"]),
        (["+growth.solver.colour=1"], ["colour"]),
        (["growth.times=0"], ["growth.times"]),
        (["growth.times=5000"], ["growth.times", "too short"]),
        (["growth.begin=0.9", "growth.end=0.1"], ["growth.begin"]),
        (["growth.start=0"], ["growth.start"]),
        (["growth.amplitude=strong"], ["amplitude", "strong"]),
        (["growth.where={policy: Sideways}"], ["growth.where", "Sideways"]),
        (["growth.when={policy: Plateau, patient: 3}"], ["growth.when", "patient", "did you mean 'patience'"]),
        (["growth.sites=[head*]"], ["growth.sites", "features.0 -> features.4"]),
        (["growth.budget.parameters=-1"], ["Budget"]),
        (["+growth.scheduler.method=tiny"], ["growth.scheduler", "growth.method"]),
        (["optimizer.lr=0"], ["optimizer.lr"]),
        (["optimizer.name=adam"], ["optimizer.name"]),
        (["lr_schedule.name=step"], ["lr_schedule.name"]),
        (["lr_schedule.warmup=2"], ["lr_schedule.warmup"]),
        (["trainer.precision=8-bit"], ["trainer.precision"]),
        (["trainer.accelerator=abacus"], ["trainer.accelerator"]),
        (["trainer.sync_batchnorm=true", "trainer.accelerator=cpu"], ["trainer.sync_batchnorm", "model.norm=group"]),
        (["trainer.accumulate=1000"], ["trainer.accumulate"]),
        (["trainer.label_smoothing=1"], ["trainer.label_smoothing"]),
        (["trainer.progress=loud"], ["trainer.progress"]),
        (["logger.name=notebook"], ["logger.name"]),
        (["logger=wandb", "logger.mode=sometimes"], ["logger.mode"]),
        (["baselines=[medium]"], ["baselines", "medium"]),
        (["growth=none", "baselines=[large]"], ["baselines"]),
        (["model=unet"], ["output does not fit", "data=digits"]),
        (["data=fashion_mnist", "model=conv_pair", "data.limit=100"], ["output does not fit"]),
        (["data=fashion_mnist", "data.root=/nowhere"], ["data.root=/nowhere", "does not exist"]),
        (["data.limit=1"], ["data.limit", "two samples"]),
        (["data.limit=0"], ["data.limit"]),
        (["+surprise=1"], ["surprise"]),
        (["optimizer.lr=1e30", "growth=none", "optimizer=sgd"], ["finite", "optimizer.lr"]),
    ],
)
def test_what_cannot_work_is_said_in_one_message(overrides, words, here, capsys):
    assert main([*QUICK, *overrides, "hydra.run.dir=run"]) == 1
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert "Traceback" not in message
    assert not (here / "run" / "summary.json").exists()


def test_sites_of_a_config(capsys):
    assert main(["sites", "model=resnet20", "data=cifar10"]) == 0
    out = capsys.readouterr().out
    assert "blocks.0.conv1 -> blocks.0.conv2" in out
    assert "classifier" in out
    assert main(["sites", "model=resnet20", "trainer.epoch=3"]) == 1
    assert "trainer.epoch" in capsys.readouterr().err


def test_a_sweep_skips_what_is_finished_and_goes_on_with_the_rest(here, capsys):
    command = ["-m", *QUICK, "growth=tiny,random", "seed=0,1", "hydra.sweep.dir=sweep", "trainer.progress=none"]
    assert main(command) == 0
    folders = sorted(path for path in (here / "sweep").iterdir() if path.is_dir())
    assert len(folders) == 4
    assert all("growth=" in path.name and "seed=" in path.name for path in folders)
    assert not list((here / "sweep").glob("*/fixed_*"))
    untouched, unfinished = folders[0] / "summary.json", folders[1] / "summary.json"
    marked = untouched.read_text().replace('"seed"', '"read_again": true, "seed"')
    untouched.write_text(marked)
    expected = json.loads(unfinished.read_text())
    unfinished.unlink()
    assert main(command) == 0
    assert untouched.read_text() == marked
    assert json.loads(unfinished.read_text())["test_loss"] == expected["test_loss"]
    command[command.index("seed=0,1")] = "seed=5"
    assert main([*command, f"hydra.sweep.subdir='{folders[0].name}'"]) == 1
    assert "other settings" in capsys.readouterr().err
    assert main(["compare", "sweep", "--output", "compared"]) == 0
    assert "tiny" in capsys.readouterr().out


def test_a_sweep_over_cores(here):
    command = [sys.executable, "-m", "growconv", "-m", *QUICK, "growth=random", "seed=0,1", "hydra.sweep.dir=sweep"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [*command, "hydra/launcher=cores", "trainer.progress=none"], capture_output=True, text=True, env=environment
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert sorted(summary(path.parent)["seed"] for path in (here / "sweep").glob("*/summary.json")) == [0, 1]


def test_help_and_config_are_hydra_s_own(here):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, "-m", "growconv", "--cfg", "job", "seed=5"], capture_output=True, text=True, env=environment
    )
    assert yaml.safe_load(answer.stdout)["seed"] == 5
    assert not (here / "runs").exists()
