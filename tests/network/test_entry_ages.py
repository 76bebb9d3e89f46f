"""Hazard: new entries of an old parameter that train at another pace than under a new optimizer, or disturbed old ones.

The referee is torch itself: one optimizer an entry (or, for optimizers of whole matrices, one that begins with the
growth), whose steps are compared.
"""

import copy
import io
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import growconv
from growconv.network.entry_ages import AGES, EXACT, SETTLED, AgeHooks, boxes, cut, follow_ages, gap_at
from growconv.network.event import shrink
from growconv.network.find import find_sites
from growconv.network.optimizer import migrate
from growconv.network.tensors import Change, Insertion
from growconv.training.checkpoint import load_checkpoint, save_checkpoint
from tests.network import zoo

O = torch.optim  # noqa: E741


class OldAdam(O.Optimizer):
    """Somebody else's Adam, known by its state only; without ε, and decaying after the step."""

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - second)
                mean = state["exp_avg"] / (1 - first ** state["step"])
                square = state["exp_avg_sq"] / (1 - second ** state["step"])
                p.sub_(group["lr"] * mean / square.sqrt()).mul_(0.9999)


ENTRYWISE: dict[str, Callable] = {
    "SGD": lambda p: O.SGD(p, 1e-2),
    "SGD, momentum": lambda p: O.SGD(p, 1e-2, momentum=0.9, weight_decay=1e-2),
    "SGD, nesterov": lambda p: O.SGD(p, 1e-2, momentum=0.9, nesterov=True),
    "SGD, dampening": lambda p: O.SGD(p, 1e-2, momentum=0.9, dampening=0.8, weight_decay=0.1, maximize=True),
    "Adam": lambda p: O.Adam(p, 1e-2),
    "Adam, other betas": lambda p: O.Adam(p, 1e-2, betas=(0.5, 0.95)),
    "Adam, no momentum": lambda p: O.Adam(p, 1e-2, betas=(0.0, 0.9)),
    "Adam, no second": lambda p: O.Adam(p, 1e-2, betas=(0.9, 0.0)),
    "Adam, amsgrad": lambda p: O.Adam(p, 1e-2, amsgrad=True),
    "Adam, large eps": lambda p: O.Adam(p, 1e-2, eps=0.3),
    "Adam, weight decay, maximize": lambda p: O.Adam(p, 1e-2, weight_decay=0.1, maximize=True),
    "Adam, foreach": lambda p: O.Adam(p, 1e-2, foreach=True),
    "Adam, fused": lambda p: O.Adam(p, 1e-2, fused=True),
    "Adam, tensor lr": lambda p: O.Adam(p, torch.tensor(1e-2, dtype=torch.float64)),
    "AdamW": lambda p: O.AdamW(p, 1e-2, weight_decay=0.3, eps=1e-3),
    "AdamW, fused, amsgrad": lambda p: O.AdamW(p, 1e-2, fused=True, amsgrad=True),
    "Adamax": lambda p: O.Adamax(p, 1e-2, weight_decay=0.1),
    "NAdam": lambda p: O.NAdam(p, 1e-2, momentum_decay=0.1),
    "NAdam, decoupled": lambda p: O.NAdam(p, 1e-2, weight_decay=0.3, decoupled_weight_decay=True, foreach=True),
    "RAdam": lambda p: O.RAdam(p, 1e-2, weight_decay=0.1, betas=(0.9, 0.99)),
    "Rprop": lambda p: O.Rprop(p, 1e-3),
    "Adagrad": lambda p: O.Adagrad(p, 1e-2, initial_accumulator_value=0.1),
    "Adagrad, decay": lambda p: O.Adagrad(p, 1e-2, lr_decay=0.1, initial_accumulator_value=0.1, weight_decay=0.1),
    "Adadelta": lambda p: O.Adadelta(p, 1.0),
    "RMSprop": lambda p: O.RMSprop(p, 1e-2),
    "RMSprop, centered": lambda p: O.RMSprop(p, 1e-2, momentum=0.9, centered=True),
    "ASGD": lambda p: O.ASGD(p, 1e-2, weight_decay=0.1),
    "ASGD, strong decay": lambda p: O.ASGD(p, 1e-1, lambd=3.0, alpha=1.0, t0=2),
    "somebody else's": lambda p: OldAdam(p, 1e-2),
}
WHOLE_MATRICES: dict[str, Callable] = {
    "Adafactor": lambda p: O.Adafactor(p, 1e-2),
    "Muon": lambda p: O.Muon(p, 1e-2),
    "Muon, plain": lambda p: O.Muon(p, 1e-2, nesterov=False, momentum=0.9),
}
REFUSED = {"LBFGS"}  # test_optimizer.py
SPARSE = {"SparseAdam"}


