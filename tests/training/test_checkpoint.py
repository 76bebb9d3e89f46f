"""Checkpoints: grown shapes rebuilt on a fresh small model, damage noticed, an old file that survives every failure."""

import copy
import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import growconv
from growconv.errors import CheckpointError
from growconv.growth.scheduler import GrowthScheduler
from growconv.network.event import GrowthHistory, grow
from growconv.network.find import find_sites
from growconv.solvers.base import solve
from growconv.training.checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    Checkpoint,
    Position,
    find_checkpoint,
    load_checkpoint,
    position_of,
    read_checkpoint,
    save_checkpoint,
    save_in_turn,
)
from growconv.training.models import resnet20, small_cnn

SHAPE = {"in_channels": 1, "classes": 4, "image_size": 8}


def fresh(builder=small_cnn, seed=0, **options):
    torch.manual_seed(seed)
    model = builder(**SHAPE, width=0.25, **options)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.8, 0.99))


def train(model, optimizer, steps=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 1, 8, 8, generator=generator)
        y = torch.randint(0, 4, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def grown(builder=small_cnn, rounds=2):
    model, optimizer = fresh(builder)
    history = GrowthHistory()
    for site in find_sites(model, torch.zeros(2, 1, 8, 8))[:2]:
        for _ in range(rounds):
            train(model, optimizer)
            growth = solve(site, "random", 3, model, torch.Generator().manual_seed(2))
            history.append(grow(model, site, growth, 0.5, optimizer))
    train(model, optimizer)
    return model, optimizer, history


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("builder", [small_cnn, resnet20])
def test_a_grown_model_loads_into_a_fresh_small_one_and_trains_on_alike(builder, tmp_path):
    model, optimizer, history = grown(builder)
    path = save_checkpoint(tmp_path / "a.safetensors", model, optimizer, history=history, state={"epoch": 3})
    other, other_optimizer = fresh(builder, seed=9)
    found = load_checkpoint(path, other, other_optimizer)
    assert found.state == {"epoch": 3}
    same(model.state_dict(), other.state_dict())
    assert other_optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    train(model, optimizer, seed=5)
    train(other, other_optimizer, seed=5)
    same(model.state_dict(), other.state_dict())


def test_public_names_and_plain_safetensors(tmp_path):
    model, _, history = grown()
    path = growconv.save_checkpoint(tmp_path / "a.safetensors", model, history=history)
    content = load_file(path)
    assert torch.equal(content["model/classifier.weight"], model.classifier.weight)
    growconv.load_checkpoint(path, model)  # into a model of the same shapes: no replay


def test_tied_weights_and_odd_types_survive(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.sixteen = nn.Parameter(torch.randn(4).bfloat16())
            self.register_buffer("flags", torch.tensor([True, False]))
            self.register_buffer("empty", torch.zeros(0, 3))
            self.register_buffer("count", torch.tensor(7))

    model, other = Tied(), Tied()
    load_checkpoint(save_checkpoint(tmp_path / "t.safetensors", model), other)
    same(model.state_dict(), other.state_dict())
    assert other.second.weight is other.first.weight


def test_channels_last_stays(tmp_path):
    model, _, history = grown()
    model.to(memory_format=torch.channels_last)
    path = save_checkpoint(tmp_path / "a.safetensors", model, history=history)
    other, _ = fresh(seed=4)
    other.to(memory_format=torch.channels_last)
    load_checkpoint(path, other)
    same(model.state_dict(), other.state_dict())
    assert other.features[4].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("position", [0, 3, 9, 100, 0.3, 0.5, 0.7, 0.9, -1])
def test_every_flipped_byte_is_noticed(position, tmp_path):
    model, optimizer, history = grown()
    path = save_checkpoint(tmp_path / "a.safetensors", model, optimizer, history=history)
    content = bytearray(path.read_bytes())
    index = int(position * len(content)) if isinstance(position, float) else position
    content[index] ^= 0x10
    path.write_bytes(content)
    other, _ = fresh()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        load_checkpoint(path, other)
    same(before, other.state_dict())


@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.99])
def test_truncation_is_noticed(kept, tmp_path):
    model, _, history = grown()
    path = save_checkpoint(tmp_path / "a.safetensors", model, history=history)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: the file is truncated or damaged"):
        read_checkpoint(path)


