"""Hazard: settings that mean something else than what was typed, or make no sense."""

import math

import pytest

from growconv.errors import ScheduleError
from growconv.growth.amount import Auto, Exponential, Fixed, Fraction, ToWidth, as_amount
from growconv.growth.scheduler import GrowthScheduler
from growconv.growth.stop import Budget, NoGain, TargetAccuracy
from growconv.growth.when import AllOf, AnyOf, AtSteps, Every, GainAbove
from growconv.growth.where import All, Best, Greedy, RankTrigger, RoundRobin, as_where
from growconv.solvers import SOLVERS


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


@pytest.mark.parametrize("method", sorted(SOLVERS))
def test_a_policy_that_compares_gains_takes_only_methods_that_have_such(three, method):
    between_sites = {"tiny", "exact", "functional", "senn", "gradmax", "firefly", "splitting"}
    shares = {"tiny", "exact", "functional", "senn"}
    policies = [
        ({"where": Best(by="energy")}, between_sites),
        ({"where": Greedy(by="energy")}, between_sites),
        ({"when": GainAbove(0.1, 5)}, shares),
        ({"when": AnyOf([Every(3), GainAbove(0.1, 5)])}, shares),
        ({"stop": NoGain()}, shares),
        ({"where": Best()}, set(SOLVERS)),  # by gradient
        ({"where": RankTrigger()}, {"north"}),
        ({"when": AllOf([Every(3), AtSteps([4])])}, set(SOLVERS)),
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