def test_every_optimizer_of_torch_is_tried() -> None:
    shipped = {name for name, kind in vars(O).items() if isinstance(kind, type) and issubclass(kind, O.Optimizer)}
    tried = {name.partition(",")[0] for name in (*ENTRYWISE, *WHOLE_MATRICES)}
    assert shipped - {"Optimizer"} - tried == REFUSED | SPARSE, "see growconv/network/entry_ages.py for a new optimizer"


class Referee:
    """The same training entry by entry: each has an optimizer of its own that begins when the entry does."""

    def __init__(self, build: Callable, values: Tensor) -> None:
        self.build, self.shape = build, values.shape
        self.parts = [self.begin(value) for value in values.flatten()]

    def begin(self, value: Tensor) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        own = nn.Parameter(value.detach().clone().reshape(1))
        return own, self.build([own])

    def resized(self, values: Tensor, kept: Tensor) -> None:
        """Entries go to where `kept` says (-1: a new one)."""
        self.parts = [
            self.begin(value) if index < 0 else self.parts[index]
            for value, index in zip(values.flatten(), kept.flatten().tolist(), strict=True)
        ]
        self.shape = values.shape

    def step(self, grad: Tensor) -> Tensor:
        for (value, optimizer), own in zip(self.parts, grad.flatten(), strict=True):
            value.grad = own.reshape(1).clone()
            optimizer.step()
        return torch.stack([value.detach() for value, _ in self.parts]).view(self.shape)


def steps(
    model: nn.Module, optimizer, referees: dict[str, Referee], count: int, seed: int, tolerance: float = 1e-9
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in model.parameters():
            grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = grad + 0.3
        optimizer.step()
        for name, parameter in model.named_parameters():
            expected = referees[name].step(parameter.grad)
            torch.testing.assert_close(parameter.detach(), expected, rtol=tolerance, atol=tolerance / 1e3)


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1)
    )
    return model.double(), torch.randn(2, 1, 4, 4, dtype=torch.float64)


def grown(site, optimizer, referees: dict[str, Referee], count: int) -> None:
    model = site.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    growconv.grow(model, site, zoo.random_growth(site, count), 1.0, optimizer)
    for name, parameter in model.named_parameters():
        kept = torch.full(parameter.shape, -1)
        old = tuple(slice(0, size) for size in before[name].shape)
        kept[old] = torch.arange(before[name].numel()).view(before[name].shape)
        referees[name].resized(parameter, kept)