def test_a_damaged_last_falls_back_to_the_previous_one(tmp_path):
    model, optimizer, history = grown()
    content = {"model": model, "optimizer": optimizer, "history": history}
    for number in range(3):
        save_in_turn(tmp_path / "checkpoint", best=number == 0, **content, state={"number": number})
    assert find_checkpoint(tmp_path).state["number"] == 2
    assert read_checkpoint(tmp_path / "checkpoint" / PREVIOUS).state["number"] == 1
    assert read_checkpoint(tmp_path / "checkpoint" / BEST).state["number"] == 0
    assert sorted(os.listdir(tmp_path / "checkpoint")) == sorted([LAST, PREVIOUS, BEST])

    damage = tmp_path / "checkpoint" / LAST
    damage.write_bytes(damage.read_bytes()[:-7])
    with pytest.warns(
        UserWarning, match=r"last\.safetensors: the file is truncated.*\n[^$]*continuing from .*previous"
    ):
        assert find_checkpoint(tmp_path).state["number"] == 1
    (tmp_path / "checkpoint" / PREVIOUS).write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged") as caught:
        assert find_checkpoint(tmp_path).state["number"] == 0
    assert [name in str(warning.message) for warning, name in zip(caught, (LAST, PREVIOUS), strict=True)] == [True] * 2
    (tmp_path / "checkpoint" / BEST).write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged") as caught:
        find_checkpoint(tmp_path)
    assert all(name in str(caught.value) for name in (LAST, PREVIOUS, BEST))
    shutil.rmtree(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        find_checkpoint(tmp_path)


FULL_DISK = """
import resource, signal, sys
import torch
from growconv.errors import CheckpointError
from growconv.training.checkpoint import read_checkpoint, save_in_turn
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
model = torch.nn.Linear(1000, 100)
save_in_turn(folder, best=True, model=model, state={"number": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    save_in_turn(folder, best=True, model=model, state={"number": 2})
except CheckpointError as error:
    print(error)
print(read_checkpoint(folder / "last.safetensors").state, sorted(path.name for path in folder.iterdir()))
"""


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """A limit on the size of files stands in for the full disk: the write fails half-way."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    answer = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "checkpoint")], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert "could not be written; the old one is unchanged" in answer.stdout
    assert "{'number': 1} ['best.safetensors', 'last.safetensors']" in answer.stdout


def test_another_model_optimizer_or_file_is_refused_and_nothing_changes(tmp_path):
    model, optimizer, history = grown()
    path = save_checkpoint(tmp_path / "a.safetensors", model, optimizer, history=history)
    stranger, _ = fresh(resnet20)
    before = copy.deepcopy(stranger.state_dict())
    with pytest.raises(CheckpointError, match="another model"):
        load_checkpoint(path, stranger)
    same(before, stranger.state_dict())

    bare = save_checkpoint(tmp_path / "bare.safetensors", fresh()[0])
    wide = small_cnn(**SHAPE, width=0.5)
    with pytest.raises(CheckpointError, match=r"features\.0\.weight is \(8, 1, 3, 3\) in the checkpoint, \(16, 1"):
        load_checkpoint(bare, wide)
    small, small_optimizer = fresh()
    with pytest.raises(CheckpointError, match="no optimizer was saved"):
        load_checkpoint(bare, small, small_optimizer)
    groups = torch.optim.AdamW([{"params": [p]} for p in small.parameters()])
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(CheckpointError, match="groups differ"):
        load_checkpoint(path, small, groups)
    same(before, small.state_dict())
    scheduler = GrowthScheduler(small, small_optimizer, find_sites(small, torch.zeros(2, 1, 8, 8)), every=1)
    with pytest.raises(CheckpointError, match="no growth scheduler was saved"):
        load_checkpoint(path, small, small_optimizer, scheduler)
    (tmp_path / "text.safetensors").write_text(json.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"text\.safetensors"):
        load_checkpoint(tmp_path / "text.safetensors", small)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of growconv"):
        load_checkpoint(tmp_path / "other.safetensors", small)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        save_checkpoint(tmp_path / "b.safetensors", small, state={"x": object()})
    assert not (tmp_path / "b.safetensors").exists()


def test_nothing_is_warned_about_on_the_good_path(tmp_path):
    model, optimizer, history = grown()
    save_in_turn(tmp_path, best=True, model=model, optimizer=optimizer, history=history)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_checkpoint(tmp_path)


class Sliced(nn.Module):
    """Two convolutions that take one's channels in pieces; one size is a number in the model's own code."""

    def __init__(self):
        super().__init__()
        self.width = 8
        self.first = nn.Conv2d(1, self.width, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        y = torch.relu(self.first(x)).view(len(x), self.width, *x.shape[2:])
        return self.head((self.left(y[:, :4]) + self.right(y[:, 4:])).mean((2, 3)))


def test_a_run_with_sites_on_slices_goes_on(tmp_path):
    x, y = torch.randn(32, 1, 8, 8), torch.arange(32) % 3

    def build():
        torch.manual_seed(0)
        model = Sliced()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        sites = growconv.find_sites(model, x[:2])
        return model, optimizer, growconv.GrowthScheduler(model, optimizer, sites, method="random", every=2, amount=2)

    def train(model, optimizer, scheduler, steps):
        for step in steps:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if scheduler.due(step):
                scheduler.grow([(x, y)] * 2, nn.functional.cross_entropy)

    whole = build()
    assert "first -> right" in [site.name for site in whole[2].sites]
    train(*whole, range(1, 4))
    assert whole[0].width == 10
    path = growconv.save_checkpoint(tmp_path / "c.safetensors", *whole)
    resumed = build()
    growconv.load_checkpoint(path, *resumed)
    assert resumed[0].width == 10
    for run in (whole, resumed):
        train(*run, range(4, 8))
    assert [site.width for site in resumed[2].sites] == [site.width for site in whole[2].sites]
    for mine, theirs in zip(resumed[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_run_with_an_inserted_layer_goes_on_with_its_optimizer(tmp_path):
    x = torch.randn(4, 1, 8, 8)

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3))
        return model, torch.optim.AdamW(model.parameters(), 1e-2)

    model, optimizer = build()
    event = growconv.insert_layer(model, growconv.find_sites(model, x)[0], optimizer=optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    history = growconv.GrowthHistory([event])
    path = growconv.save_checkpoint(tmp_path / "c.safetensors", model, optimizer, history=history)
    fresh, fresh_optimizer = build()
    growconv.load_checkpoint(path, fresh, fresh_optimizer)
    for net, steps in ((model, optimizer), (fresh, fresh_optimizer)):
        steps.zero_grad()
        net(x).square().mean().backward()
        steps.step()
    for mine, theirs in zip(fresh.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


STANDS = Position(step=7, epoch=2, loss_sum=1.5, best=None, metrics=[{"step": 3, "train_loss": 0.5}])


def checkpoint(state: dict[str, Any]) -> Checkpoint:
    return Checkpoint(Path("last.safetensors"), {}, state=state)


def test_a_position_comes_back_as_it_was() -> None:
    assert position_of(checkpoint({"position": asdict(STANDS)})) == STANDS


@pytest.mark.parametrize(
    "changed",
    [
        {"step": 7.0}, {"epoch": True}, {"loss_sum": "1.5"}, {"best": "none"}, {"metrics": {}}, {"metrics": [3]},
        {"metrics": [{"train_loss": "low"}]}, {"metrics": [{"step": True}]}, {"speed": 3},
    ],
)  # fmt: skip
def test_what_no_run_has_written_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="does not say where its run stands"):
        position_of(checkpoint({"position": asdict(STANDS) | changed}))


def test_a_checkpoint_of_no_run_is_refused() -> None:
    with pytest.raises(CheckpointError, match="does not say where its run stands"):
        position_of(checkpoint({}))
