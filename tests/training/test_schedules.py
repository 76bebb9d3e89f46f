"""Learning rates over a run, beside torch's own schedulers and numpy's interpolation."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from growconv.cli import main
from growconv.errors import ConfigError
from growconv.training.config import compose, plain
from growconv.training.loop import Trainer
from growconv.training.rundir import RunDirectory
from growconv.training.schedules import lr_factor, make_lr_schedule, make_optimizer

SHARES = {"warmup": 0.0, "final": 0.0, "decay": 0.3}


def test_cosine_is_torchs_own() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1)
    factor = make_lr_schedule({**SHARES, "name": "cosine", "final": 0.1}, 50)
    for step in range(50):
        assert factor(step, 1) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("total", "decay", "final"), [(100, 0.3, 0.0), (40, 0.25, 0.1), (10, 1.0, 0.0)])
def test_trapezoid_rises_stays_and_falls(total: int, decay: float, final: float) -> None:
    factor = make_lr_schedule({"name": "trapezoid", "warmup": 0.0, "final": final, "decay": decay}, total)
    expected = np.interp(range(total), [total - decay * total - 1, total], [1.0, final])
    np.testing.assert_allclose([factor(step, 1) for step in range(total)], expected, atol=1e-12)
    warm = make_lr_schedule({"name": "trapezoid", "warmup": 0.1, "final": final, "decay": decay}, total)
    assert warm(0, 1) == pytest.approx(1 / (0.1 * total + 1))


@pytest.mark.parametrize("name", ["cosine", "trapezoid", "constant"])
def test_a_schedule_in_flops_is_that_in_steps_where_steps_cost_the_same(name: str) -> None:
    for step in range(40):
        in_steps = lr_factor(name, step, 40, warmup=0.1, decay=0.5)
        assert lr_factor(name, 3e9 * step, 1.2e11, warmup=0.1, decay=0.5, one=3e9) == pytest.approx(in_steps)


def test_constant_stays() -> None:
    factor = make_lr_schedule({**SHARES, "name": "constant"}, 10)
    assert {factor(step, 1) for step in range(10)} == {1.0}


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_optimizers_are_torchs_own(kind: str) -> None:
    """Step for step, with the state that torch's classes load."""
    config = plain(compose([f"optimizer={kind}"]))["optimizer"]
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(config, ours)
    groups = [
        {"params": [theirs.weight], "weight_decay": config["weight_decay"]},
        {"params": [theirs.bias], "weight_decay": 0.0},
    ]
    if kind == "sgd":
        expected = torch.optim.SGD(groups, lr=config["lr"], momentum=config["momentum"], nesterov=config["nesterov"])
    else:
        expected = torch.optim.AdamW(groups, lr=config["lr"], betas=tuple(config["betas"]), eps=config["eps"])
    for step in range(6):
        if step == 3:
            expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for model, each in ((ours, optimizer), (theirs, expected)):
            each.zero_grad()
            model(torch.arange(6.0).reshape(2, 3)).square().sum().backward()
            each.step()
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)
    assert isinstance(optimizer, type(expected))


TORCH_SCHEDULES = {
    "StepLR": {"step_size": 2, "gamma": 0.5},
    "MultiStepLR": {"milestones": [3, 5]},
    "ConstantLR": {"total_iters": 3},
    "LinearLR": {"total_iters": 4},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 9},
    "CosineAnnealingLR": {"T_max": 7},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 3},
    "OneCycleLR": {"max_lr": 0.3, "total_steps": 12},
}