@pytest.mark.parametrize("name", ENTRYWISE)
def test_every_entry_trains_as_if_it_had_an_optimizer_of_its_own(name: str) -> None:
    tolerance = 1e-4 if name == "ASGD" else 1e-9  # its rate differs by so little that it counts as old at once
    model, example = small()
    optimizer = ENTRYWISE[name](model.parameters())
    referees = {path: Referee(ENTRYWISE[name], p) for path, p in model.named_parameters()}
    first, second = find_sites(model, example)
    steps(model, optimizer, referees, 4, 0, tolerance)
    grown(first, optimizer, referees, 2)
    steps(model, optimizer, referees, 3, 1, tolerance)
    grown(second, optimizer, referees, 1)  # rows of another age than the columns of the same weight
    steps(model, optimizer, referees, 3, 2, tolerance)
    shapes = {path: torch.arange(p.numel()).view(p.shape) for path, p in model.named_parameters()}
    shrink(model, first, [0, 2], optimizer)
    for path, parameter in model.named_parameters():
        kept = shapes[path]
        for axis, size in enumerate(parameter.shape):
            if kept.shape[axis] != size:
                kept = kept.index_select(axis, torch.tensor([1, 3]))
        referees[path].resized(parameter, kept)
    steps(model, optimizer, referees, 3, 3, tolerance)


def test_new_entries_move_by_the_learning_rate_however_old_their_parameter_is() -> None:
    model, example = small()
    optimizer = ENTRYWISE["Adam"](model.parameters())
    site = find_sites(model, example)[0]

    def train(count: int) -> dict[str, Tensor]:
        before = {path: p.detach().clone() for path, p in model.named_parameters()}
        for _ in range(count):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return {path: (before[path] - p.detach()) / 1e-2 for path, p in model.named_parameters()}

    train(1000)
    growconv.grow(model, site, zoo.random_growth(site, 1), 1.0, optimizer)
    moved = train(20)
    for part in moved.values():  # with gradients of one sign Adam moves by its learning rate
        torch.testing.assert_close(part, torch.full_like(part, 20.0), rtol=1e-6, atol=1e-6)


def test_the_ages_survive_a_checkpoint(tmp_path: Path) -> None:
    results = []
    for interrupted in (False, True):
        model, example = small()
        optimizer = ENTRYWISE["Adam"](model.parameters())
        referees = {path: Referee(ENTRYWISE["Adam"], p) for path, p in model.named_parameters()}
        steps(model, optimizer, referees, 6, 0)
        site = find_sites(model, example)[0]
        event = growconv.grow(model, site, zoo.random_growth(site, 2), 1.0, optimizer)
        generator = torch.Generator().manual_seed(1)
        for index in range(8):
            if interrupted and index == 3:
                history = growconv.GrowthHistory([event])
                file = save_checkpoint(tmp_path / "half-way.safetensors", model, optimizer, history=history)
                model, _ = small()
                optimizer = ENTRYWISE["Adam"](model.parameters())
                load_checkpoint(file, model, optimizer)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).double()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def hooks_of(optimizer) -> list:
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]


def grown_parameter(build: Callable, rows: int, columns: int, steps: int, new: int, scale: float = 1.0) -> tuple:
    """A matrix trained for some steps, then with `new` rows at the end and columns in front; its twin that did not."""
    generator = torch.Generator().manual_seed(0)
    old = nn.Parameter(torch.randn(rows, columns, generator=generator))
    same = nn.Parameter(old.detach().clone())
    optimizer, other = build([old]), build([same])
    for _ in range(steps):
        gradient = scale * torch.randn(rows, columns, generator=generator)
        for parameter, each in ((old, optimizer), (same, other)):
            parameter.grad = gradient.clone()
            each.step()
    change = Change("weight", old, [Insertion(0, rows, new), Insertion(1, 0, new)])
    data = torch.randn(rows + new, columns + new, generator=generator)
    data[:rows, new:] = old.detach()
    parameter = nn.Parameter(data)
    migrate([optimizer], old, parameter, change)
    follow_ages([optimizer])
    return parameter, optimizer, same, other, generator


