"""Hazard: new entries that train at the wrong rate, or old ones that do."""

import json

import pytest
import torch
from torch import nn

from growconv.errors import ScheduleError
from growconv.growth import GrowthScheduler, StageRates, WarmUp, WidthRates
from growconv.growth.learning_rate import stages_of
from growconv.network.event import shrink

LOSS = nn.functional.cross_entropy
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
}


def grown(chain, sites_of, batches_of, rates, optimizer="sgd", rounds=1, **options):
    model = chain(3, 4, 5, norm=False)
    own = OPTIMIZERS[optimizer](model.parameters())
    scheduler = GrowthScheduler(
        model, own, sites_of(model), amount=2, learning_rate=rates, method="random", amplitude=1.0, **options
    )
    for index in range(rounds):
        scheduler.grow(batches_of(2), LOSS, step=index)
    return model, own, scheduler


def step(model, optimizer, batches):
    optimizer.zero_grad()
    LOSS(model(batches[0][0]), batches[0][1]).backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


def test_stages_tell_old_entries_from_new_ones_also_after_pruning(chain, sites_of, batches_of):
    model, optimizer, scheduler = grown(chain, sites_of, batches_of, None, rounds=2)
    stages = stages_of(model, scheduler.history)
    weight = stages[model[3].weight].expand_as(model[3].weight)[:, :, 0, 0]
    expected = torch.tensor(
        [[max(row, column) for column in (0, 0, 0, 1, 1, 2, 2)] for row in (0, 0, 0, 0, 1, 1, 2, 2)]
    )
    assert torch.equal(weight, expected)
    assert stages[model[0].bias].tolist() == [0, 0, 0, 1, 1, 2, 2]
    scheduler.history.append(shrink(model, scheduler.sites[0], [1, 3, 5], optimizer))
    assert stages_of(model, scheduler.history)[model[0].bias].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_warm_up_scales_exactly_the_new_entries(chain, sites_of, batches_of, kind):
    plain_model, plain, _ = grown(chain, sites_of, batches_of, None, kind)
    warm_model, warm, scheduler = grown(chain, sites_of, batches_of, WarmUp(steps=3, start=0.2), kind)
    stages = {
        name: stages_of(warm_model, scheduler.history).get(parameter, torch.zeros((), dtype=torch.long))
        for name, parameter in warm_model.named_parameters()
    }
    for rate in (0.2 + 0.8 / 4, 0.2 + 0.8 * 2 / 4, 0.2 + 0.8 * 3 / 4, 1.0, 1.0):
        warm_model.load_state_dict(plain_model.state_dict())
        full, scaled = step(plain_model, plain, batches_of(1)), step(warm_model, warm, batches_of(1))
        for name, update in full.items():
            new = (stages[name] > 0).expand_as(update)
            torch.testing.assert_close(scaled[name][new], rate * update[new], rtol=1e-4, atol=1e-7)
            assert torch.equal(scaled[name][~new], update[~new])


@pytest.mark.parametrize("kind", ["rms", "frobenius"])
def test_stage_rates_follow_the_size_of_each_block(chain, sites_of, batches_of, kind):
    plain_model, plain, _ = grown(chain, sites_of, batches_of, None, rounds=2)
    rates = StageRates(lowest=0.05, highest=20.0, size=kind)
    model, optimizer, scheduler = grown(chain, sites_of, batches_of, rates, rounds=2)
    with torch.no_grad():
        model[3].weight[4:] *= 7.0
    plain_model.load_state_dict(model.state_dict())
    weight, stages = model[3].weight.detach().clone(), stages_of(model, scheduler.history)[model[3].weight]
    full, scaled = step(plain_model, plain, batches_of(1)), step(model, optimizer, batches_of(1))
    blocks = stages.expand_as(weight)
    squares = [weight[blocks == stage].double().square() for stage in range(3)]
    sizes = [(each.mean() if kind == "rms" else each.sum()).sqrt() for each in squares]
    for stage in range(3):
        rate = float((sizes[stage] / sizes[0]).clamp(0.05, 20.0)) if stage else 1.0
        update, expected = scaled["3.weight"][blocks == stage], rate * full["3.weight"][blocks == stage]
        torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(scaled["3.bias"], full["3.bias"])


