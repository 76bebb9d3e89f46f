"""Blocks that are copied while a run trains: depth alone, with width, in the middle of a resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from growconv.cli import main
from growconv.errors import SiteError
from growconv.growth import GrowthScheduler, WarmUp
from growconv.growth.learning_rate import stages_of
from growconv.network.depth import copy_blocks, insert_layer
from growconv.network.find import find_sites
from growconv.training.loop import Trainer
from growconv.training.models import BasicBlock, Kit
from growconv.training.rundir import RunDirectory

QUICK = [
    "model=resnet20", "model.width=0.25", "data.limit=128", "trainer.epochs=3", "growth.samples=64", "baselines=[]",
    "growth.batch_size=32", "report=false", "trainer.progress=none", "growth.depth.at=[0.34]",
]  # fmt: skip
COPIED = 7  # of the nine blocks of a ResNet-20 two change the size of the map


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    assert main([*QUICK, f"hydra.run.dir={folder}", *overrides]) == 0
    return RunDirectory(folder).summary()


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    kit = Kit(in_channels=4, classes=10, image_size=8)
    blocks = [BasicBlock(kit, 4, 4, 4, 1), BasicBlock(kit, 4, 6, 8, 2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def test_only_whole_blocks_that_keep_their_shape_are_copied() -> None:
    model, x = stack().eval(), torch.randn(2, 4, 6, 6)
    before = model(x)
    events = copy_blocks(model, ["?", "*.conv1"], x, identity=True)
    assert [event.site for event in events] == ["0"]
    torch.testing.assert_close(model(x), before)
    with pytest.raises(SiteError, match="no block"):
        copy_blocks(model, ["layer*"], x)


def test_width_goes_on_in_a_deeper_model_and_old_entries_keep_their_ages() -> None:
    model, x, y = stack(), torch.randn(8, 4, 6, 6), torch.randint(3, (8,))
    optimizer, sites = torch.optim.SGD(model.parameters(), lr=0.1), find_sites(stack(), torch.randn(2, 4, 6, 6))
    sites = [site for site in sites if site.name == "0.conv1 -> 0.conv2"]
    scheduler = GrowthScheduler(
        model, optimizer, sites, method="random", every=1, amount=0.5, learning_rate=WarmUp(5, 1.0, 1.3)
    )
    loss = nn.functional.cross_entropy
    scheduler.grow([(x, y)], loss, step=1)
    events = copy_blocks(model, ["0"], x, optimizer=optimizer)
    scheduler.follow_model(find_sites(model, x), events)
    assert [site.name for site in scheduler.sites] == [
        f"0.{part}.conv1 -> 0.{part}.conv2" for part in ("original", "inserted")
    ]
    scheduler.grow([(x, y)], loss, step=2)
    assert [site.width for site in scheduler.sites] == [8, 8]  # by half of the four that the run began with
    stages = stages_of(model, scheduler.history)[model[0].original.conv1.weight]
    assert stages.flatten().tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    loss(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["convolution", "residual"])
def test_width_goes_on_on_both_sides_of_a_layer_that_was_inserted(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())
    model.extend([nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3)])
    x, y = torch.randn(8, 4, 6, 6), torch.randint(3, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sites = [site for site in find_sites(model, x) if site.name in ("0 -> 2", "2 -> 4")]
    scheduler = GrowthScheduler(model, optimizer, sites, method="random", every=1, amount=1.0)
    for _ in range(2):  # the second one in front of what the first one put there
        site = scheduler.sites[0]
        event = insert_layer(model, site, kind=kind, consumer=site.consumers[0], optimizer=optimizer)
        scheduler.follow_model(find_sites(model, x), [event])
    written = {path for site in scheduler.sites for path in (*site.producers, *site.consumers)}
    deeper = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert deeper <= written
    assert not any("7" in site.consumers for site in scheduler.sites)  # it was not to be grown
    before = {site.name: site.width for site in scheduler.sites}
    scheduler.grow([(x, y)], nn.functional.cross_entropy, step=1)
    first = {"4": 5}
    for site in scheduler.sites:
        assert site.width == before[site.name] + first.get(site.consumers[-1], 3)


@pytest.mark.slow
@pytest.mark.parametrize("growth", ["none", "net2net"])
def test_a_run_grows_deeper_and_goes_on_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, growth: str
) -> None:
    width = ["growth.times=2", "growth.begin=0.2", "growth.end=0.6", "growth.amount=0.25"]
    options = [f"growth={growth}", *(width if growth != "none" else []), "trainer.checkpoint_every=1"]
    whole = run(tmp_path / "whole", *options)
    events = [json.loads(line) for line in (tmp_path / "whole" / "growth.jsonl").read_text().splitlines()]
    copies = [event for event in events if event["method"] == "insert_copy"]
    assert len(copies) == COPIED
    assert len({event["step"] for event in copies}) == 1
    assert whole["parameters"] == events[-1]["parameters_after"]
    step = Trainer._step

    def stopping(self: Trainer, index: Any) -> None:
        if self.position.step == copies[0]["step"] + 1:
            raise KeyboardInterrupt
        step(self, index)

    monkeypatch.setattr(Trainer, "_step", stopping)
    assert main([*QUICK, f"hydra.run.dir={tmp_path / 'cut'}", *options]) == 130
    monkeypatch.undo()
    assert main([f"resume={tmp_path / 'cut'}", "trainer.progress=none"]) == 0
    timed = {"seconds", "growth_seconds", "peak_memory"}
    resumed = RunDirectory(tmp_path / "cut").summary()
    assert {k: v for k, v in resumed.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}
