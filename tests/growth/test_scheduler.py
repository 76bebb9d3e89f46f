"""Hazard: a round that disturbs the training, that grows the wrong thing, or that fails half way."""

import copy
import json
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

import growconv
from growconv.errors import CheckpointError, GrowthError, GrowthWarning, ScheduleError, SiteError, SurgeryError
from growconv.growth import (
    AtSteps,
    Best,
    Every,
    Fixed,
    GainAbove,
    Greedy,
    GrowthHistory,
    GrowthScheduler,
    NoGain,
    Plateau,
    PruneBack,
    TargetAccuracy,
    ToWidth,
    WarmUp,
    parameter_hash,
    undisturbed,
)  # fmt: skip
from tests.growth.conftest import build_chain

LOSS = nn.functional.cross_entropy


def optimizer_of(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def train(
    model, optimizer, digits, scheduler=None, steps=60, growth=lambda: (), seed=0, first=1, metrics=lambda step: {}
):
    """A plain training loop; returns losses and events."""
    images, labels = digits
    losses, events = [], []
    for step in range(first, steps + 1):
        index = torch.randperm(1500, generator=torch.Generator().manual_seed(seed * 10_000 + step))[:64]
        value = LOSS(model(images[index]), labels[index])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
        if scheduler is not None and scheduler.due(step, metrics(step)):
            events += scheduler.grow(growth(), LOSS)
    return losses, events


def everything(model, optimizer):
    """All that a round without growth has to leave alone."""
    return {
        "hash": parameter_hash(model),
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "modes": [module.training for module in model.modules()],
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "needed": [p.requires_grad for p in model.parameters()],
        "identity": [id(p) for p in model.parameters()],
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
    }


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, dict):
            assert_same(value, second[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key]), key
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for one, other in zip(value, second[key], strict=True):
                assert_same(one, other)
        else:
            assert value == second[key], key


def accuracy(model, digits):
    images, labels = digits
    model.eval()
    return float((model(images[1500:]).argmax(1) == labels[1500:]).float().mean())


@pytest.fixture(scope="module")
def accuracy_of_small(digits):
    """What the net that the next test grows reaches when it stays as it is."""
    small = build_chain(2, 2, 2)
    train(small, optimizer_of(small), digits, steps=200)
    return accuracy(small, digits)


@pytest.mark.parametrize("method", ["tiny", "gradmax", "random"])
def test_growing_in_a_plain_loop_beats_staying_small(chain, sites_of, digits, batches_of, method, accuracy_of_small):
    model = chain(2, 2, 2)
    optimizer = optimizer_of(model)
    scheduler = GrowthScheduler(model, optimizer, sites_of(model), method=method, every=20, times=3, amount=3)
    train(model, optimizer, digits, scheduler, steps=200, growth=lambda: batches_of(4))
    assert [site.width for site in scheduler.sites] == [11, 11, 11]
    assert [event.step for event in scheduler.history] == [20, 20, 20, 40, 40, 40, 60, 60, 60]
    assert accuracy(model, digits) > accuracy_of_small + 0.05


def test_the_same_pair_grows_ten_times_and_every_tensor_keeps_its_momentum(chain, sites_of, digits, batches_of):
    model = chain(3, 3)
    optimizer = optimizer_of(model)
    scheduler = GrowthScheduler(model, optimizer, sites_of(model)[:1], every=2, times=10, amount=1, amplitude=0.5)
    train(model, optimizer, digits, scheduler, steps=24, growth=lambda: batches_of(2))
    assert [after for _, after in scheduler.history.widths(scheduler.sites[0].name)] == list(range(4, 14))
    for parameter in model.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape


