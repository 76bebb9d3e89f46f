"""Hazard: new entries of an old parameter that Adam trains several times too fast, or old ones that it disturbs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import growconv
from growconv.network.bias_correction import BORN, CLOSE
from growconv.network.site import find_sites
from growconv.network.surgery import shrink
from growconv.training.checkpoint import load_checkpoint, save_checkpoint
from tests.network import zoo

OPTIMIZERS: dict[str, Callable] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-30),
    "adam, other betas": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.5, 0.95), eps=1e-30),
    "adam, no momentum": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.0, 0.9), eps=1e-30),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, eps=1e-30),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, eps=1e-30),
}


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


def steps(model: nn.Module, optimizer, referees: dict[str, Referee], count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in model.parameters():
            grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = grad + 0.3
        optimizer.step()
        for name, parameter in model.named_parameters():
            expected = referees[name].step(parameter.grad)
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)


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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_entry_trains_as_if_it_had_an_optimizer_of_its_own(name: str) -> None:
    model, example = small()
    optimizer = OPTIMIZERS[name](model.parameters())
    referees = {path: Referee(OPTIMIZERS[name], p) for path, p in model.named_parameters()}
    first, second = find_sites(model, example)
    steps(model, optimizer, referees, 4, 0)
    grown(first, optimizer, referees, 2)
    steps(model, optimizer, referees, 3, 1)
    grown(second, optimizer, referees, 1)  # rows of another age than the columns of the same weight
    steps(model, optimizer, referees, 3, 2)
    shapes = {path: torch.arange(p.numel()).view(p.shape) for path, p in model.named_parameters()}
    shrink(model, first, [0, 2], optimizer)
    for path, parameter in model.named_parameters():
        kept = shapes[path]
        for axis, size in enumerate(parameter.shape):
            if kept.shape[axis] != size:
                kept = kept.index_select(axis, torch.tensor([1, 3]))
        referees[path].resized(parameter, kept)
    steps(model, optimizer, referees, 3, 3)


def test_new_entries_move_by_the_learning_rate_however_old_their_parameter_is() -> None:
    model, example = small()
    optimizer = OPTIMIZERS["adam"](model.parameters())
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
        optimizer = OPTIMIZERS["adam"](model.parameters())
        referees = {path: Referee(OPTIMIZERS["adam"], p) for path, p in model.named_parameters()}
        steps(model, optimizer, referees, 6, 0)
        site = find_sites(model, example)[0]
        event = growconv.grow(model, site, zoo.random_growth(site, 2), 1.0, optimizer)
        generator = torch.Generator().manual_seed(1)
        for index in range(8):
            if interrupted and index == 3:
                history = growconv.GrowthHistory([event])
                file = save_checkpoint(tmp_path / "half-way.safetensors", model, optimizer, history=history)
                model, _ = small()
                optimizer = OPTIMIZERS["adam"](model.parameters())
                load_checkpoint(file, model, optimizer)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).double()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_record_goes_when_the_entries_are_old() -> None:
    model, example = small()
    betas = (0.5, 0.8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=betas)
    site = find_sites(model, example)[0]

    def train() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    train()
    growconv.grow(model, site, zoo.random_growth(site, 1), 1.0, optimizer)
    young = [p for p in model.parameters() if BORN in optimizer.state[p]]
    assert len(young) == 5  # weight and bias of the writer, weight and bias of the norm, weight of the reader
    count = 0
    while any(BORN in optimizer.state[p] for p in young):
        train()
        count += 1
    factor = (1 - betas[1] ** count) ** 0.5 / (1 - betas[0] ** count)
    assert abs(factor - 1) <= CLOSE < abs((1 - betas[1] ** (count - 2)) ** 0.5 / (1 - betas[0] ** (count - 2)) - 1)


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax])
def test_optimizers_without_such_a_correction_are_left_alone(build) -> None:
    model, example = small()
    optimizer = build(model.parameters(), lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    site = find_sites(model, example)[0]
    growconv.grow(model, site, zoo.random_growth(site, 1), 1.0, optimizer)
    assert not any(BORN in optimizer.state[p] for p in model.parameters())
