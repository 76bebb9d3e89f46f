"""The moving average of the weights: by its formula, through growth, through an interruption, in what a run gives."""

import json

import pytest
import torch

import growconv
from growconv.cli import main
from growconv.training.average import Average
from growconv.training.data import load_data
from growconv.training.models import small_cnn

QUICK = ["trainer.ema=0.9", "trainer.epochs=2", "data.limit=160", "growth.samples=64", "growth.batch_size=32"]
QUICK += ["growth.times=2", "trainer.progress=none", "report=false", "baselines=[]", "growth=random"]


def test_the_average_is_the_formulas_and_grows():
    torch.manual_seed(0)
    model = small_cnn(in_channels=1, classes=10, image_size=8, width=0.1)
    average, expected = Average(model, 0.9), None
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(model)
        now = [parameter.detach().clone() for parameter in model.parameters()]
        expected = now if expected is None else [0.9 * a + 0.1 * b for a, b in zip(expected, now, strict=True)]
    for got, wanted in zip(average.model.parameters(), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    sites = growconv.find_sites(model, torch.zeros(2, 1, 8, 8))
    growth = growconv.solve(sites[0], method="random", channels=2, model=model)
    average.follow([growconv.grow(model, sites[0], growth)])
    shapes = [[parameter.shape for parameter in each.parameters()] for each in (average.model, model)]
    assert shapes[0] == shapes[1]
    assert torch.equal(
        average.model.get_submodule("features.0").weight[-2:], model.get_submodule("features.0").weight[-2:]
    )


def test_a_run_is_judged_by_its_average_and_resumes(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run in (whole, cut):
        assert main([*QUICK, f"hydra.run.dir={run}"]) == 0
    told = json.loads((whole / "summary.json").read_text())
    data = load_data("digits", validation=0.15, augmentation="none", limit=160)
    images, labels = data.batch(data.test, torch.arange(len(data.test)))
    with torch.no_grad():
        hits = (growconv.load_run(whole)(images).argmax(1) == labels).double().mean()
    assert float(hits) == pytest.approx(told["test_accuracy"])
    (cut / "summary.json").unlink()
    (cut / "checkpoint" / "previous.safetensors").rename(cut / "checkpoint" / "last.safetensors")
    assert main([f"resume={cut}"]) == 0
    assert json.loads((cut / "summary.json").read_text())["test_loss"] == told["test_loss"]
    assert main(["grow", str(cut), "--factor", "1.5"]) == 0
    assert main(["trainer.ema=1"]) == 1
    assert "trainer.ema" in capsys.readouterr().err
