"""Runs as long as their training FLOPs, random numbers after a stop, and the moving average of the weights."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import growconv
from growconv.cli import main
from growconv.training.data import Dataset, Split, load_data
from growconv.training.loop import Trainer, global_batch_size, moving_average
from growconv.training.models import small_cnn
from growconv.training.rundir import RunDirectory

QUICK = [
    "data.limit=160",
    "growth=random",
    "growth.times=2",
    "growth.begin=0.2",
    "growth.end=0.5",
    "lr_schedule=trapezoid",
    "lr_schedule.decay=0.25",
    "baselines=[]",
    "report=false",
    "trainer.progress=none",
]


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    assert main([*QUICK, f"hydra.run.dir={folder}", *overrides]) == 0
    return RunDirectory(folder).summary()


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_run_ends_with_its_flops_and_grows_at_shares_of_them(tmp_path: Path) -> None:
    budget = 3e9
    ended = run(tmp_path / "run", f"trainer.flops={budget}", "trainer.checkpoint_every=1")
    metrics, events = lines(tmp_path / "run", "metrics.jsonl"), lines(tmp_path / "run", "growth.jsonl")
    last_step = 32 * 3 * 2 * (64 * 9 * 32 + 16 * 9 * 32 * 64 + 4 * 9 * 64 * 64 + 64 * 10)  # of the full width, at most
    assert budget - last_step < ended["train_flops"] <= budget
    assert ended["train_flops"] == metrics[-1]["train_flops"]
    assert [record["epoch"] for record in metrics] == list(range(1, len(metrics) + 1))
    assert len({event["step"] for event in events}) == 2
    assert metrics[-1]["learning_rate"] < 0.1 * metrics[0]["learning_rate"]
    for record in metrics:  # constant, then linear in FLOPs; the rate is that of the step before the line
        left = (budget - record["train_flops"]) / (0.25 * budget)
        assert record["learning_rate"] / metrics[0]["learning_rate"] == pytest.approx(min(1.0, left), abs=0.06)


def test_fixed_runs_of_other_widths_spend_the_same(tmp_path: Path) -> None:
    spent = [
        run(tmp_path / width, "growth=none", f"model.width={width}", "trainer.flops=1e9")["train_flops"]
        for width in ("0.25", "0.5")
    ]
    assert max(spent) <= 1e9
    assert min(spent) > 0.95e9


@pytest.mark.slow
def test_a_run_by_flops_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", "trainer.flops=2e9", "trainer.checkpoint_every=1")
    step = Trainer._step

    def stopping(self: Trainer, index: Any) -> None:
        if self.position.step == whole["steps"] // 2:
            raise KeyboardInterrupt
        step(self, index)

    monkeypatch.setattr(Trainer, "_step", stopping)
    overrides = [*QUICK, f"hydra.run.dir={tmp_path / 'cut'}", "trainer.flops=2e9", "trainer.checkpoint_every=1"]
    assert main(overrides) == 130
    monkeypatch.undo()
    assert main([f"resume={tmp_path / 'cut'}", "trainer.progress=none"]) == 0
    timed = {"seconds", "growth_seconds", "peak_memory"}
    resumed = RunDirectory(tmp_path / "cut").summary()
    assert {k: v for k, v in resumed.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}


def test_random_numbers_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a model draws from torch, numpy and Python, as for dropout; others were drawn before it is resumed."""
    drawn: dict[int, tuple[float, ...]] = {}
    step, last = Trainer._step, [-1]

    def drawing(self: Trainer, index: Any) -> None:
        if self.position.step == last[0]:
            raise KeyboardInterrupt
        drawn[self.position.step] = float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002
        step(self, index)

    monkeypatch.setattr(Trainer, "_step", drawing)
    once = ["growth=none", "trainer.epochs=2", "data.limit=160", "trainer.checkpoint_every=1"]
    run(tmp_path / "whole", *once)
    whole, last[0] = dict(drawn), len(drawn) // 2 + 1
    drawn.clear()
    assert main([*QUICK, *once, f"hydra.run.dir={tmp_path / 'cut'}"]) == 130
    last[0] = -1
    for reset in (torch.manual_seed, np.random.seed, random.seed):
        reset(99)
    assert main([f"resume={tmp_path / 'cut'}", "trainer.progress=none"]) == 0
    assert drawn == whole
    assert len({first for first, *_ in whole.values()}) == len(whole) > 2