@pytest.mark.parametrize("name", {**ENTRYWISE, **WHOLE_MATRICES})
@pytest.mark.parametrize("drift", [0.0, 1.0, 1e-4])
def test_new_entries_move_as_under_a_new_optimizer_for_twenty_steps(name: str, drift: float) -> None:
    build = {**ENTRYWISE, **WHOLE_MATRICES}[name]
    scale = drift if 0 < drift < 1 else 1.0
    before = scale if name in WHOLE_MATRICES else 1.0  # there old entries share the scale, and keep theirs in momentum
    parameter, optimizer, _, _, generator = grown_parameter(build, 12, 10, 150, 4, before)
    fresh = nn.Parameter(parameter.detach().clone())
    new_optimizer = build([fresh])
    young = torch.ones_like(parameter, dtype=torch.bool)
    young[:12, 4:] = False
    moved, expected = torch.zeros(()), torch.zeros(())
    for step in range(20):
        before, before_fresh = parameter.detach().clone(), fresh.detach().clone()
        gradient = drift + scale * torch.randn(parameter.shape, generator=generator)
        parameter.grad, fresh.grad = gradient, gradient.clone()
        optimizer.step()
        new_optimizer.step()
        moved += (parameter.detach() - before)[young].abs().sum()
        expected += (fresh.detach() - before_fresh)[young].abs().sum()
        tolerance = 1.0 if name in WHOLE_MATRICES else 1e-3 if step < EXACT else 0.03
        assert 1 / (1 + tolerance) < moved / expected < 1 + tolerance


@pytest.mark.parametrize("name", ENTRYWISE)
def test_old_entries_stay_bit_for_bit_what_they_would_be(name: str) -> None:
    parameter, optimizer, same, other, generator = grown_parameter(ENTRYWISE[name], 9, 7, 5, 3)
    for _ in range(EXACT + 10):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad, same.grad = gradient, gradient[:9, 3:].clone(memory_format=torch.contiguous_format)
        optimizer.step()
        other.step()
        assert torch.equal(parameter[:9, 3:], same)


def test_after_its_exact_steps_an_entry_still_moves_as_under_a_new_optimizer() -> None:
    parameter, optimizer, _, _, generator = grown_parameter(ENTRYWISE["Adam"], 40, 30, 4000, 8)
    fresh = nn.Parameter(parameter.detach().clone())
    new_optimizer = ENTRYWISE["Adam"]([fresh])
    for step in range(800):
        before, before_fresh = parameter.detach().clone(), fresh.detach().clone()
        gradient = (0.1 + step / 100) * torch.randn(parameter.shape, generator=generator)  # grows all the time
        parameter.grad, fresh.grad = gradient, gradient.clone()
        optimizer.step()
        new_optimizer.step()
        if step % 40 == 39:
            moved = (parameter.detach() - before)[40:].abs().mean()
            assert 0.85 < moved / (fresh.detach() - before_fresh)[40:].abs().mean() < 1.15


def test_sparse_gradients() -> None:
    def build(parameters: list) -> torch.optim.Optimizer:
        return O.SparseAdam(parameters, 1e-2)

    generator = torch.Generator().manual_seed(0)
    old = nn.Parameter(torch.randn(6, 3, generator=generator, dtype=torch.float64))
    optimizer = build([old])

    def sparse(columns: int) -> Tensor:
        rows = torch.randperm(6, generator=generator)[:3]
        values = torch.randn(3, columns, generator=generator, dtype=torch.float64)
        return torch.sparse_coo_tensor(rows[None], values, (6, columns), check_invariants=True)

    for _ in range(30):
        old.grad = sparse(3)
        optimizer.step()
    new = nn.Parameter(torch.cat([old.detach(), torch.randn(6, 2, generator=generator, dtype=torch.float64)], 1))
    migrate([optimizer], old, new, Change("weight", old, [Insertion(1, 3, 2)]))
    follow_ages([optimizer])
    fresh = nn.Parameter(new.detach()[:, 3:].clone())
    new_optimizer = build([fresh])
    for _ in range(EXACT):
        new.grad = sparse(5)
        dense = new.grad.to_dense()[:, 3:]
        rows = new.grad.coalesce().indices()
        fresh.grad = torch.sparse_coo_tensor(rows, dense[rows[0]], dense.shape, check_invariants=True)
        optimizer.step()
        new_optimizer.step()
        torch.testing.assert_close(new.detach()[:, 3:], fresh.detach(), rtol=1e-6, atol=1e-9)  # but for ε


