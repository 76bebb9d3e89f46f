"""One run: what it leaves, what it counts, and what fails before it begins."""

import json

import yaml

from growconv.cli import main
from tests.test_cli import QUICK, summary


def test_a_run_leaves_what_the_readme_promises(here, capsys):
    assert main([*QUICK, "hydra.run.dir=run", "baselines=[large]", "report=true"]) == 0
    out = capsys.readouterr().out
    assert "grown, tiny" in out
    assert "fixed large" in out
    assert "run directory: run" in out
    assert "3 sites to grow" in out
    assert "grows at " in out
    assert out.splitlines()[-1] == "report: run/report.html"
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


def test_what_fails_before_the_run_begins_leaves_nothing(here, capsys, monkeypatch):
    """Errors that only the model can tell, and a model that raises."""
    assert main([*QUICK, "growth.sites=[head*]"]) == 1
    assert main([*QUICK, "growth.sites=[head*]", "hydra.run.dir=deep/down/run"]) == 1
    assert main(["-m", *QUICK, "growth.sites=[head*]", "hydra.sweep.dir=sweep"]) == 1
    assert [path.name for path in (here / "sweep").iterdir()] == ["multirun.yaml"]
    (here / "broken.py").write_text("def net(classes):\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(here)
    assert main([*QUICK, "model._target_=broken.net"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["broken.py", "sweep"]
