"""Hazard: the wrong site, or a budget that is overrun."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from growconv.errors import ScheduleError
from growconv.growth.stop import NoGain
from growconv.growth.where import Best, Greedy, RankTrigger, RoundRobin
from tests.growth.made_up import proposal, situation


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


def test_a_measured_decrease_is_shared_out_by_gains(three):
    offers = [proposal(three.sites[0], [3.0, 1.0]), proposal(three.sites[1], [0.0, 0.0])]
    offers = [replace(offer, decrease=worth) for offer, worth in zip(offers, (0.4, 0.5), strict=True)]
    values, name = Greedy(by="decrease").values(offers)
    assert name == "decrease"
    assert values == [pytest.approx([0.3, 0.1]), pytest.approx([0.25, 0.25])]
    chosen = Greedy("channel", by="decrease", channels=3).choose(offers, math.inf, math.inf)
    assert {taken.site.name: taken.growth.channels for taken, _ in chosen} == {
        three.sites[0].name: 1,
        three.sites[1].name: 2,
    }


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
