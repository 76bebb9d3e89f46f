"""Events replay, survive JSON and pickles, and do the same to averages, teachers and replicas."""

import copy
import json
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from growconv.errors import ArgumentValueError, CheckpointError, GrowthError, SurgeryError
from growconv.network.apply import grow, shrink
from growconv.network.event import GrowthEvent, GrowthHistory, apply_edits, count_parameters
from growconv.network.site import GrowthSite
from tests.network import hand
from tests.network.test_apply import everything, interrupt_everywhere, same

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def surgery(model: nn.Module, site: GrowthSite, optimizer: torch.optim.Optimizer | None = None) -> list[GrowthEvent]:
    """Grow twice and shrink once."""
    events = [grow(model, site, hand.growth(site, 2), 0.5, optimizer)]
    events.append(shrink(model, site, range(site.granularity, 2 * site.granularity), optimizer))
    events.append(grow(model, site, hand.growth(site, 1, seed=3), 1.0, optimizer))
    return events


@pytest.mark.parametrize("name", hand.SITES)
def test_a_replica_grows_alike_to_the_last_bit(name: str) -> None:
    model, example, site = hand.build(name)
    replica, _, _ = hand.build(name)
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9)
    applied = [event.apply_to(replica, optimizer) for event in surgery(model, site)]
    for (key, value), other in zip(model.state_dict().items(), replica.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    assert torch.equal(model.eval()(example), replica.eval()(example))
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in replica.parameters()}
    assert [event.parameters_after for event in applied][-1] == count_parameters(model)


@pytest.mark.parametrize("name", ["pair", "stream", "weight norm", "concatenation"])
def test_an_average_keeps_its_function_at_amplitude_zero(name: str) -> None:
    model, example, site = hand.build(name)
    average = hand.build(name, seed=7)[0].requires_grad_(False)  # other weights, as an average or a teacher has
    expected = average.eval()(example)
    event = grow(model, site, hand.growth(site, 2), 0.0)
    event.apply_to(average)
    assert not any(parameter.requires_grad for parameter in average.parameters())
    torch.testing.assert_close(average(example), expected, rtol=0, atol=1e-12)
    assert {k: v.shape for k, v in average.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", hand.SITES)
def test_a_history_replays_on_a_fresh_model_from_json(name: str) -> None:
    model, example, site = hand.build(name)
    fresh, _, _ = hand.build(name, seed=1)
    history = GrowthHistory(surgery(model, site))
    assert history.starts_from(fresh)
    read = GrowthHistory.from_json(history.to_json())
    assert [event.to_dict() for event in read] == [json.loads(json.dumps(event.to_dict())) for event in history]
    optimizer = torch.optim.AdamW(fresh.parameters())
    assert read.replay(fresh, optimizer) is fresh
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval()(example), model.eval()(example), rtol=0, atol=0)
    assert history.widths(site.name) == [(None, event.width_after) for event in history]
    fresh.train()(example).sum().backward()
    optimizer.step()
    assert "channels by random" in str(history)


@pytest.mark.parametrize("how", [pickle.loads, copy.deepcopy, "json"])
def test_events_from_elsewhere_know_shapes_only(how: object) -> None:
    model, example, site = hand.build("pair")
    other, _, _ = hand.build("pair", seed=2)
    event = grow(model, site, hand.growth(site, 2))
    event = replace(event, step=7)
    assert event.recipe is not None
    if how == "json":
        event = GrowthEvent.from_dict(json.loads(json.dumps(event.to_dict())))
    else:
        event = how(pickle.dumps(event)) if how is pickle.loads else how(event)
    assert event.recipe is None
    assert event.step == 7
    expected = other.eval()(example)
    event.apply_to(other)
    assert other.a.out_channels == 6
    assert other.b.weight[:, 4:].abs().max() == 0
    torch.testing.assert_close(other(example), expected, rtol=0, atol=1e-12)
    other.load_state_dict(model.state_dict())
    with pytest.raises(SurgeryError, match="as the other one was"):
        event.apply_to(other)


def test_a_model_that_is_not_in_step_is_refused_unchanged() -> None:
    model, _, site = hand.build("pair")
    other, _, _ = hand.build("pair")
    events = surgery(model, site)
    before = everything(other)
    for event, message in ((events[1], "as the other one was"), (events[2], "as the other one was")):
        with pytest.raises(SurgeryError, match=message):
            event.apply_to(other)
    with pytest.raises(GrowthError):
        events[0].apply_to(nn.Sequential(nn.Linear(2, 2)))
    assert same(everything(other), before)


def test_edits_that_do_not_fit_change_nothing() -> None:
    model, _, site = hand.build("pair")
    fresh, _, _ = hand.build("pair")
    edits = [edit for event in surgery(model, site) for edit in event.edits]
    optimizer = torch.optim.Adam(fresh.parameters())
    before = everything(fresh, optimizer)
    for wrong in (
        {"module": "nowhere", "tensor": "weight", "axis": 0, "position": 1, "count": 1},
        {"module": "a", "tensor": "weight", "axis": 9, "position": 1, "count": 1},
        {"module": "a", "tensor": "weight", "axis": 0, "position": "1", "count": 1},
        {"module": "a"},
    ):
        with pytest.raises(SurgeryError, match="does not fit this model"):
            apply_edits(fresh, [*edits, wrong], optimizer)
        assert same(everything(fresh, optimizer), before)


def test_histories_that_cannot_be_read_are_refused() -> None:
    for text, message in (
        ("no json", "has to be JSON"),
        ("{}", "no kind of growth history"),
        ('{"format": 1, "events": [{}]}', "read"),
    ):
        with pytest.raises(CheckpointError, match=message):
            GrowthHistory.from_json(text)
    with pytest.raises(ArgumentValueError, match="unknown entries"):
        GrowthEvent.from_dict({"colour": "blue"})
    model, _, site = hand.build("pair")
    history = GrowthHistory(surgery(model, site))
    with pytest.raises(CheckpointError, match="began with another model"):
        history.replay(model)


def test_an_interrupt_in_a_replay_undoes_all_of_it() -> None:
    model, _, site = hand.build("mlp")
    fresh, example, _ = hand.build("mlp")
    optimizer = torch.optim.Adam(fresh.parameters())
    fresh(example).sum().backward()
    optimizer.step()
    event = grow(model, site, hand.growth(site, 1))
    assert interrupt_everywhere(fresh, optimizer, lambda: apply_edits(fresh, event.edits, optimizer)) > 30


def test_models_grow_in_threads_of_their_own() -> None:
    built = [hand.build(name) for name in ("pair", "stream", "mlp", "depthwise") * 2]
    expected = [model.eval()(example) for model, example, _ in built]
    failures = []

    def work(model: nn.Module, site: GrowthSite) -> None:
        try:
            for seed in range(5):
                grow(model, site, hand.growth(site, 1, seed), 0.0, torch.optim.SGD(model.parameters(), lr=0.1))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(model, site)) for model, _, site in built]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for (model, example, _), output in zip(built, expected, strict=True):
        torch.testing.assert_close(model(example), output, rtol=0, atol=1e-12)
