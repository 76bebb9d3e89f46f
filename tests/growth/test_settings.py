"""Hazard: settings that mean something else than what was typed, make no sense, or have much against them unsaid."""

import logging
import math

import pytest
import torch
from torch import nn

from growconv.errors import ScheduleError
from growconv.growth import AtFlops
from growconv.growth.amount import Auto, Exponential, Fixed, Fraction, ToWidth, as_amount, too_wide
from growconv.growth.scheduler import GrowthScheduler
from growconv.growth.stop import Budget, NoGain, TargetAccuracy
from growconv.growth.when import AllOf, AnyOf, AtSteps, Every, GainAbove, fallen, too_late
from growconv.growth.where import All, Best, Greedy, RankTrigger, RoundRobin, as_where
from growconv.network.find import find_sites
from growconv.training.config import compose, plain
from growconv.training.experiment import cautions
from growconv.training.schedules import decay_begins, lr_factor
from tests.methods import METHODS

LOSS = nn.functional.cross_entropy


def test_short_forms_mean_what_the_scheduler_says():
    assert as_amount(3) == Fixed(3)
    assert as_amount(0.25) == Fraction(0.25)
    assert as_amount("auto") == Auto()
    assert as_amount(Fixed(2)) == Fixed(2)
    assert as_where("all") == All()
    assert as_where("best") == Best()
    assert as_where("round_robin") == RoundRobin()
    for wrong in ("many", True):
        with pytest.raises(ScheduleError, match="amount"):
            as_amount(wrong)
    with pytest.raises(ScheduleError, match="where"):
        as_where("somewhere")


@pytest.mark.parametrize("method", METHODS)
def test_a_policy_that_compares_gains_takes_only_methods_that_have_such(three, method):
    between_sites = {"tiny", "exact", "functional", "senn", "gradmax", "firefly", "splitting"}
    shares = {"tiny", "exact", "functional", "senn"}
    policies = [
        ({"where": Best(by="energy")}, between_sites),
        ({"where": Greedy(by="energy")}, between_sites),
        ({"when": GainAbove(0.1, 5)}, shares),
        ({"when": AnyOf([Every(3), GainAbove(0.1, 5)])}, shares),
        ({"stop": NoGain()}, shares),
        ({"where": Best()}, set(METHODS)),  # by gradient
        ({"where": RankTrigger()}, {"north"}),
        ({"when": AllOf([Every(3), AtSteps([4])])}, set(METHODS)),
    ]
    for settings, able in policies:
        if method in able:
            GrowthScheduler(three.model, None, three.sites, method=method, **settings)
        else:
            with pytest.raises(ScheduleError, match=r"compares gains.*has (none|gains in another)"):
                GrowthScheduler(three.model, None, three.sites, method=method, **settings)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Fixed(0), lambda: Fraction(0.0), lambda: ToWidth(8, 0), lambda: ToWidth(0, 3), lambda: Exponential(0),
        lambda: Exponential(0.2, rounds=4), lambda: Auto(0), lambda: RoundRobin(0), lambda: Best(count=0),
        lambda: Greedy(channels=0), lambda: Greedy(parameters=-5), lambda: Greedy("gain"),
        lambda: Best(by="loss"), lambda: Budget(), lambda: Budget(parameters=0),
        lambda: Budget(flops=-1), lambda: Budget(seconds=0.0), lambda: TargetAccuracy(math.nan), lambda: NoGain(0.0),
        lambda: NoGain(0.1, 0),
    ],
)  # fmt: skip
def test_settings_without_sense_are_refused(build):
    with pytest.raises(ScheduleError):
        build()


def test_a_step_above_twice_the_width_is_told_before_and_when_it_happens(chain, sites_of, batches_of, caplog):
    model = chain(3, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = GrowthScheduler(model, optimizer, sites_of(model), method="random", every=1, times=1, amount=4)
    assert [text.split(":")[0] for text in scheduler.cautions()] == ["0 -> 4"]
    assert repr(scheduler) in scheduler.explain()
    assert "caution: 0 -> 4: 3 to 7 channels is 2.33 times as wide" in scheduler.explain()
    with caplog.at_level(logging.WARNING, logger="growconv.growth"):
        assert scheduler.due(1)
        scheduler.grow(batches_of(1), LOSS)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["0 -> 4"]
    assert too_wide("a", 8, 16) is None


@pytest.mark.parametrize(
    ("method", "norm", "told"), [("gradmax", True, True), ("gradmax", False, False), ("random", True, False)]
)
def test_zero_filters_behind_norm_layers_are_told(method, norm, told):
    between = [nn.BatchNorm2d(3)] if norm else []
    model = nn.Sequential(nn.Conv2d(1, 3, 3), *between, nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    sites = find_sites(model, torch.zeros(2, 1, 8, 8))
    found = GrowthScheduler(model, None, sites, method=method, every=1, times=1, amount=1).cautions()
    assert any("norm layer" in text for text in found) == told
    assert all(text.startswith(f"gradmax on {sites[0].name}: ") for text in found)


@pytest.mark.parametrize(("share", "told"), [(1.0, False), (0.3, True)])
def test_growing_at_a_rate_that_has_fallen_is_told(chain, sites_of, batches_of, caplog, share, told):
    model = chain(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = GrowthScheduler(model, optimizer, sites_of(model), method="random", every=2, amount=1)
    scheduler.due(1)
    optimizer.param_groups[0]["lr"] *= share
    assert scheduler.due(2)
    with caplog.at_level(logging.WARNING, logger="growconv.growth"):
        scheduler.grow(batches_of(1), LOSS)
    assert any("has fallen to 30%" in record.getMessage() for record in caplog.records) == told
    assert fallen(0.1, 0.1) is None


@pytest.mark.parametrize("schedule", ["cosine", "trapezoid", "constant"])
def test_where_a_rate_begins_to_fall(schedule):
    config = plain(compose([f"lr_schedule={schedule}", "lr_schedule.warmup=0.1"]))["lr_schedule"]
    begins, shares = decay_begins(config), {key: config[key] for key in ("warmup", "final", "decay")}
    factors = [lr_factor(schedule, step, 1000, **shares) for step in range(1000)]
    full = [step for step, factor in enumerate(factors) if factor > 0.999]
    assert max(full) == pytest.approx(1000 * begins, abs=25)


def test_a_run_is_warned_of_growth_in_its_decay_and_the_default_is_not(chain, sites_of):
    def said(*overrides, when):
        model = chain(4, 4)
        scheduler = GrowthScheduler(model, None, sites_of(model), method="random", when=when, amount=1)
        return cautions(plain(compose(overrides)), scheduler, 100)

    assert said(when=AtSteps([10, 60])) == []
    assert "last growth comes at 60% of the run" in said("lr_schedule=cosine", when=AtSteps([10, 60]))[0]
    assert "falls from 70% on" in said(when=AtFlops([10.0, 80.0]))[0]
    assert too_late(0.6, 0.7) is None