@pytest.mark.parametrize("every", ["epoch", "step"])
@pytest.mark.parametrize("name", TORCH_SCHEDULES)
def test_a_schedule_of_torch_gives_torchs_rates_from_any_step_on(name: str, every: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **TORCH_SCHEDULES[name])
    period = 3 if every == "epoch" else 1
    expected = []
    for _ in range(10):
        expected += period * [optimizer.param_groups[0]["lr"]]
        optimizer.step()
        scheduler.step()
    config = {"name": name, "every": every, "args": TORCH_SCHEDULES[name]}
    factor = make_lr_schedule(config, len(expected), 0.1, 3)
    assert [0.1 * factor(step, 1) for step in range(len(expected))] == pytest.approx(expected)
    assert 0.1 * factor(4, 1) == pytest.approx(expected[4])  # as after resuming


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lr_schedule=torch", "lr_schedule.name=StepLr", "+lr_schedule.args.step_size=2"], "lr_schedule.name=StepLR?"),
        (["lr_schedule=torch", "lr_schedule.name=ReduceLROnPlateau"], "looks at a metric"),
        (["lr_schedule=torch", "lr_schedule.name=StepLR"], "step_size"),
        (
            ["lr_schedule=torch", "lr_schedule.name=OneCycleLR", "+lr_schedule.args={max_lr: 1, total_steps: 2}"],
            "before",
        ),
        (["optimizer=torch", "optimizer.name=RMSProp", "optimizer.lr=0.1"], "optimizer.name=RMSprop?"),
        (["optimizer=torch", "optimizer.name=LBFGS", "optimizer.lr=0.1"], "runs the model itself"),
        (
            ["optimizer=torch", "optimizer.name=Rprop", "optimizer.lr=0.1", "optimizer.weight_decay=0.1"],
            "no weight decay",
        ),
        (["optimizer=torch", "optimizer.name=NAdam", "optimizer.lr=0.1", "+optimizer.args.alpha=1"], "alpha"),
        (["optimizer=torch", "optimizer.name=torch.optim.NAdamm", "optimizer.lr=0.1"], "torch.optim.NAdam?"),
        (["optimizer=torch", "optimizer.name=torch.optim.LBFGS", "optimizer.lr=0.1"], "runs the model itself"),
        (["optimizer=torch", "optimizer.name=torch.optim.lbfgs.LBFGS", "optimizer.lr=0.1"], "runs the model itself"),
        (["optimizer=torch", "optimizer.name=torch.nn.ReLU", "optimizer.lr=0.1"], "a subclass of Optimizer"),
    ],
)
def test_what_torch_does_not_have_or_take_is_said(overrides: list[str], words: str) -> None:
    config = plain(compose(overrides))

    def make() -> None:
        make_optimizer(config["optimizer"], torch.nn.Linear(3, 2))
        make_lr_schedule(config["lr_schedule"], 20, 0.1, 4)

    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value)


def test_classes_of_ones_own_are_named_by_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import torch
class Lion(torch.optim.SGD):
    pass
class Halving(torch.optim.lr_scheduler.ExponentialLR):
    def __init__(self, optimizer):
        super().__init__(optimizer, 0.5)
"""
    (tmp_path / "mine_for_schedules.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    chosen = ["optimizer=torch", "optimizer.name=mine_for_schedules.Lion", "optimizer.lr=0.1"]
    config = plain(compose([*chosen, "lr_schedule=torch", "lr_schedule.name=mine_for_schedules.Halving"]))
    assert type(make_optimizer(config["optimizer"], torch.nn.Linear(3, 2))).__name__ == "Lion"
    factor = make_lr_schedule(config["lr_schedule"], 8, 0.1, 4)
    assert [factor(step, 1) for step in (0, 4, 7)] == pytest.approx([1, 0.5, 0.5])


def test_torchs_schedules_need_a_number_of_steps() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.epochs"):
        plain(compose(["lr_schedule=torch", "lr_schedule.name=StepLR", "trainer.flops=1e9"]))


@pytest.mark.parametrize(("name", "args"), [("RMSprop", "{alpha: 0.9}"), ("NAdam", "{}"), ("Adagrad", "{}")])
def test_a_growing_run_with_any_optimizer_of_torch_goes_on_bit_for_bit(
    name: str, args: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["optimizer=torch", f"optimizer.name={name}", f"+optimizer.args={args}", "optimizer.lr=1e-3"]
    chosen += ["lr_schedule=torch", "lr_schedule.name=StepLR", "+lr_schedule.args={step_size: 1, gamma: 0.5}"]
    quick = [
        "trainer.epochs=3",
        "growth.times=1",
        "data.limit=300",
        "growth.batch_size=64",
        "growth.samples=128",
        "report=false",
    ]
    quick += ["baselines=[]", "trainer.progress=none"]
    assert main([*quick, *chosen, f"hydra.run.dir={tmp_path / 'whole'}"]) == 0
    whole = RunDirectory(tmp_path / "whole").summary()
    assert whole["growth_events"] > 0
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["learning_rate"] for line in lines] == pytest.approx([1e-3, 5e-4, 2.5e-4])
    step = Trainer._step

    def stopping(self: Trainer, index: Any) -> None:
        if self.position.epoch == 2:
            raise KeyboardInterrupt
        step(self, index)

    monkeypatch.setattr(Trainer, "_step", stopping)
    assert main([*quick, *chosen, f"hydra.run.dir={tmp_path / 'cut'}"]) == 130
    monkeypatch.undo()
    assert main([f"resume={tmp_path / 'cut'}", "trainer.progress=none"]) == 0
    timed = {"seconds", "growth_seconds", "peak_memory"}
    resumed = RunDirectory(tmp_path / "cut").summary()
    assert {k: v for k, v in resumed.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}
