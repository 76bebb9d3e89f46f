"""Hazard: the wrong site, the wrong number of channels, a budget that is overrun."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from growconv.errors import ScheduleError
from growconv.growth.amount import Auto, Exponential, Fixed, Fraction, ToWidth, as_amount
from growconv.growth.decision import Proposal, Situation
from growconv.growth.scheduler import GrowthScheduler
from growconv.growth.stop import Budget, NoGain, TargetAccuracy
from growconv.growth.when import AllOf, AnyOf, AtSteps, Every, GainAbove
from growconv.growth.where import All, Best, Greedy, RankTrigger, RoundRobin, as_where
from growconv.network.proposal import ChannelGrowth
from growconv.solvers import SOLVERS


@pytest.fixture
def three(chain, sites_of):
    model = chain(4, 6, 8)
    return SimpleNamespace(model=model, sites=sites_of(model))


def situation(three, **fields):
    defaults = {"step": 0, "metrics": {}, "initial_widths": {site.name: site.width for site in three.sites}}
    return Situation(model=three.model, sites=three.sites, **(defaults | fields))


def proposal(site, gains, parameters=10.0, flops=100.0, energy=1.0):
    gains = torch.tensor(gains, dtype=torch.float64)
    growth = ChannelGrowth(
        site=site.name, method="made up", incoming={"a": torch.zeros(len(gains), 1, 3, 3)},
        outgoing={"b": torch.zeros(2, len(gains), 3, 3)}, gains=gains,
    )  # fmt: skip
    return Proposal(site, growth, energy, parameters, flops)


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


def test_round_robin_visits_every_site_before_any_twice(three):
    visits, order = {site.name: 0 for site in three.sites}, []
    for _ in range(2 * len(three.sites)):
        (site,) = RoundRobin().candidates(three.sites, situation(three, visits=visits))
        visits[site.name] += 1
        order.append(site)
    assert order == [*three.sites, *three.sites]
    pair = RoundRobin(count=2).candidates(three.sites, situation(three, visits=dict.fromkeys(visits, 0)))
    assert pair == list(three.sites[:2])


def test_best_compares_by_the_yardstick_it_was_given(three):
    offers = [
        proposal(three.sites[0], [3.0, 1.0], parameters=100.0, flops=10.0),
        proposal(three.sites[1], [2.0, 1.0], parameters=10.0, flops=100.0),
    ]
    for per, expected in (("channel", 0), ("parameter", 1), ("flop", 0)):
        ((chosen, reason),) = Best(per).choose(offers, math.inf, math.inf)
        assert chosen is offers[expected]
        assert f"energy per {per}" in reason
    steep = [replace(offer, slopes=torch.tensor(s)) for offer, s in zip(offers, ([1.0, 1.0], [50.0, 1.0]), strict=True)]
    for policy, expected in ((Best(), 1), (Best("channel", "gradient"), 1), (Best("flop", "energy"), 0)):
        ((chosen, _),) = policy.choose(steep, math.inf, math.inf)
        assert chosen is steep[expected]
    with pytest.raises(ScheduleError, match="compares gradients"):
        Best(by="gradient").choose([steep[0], offers[1]], math.inf, math.inf)
    assert [chosen for chosen, _ in Best("channel", count=2).choose(offers, math.inf, math.inf)] == offers


def test_greedy_is_the_best_filling_of_a_small_knapsack_of_equal_prices(three):
    gains = [[5.0, 2.0, 0.5], [4.0, 3.0, 0.1], [1.0, 0.9, 0.8]]
    offers = [proposal(site, values) for site, values in zip(three.sites, gains, strict=True)]
    chosen = Greedy(channels=4).choose(offers, math.inf, math.inf)
    got = sum(float(taken.growth.gains.sum()) for taken, _ in chosen)
    assert got == max(sum(four) for four in itertools.combinations([g for row in gains for g in row], 4))
    assert {taken.site.name: taken.growth.channels for taken, _ in chosen} == {
        three.sites[0].name: 2,
        three.sites[1].name: 2,
    }


def test_greedy_never_exceeds_an_allowance_and_fills_up_with_cheaper_channels(three):
    dear = proposal(three.sites[0], [9.0, 8.0], parameters=60.0, flops=1.0)
    cheap = proposal(three.sites[1], [1.0, 0.5], parameters=10.0, flops=1.0)
    chosen = Greedy(parameters=85).choose([dear, cheap], math.inf, math.inf)
    assert {taken.site.name: taken.growth.channels for taken, _ in chosen} == {dear.site.name: 1, cheap.site.name: 2}
    chosen = Greedy(per="parameter").choose([dear, cheap], 25.0, math.inf)
    assert {taken.site.name: taken.growth.channels for taken, _ in chosen} == {cheap.site.name: 2}
    assert Greedy().choose([dear, cheap], 5.0, math.inf) == []
    assert Greedy().choose([dear, cheap], math.inf, 0.5) == []


def test_greedy_spreads_a_budget_over_its_rounds(three):
    offers = [proposal(site, [3.0] * 12, flops=10.0) for site in three.sites]
    policy, room = Greedy(rounds=3), 300.0
    for number, expected in enumerate((100.0, 100.0, 100.0, 0.0)):
        policy.candidates(three.sites, situation(three, rounds=number))
        spent = 10.0 * sum(taken.growth.channels for taken, _ in policy.choose(offers, math.inf, room))
        assert spent == expected
        room -= spent


def test_gains_cannot_be_compared_where_there_are_none(three):
    offers = [proposal(site, [0.0], energy=None) for site in three.sites]
    for policy in (Best(), Greedy()):
        with pytest.raises(ScheduleError, match="has none"):
            policy.choose(offers, math.inf, math.inf)
    with pytest.raises(ScheduleError, match="no statistics"):
        NoGain().observe(offers)


def test_greedy_takes_a_share_of_all_channels(three):
    offers = [proposal(site, [3.0 - rank, 2.0 - rank, 1.0 - rank]) for rank, site in enumerate(three.sites)]
    chosen = Greedy(share=0.3).choose(offers, math.inf, math.inf)  # of 4 + 6 + 8 channels
    assert sum(taken.growth.channels for taken, _ in chosen) == 5
    assert Greedy(share=0.3, channels=2).choose(offers, math.inf, math.inf)[0][0].growth.channels == 2
    with pytest.raises(ScheduleError):
        Greedy(share=0.0)


def test_the_rank_trigger_measures_against_the_largest_rank_seen(three):
    def offer(site, rank, channels=8):
        made = proposal(site, [0.0] * channels)
        return replace(made, growth=replace(made.growth, measured={"rank": rank}))

    def taken(trigger, *offers):
        return {p.site.name: p.growth.channels for p, _ in trigger.choose(offers, math.inf, math.inf)}

    first, second, _ = three.sites  # 4 and 6 channels
    trigger = RankTrigger(gamma=0.5)
    # nothing was seen before: the first rank is the baseline, floor(4 (1 - 0.5)) and floor(6 (0.5 - 0.25))
    assert taken(trigger, offer(first, 1.0), offer(second, 0.5)) == {first.name: 2, second.name: 1}
    saved = json.loads(json.dumps(trigger.state_dict()))
    # the first fell below half of its best; the second passes its own: floor(6 (1 - 0.25)), at most what is offered
    assert taken(trigger, offer(first, 0.5), offer(second, 1.0, channels=3)) == {second.name: 3}
    assert taken(trigger, offer(second, 0.5)) == {}
    resumed = RankTrigger(gamma=0.5)
    resumed.load_state_dict(saved)
    assert taken(resumed, offer(first, 0.5), offer(second, 1.0)) == {second.name: 4}
    with pytest.raises(ScheduleError):
        RankTrigger(0.0)


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
