"""Hazard: pruning that misses its budget, takes the wrong channels, or forgets the optimizer."""

import json

import pytest
import torch
from torch import nn

from growconv.errors import ScheduleError
from growconv.growth import AtSteps, GrowthScheduler, ModelCost, PruneBack
from growconv.growth.pruning import norm_scores, size_without
from growconv.network.event import shrink

LOSS = nn.functional.cross_entropy


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


class Branched(nn.Module):
    """Flattening, a depthwise layer and a residual sum: channels that many tensors share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.inner = nn.Conv2d(4, 6, 1)
        self.back = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4 * 16, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.back(torch.relu(self.inner(torch.relu(self.depthwise(x)))))
        return self.head(nn.functional.avg_pool2d(x, 2).flatten(1))


def shrinks_as_predicted(model, sites, cost, removed):
    """The model that is shrunk by hand has the size that was told before; until then nothing has changed."""
    whole = (size(model), cost.flops())
    assert size_without(model, cost, {}) == whole
    predicted = size_without(model, cost, removed)
    assert (size(model), cost.flops()) == whole
    for site, channels in removed.items():
        shrink(model, site, channels)
    assert predicted == (size(model), cost.flops()) != whole


def test_sizes_predict_the_shrunken_model(sites_of, digits):
    model = Branched()
    sites = sites_of(model)
    cost = ModelCost.measure(model, digits[0][:2])
    shrinks_as_predicted(model, sites, cost, {site: list(range(site.width // 2)) for site in sites})
    model(digits[0][:2])


def stored_otherwise(kind):
    """Two pairs whose kernels are no plain Parameters, and a linear head."""
    torch.manual_seed(0)
    conv = {
        "weight_norm": lambda *shape: nn.utils.parametrizations.weight_norm(nn.Conv2d(*shape, 3, padding=1)),
        "other_axis": lambda *shape: nn.utils.parametrizations.weight_norm(nn.Conv2d(*shape, 3, padding=1), dim=1),
    }[kind]
    return nn.Sequential(conv(1, 6), nn.ReLU(), conv(6, 5), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(20, 10))


KINDS = ("weight_norm", "other_axis")


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_where_kernels_are_stored_as_something_else(kind, sites_of, digits):
    model = stored_otherwise(kind)
    sites = sites_of(model)
    cost = ModelCost.measure(model, digits[0][:2])
    shrinks_as_predicted(model, sites, cost, {site: list(range(2)) for site in sites})


@pytest.mark.parametrize("kind", KINDS)
def test_scores_where_kernels_are_stored_as_something_else(kind, sites_of):
    model = stored_otherwise(kind).double()
    plain = nn.Sequential(*stored_otherwise(kind)).double()
    for index in (0, 2):
        like = model[index].weight
        plain[index] = nn.Conv2d(like.shape[1], like.shape[0], 3, padding=1).double()
        plain[index].load_state_dict({"weight": like.detach(), "bias": model[index].bias.detach()})
    plain[6].load_state_dict(model[6].state_dict())
    found = [norm_scores(next(s for s in sites_of(each) if s.name == "0 -> 2")) for each in (model, plain)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_grow_and_prune_where_kernels_are_stored_as_something_else(kind, sites_of, digits, batches_of):
    model = stored_otherwise(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sizes = [size(model)]
    pruning = PruneBack(AtSteps([3]), parameters=sizes[0])
    scheduler = GrowthScheduler(model, optimizer, sites_of(model), every=2, amount=2, pruning=pruning)
    for step in range(1, 4):
        optimizer.zero_grad()
        LOSS(model(digits[0][:64]), digits[1][:64]).backward()
        optimizer.step()
        if scheduler.due(step):
            scheduler.grow(batches_of(3, size=32), LOSS)
        sizes.append(size(model))
    assert sizes[1] == sizes[0] < sizes[2]
    assert sizes[3] <= sizes[0]
    model(digits[0][:2])


def test_silent_channels_go_first_and_the_function_stays(chain, sites_of, digits, batches_of):
    model = chain(6, 6, norm=False)
    sites = sites_of(model)
    with torch.no_grad():
        model[3].weight[:, [1, 4]] = 0.0  # what the first pair writes there is read by nobody
        model[0].weight[[2]] = 0.0
        model[0].bias[[2]] = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = model(digits[0][:16])
    per_channel = 9 + 1 + 6 * 9
    pruning = PruneBack(AtSteps([3]), parameters=size(model) - 3 * per_channel + 5)
    scheduler = GrowthScheduler(model, optimizer, sites, every=100, pruning=pruning)
    assert not scheduler.due(2)
    assert scheduler.due(3)
    events = scheduler.grow(batches_of(2, size=32), LOSS)
    assert [(event.site, event.channels) for event in events] == [(sites[0].name, -3)]
    torch.testing.assert_close(model(digits[0][:16]), before, rtol=0, atol=1e-6)
    assert not scheduler.due(4)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    assert scheduler.rounds == 0


def test_norm_scores_do_not_depend_on_how_scale_is_shared(chain, sites_of):
    model = chain(3, 4, norm=False)
    site = sites_of(model)[0]
    scores = norm_scores(site)
    with torch.no_grad():
        model[0].weight[1] *= 8.0
        model[3].weight[:, 1] /= 8.0
    torch.testing.assert_close(norm_scores(site), scores)


def test_grow_and_prune_to_a_budget_is_one_schedule_that_resumes(chain, sites_of, digits, batches_of):
    def build():
        model = chain(4, 4, 4)
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def schedule(model, optimizer):
        pruning = PruneBack(AtSteps([5, 9]), parameters=700, flops=70_000, keep=2)
        return GrowthScheduler(model, optimizer, sites_of(model), every=2, amount=2, pruning=pruning)

    def train(model, optimizer, scheduler, steps, first=1):
        widths = []
        for step in range(first, steps + 1):
            index = torch.randperm(1500, generator=torch.Generator().manual_seed(step))[:64]
            optimizer.zero_grad()
            LOSS(model(digits[0][index]), digits[1][index]).backward()
            optimizer.step()
            if scheduler.due(step):
                scheduler.grow(batches_of(2, size=32), LOSS)
            widths.append(size(model))
        return widths

    model, optimizer = build()
    whole = schedule(model, optimizer)
    sizes = train(model, optimizer, whole, 10)
    assert sizes[4] <= 700 < sizes[3]
    assert sizes[8] <= 700 < sizes[7]
    assert whole.now.flops > 0
    assert any(event.method == "shrink" for event in whole.history)

    first, first_optimizer = build()
    head = schedule(first, first_optimizer)
    train(first, first_optimizer, head, 6)
    state = json.loads(json.dumps(head.state_dict()))
    second = head.history.replay(build()[0])
    second.load_state_dict(first.state_dict())
    second_optimizer = torch.optim.SGD(second.parameters(), lr=0.05, momentum=0.9)
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    tail = schedule(second, second_optimizer)
    tail.load_state_dict(state)
    train(second, second_optimizer, tail, 10, first=7)
    for mine, theirs in zip(second.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_budget_out_of_reach_changes_nothing(chain, sites_of, batches_of):
    model = chain(4, 4)
    before = size(model)
    pruning = PruneBack(AtSteps([1]), parameters=20)
    scheduler = GrowthScheduler(model, None, sites_of(model), every=50, pruning=pruning)
    assert scheduler.due(1)
    with pytest.raises(ScheduleError, match="cannot be pruned"):
        scheduler.grow(batches_of(2), LOSS)
    assert size(model) == before
    for wrong in ({}, {"parameters": 0}, {"flops": 5, "keep": 0}):
        with pytest.raises(ScheduleError):
            PruneBack(AtSteps([1]), **wrong)
