"""Hazard: a run that grows on, or stops too early."""

import math

import pytest
import torch
from torch import nn

from growconv.growth import GrowthScheduler, ModelCost
from growconv.growth.stop import Budget, NoGain, TargetAccuracy
from growconv.growth.where import Greedy
from tests.growth.made_up import proposal, situation


def test_budgets_say_what_is_left_and_when_it_is_spent(three):
    size = sum(parameter.numel() for parameter in three.model.parameters())
    now = situation(three, seconds=9.0)
    assert not Budget(parameters=size + 5).decide(now)
    assert Budget(parameters=size + 5).room(now) == (5, math.inf)
    assert Budget(parameters=size).decide(now)
    assert Budget(parameters=size - 3).room(now) == (0, math.inf)
    assert Budget(seconds=9).decide(now)
    assert not Budget(seconds=9.5).decide(now)
    assert Budget(seconds=9).personal
    assert not Budget(parameters=5).personal


def test_a_target_once_reached_stays_reached(three):
    policy = TargetAccuracy(0.9)
    answers = [bool(policy.decide(situation(three, metrics={"val_accuracy": value}))) for value in (0.5, 0.91, 0.4)]
    assert answers == [False, True, True]
    assert policy.decide(situation(three))


def test_no_gain_needs_poor_rounds_in_a_row(three):
    policy = NoGain(threshold=0.1, patience=2)
    for gain, over in ((0.05, False), (0.5, False), (0.05, False), (0.02, True), (0.9, True)):
        policy.observe([proposal(three.sites[0], [gain])])
        assert bool(policy.decide(situation(three))) is over


@pytest.mark.parametrize("amount", [1, 0.5, "auto"])
def test_a_budget_of_parameters_is_filled_and_never_exceeded(chain, sites_of, digits, batches_of, amount):
    model = chain(3, 4, 5)
    size = sum(parameter.numel() for parameter in model.parameters())
    limit = size + 160
    scheduler = GrowthScheduler(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05),
        sites_of(model),
        every=1,
        amount=amount,
        budget=Budget(parameters=limit),
    )
    for step in range(1, 8):
        if scheduler.due(step):
            scheduler.grow(batches_of(2, size=32), LOSS)
    final = sum(parameter.numel() for parameter in model.parameters())
    assert final <= limit
    if amount != "auto":
        assert final > limit - 80  # less than one channel of the dearest site is left


LOSS = nn.functional.cross_entropy


def test_a_budget_of_flops_holds_by_torchs_own_counter(chain, sites_of, digits, batches_of):
    from torch.utils.flop_counter import FlopCounterMode

    def flops(net):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net.eval()(digits[0][:1])
        return counter.get_total_flops()

    model = chain(3, 4, 5)
    assert ModelCost.measure(model, digits[0][:4]).flops() == flops(model)
    limit = round(1.4 * flops(model))
    scheduler = GrowthScheduler(
        model, None, sites_of(model), where=Greedy("flop"), amount=2, budget=Budget(flops=limit), every=1
    )
    for step in range(1, 7):
        if scheduler.due(step):
            model.train()
            scheduler.grow(batches_of(2, size=32), LOSS)
    assert 0.85 * limit < flops(model) <= limit
    assert scheduler.state_dict()["history"]
