"""Hazard: the wrong number of channels."""

import itertools
import warnings

import pytest
from torch.nn.functional import cross_entropy

from growconv.errors import ScheduleError
from growconv.growth import GrowthScheduler
from growconv.growth.amount import Exponential, Fraction, ToWidth
from growconv.solvers import SOLVERS
from tests.growth.made_up import situation
from tests.methods import METHODS


def test_fraction_counts_from_the_initial_width(three):
    site = three.sites[2]
    assert Fraction(0.25).channels(site, situation(three, initial_widths={site.name: 16})) == 4
    assert Fraction(0.25).channels(site, situation(three, initial_widths={site.name: 1})) == 1


@pytest.mark.parametrize(("target", "rounds"), [(9, 3), (3.0, 4), (5, 7), (2, 2)])
def test_equal_steps_reach_the_target_in_the_last_round(three, chain, sites_of, target, rounds):
    start, widths = 4, [4]
    for visit in range(rounds + 2):
        site = sites_of(chain(widths[-1]))[0]
        now = situation(three, initial_widths={site.name: start}, visits={site.name: visit})
        widths.append(widths[-1] + ToWidth(target, rounds).channels(site, now))
    goal = max(start, target if isinstance(target, int) else round(target * start))
    assert widths[rounds] == widths[-1] == goal
    steps = [after - before for before, after in itertools.pairwise(widths[: rounds + 1])]
    assert max(steps) - min(steps) <= 1


def test_exponential_widths_follow_the_paper(three, chain, sites_of):
    width, widths = 16, [16]
    for visit in range(6):
        site = sites_of(chain(width))[0]
        now = situation(three, initial_widths={site.name: 16}, visits={site.name: visit})
        width += Exponential(0.2, target=64, rounds=6).channels(site, now)
        widths.append(width)
    assert widths == [16, 18, 20, 24, 28, 32, 64]
    assert all((after - before) % 2 == 0 for before, after in itertools.pairwise(widths))


@pytest.mark.parametrize("method", METHODS)
def test_the_number_is_left_to_methods_that_can_tell_it(method, chain, sites_of, batches_of):
    model = chain(3, 4)
    if not SOLVERS[method].counts:
        with pytest.raises(ScheduleError, match="no measure by which to choose"):
            GrowthScheduler(model, None, sites_of(model), method=method, amount="auto")
        return
    scheduler = GrowthScheduler(model, None, sites_of(model), method=method, amount="auto")
    with warnings.catch_warnings(action="ignore"):  # few samples
        scheduler.grow(batches_of(2), cross_entropy)