@pytest.mark.parametrize("name", ["Adam", "NAdam", "SGD, dampening", "ASGD, strong decay"])
def test_closures(name: str) -> None:
    results = []
    for as_closure in (False, True):
        parameter, optimizer, _, _, generator = grown_parameter(ENTRYWISE[name], 4, 3, 5, 2)
        for _ in range(5):
            gradient = torch.randn(parameter.shape, generator=generator)

            def closure(parameter=parameter, gradient=gradient) -> float:
                parameter.grad = gradient
                return 1.5

            if as_closure:
                parameter.grad = torch.full_like(parameter, 7.0)  # of the step before
                assert optimizer.step(closure) == 1.5
            else:
                closure()
                optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


def test_a_fused_optimizer_that_skips_a_step_or_unscales_its_gradients() -> None:
    results = []
    for scaled in (False, True):
        parameter, optimizer, _, _, generator = grown_parameter(lambda p: O.AdamW(p, 1e-2, fused=True), 4, 3, 5, 2)
        for step in range(6):
            gradient = torch.randn(parameter.shape, generator=generator)
            if scaled:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
                if step == 3:
                    before = parameter.detach().clone()
                    parameter.grad, optimizer.found_inf = torch.full_like(parameter, torch.inf), torch.tensor(1.0)
                    optimizer.step()
                    assert torch.equal(before, parameter)
                    optimizer.found_inf = torch.tensor(0.0)
            parameter.grad = gradient * 1024 if scaled else gradient
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results)


def test_parameters_without_a_gradient_do_not_age() -> None:
    first, optimizer, _, _, generator = grown_parameter(ENTRYWISE["Adam"], 4, 3, 5, 2)
    second, other, _, _, _ = grown_parameter(ENTRYWISE["Adam"], 4, 3, 5, 2)
    for step in range(12):
        gradient = torch.randn(first.shape, generator=generator)
        if step % 3 == 0:
            first.grad = None
            optimizer.step()
        first.grad, second.grad = gradient, gradient.clone()
        optimizer.step()
        other.step()
        assert torch.equal(first, second)


COPIES: dict[str, Callable] = {
    "deepcopy": lambda both: copy.deepcopy(both),
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
}


@pytest.mark.parametrize("name", ["Adam", "NAdam", "Adagrad, decay", "Adafactor", "Muon", "SGD, dampening"])
@pytest.mark.parametrize("how", [*COPIES, "state_dict", "file", "json"])
@pytest.mark.parametrize("after", [0, 3])
def test_a_copy_goes_on_bit_for_bit(name: str, how: str, after: int) -> None:
    build = {**ENTRYWISE, **WHOLE_MATRICES}[name]
    parameter, optimizer, _, _, generator = grown_parameter(build, 4, 3, 5, 2)

    def train(pair: tuple, gradients: list[Tensor]) -> None:
        for gradient in gradients:
            pair[0].grad = gradient.clone()
            pair[1].step()

    gradients = [torch.randn(parameter.shape, generator=generator) for _ in range(12)]
    train((parameter, optimizer), gradients[:after])
    if how in COPIES:
        pair = COPIES[how]((parameter, optimizer))
    else:
        twin = nn.Parameter(parameter.detach().clone())
        pair = (twin, build([twin]))
        saved = copy.deepcopy(optimizer.state_dict())
        if how == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        if how == "json":
            for state in saved["state"].values():
                if AGES in state:
                    state[AGES] = json.loads(json.dumps(state[AGES]))
        pair[1].load_state_dict(saved)
    follow_ages([pair[1]])
    follow_ages([pair[1]])  # once more changes nothing
    train((parameter, optimizer), gradients[after:])
    train(pair, gradients[after:])
    assert torch.equal(parameter, pair[0])


