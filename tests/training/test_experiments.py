"""The recipes under conf/experiment: they compose, hold the papers' figures, and run on data of the right shape."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from growconv.training import models, sources
from growconv.training.config import compose, conf_dir, plain
from growconv.training.experiment import run

CLASSES = {"cifar10": 10, "cifar100": 100}
RECIPES = sorted(path.stem for path in (conf_dir() / "experiment").glob("*_*_*.yaml"))  # METHOD_MODEL_DATA
# what two steps of a recipe need to be quick: few samples, a round at the first step, a quarter of the width
QUICK = ["trainer.epochs=1", "trainer.batch_size=8", "trainer.eval_batch_size=8", "trainer.progress=none"]
QUICK += ["model.width=0.25"]


@pytest.fixture
def random_images(monkeypatch):
    """CIFAR by shape and number of classes, random by content: 24 images, 16 to train on after the split."""

    def images(name):
        def load(root, download=True):
            generator = torch.Generator().manual_seed(0)

            def draw(count):
                pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
                return pixels, torch.randint(0, CLASSES[name], (count,), generator=generator)

            return sources.RawData(*draw(24), *draw(8), CLASSES[name])

        return load

    for name in CLASSES:
        monkeypatch.setitem(sources.SOURCES, name, images(name))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes_and_tells_what_to_expect(name):
    config = plain(compose([f"experiment={name}"]))
    header = [
        line for line in Path(conf_dir() / "experiment" / f"{name}.yaml").read_text().splitlines() if line[:1] == "#"
    ]
    assert config["growth"]["method"] in name
    assert any("reported" in line.lower() and "test accurac" in line for line in header)
    assert any(f"growconv experiment={name}" in line for line in header)


def test_the_schedule_of_gradmax_is_the_papers():
    config = plain(compose(["experiment=gradmax_wrn28_cifar10"]))
    growth = config["growth"]
    assert growth["when"]["steps"] == list(range(10_000, 37_501, 2_500))
    assert growth["start"] * (1 + growth["times"] * growth["amount"]) == pytest.approx(1.0)
    assert config["optimizer"]["weight_decay"] == 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_two_steps_and_grows(name, tmp_path, random_images):
    reported = name == RECIPES[0]  # figures take longer than two steps
    quick = [*QUICK, "data.validation=0.3", "growth.samples=16", "growth.times=1", f"report={reported}"]
    config = plain(compose([f"experiment={name}", *quick]))
    config["growth"] |= {"when": None, "every": 1, "batch_size": 8}
    summary = run(config, tmp_path / "run")
    assert summary["method"] == config["growth"]["method"]
    events = [json.loads(line) for line in (tmp_path / "run" / "growth.jsonl").read_text().splitlines()]
    assert events
    assert all(event["width_after"] > event["width_before"] for event in events)
    assert (tmp_path / "run" / "report.html").exists() == reported


def test_variance_transfer_grows_the_skip_connections_too():
    config = plain(compose(["experiment=variance_transfer_resnet20_cifar10"]))
    assert config["growth"]["start_width"] == 0.25
    assert config["growth"]["scheduler"]["learning_rate"]["size"] == "frobenius"


def test_the_blocks_of_gradmax_have_no_norm_inside_unless_asked():
    for override, norm in (([], nn.Identity), (["model.args.inner_norm=batch"], nn.BatchNorm2d)):
        config = plain(compose(["experiment=gradmax_wrn28_cifar10", *override]))
        block = models.wrn28(in_channels=3, classes=10, image_size=32, **config["model"]["args"]).blocks[0]
        assert isinstance(block.norm1, nn.BatchNorm2d)
        assert isinstance(block.norm2, norm)
        assert (block.conv1.bias is None) == (norm is nn.BatchNorm2d)
