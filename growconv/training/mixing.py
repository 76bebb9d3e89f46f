"""Mixup, CutMix and RandAugment, by kornia; every choice is drawn from the run's own generator."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from growconv.errors import ConfigError

OPERATIONS, STRENGTH = 2, 9
"""Of RandAugment: operations in a row, and their strength from 0 to 30, the paper's for ImageNet."""


def require_kornia(config: Mapping[str, Any]) -> None:
    """Refuse settings that need kornia where it is not installed.

    Args:
        config: the whole config.

    Raises:
        ConfigError: names the setting.
    """
    augments = config["data"]["augmentation"] == "randaugment"
    asked = {"trainer.mix": config["trainer"]["mix"] != "none", "data.augmentation": augments}
    for name in (name for name, is_asked in asked.items() if is_asked):
        if find_spec("kornia") is None:
            raise ConfigError(
                "this needs kornia, which is not installed", where=name, fix="pip install 'growconv[augment]'"
            )


def rand_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """RandAugment (Cubuk et al. 2020): the operations are drawn for the batch, their signs and shifts for each image.

    Args:
        images: (n, channels, height, width), 0 to 1.
        generator: CPU generator.

    Raises:
        ConfigError: the images are neither grey nor in colour.
    """
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ConfigError(
            "RandAugment needs grey or colour images", where="data.augmentation", expected="1 or 3", got=channels
        )
    with _drawing_from(generator, images.device):
        return _augmenter("randaugment")(images.expand(-1, 3, -1, -1))[:, :channels]


def mix(kind: str, images: Tensor, labels: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each image mixed with another one of the batch, in a share that is uniform between 0 and 1.

    Args:
        kind: "mixup" (Zhang et al. 2018) blends, "cutmix" (Yun et al. 2019) puts in a rectangle.
        images: (n, channels, height, width).
        labels: (n,) classes.
        classes: how many there are.
        generator: CPU generator.

    Returns:
        The mixed images, and the share of each class in them, (n, classes).

    Raises:
        ConfigError: the targets are no class an image.
    """
    if labels.is_floating_point() or labels.dim() != 1:
        raise ConfigError("only images with a single class each can be mixed", where="trainer.mix", got=kind)
    with _drawing_from(generator, images.device):
        mixed, told = _augmenter(kind)(images, labels)
    first, second, share = told.reshape(-1, 3).to(images.dtype).unbind(1)  # own class, the other's, a share
    share = 1 - share if kind == "cutmix" else share  # of the other image, which kornia tells for mixup only
    own, other = (functional.one_hot(each.long(), classes).to(images.dtype) for each in (first, second))
    return mixed, own * (1 - share[:, None]) + other * share[:, None]


@cache
def _augmenter(kind: str) -> nn.Module:
    import kornia.augmentation as kornia
    from kornia.augmentation.auto import RandAugment

    if kind == "randaugment":
        return RandAugment(n=OPERATIONS, m=STRENGTH)
    if kind == "mixup":
        return kornia.RandomMixUpV2(data_keys=["input", "class"])
    return kornia.RandomCutMixV2(data_keys=["input", "class"], use_correct_lambda=True)


@contextmanager
def _drawing_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Inside, torch's own random numbers follow from the generator; afterwards they are as before."""
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