def test_a_fresh_state_trains_on_as_a_new_optimizer_would(chain, sites_of, digits, batches_of):
    model = chain(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = GrowthScheduler(model, optimizer, sites_of(model), every=20, times=1, optimizer_state="fresh")
    train(model, optimizer, digits, scheduler, steps=20, growth=lambda: batches_of(4))
    assert scheduler.history
    twin = copy.deepcopy(model)
    train(model, optimizer, digits, steps=25, first=21)
    train(twin, torch.optim.AdamW(twin.parameters(), lr=1e-2), digits, steps=25, first=21)
    assert parameter_hash(model) == parameter_hash(twin)


def test_neighbouring_pairs_grow_in_one_round(chain, sites_of, digits, batches_of):
    model = chain(3, 4, 5, norm=False)
    optimizer = optimizer_of(model)
    before = model(digits[0][:8])
    scheduler = GrowthScheduler(model, optimizer, sites_of(model), amplitude=0.0, amount=2)
    events = scheduler.grow(batches_of(2, size=32), LOSS, step=1)
    assert [event.width_after for event in events] == [5, 6, 7]
    torch.testing.assert_close(model(digits[0][:8]), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_a_round_that_adds_nothing_leaves_no_trace(chain, sites_of, digits, batches_of, training):
    model = chain(3, 4)
    model.insert(2, nn.Dropout(0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, digits, steps=3)
    model.train(training)
    scheduler = GrowthScheduler(model, optimizer, sites_of(model), when=GainAbove(0.999999, every=1), amount=1)
    before = everything(model, optimizer)
    loader = torch.utils.data.DataLoader(list(zip(*digits, strict=True))[:256], batch_size=64, shuffle=True)
    assert scheduler.due(1)
    assert scheduler.grow(loader, LOSS) == []
    assert_same(before, everything(model, optimizer))
    assert "threshold" in scheduler.explain()
    assert not scheduler.due(1)
    assert scheduler.rounds == 1


def test_undisturbed_puts_everything_back_after_an_error(chain, digits):
    model = chain(3, 4)
    optimizer = optimizer_of(model)
    train(model, optimizer, digits, steps=2)
    before, state = everything(model, optimizer), random.getstate()

    def disturb():
        model.eval()
        model[0].weight.requires_grad_(False)
        model.train()
        model(digits[0][:8]).sum().backward()
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002
        random.seed(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), undisturbed(model):
        disturb()
    assert random.getstate() == state
    assert_same(before, everything(model, optimizer))


def test_a_round_that_grows_draws_nothing_from_the_training(chain, sites_of, digits, batches_of):
    model = chain(3, 4)
    scheduler = GrowthScheduler(model, optimizer_of(model), sites_of(model), method="random", amount=1)
    state, buffers = torch.get_rng_state(), [buffer.clone() for buffer in model.buffers()]
    gradients = [parameter.grad for parameter in model.parameters()]
    assert scheduler.grow(batches_of(2, size=32), LOSS, step=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters()) == all(grad is None for grad in gradients)
    for old, new in zip(buffers, model.buffers(), strict=True):
        assert torch.equal(old, new[: len(old)] if old.dim() else new)


def test_a_failure_in_the_middle_of_a_round_takes_everything_back(chain, sites_of, digits, batches_of):
    model = chain(3, 4, 5)
    optimizer = optimizer_of(model)
    train(model, optimizer, digits, steps=2)
    scheduler = GrowthScheduler(model, optimizer, sites_of(model), amount=1)
    scheduler.grow(batches_of(2, size=32), LOSS, step=2)
    before, output = everything(model, optimizer), model.eval()(digits[0][:4])
    model.train()
    attributes = [(m.in_channels, m.out_channels) for m in model.modules() if isinstance(m, nn.Conv2d)]

    class Spoilt(RuntimeError):
        pass

    def loss(output, targets):  # fails only once the first site has grown
        if model[0].out_channels > 4:
            raise Spoilt
        return LOSS(output, targets)

    for _ in range(3):
        with pytest.raises(Spoilt):
            scheduler.grow(batches_of(3), loss, step=3)
        assert_same(before, everything(model, optimizer))
    assert attributes == [(m.in_channels, m.out_channels) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert torch.equal(model.eval()(digits[0][:4]), output)
    assert scheduler.rounds == 1
    assert len(scheduler.history) == 3
    model.train()
    assert len(scheduler.grow(batches_of(2, size=32), LOSS, step=4)) == 3
    train(model, optimizer, digits, steps=2)


def test_a_loss_that_is_not_finite_changes_nothing(chain, sites_of, digits, batches_of):
    model = chain(3, 4)
    optimizer = optimizer_of(model)
    scheduler = GrowthScheduler(model, optimizer, sites_of(model))
    before = everything(model, optimizer)
    with pytest.raises(GrowthError):
        scheduler.grow(batches_of(3), lambda output, targets: LOSS(output, targets) * float("nan"), step=1)
    assert_same(before, everything(model, optimizer))
    assert len(scheduler.history) == 0


def test_events_say_what_happened(chain, sites_of, digits, batches_of):
    model = chain(3, 4, norm=False)
    optimizer = optimizer_of(model)
    train(model, optimizer, digits, steps=5)
    scheduler = GrowthScheduler(model, optimizer, sites_of(model), amount=2)
    events = scheduler.grow(batches_of(6), LOSS, step=5)
    for event in events:
        assert event.step == 5
        assert set(event.details["seconds"]) == {"collect", "solve", "amplitude", "surgery"}
        assert event.seconds == pytest.approx(sum(event.details["seconds"].values()))
        assert len(event.gains) == 2
        assert event.realised_decrease is not None
        assert event.realised_decrease >= 0
        assert event.predicted_decrease is None or event.predicted_decrease >= 0
    total = sum(event.seconds for event in events)
    assert total == pytest.approx(sum(scheduler.spent.values()))
    assert scheduler.flops_spent > 0


@pytest.mark.parametrize("method", ["tiny", "functional", "splitting"])
def test_the_flops_of_a_round_are_those_of_torchs_own_counter(chain, sites_of, batches_of, method):
    from torch.utils.flop_counter import FlopCounterMode

    model = chain(3, 4, norm=False)
    scheduler = GrowthScheduler(model, optimizer_of(model), sites_of(model), method=method, amount=2)
    scheduler.grow(batches_of(4), LOSS, step=1)
    before = scheduler.flops_spent
    with FlopCounterMode(display=False) as counter:
        scheduler.grow(batches_of(4), LOSS, step=2)
    assert scheduler.flops_spent - before == counter.get_total_flops() > 0


@pytest.mark.parametrize("method", ["tiny", "random", "net2net"])
def test_the_best_site_is_where_new_weights_would_get_the_steepest_gradient_per_flop(
    chain, sites_of, batches_of, method
):
    """The referee: autograd on weights that are put in at zero, behind the singular vectors that GradMax takes."""
    model, batches, steep = chain(3, 4, 5, norm=False), batches_of(2), {}
    for index, site in enumerate(sites_of(model)):
        twin = chain(3, 4, 5, norm=False)
        site = sites_of(twin)[index]
        found = growconv.collect_statistics(twin, [site], batches, LOSS, quantities={"N_raw"})[site.name]
        growth = growconv.solve(found, "gradmax", channels=2, lift=1e-6)
        growconv.grow(twin, site, growth)
        twin.train()
        for inputs, targets in batches:
            (LOSS(twin(inputs), targets) / len(batches)).backward()
        norm = float(growth.omega.norm()) / 2**0.5  # of one channel
        producer = twin.get_submodule(site.producers[0])
        gradient = producer.weight.grad[-2:].square().sum() + producer.bias.grad[-2:].square().sum()
        steep[site.name] = float(gradient) / norm**2

    class Noting(Best):
        def choose(self, proposals, parameters, flops):
            seen.update({proposal.site.name: float(proposal.slopes.sum()) for proposal in proposals})
            return super().choose(proposals, parameters, flops)

    seen, where = {}, Noting("channel")
    scheduler = GrowthScheduler(model, None, sites_of(model), method=method, where=where, amount=2, amplitude=1.0)
    (event,) = scheduler.grow(batches, LOSS, step=1)
    assert event.site == max(steep, key=steep.get)
    assert len(seen) == 3
    for name in list(seen)[1:]:  # at the first a max pooling of equals gives autograd one entry, and N their mean
        assert seen[name] == pytest.approx(steep[name], rel=0.05)


@pytest.mark.parametrize("method", ["tiny", "splitting"])
def test_by_decrease_the_best_site_is_where_growing_alone_lowers_the_held_out_loss_most(
    chain, sites_of, batches_of, method
):
    """The referee: schedulers of one site each, which grow twins."""
    model, batches, alone = chain(3, 4, 5, norm=False), batches_of(4), {}
    for index, site in enumerate(sites_of(model)):
        twin = chain(3, 4, 5, norm=False)
        only = GrowthScheduler(twin, None, [sites_of(twin)[index]], method=method, amount=2)
        alone[site.name] = sum(event.realised_decrease for event in only.grow(batches, LOSS, step=1))

    class Noting(Best):
        def choose(self, proposals, parameters, flops):
            seen.update({proposal.site.name: proposal.decrease for proposal in proposals})
            return super().choose(proposals, parameters, flops)

    seen = {}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    where = Noting("channel", by="decrease")
    scheduler = GrowthScheduler(model, None, sites_of(model), method=method, where=where, amount=2)
    (event,) = scheduler.grow(batches, LOSS, step=1)
    assert event.site == max(seen, key=seen.get)
    assert seen == pytest.approx({name: alone[name] for name in seen}, rel=1e-4, abs=2e-6)
    others = [name for name in before if event.site.split(" -> ")[0] not in name and name in model.state_dict()]
    unchanged = [name for name in others if model.state_dict()[name].shape == before[name].shape]
    assert unchanged
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in unchanged)


@pytest.mark.parametrize("settings", [{"method": "random"}, {"amplitude": 1.0}])
def test_a_decrease_is_compared_only_where_it_is_measured(chain, sites_of, settings):
    model = chain(3, 4)
    with pytest.raises(ScheduleError, match="take off the held-out loss"):
        GrowthScheduler(model, None, sites_of(model), where=Greedy(by="decrease"), **settings)


def test_the_history_replays_on_a_fresh_model(chain, sites_of, digits, batches_of):
    model = chain(3, 4, 5)
    optimizer = optimizer_of(model)
    scheduler = GrowthScheduler(model, optimizer, sites_of(model), every=3, times=3, amount=0.5)
    train(model, optimizer, digits, scheduler, steps=10, growth=lambda: batches_of(2, size=32))
    history = GrowthHistory.from_json(scheduler.history.to_json())
    fresh = history.replay(chain(3, 4, 5, seed=7))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(digits[0][:16]), model.eval()(digits[0][:16]))
    assert history.to_json() == scheduler.history.to_json()
    with pytest.raises(CheckpointError, match="another model"):
        history.replay(chain(4, 4, 5))
    for text in ("{", "[]", '{"format": 99, "events": []}', '{"format": 1, "events": [{"site": "a"}]}'):
        with pytest.raises(CheckpointError):
            GrowthHistory.from_json(text)


@pytest.mark.parametrize("where", ["all", "best"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(chain, sites_of, digits, batches_of, where):
    def build():
        model = chain(3, 4, 5)
        optimizer = optimizer_of(model)
        return model, optimizer

    def schedule(model, optimizer):
        return GrowthScheduler(
            model, optimizer, sites_of(model), when=Plateau("loss", patience=3), where=where, amount=ToWidth(2.0, 4),
            stop=[NoGain(1e-9), TargetAccuracy(2.0, "accuracy")],
        )  # fmt: skip

    def flat(step):
        return {"loss": 1.0, "accuracy": 0.5}

    model, optimizer = build()
    whole = schedule(model, optimizer)
    train(model, optimizer, digits, whole, steps=16, growth=lambda: batches_of(2, size=32), metrics=flat)

    first_model, first_optimizer = build()
    first = schedule(first_model, first_optimizer)
    train(first_model, first_optimizer, digits, first, steps=9, growth=lambda: batches_of(2, size=32), metrics=flat)
    saved = json.loads(json.dumps(first.state_dict()))
    weights, moments = copy.deepcopy(first_model.state_dict()), copy.deepcopy(first_optimizer.state_dict())

    second_model = chain(3, 4, 5, seed=3)
    sites = sites_of(second_model)
    GrowthHistory.from_records(saved["history"]).replay(second_model)
    second_model.load_state_dict(weights)
    second_optimizer = optimizer_of(second_model)
    second_optimizer.load_state_dict(moments)
    second = GrowthScheduler(
        second_model, second_optimizer, sites, when=Plateau("loss", patience=3), where=where, amount=ToWidth(2.0, 4),
        stop=[NoGain(1e-9), TargetAccuracy(2.0, "accuracy")],
    )  # fmt: skip
    second.load_state_dict(saved)
    train(
        second_model,
        second_optimizer,
        digits,
        second,
        steps=16,
        first=10,
        growth=lambda: batches_of(2, size=32),
        metrics=flat,
    )
    assert parameter_hash(second_model) == parameter_hash(model)
    assert len(second.history) == len(whole.history) > len(first.history) > 0
    timeless = [
        {key: value for key, value in event.to_dict().items() if key not in ("seconds", "details")}
        for event in whole.history
    ]
    assert timeless == [
        {key: value for key, value in event.to_dict().items() if key not in ("seconds", "details")}
        for event in second.history
    ]


def test_a_state_of_another_schedule_changes_nothing(chain, sites_of, digits, batches_of):
    model = chain(3, 4)
    scheduler = GrowthScheduler(model, None, sites_of(model), every=5)
    state = scheduler.state_dict()
    other_model = chain(3, 4, 5)
    other = GrowthScheduler(other_model, None, sites_of(other_model), every=5)
    grown = chain(3, 4)
    wider = GrowthScheduler(grown, None, sites_of(grown), every=5, amount=1)
    wider.grow(batches_of(2, size=32), LOSS, step=1)
    steps = GrowthScheduler(model, None, sites_of(model), when=Every(5), stop=NoGain())
    for target, wrong in ((scheduler, other.state_dict()), (scheduler, wider.state_dict()), (steps, state)):
        before = target.state_dict()
        with pytest.raises(CheckpointError):
            target.load_state_dict(wrong)
        after = target.state_dict()
        assert {**before, "seconds": 0} == {**after, "seconds": 0}


def test_rounds_stop_at_times_target_and_no_gain(chain, sites_of, digits, batches_of):
    model = chain(2, 2)
    scheduler = GrowthScheduler(model, None, sites_of(model), every=1, times=2, amount=1)
    for step in range(1, 5):
        if scheduler.due(step):
            scheduler.grow(batches_of(2, size=32), LOSS)
    assert scheduler.rounds == 2
    assert "all 2 rounds" in scheduler.explain() or not scheduler.due(9)
    scheduler = GrowthScheduler(model, None, sites_of(model), every=1, stop=TargetAccuracy(0.9, "accuracy"))
    assert scheduler.due(1, {"accuracy": 0.8})
    assert not scheduler.due(2, {"accuracy": 0.95})
    assert not scheduler.due(3, {"accuracy": 0.2})
    scheduler = GrowthScheduler(model, None, sites_of(model), every=1, stop=NoGain(0.9999, patience=1), amount=1)
    assert scheduler.grow(batches_of(2, size=32), LOSS, step=1) == []
    assert not scheduler.due(2)
    assert "captured less" in scheduler.explain()


def test_best_grows_one_site_per_round_and_says_why(chain, sites_of, digits, batches_of):
    model = chain(3, 4, 5)
    scheduler = GrowthScheduler(model, None, sites_of(model), where=Best("parameter"), amount=Fixed(1))
    for step in range(3):
        (event,) = scheduler.grow(batches_of(2, size=32), LOSS, step=step)
        assert "decrease per parameter" in event.reason


def test_settings_that_contradict_are_refused_before_training(chain, sites_of, digits, batches_of):
    model, other = chain(3, 4), chain(3, 4)
    sites = sites_of(model)
    optimizer = optimizer_of(model)
    for wrong in (
        {"every": 5, "when": AtSteps([1])}, {"times": 0}, {"every": 0}, {"amount": -1}, {"amplitude": "big"},
        {"amplitude": float("nan")}, {"held_out": 1.0}, {"where": "somewhere"}, {"optimizer_state": "lost"},
    ):  # fmt: skip
        with pytest.raises(ScheduleError):
            GrowthScheduler(model, optimizer, sites, **wrong)
    with pytest.raises(ScheduleError, match="no sites"):
        GrowthScheduler(model, optimizer, [])
    with pytest.raises(ScheduleError, match="twice"):
        GrowthScheduler(model, optimizer, [sites[0], sites[0]])
    with pytest.raises(SiteError, match="no such layer"):
        GrowthScheduler(nn.Sequential(nn.Conv2d(1, 3, 3)), None, sites)
    with pytest.raises(SurgeryError, match="does not own"):
        GrowthScheduler(model, optimizer_of(other), sites)
    flat = torch.optim.LBFGS(model.parameters())
    LOSS(model(digits[0][:8]), digits[1][:8]).backward()
    flat.step(lambda: LOSS(model(digits[0][:8]), digits[1][:8]).detach())
    with pytest.raises(SurgeryError, match="cannot be enlarged"):
        GrowthScheduler(model, flat, sites)
    with pytest.raises(GrowthError, match="no such growth method"):
        GrowthScheduler(model, optimizer, sites, method="tinny")
    for wrong in ({"where": Best(by="energy")}, {"when": GainAbove(0.1, 5)}, {"stop": NoGain()}):
        with pytest.raises(ScheduleError, match="compares gains"):
            GrowthScheduler(model, optimizer, sites, method="random", **wrong)


def test_growth_batches_are_checked(chain, sites_of, batches_of):
    model = chain(3, 4)
    scheduler = GrowthScheduler(model, None, sites_of(model))
    with pytest.raises(ScheduleError, match="no growth batches"):
        scheduler.grow([], LOSS, step=1)
    with pytest.raises(ScheduleError, match="at least two"):
        scheduler.grow(batches_of(1), LOSS, step=1)
    with pytest.raises(GrowthError, match="pair"):
        scheduler.grow([torch.zeros(4, 1, 8, 8)] * 2, LOSS, step=1)
    assert scheduler.rounds == 0
    fixed = GrowthScheduler(model, None, sites_of(model), amplitude=0.5, amount=1)
    assert len(fixed.grow(batches_of(1), LOSS, step=1)) == 2


def test_a_site_serves_every_model_of_the_same_names(chain, sites_of, batches_of):
    model, other = chain(3, 4), chain(3, 4)
    scheduler = GrowthScheduler(other, optimizer_of(other), sites_of(model), amount=1)
    scheduler.grow(batches_of(2, size=32), LOSS, step=1)
    assert (model[0].out_channels, other[0].out_channels) == (3, 4)


class Gated(nn.Module):
    """A pair of convolutions inside a block, and a gated stream that no closed form serves."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 3), nn.Conv2d(3, 4, 3, padding=2)
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head((x * torch.sigmoid(self.second(torch.relu(self.first(x))))).mean((2, 3)))


def test_sites_that_a_method_cannot_serve_are_left_out_with_one_warning(sites_of, batches_of):
    model = Gated()
    sites = sites_of(model)
    assert [site.name for site in sites if site.refusal("gradmax") is not None] == ["stem + second -> first, head"]
    with pytest.warns(GrowthWarning, match="1 of 2 sites.*scheduler.left_out.*random") as caught:
        scheduler = GrowthScheduler(model, optimizer_of(model), sites, method="gradmax", amount=1)
    assert len(caught) == 1
    assert [site.name for site in scheduler.sites] == ["first -> second"]
    assert [(each.site.name, bool(each.reason)) for each in scheduler.left_out] == [
        ("stem + second -> first, head", True)
    ]
    assert len(scheduler.grow(batches_of(2, size=32), LOSS, step=1)) == 1
    stream = [site for site in sites if len(site.producers) > 1]
    with pytest.raises(ScheduleError, match="cannot serve any of these sites"):
        GrowthScheduler(model, None, stream, method="gradmax")


def test_a_site_made_by_hand_is_never_left_out(batches_of):
    model, x = Gated(), batches_of(1)[0][0][:2]
    site = growconv.site(model, ["stem", "second"], ["first", "head"], example_input=x)
    other = growconv.site(model, "first", "second", example_input=x)
    with pytest.raises(ScheduleError, match="this site"):
        GrowthScheduler(model, None, [other, site], method="gradmax")
    assert GrowthScheduler(model, None, [other, site], method="random").left_out == ()


def test_without_a_schedule_only_growing_by_hand_works(chain, sites_of, batches_of):
    model = chain(3, 4)
    scheduler = GrowthScheduler(model, optimizer_of(model), sites_of(model), amount=1)
    assert "no schedule" in repr(scheduler)
    with pytest.raises(ScheduleError, match=r"no schedule(.|\n)*every=500"):
        scheduler.due(1)
    pruning = PruneBack(AtSteps([5]), parameters=100)
    for further in ({}, {"pruning": pruning}):
        with pytest.raises(ScheduleError, match="times limits a schedule"):
            GrowthScheduler(model, optimizer_of(model), sites_of(model), times=8, **further)
    assert not GrowthScheduler(model, optimizer_of(model), sites_of(model), pruning=pruning).due(1)
    assert len(scheduler.grow(batches_of(2, size=32), LOSS)) == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_grow_and_train_like_the_original(chain, sites_of, digits, batches_of, duplicate):
    model = chain(3, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scheduler = GrowthScheduler(
        model, optimizer, sites_of(model), every=3, times=3, amount=1, learning_rate=WarmUp(4), method="random"
    )
    train(model, optimizer, digits, scheduler, 5, lambda: batches_of(2, size=32))
    twin, twins_optimizer, twins_scheduler = duplicate((model, optimizer, scheduler))
    assert all(site.model is twin for site in twins_scheduler.sites)
    for each in ((model, optimizer, scheduler), (twin, twins_optimizer, twins_scheduler)):
        train(each[0], each[1], digits, each[2], 12, lambda: batches_of(2, size=32), first=6)
    assert parameter_hash(model) == parameter_hash(twin)
    assert [site.width for site in twins_scheduler.sites] == [site.width for site in scheduler.sites] == [6, 7]


def test_a_schedule_says_what_it_will_do(chain, sites_of):
    model = chain(3, 4)
    text = repr(GrowthScheduler(model, None, sites_of(model), method="tiny", every=500, times=8, amount=0.25))
    for part in ("'tiny'", "every 500 steps", "8 times", "0.25", "All()", "2 sites"):
        assert part in text


def test_a_schedule_prints_itself(chain, sites_of, batches_of):
    model = chain(3, 4)
    scheduler = GrowthScheduler(model, None, sites_of(model), amount=1, every=9, times=4)
    scheduler.grow(batches_of(2, size=32), LOSS, step=1)
    assert "1 of 4 rounds, 2 events" in str(scheduler)
    assert "3 → 4" in str(scheduler)
    assert str(scheduler.history).count("\n") == 1
