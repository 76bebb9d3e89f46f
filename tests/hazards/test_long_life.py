"""Hazards of a long life and of extremes: 500 rounds, 1 000 channels, batches of one, one class, NaN and infinity."""

import copy
import ctypes
import gc
from pathlib import Path

import pytest
import torch
from torch import nn

import growconv
from growconv.errors import GrowthError
from growconv.growth.scheduler import GrowthScheduler
from growconv.network.find import find_sites
from growconv.solvers.base import SOLVERS
from tests.methods import METHODS

LOSS = nn.functional.cross_entropy


def build(width=4, classes=10):
    """Between the convolutions a width that the cost of a round hardly depends on."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 6, 1),
        nn.ReLU(), nn.Flatten(), nn.Linear(96, classes),
    )  # fmt: skip


def growing(model, method, amount=2, **options):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    (site,) = (site for site in find_sites(model, torch.zeros(2, 1, 8, 8)) if site.name == "0 -> 4")
    return optimizer, GrowthScheduler(model, optimizer, [site], method=method, amount=amount, **options)


def step(model, optimizer, batch):
    optimizer.zero_grad()
    LOSS(model(batch[0]), batch[1]).backward()
    optimizer.step()


def hooks(*owners):
    """Hooks of all kinds on modules, parameters and optimizers."""
    tables = [table for owner in owners for name, table in vars(owner).items() if "hook" in name]
    return sum(len(table) for table in tables if hasattr(table, "__len__"))


def living(model, optimizer):
    """Tensors, hooks, objects and resident bytes, once everything that can be freed is."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    kinds = [type(each) for each in gc.get_objects()]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    tensors = sum(issubclass(kind, torch.Tensor) for kind in kinds)
    return tensors, hooks(optimizer, *model.modules(), *model.parameters()), len(kinds), resident


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("method", "rounds"),
    [
        ("tiny", 25),
        ("random", 25),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in (("tiny", 500), ("random", 500), ("functional", 100))
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:TF32")
def test_rounds_leave_nothing_behind(method, rounds, batches_of, tmp_path):
    """One event a round is kept, and nothing else: no tensor, no hook, no memory; the long history replays."""
    model = build()
    optimizer, scheduler = growing(model, method, amplitude=0.5)
    batches = batches_of(20)
    early = None
    with torch.backends.mkldnn.flags(enabled=False):  # it keeps compiled kernels for every width that it has met
        for number in range(rounds):
            step(model, optimizer, batches[number % 20])
            pair = [batches[number % 20], batches[(number + 1) % 20]]
            assert len(scheduler.grow(pair, LOSS, step=number)) == 1
            if number == 9:
                early = living(model, optimizer)
    late = living(model, optimizer)
    assert early is not None
    assert scheduler.sites[0].width == 4 + 2 * rounds
    assert late[:2] == early[:2]
    assert late[2] - early[2] <= 6 * (rounds - 10) + 20  # an event is a handful of objects
    assert late[3] - early[3] < 40e6
    saved = growconv.save_checkpoint(tmp_path / "old.safetensors", model, optimizer, scheduler)
    again = build()
    growconv.load_checkpoint(saved, again, *growing(again, method, amplitude=0.5))
    assert torch.equal(again.eval()(batches[0][0]), model.eval()(batches[0][0]))


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_a_thousand_channels_grow(method, batches_of):
    model = build(1000)
    optimizer, scheduler = growing(model, method, amount=4, amplitude=0.5)
    step(model, optimizer, batches_of(1)[0])
    events = scheduler.grow(batches_of(4), LOSS, step=1)
    assert [event.channels for event in events] == ([] if method == "north" else [4])  # north: the rank is full
    step(model, optimizer, batches_of(1)[0])
    assert all(bool(torch.isfinite(each).all()) for each in model.parameters())


def grown_or_told(method, batches, classes=10):
    """A round in all methods' hands: it ends with finite numbers, or in a typed error that has changed nothing."""
    model = build(classes=classes)
    optimizer, scheduler = growing(model, method)
    before = copy.deepcopy(model.state_dict())
    try:
        events = scheduler.grow(batches, LOSS, step=1)
    except GrowthError as error:
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert len(scheduler.history) == 0
        return str(error)
    assert scheduler.sites[0].width == 4 + sum(event.width_after - event.width_before for event in events)
    images = torch.randn(2, 1, 8, 8)
    step(model, optimizer, (images, torch.zeros(2, dtype=torch.long)))
    assert all(bool(torch.isfinite(each).all()) for each in model.parameters())
    return events


@pytest.mark.filterwarnings("ignore::growconv.solvers.functional.FewSamplesWarning")
@pytest.mark.parametrize("method", METHODS)
def test_batches_of_one(method, batches_of):
    (event,) = grown_or_told(method, batches_of(12, size=1))
    assert event.width_after > event.width_before


@pytest.mark.parametrize("method", METHODS)
def test_one_class_leaves_nothing_to_learn(method, batches_of):
    """The loss is 0 and so is every gradient: nothing grows, or what grows without looking at the data is finite."""
    grown_or_told(method, [(x, torch.zeros_like(y)) for x, y in batches_of(3)], classes=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_are_no_numbers_change_nothing(method, value, batches_of):
    batches = [(images.clone(), labels) for images, labels in batches_of(3)]  # cut from one tensor of all tests
    batches[0][0][1, 0, 2, 3] = value
    batches[2][0][1, 0, 2, 3] = value
    outcome = grown_or_told(method, batches)
    assert "finite" in outcome if SOLVERS[method].reads else len(outcome) == 1  # the others look at no data