@pytest.mark.parametrize("beta", [0.8, 0.95])
def test_hooks_are_on_the_grown_optimizer_alone_and_go_when_the_entries_are_old(beta: float) -> None:
    def build(parameters: list) -> torch.optim.Optimizer:
        return O.Adam(parameters, lr=1e-2, betas=(0.5, beta))

    model, example = small()
    optimizer, other = build(list(model.parameters())), build([nn.Parameter(torch.ones(1))])
    site = find_sites(model, example)[0]

    def train() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    train()
    growconv.grow(model, site, zoo.random_growth(site, 1), 1.0, optimizer)
    young = [p for p in model.parameters() if AGES in optimizer.state[p]]
    assert len(young) == 5  # weight and bias of the writer, weight and bias of the norm, weight of the reader
    assert [type(hook.__self__) for hook in hooks_of(optimizer)] == [AgeHooks, AgeHooks]
    assert not hooks_of(other)
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks
    assert not any(vars(parameter) for parameter in model.parameters())
    count = 0
    while any(AGES in optimizer.state[p] for p in young):
        train()
        count += 1
    assert count == max(EXACT, math.ceil(math.log(SETTLED) / math.log(beta)))
    assert not hooks_of(optimizer)


@pytest.mark.parametrize("name", ["SGD", "SGD, momentum", "RMSprop", "Adadelta", "Rprop", "Adagrad", "ASGD"])
def test_optimizers_that_need_no_ages_get_no_hooks(name: str) -> None:
    parameter, optimizer, _, _, _ = grown_parameter(ENTRYWISE[name], 4, 3, 5, 2)
    assert AGES not in optimizer.state[parameter]
    assert not hooks_of(optimizer)


def test_growing_before_the_first_step_leaves_no_ages() -> None:
    parameter, optimizer, _, _, _ = grown_parameter(ENTRYWISE["Adam"], 4, 3, 0, 2)
    assert not optimizer.state.get(parameter)
    assert not hooks_of(optimizer)


def test_state_that_is_cleared_between_steps() -> None:
    for name in ("Adam", "NAdam"):
        parameter, optimizer, _, _, generator = grown_parameter(ENTRYWISE[name], 4, 3, 50, 2)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.state.clear()
        fresh = nn.Parameter(parameter.detach().clone())
        other = ENTRYWISE[name]([fresh])
        for _ in range(3):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            fresh.grad = parameter.grad.clone()
            optimizer.step()
            other.step()
        assert torch.equal(parameter, fresh)
        assert not hooks_of(optimizer)


def test_state_that_is_moved_between_steps() -> None:
    results = []
    for moved in (False, True):
        parameter, optimizer, _, _, generator = grown_parameter(ENTRYWISE["Adam"], 4, 3, 50, 2)
        for _ in range(8):
            if moved:  # as an offload to another device and back does
                state = optimizer.state[parameter]
                state.update({name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")})
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


def test_own_hooks_see_a_whole_step() -> None:
    parameter, optimizer, _, _, generator = grown_parameter(ENTRYWISE["NAdam"], 4, 3, 100, 2)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(parameter.detach().clone()))
    parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    assert torch.equal(seen[0], parameter)


def test_the_boxes_cover_every_young_entry_once() -> None:
    born = [[0, 0, 5, 5, 0, 9], None, [0, 7, 7, 5]]
    shape = (6, 3, 4)
    expected = torch.maximum(torch.tensor(born[0]).view(6, 1, 1), torch.tensor(born[2]).view(1, 1, 4)).expand(shape)
    found = torch.zeros(shape, dtype=torch.long)
    for birth, box in boxes(born):
        assert not cut(found, box).any()
        cut(found, box).fill_(birth)
    assert torch.equal(found, expected)


def test_gaps_follow_on_each_other() -> None:
    last = 0
    for age in range(1, 5000):
        if age % gap_at(age) == 0:
            assert age - last == gap_at(age - 1)
            assert age <= EXACT or (age - last) / age <= 2 / EXACT
            last = age
