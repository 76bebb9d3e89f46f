"""Hazard: a round that comes twice, never, or at another step after a resume."""

import json

import pytest
from torch import nn

from growconv.errors import CheckpointError, ScheduleError
from growconv.growth.decision import Situation
from growconv.growth.when import AllOf, AnyOf, AtFlops, AtSteps, Every, GainAbove, LengtheningStages, Plateau, When

MODEL = nn.Linear(2, 2)


def situation(step, last_step=None, rounds=0, last_epoch=None, **metrics):
    return Situation(
        step=step, metrics=metrics, model=MODEL, sites=(), initial_widths={}, rounds=rounds, last_step=last_step,
        last_epoch=last_epoch,
    )  # fmt: skip


def rounds_of(policy: When, steps, asked_every=1, metric=lambda step: {}):
    """The steps at which a loop that asks every `asked_every` steps would grow."""
    last, last_epoch, grown = None, None, []
    for step in range(0, steps + 1, asked_every):
        now = situation(step, last, len(grown), last_epoch, **metric(step))
        if policy.decide(now):
            grown.append(step)
            last, last_epoch = step, metric(step).get("epoch")
    return grown


def test_every_interval_grows_once_each():
    assert rounds_of(Every(500), 2100) == [500, 1000, 1500, 2000]
    assert rounds_of(Every(500, start=100), 1200) == [100, 600, 1100]
    assert rounds_of(Every(3, start=0), 7) == [0, 3, 6]


def test_a_loop_that_asks_rarely_misses_no_interval_and_never_catches_up():
    assert rounds_of(Every(75), 400, asked_every=100) == [100, 200, 300, 400]
    assert rounds_of(Every(150), 600, asked_every=100) == [200, 300, 500, 600]


def test_marks_in_flops_grow_once_each_whatever_a_step_costs():
    spent = [0, 10, 20, 30, 70, 110, 150, 190, 230, 270]  # steps cost 10, and 40 after the first growth
    report = lambda step: {"train_flops": spent[step]}  # noqa: E731
    assert rounds_of(AtFlops([25, 150]), 9, metric=report) == [3, 6]
    assert rounds_of(AtFlops([25, 40, 1000]), 9, metric=report) == [3, 4]
    assert "no train_flops" in AtFlops([25]).decide(situation(3)).reason
    for wrong in ([], [0.0], [3.0, 2.0]):
        with pytest.raises(ScheduleError, match="ascending"):
            AtFlops(wrong)


def test_epochs_count_where_they_are_reported():
    report = lambda step: {"epoch": step // 10} if step % 10 == 0 else {}  # noqa: E731
    assert rounds_of(Every(2, unit="epoch"), 60, metric=report) == [20, 40, 60]
    assert "no number of finished epochs" in Every(2, unit="epoch").decide(situation(3)).reason


def test_a_list_of_steps_holds_when_the_loop_asks_late():
    assert rounds_of(AtSteps([10, 25, 26]), 40) == [10, 25, 26]
    assert rounds_of(AtSteps([10, 25, 26]), 40, asked_every=7) == [14, 28]


def test_stages_grow_longer_as_in_variance_transfer():
    lengths = [100]
    while len(lengths) < 5:
        lengths.append(lengths[-1] + int(0.2 * lengths[-1]))
    ends = [sum(lengths[: index + 1]) for index in range(5)]
    assert rounds_of(LengtheningStages(100, 0.2), ends[-1]) == ends


def test_plateau_waits_for_patience_and_starts_afresh_after_a_round():
    losses = [5.0, 4.0, 3.0, 3.0, 3.0, 2.9, 2.9, 2.9, 2.9]
    policy = Plateau("loss", patience=2, min_delta=0.01)
    grown = rounds_of(policy, len(losses) - 1, metric=lambda step: {"loss": losses[step]})
    assert grown == [4, 7]


def test_plateau_counts_a_step_once_however_often_it_is_asked():
    policy = Plateau("loss", patience=2)
    for _ in range(5):
        assert not policy.decide(situation(1, loss=1.0))
    for _ in range(5):
        assert not policy.decide(situation(2, loss=1.0))
    assert policy.decide(situation(3, loss=1.0))


def test_plateau_takes_larger_for_better_ignores_cooldown_and_counts_nan_as_no_improvement():
    policy = Plateau("accuracy", patience=1, mode="max", cooldown=10)
    assert not policy.decide(situation(5, 0, accuracy=0.1))  # cooling: not even counted
    assert not policy.decide(situation(10, 0, accuracy=0.5))
    assert not policy.decide(situation(11, 0, accuracy=0.6))
    assert policy.decide(situation(12, 0, accuracy=float("nan")))


def test_plateau_resumes_exactly():
    losses = [3.0, 2.0, 2.0, 1.5, 1.5, 1.5]
    whole = Plateau("loss", patience=2)
    answers = [bool(whole.decide(situation(step, loss=loss))) for step, loss in enumerate(losses)]
    for cut in range(len(losses)):
        first, second = Plateau("loss", patience=2), Plateau("loss", patience=2)
        head = [bool(first.decide(situation(step, loss=losses[step]))) for step in range(cut)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        tail = [bool(second.decide(situation(step, loss=losses[step]))) for step in range(cut, len(losses))]
        assert head + tail == answers


def test_combinations_ask_every_member_and_keep_their_states():
    flat = {"loss": 1.0}
    both = AllOf([Plateau("loss", patience=2), Every(5)])
    assert rounds_of(both, 12, metric=lambda step: flat) == [5, 10]
    either = AnyOf([AtSteps([1]), Every(5)])
    assert rounds_of(either, 12) == [1, 5, 10]
    fresh = AllOf([Plateau("loss", patience=2), Every(5)])
    fresh.load_state_dict(json.loads(json.dumps(both.state_dict())))
    assert fresh.state_dict() == both.state_dict()
    for other in ({"policies": [{}]}, {"policies": [1, 2]}, {"policies": {}}, {}):
        with pytest.raises(CheckpointError, match="another policy"):
            fresh.load_state_dict(other)
    assert both.personal
    assert not either.personal


def test_every_answer_says_why():
    for policy in (Every(5), AtSteps([3]), Plateau("loss"), LengtheningStages(5), GainAbove(0.1, 5)):
        assert len(policy.decide(situation(2, loss=1.0)).reason) > 10


@pytest.mark.parametrize(
    "build",
    [
        lambda: Every(0), lambda: Every(-3), lambda: Every(5, start=-1), lambda: Every(True), lambda: AtSteps([]),
        lambda: AtSteps([5, 3]), lambda: AtSteps([3, 3]), lambda: LengtheningStages(0),
        lambda: LengtheningStages(5, -0.1),
        lambda: Plateau("loss", patience=0), lambda: Plateau("loss", min_delta=-1.0), lambda: GainAbove(0.0, 5),
        lambda: GainAbove(0.5, 5, -1), lambda: AllOf([]),
    ],
)  # fmt: skip
def test_settings_without_sense_are_refused(build):
    with pytest.raises(ScheduleError):
        build()


def test_a_state_of_another_policy_is_refused():
    with pytest.raises(CheckpointError, match="another policy"):
        Every(5).load_state_dict(Plateau("loss").state_dict())
