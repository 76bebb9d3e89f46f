"""What becomes of a finished run: its model in Python, in a file, wider, deeper, and trained for longer."""

import json
import shutil

import pytest
import torch

import growconv
from growconv.cli import main
from growconv.training.data import load_data
from tests.training.finished import QUICK, summary


def lines(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in each.items() if "seconds" not in key} for each in records]


def accuracy(model, images, labels):
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def test_load_run_is_the_trained_model(run):
    """The accuracies of the summary, by hand; the caller's random numbers stay."""
    before = torch.get_rng_state()
    model = growconv.load_run(run)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    data = load_data("digits", validation=0.15, augmentation="none", limit=200)
    images, labels = data.batch(data.test, torch.arange(len(data.test)))
    assert accuracy(model, images, labels) == pytest.approx(summary(run)["test_accuracy"])
    assert sum(each.numel() for each in model.parameters()) == summary(run)["parameters"]
    images, labels = data.batch(data.validation, torch.arange(len(data.validation)))
    best = growconv.load_run(run, best=True)
    assert accuracy(best, images, labels) == pytest.approx(summary(run)["best_val_accuracy"])
    small = growconv.load_run(run / "fixed_small")
    assert sum(each.numel() for each in small.parameters()) == summary(run / "fixed_small")["parameters"]


def test_load_run_says_what_is_no_run(run, tmp_path):
    with pytest.raises(growconv.GrowthError, match="no such run"):
        growconv.load_run(tmp_path / "nowhere")
    with pytest.raises(growconv.GrowthError, match=r"config\.yaml"):
        growconv.load_run(tmp_path)
    shutil.copy(run / "config.yaml", tmp_path)
    with pytest.raises(growconv.GrowthError, match="no checkpoint yet"):
        growconv.load_run(tmp_path)
    own = growconv.save_checkpoint(tmp_path / "own.safetensors", growconv.load_run(run))
    with pytest.raises(growconv.GrowthError, match="not written by a run"):
        growconv.load_run(own)


def test_load_run_builds_foreign_code_on_request_only(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "from torch import nn\n"
        "def net(in_channels, classes):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    command = ["growth=none", "data.limit=64", "trainer.epochs=1", "trainer.progress=none", "report=false"]
    assert main([*command, "model._target_=theirs.net", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    with pytest.raises(growconv.GrowthError, match=r"theirs\.net"):
        growconv.load_run(tmp_path / "run")
    assert growconv.load_run(tmp_path / "run", trust=True)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_a_prolonged_run_is_the_longer_one(mine, tmp_path):
    """With a schedule that does not look at the end: bit for bit what the longer run does; the baseline, too."""
    assert main([f"resume={mine}", "trainer.epochs=4"]) == 0
    assert main([*QUICK, "trainer.epochs=4", "baselines=[small]", f"hydra.run.dir={tmp_path / 'long'}"]) == 0
    for part in ("", "fixed_small"):
        assert lines(mine / part) == lines(tmp_path / "long" / part)
        assert summary(mine / part)["test_loss"] == summary(tmp_path / "long" / part)["test_loss"]
    before = (mine / "summary.json").read_bytes()
    assert main([f"resume={mine}"]) == 0
    assert (mine / "summary.json").read_bytes() == before


def test_a_run_is_not_cut_short(mine, capsys):
    assert main([f"resume={mine}", "trainer.epochs=1"]) == 1
    said = capsys.readouterr().err
    assert "trainer.epochs: 2 -> 1" in said
    assert "prolong" in said
    assert main([f"resume={mine}", "trainer.epochs=4", "optimizer.lr=1"]) == 1
    assert "optimizer.lr" in capsys.readouterr().err
    assert len(lines(mine)) == 2


def test_export_to_torch(run, tmp_path, capsys):
    file = tmp_path / "deep" / "model.pt2"
    assert main(["export", str(run), "--output", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(torch.export.load(file).module()(x), growconv.load_run(run)(x))


def test_export_to_onnx(run, tmp_path, capfd):
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    file = tmp_path / "model.onnx"
    assert main(["export", str(run), "--output", str(file), "--best"]) == 0
    assert capfd.readouterr().err == ""
    x = torch.randn(7, 1, 8, 8)
    got = torch.from_numpy(evaluator(str(file)).run(None, {"images": x.numpy()})[0])
    torch.testing.assert_close(got, growconv.load_run(run, best=True)(x), rtol=1e-4, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "RUN", "--otput", "a.pt2"], "did you mean --output?"),
        (["export"], "RUN"),
        (["export", "RUN", "--output", "a.txt"], "FILE.pt2 or FILE.onnx"),
        (["export", "nowhere"], "no such run"),
        (["grow", "RUN"], "--factor, --width"),
        (["grow", "RUN", "--facter", "2"], "did you mean --factor?"),
        (["grow", "RUN", "--factor", "big"], "invalid float value"),
        (["grow", "RUN", "--factor", "0.5"], "above 1"),
        (["grow", "RUN", "--width", "features.0"], "SITE=N"),
        (["grow", "RUN", "--width", "featurs*=64"], "features.0 -> features.4"),
        (["grow", "RUN", "--width", "*=3"], "already has this width"),
        (["grow", "RUN", "--parameters", "0"], "1 or more"),
        (["grow", "RUN", "--parameters", "500"], "nothing grew"),
        (["grow", "RUN", "--deepen", "features.99"], "features.0 -> features.4"),
        (["grow", "RUN", "--factor", "2", "--method", "tinny"], "tiny"),
        (["grow", "RUN", "--factor", "2", "--output", "."], "already something here"),
        (["grow", "nowhere", "--factor", "2"], "no such run"),
    ],
)
def test_what_cannot_work_is_one_message(arguments, words, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in run.parent.iterdir())
    assert main([str(run) if each == "RUN" else each for each in arguments]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())
    assert sorted(path.name for path in run.parent.iterdir()) == before