def test_entries_that_start_at_zero_still_learn(chain, sites_of, batches_of):
    model, optimizer, scheduler = grown(chain, sites_of, batches_of, StageRates())
    stages = stages_of(model, scheduler.history)[model[3].weight].expand_as(model[3].weight)
    with torch.no_grad():
        model[3].weight[stages == 1] = 0.0
    moved = step(model, optimizer, batches_of(1))["3.weight"][stages == 1]
    assert float(moved.abs().sum()) > 0


def test_a_warm_up_resumes_exactly(chain, sites_of, batches_of):
    def run(cut):
        model, optimizer, scheduler = grown(chain, sites_of, batches_of, WarmUp(steps=6))
        for _ in range(cut):
            step(model, optimizer, batches_of(1))
        if cut < 5:
            saved, weights = json.loads(json.dumps(scheduler.state_dict())), model.state_dict()
            moments = optimizer.state_dict()
            model = scheduler.history.replay(chain(3, 4, 5, norm=False))
            model.load_state_dict(weights)
            optimizer = OPTIMIZERS["sgd"](model.parameters())
            optimizer.load_state_dict(moments)
            sites = sites_of(model)
            scheduler = GrowthScheduler(
                model, optimizer, sites, amount=2, learning_rate=WarmUp(steps=6), method="random", amplitude=1.0
            )
            scheduler.load_state_dict(saved)
            for _ in range(cut, 5):
                step(model, optimizer, batches_of(1))
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    whole = run(5)
    for cut in range(5):
        assert torch.equal(run(cut), whole)


@pytest.mark.parametrize(
    "build",
    [
        lambda: WarmUp(0), lambda: WarmUp(5, 1.5), lambda: WarmUp(5, 0.0, 0.0), lambda: StageRates(0.0),
        lambda: StageRates(2.0, 1.0), lambda: StageRates(size="max"), lambda: WidthRates("momentum"),
    ],
)  # fmt: skip
def test_settings_without_sense_are_refused(build):
    with pytest.raises(ScheduleError):
        build()


def test_a_peak_above_one_is_kept_and_follows_the_learning_rate(chain, sites_of, batches_of):
    plain_model, plain, _ = grown(chain, sites_of, batches_of, None)
    model, optimizer, scheduler = grown(chain, sites_of, batches_of, WarmUp(steps=1, start=1.0, peak=1.3))
    for rate, top in ((1.15, 0.1), (1.3, 0.1), (1.3, 0.02)):
        for each in (plain, optimizer):
            each.param_groups[0]["lr"] = top
        model.load_state_dict(plain_model.state_dict())
        full, scaled = step(plain_model, plain, batches_of(1)), step(model, optimizer, batches_of(1))
        new = stages_of(model, scheduler.history)[model[3].weight].expand_as(model[3].weight) > 0
        torch.testing.assert_close(scaled["3.weight"][new], rate * full["3.weight"][new], rtol=1e-4, atol=1e-7)
        assert torch.equal(scaled["3.weight"][~new], full["3.weight"][~new])


def test_everything_warms_up_with_the_youngest_entries(chain, sites_of, batches_of):
    plain_model, plain, _ = grown(chain, sites_of, batches_of, None)
    model, optimizer, _ = grown(chain, sites_of, batches_of, WarmUp(steps=3, everything=True))
    for rate in (0.25, 0.5, 0.75, 1.0):
        model.load_state_dict(plain_model.state_dict())
        full, scaled = step(plain_model, plain, batches_of(1)), step(model, optimizer, batches_of(1))
        for name, update in full.items():
            torch.testing.assert_close(scaled[name], rate * update, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_width_rates_follow_fan_in_and_fan_out(chain, sites_of, batches_of, rule):
    plain_model, plain, _ = grown(chain, sites_of, batches_of, None)  # widths 3, 4, 5 to 5, 6, 7
    model, optimizer, _ = grown(chain, sites_of, batches_of, WidthRates(rule))
    model.load_state_dict(plain_model.state_dict())
    full, scaled = step(plain_model, plain, batches_of(1)), step(model, optimizer, batches_of(1))
    outputs = {"0": 5 / 3, "3": 6 / 4, "5": 7 / 5, "9": 1.0}
    inputs = {"0": 1.0, "3": 5 / 3, "5": 6 / 4, "9": 7 / 5}
    for name, update in full.items():
        layer, kind = name.split(".")
        rate = (outputs[layer] if rule == "sgd" else 1.0) / (inputs[layer] if kind == "weight" else 1.0)
        torch.testing.assert_close(scaled[name], rate * update, rtol=1e-4, atol=1e-6)
