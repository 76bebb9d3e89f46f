"""Learning rates over a run, beside torch's own schedulers and numpy's interpolation."""

import copy

import numpy as np
import pytest
import torch

from growconv.training.config import compose, plain
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
