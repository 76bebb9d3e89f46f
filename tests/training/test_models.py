"""The models under conf/model: sizes as in their papers, every factor and norm, and what `hidden` scales."""

import pytest
import torch
from torch import nn

from growconv.errors import ConfigError
from growconv.network.find import find_sites
from growconv.training import models
from growconv.training.build import choose_sites
from growconv.training.config import compose, plain

NAMES = ("small_cnn", "vgg11", "resnet20", "resnet18", "wrn28", "mobilenet_v2", "unet")
SHAPE = {"in_channels": 1, "classes": 10, "image_size": 28}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "in_channels", "published"),
    [
        # CIFAR figures; ResNet-20's 0.27 M are of parameter-free shortcuts, ours have 1x1 convolutions.
        ("resnet20", 3, 0.27e6),
        ("resnet18", 3, 11.17e6),
        ("wrn28", 3, 0.37e6),
        ("mobilenet_v2", 3, 2.24e6),
        ("vgg11", 3, 9.23e6),
    ],
)
def test_sizes_are_the_published_ones(name, in_channels, published):
    model = getattr(models, name)(in_channels=in_channels, classes=10, image_size=32)
    assert count(model) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", models.NORMS)
def test_every_norm_and_width_runs(name, norm):
    model = getattr(models, name)(**SHAPE, norm=norm, width=0.5, hidden=0.25, activation="gelu")
    output = model(torch.randn(2, 1, 28, 28))
    assert output.shape == ((2, 10, 28, 28) if name == "unet" else (2, 10))
    assert torch.isfinite(output).all()
    assert count(model) < count(getattr(models, name)(**SHAPE, norm=norm))


@pytest.mark.parametrize("size", [8, 32, 96])
def test_vgg_pools_as_long_as_there_is_a_grid(size):
    model = models.vgg11(in_channels=1, classes=3, image_size=size, width=0.1)
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 3)


@pytest.mark.parametrize("name", [*NAMES, "conv_pair"])
def test_hidden_scales_exactly_the_sites_it_names(name):
    """Halving `hidden` halves the width of the sites in model.hidden_sites and of no other."""
    data = "data=synthetic" if name in ("conv_pair", "unet") else "data=fashion_mnist"
    config = plain(compose([data, f"model={name}", "growth=random"]))
    build = config["model"]["_target_"].rpartition(".")[2]
    example = torch.zeros(2, 1, 28, 28)
    full, half = (find_sites(getattr(models, build)(**SHAPE, hidden=hidden), example) for hidden in (1.0, 0.5))
    named = {site.name for site in choose_sites(config, half)}
    assert named
    for wide, narrow in zip(full, half, strict=True):
        expected = wide.width // 2 if narrow.name in named else wide.width
        assert narrow.width == expected, narrow.name


def test_impossible_models_are_refused():
    with pytest.raises(ConfigError, match=r"model\.norm"):
        models.small_cnn(**SHAPE, norm="layer")
    with pytest.raises(ConfigError, match=r"model\.activation"):
        models.small_cnn(**SHAPE, activation="swoosh")
    with pytest.raises(ConfigError, match="positive"):
        models.resnet20(**SHAPE, width=-1.0)
    with pytest.raises(ConfigError, match="halved"):
        models.unet(in_channels=1, classes=2, image_size=10)