def test_a_run_whose_last_flops_went_into_growing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costly = ["growth=functional", "growth.times=1", "growth.amount=2", "growth.samples=640"]
    summary = run(tmp_path / "run", "trainer.flops=3e8", "trainer.progress=lines", "data.limit=640", *costly)
    grown = lines(tmp_path / "run", "growth.jsonl")
    assert summary["train_flops"] > 3e8
    assert grown[-1]["step"] == summary["steps"]
    assert "the last channels were not trained" in "".join(capsys.readouterr())


def test_flops_that_pay_for_no_step_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, f"hydra.run.dir={tmp_path / 'run'}", "trainer.flops=10"]) == 1
    assert "trainer.flops" in capsys.readouterr().err


def test_images_are_small_at_first_and_cost_less(tmp_path: Path) -> None:
    run(tmp_path / "run", "growth=none", "trainer.epochs=4", "data.size=[[0.5,4]]")
    spent = [0.0, *(record["train_flops"] for record in lines(tmp_path / "run", "metrics.jsonl"))]
    small, still, full, same = (after - before for before, after in itertools.pairwise(spent))
    assert (small, full) == (still, same)
    assert small == pytest.approx(
        full / 4, rel=0.05
    )  # but for the linear layer, every layer's cost is that of its area
    growing = ["trainer.flops=1e9", "data.size=[[0.5,4]]"]
    assert run(tmp_path / "grown", *growing)["train_flops"] <= 1e9
    assert main([*QUICK, f"hydra.run.dir={tmp_path / 'wrong'}", "data.size=[[0.5,4],[0.25,2]]"]) == 1


@pytest.mark.parametrize(
    ("samples", "processes", "batch"),
    [(54_000, 1, 128), (4096, 1, 128), (4095, 1, 64), (1222, 1, 32), (20, 1, 20), (1222, 3, 33), (20, 3, 18)],
)
def test_few_images_come_in_small_batches(samples: int, processes: int, batch: int) -> None:
    """An epoch of at least 32 steps, but no batch under 32 images unless there are no more."""
    split = Split(torch.zeros(samples, 1, 1, 1), torch.zeros(samples, dtype=torch.long))
    dataset = Dataset("any", split, split, split, 2, torch.zeros(1), torch.ones(1))
    config: dict[str, Any] = {"trainer": {"batch_size": None, "accumulate": 1}}
    assert global_batch_size(config, dataset, processes) == batch


AVERAGED = ["trainer.ema=0.9", "trainer.epochs=2", "data.limit=160", "growth.samples=64", "growth.batch_size=32"]
AVERAGED += ["growth.times=2", "trainer.progress=none", "report=false", "baselines=[]", "growth=random"]


def test_the_average_is_the_formulas_and_grows() -> None:
    torch.manual_seed(0)
    model = small_cnn(in_channels=1, classes=10, image_size=8, width=0.1)
    average, expected = moving_average(model, 0.9), None
    assert average is not None
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update_parameters(model)
        now = [parameter.detach().clone() for parameter in model.parameters()]
        expected = now if expected is None else [0.9 * a + 0.1 * b for a, b in zip(expected, now, strict=True)]
    for got, wanted in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    sites = growconv.find_sites(model, torch.zeros(2, 1, 8, 8))
    growth = growconv.solve(sites[0], method="random", channels=2, model=model)
    growconv.grow(model, sites[0], growth).apply_to(average.module)
    shapes = [[parameter.shape for parameter in each.parameters()] for each in (average.module, model)]
    assert shapes[0] == shapes[1]
    assert torch.equal(
        average.module.get_submodule("features.0").weight[-2:], model.get_submodule("features.0").weight[-2:]
    )


def test_a_run_is_judged_by_its_average_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        assert main([*AVERAGED, f"hydra.run.dir={folder}"]) == 0
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
