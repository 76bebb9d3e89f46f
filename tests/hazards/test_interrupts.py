"""Hazard: Ctrl-C amid a round that leaves a grown model without its history, or a history without its model."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import growconv
from growconv.growth import AtSteps, GrowthScheduler, PruneBack, StageRates, parameter_hash

LOSS = nn.functional.cross_entropy
PACKAGE = str(Path(growconv.__file__).parent)


class Interrupted:
    """A trace that raises KeyboardInterrupt at the n-th line of growconv that runs."""

    def __init__(self, at):
        self.left = at

    def __enter__(self):
        sys.settrace(self.enter)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def enter(self, frame, event, argument):
        return self.line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def line(self, frame, event, argument):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.line


def build(chain, sites_of, **options):
    model = chain(3, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    settings = {"method": "random", "amplitude": 1.0, "every": 1, "amount": 1, "learning_rate": StageRates()} | options
    return model, optimizer, GrowthScheduler(model, optimizer, sites_of(model), **settings)


def trained(model, optimizer, batches):
    for x, y in batches:
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()


def state(model, optimizer, scheduler):
    record = scheduler.state_dict() | {"seconds": 0}
    members = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    moments = [{name: float(torch.as_tensor(value).sum()) for name, value in optimizer.state[p].items()
                if not isinstance(value, dict)} for p in model.parameters()]  # fmt: skip
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    numbers = (members, moments, hooks, modes, [float(each.double().sum()) for each in buffers])
    return parameter_hash(model), record, numbers, torch.get_rng_state().tolist()


def lines_of(work):
    counter = Interrupted(-1)
    with counter:
        work()
    return -1 - counter.left


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "tiny", "amplitude": "line_search"},
        {"method": "splitting"},
        {"pruning": PruneBack(AtSteps([1]), parameters=300), "times": 1},
    ],
    ids=["random", "tiny", "splitting", "pruning"],
)
def test_an_interrupt_at_any_line_leaves_both_or_neither(options, chain, sites_of, batches_of, tmp_path):
    batches = batches_of(2, size=8)

    small = build(chain, sites_of, **options)
    begun = copy.deepcopy(small)
    trained(*begun[:2], batches)
    begun[2].due(1)

    def ready():
        torch.manual_seed(0)
        return copy.deepcopy(begun)

    model, optimizer, scheduler = ready()
    count = lines_of(lambda: scheduler.grow(batches, LOSS))
    assert len(scheduler.history) >= 1
    for at in sorted({1, *range(2, count, max(1, count // 7)), *range(count - 50, count + 1, 9), count}):
        model, optimizer, scheduler = ready()
        before = state(model, optimizer, scheduler)
        try:
            with Interrupted(at):
                scheduler.grow(batches, LOSS)
        except KeyboardInterrupt:
            assert state(model, optimizer, scheduler) == before, at
            assert len(scheduler.history) == 0
        path = growconv.save_checkpoint(tmp_path / "after.safetensors", model, optimizer, scheduler)
        fresh = copy.deepcopy(small)
        growconv.load_checkpoint(path, *fresh)
        assert parameter_hash(fresh[0]) == parameter_hash(model)
    trained(model, optimizer, batches)
    assert len(scheduler.grow(batches, LOSS, step=2)) >= 0
