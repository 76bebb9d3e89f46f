"""A dataset as tensors on the device, and batches whose order and augmentation are functions of seed and position.

Nothing here carries a random state: the batch of epoch e and step s is the same whenever it is asked for, which is what
lets a run go on bit for bit, on any number of processes.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from growconv.errors import ConfigError, DataError
from growconv.training.sources import SOURCES, RawData


def seed_for(seed: int, *labels: object) -> int:
    """A 63-bit seed for one purpose of a run: a hash of the run's seed and the labels."""
    text = "/".join(map(str, (seed, *labels)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *labels: object) -> torch.Generator:
    """A CPU generator seeded by `seed_for`."""
    return torch.Generator().manual_seed(seed_for(seed, *labels))


@dataclass(frozen=True)
class Split:
    """Inputs (n, channels, height, width), uint8 or float, and targets: (n,) classes, or float maps (regression)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device | str) -> "Split":
        """The same split on a device."""
        return Split(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class Dataset:
    """Training, validation and test data with what a model must know of them."""

    name: str  # name of the source
    train: Split  # training split
    validation: Split  # held out from the training data; model choices are made on it
    test: Split  # looked at once, at the end
    classes: int  # number of classes, or of output channels for a regression
    mean: Tensor  # per channel, of the training inputs, in the unit of the inputs (0 to 1 for images)
    std: Tensor  # per channel, likewise
    augmentation: str = "none"  # see `DataConfig`

    @property
    def shape(self) -> tuple[int, int, int]:
        """Input channels, height and width in pixels, classes (or output channels)."""
        return self.train.inputs.shape[1], self.train.inputs.shape[2], self.classes

    @property
    def regression(self) -> bool:
        """Whether the targets are numbers rather than classes."""
        return self.train.targets.is_floating_point()

    @property
    def score(self) -> str:
        """What the share of correct answers is called; of a regression the coefficient of determination."""
        return "R²" if self.regression else "accuracy"

    def to(self, device: torch.device | str) -> "Dataset":
        """The whole dataset on a device."""
        parts = ("train", "validation", "test", "mean", "std")
        return replace(self, **{part: getattr(self, part).to(device) for part in parts})

    def inputs(self, split: Split, index: Tensor, augment: torch.Generator | None = None) -> Tensor:
        """Normalised float32 inputs (n, channels, height, width) of samples by number (n,); augmented if `augment`."""
        images = split.inputs[index]
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if augment is not None and self.augmentation == "randaugment":
            images = rand_augment(images, augment)
        images = (images - self.mean[:, None, None]) / self.std[:, None, None]
        if augment is None or self.augmentation == "none":
            return images
        return shift_and_flip(images, augment, pad=4, flip=self.augmentation != "crop")

    def batch(self, split: Split, index: Tensor, augment: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some samples; see `inputs`."""
        index = index.to(split.targets.device)
        return self.inputs(split, index, augment), split.targets[index]

    def batches(self, split: Split, size: int, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """A split in order, in batches of `size`; of those the ones numbered first, first + every, ..."""
        for start in range(first * size, len(split), every * size):
            yield self.batch(split, torch.arange(start, min(start + size, len(split))))


def shift_and_flip(images: Tensor, generator: torch.Generator, pad: int, flip: bool) -> Tensor:
    """Images (n, channels, height, width), each shifted by up to `pad` pixels in each direction, zeros moving in.

    With `flip` half of them are mirrored.
    """
    count, _, height, width = images.shape
    shifts = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
    rows = shifts[0] + torch.arange(height)
    columns = shifts[1] + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = functional.pad(images, (pad, pad, pad, pad))
    samples = torch.arange(count)[:, None, None]
    rows, columns, samples = (index.to(images.device) for index in (rows[:, :, None], columns[:, None, :], samples))
    return padded.permute(0, 2, 3, 1)[samples, rows, columns].permute(0, 3, 1, 2).contiguous()


def require_kornia(config: Mapping[str, Any]) -> None:
    """Refuse settings of a whole config that need kornia where it is not installed."""
    augments = config["data"]["augmentation"] == "randaugment"
    for name, asked in {"trainer.mix": config["trainer"]["mix"] != "none", "data.augmentation": augments}.items():
        if asked and find_spec("kornia") is None:
            fix = "pip install 'growconv[augment]'"
            raise ConfigError("this needs kornia, which is not installed", where=name, fix=fix)


def rand_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """RandAugment (Cubuk et al. 2020) of grey or colour images (n, channels, height, width), 0 to 1; refuses others.

    The operations are drawn for the batch, their signs and shifts for each image.
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
        labels: (n,) of `classes` classes; other targets are refused.

    Returns:
        The mixed images, and the share of each class in them, (n, classes).
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
        return RandAugment(n=2, m=9)  # operations in a row, and their strength from 0 to 30: the paper's for ImageNet
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


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Whole batches in an epoch; the remainder is left out, and falls to other samples in every epoch."""
    return max(1, samples // batch_size)


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The order (n,) in which an epoch goes through the training samples."""
    return torch.randperm(samples, generator=generator_for(seed, "order", epoch))


def load_data(name: str, *, validation: float, augmentation: str, limit: int | None, **options: object) -> Dataset:
    """Read a dataset and hold out its validation split, the same in every run.

    Args:
        name: a key of SOURCES, which gets the other options.
        validation: share of the training data held out, between 0 and 1.
        augmentation: see `DataConfig`.
        limit: keep only this many training samples, chosen evenly at random, the same in every run; None keeps all.

    Raises:
        DataError: an unknown source, missing or damaged files, or a limit that leaves no sample.
    """
    if name not in SOURCES:
        raise DataError("there is no such dataset", where="data.name", expected=", ".join(SOURCES), got=name)
    raw: RawData = SOURCES[name](**options)
    samples = len(raw.train_inputs)
    order = torch.randperm(samples, generator=generator_for(0, "validation"))
    held_out = max(1, round(samples * validation))
    if limit is not None and not 2 <= limit <= samples - held_out:
        problem = "There are not that many training samples." if limit > 1 else "Training needs at least two samples."
        raise DataError(problem, where="data.limit", expected=f"2 to {samples - held_out}", got=limit)
    if samples - held_out < 2:
        raise DataError(
            "There are too few samples to train on.",
            where=f"data={name}, data.validation={validation}",
            expected="two or more besides those held out for validation",
            got=f"{samples} samples, of which {held_out} are held out",
            fix="add samples to data.root, or lower data.validation",
        )
    kept, held = order[held_out:][:limit], order[:held_out]
    train = Split(raw.train_inputs[kept], raw.train_targets[kept])
    mean, std = _channel_moments(train.inputs)
    return Dataset(
        name=name,
        train=train,
        validation=Split(raw.train_inputs[held], raw.train_targets[held]),
        test=Split(raw.test_inputs, raw.test_targets),
        classes=raw.classes,
        mean=mean,
        std=torch.where(std > 0, std, 1.0),  # a channel that is the same everywhere stays at zero
        augmentation=augmentation,
    )


def _channel_moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (channels,), images scaled to 0 to 1, from counts of levels: no float64 copy."""
    if inputs.dtype != torch.uint8:
        return inputs.mean((0, 2, 3)), inputs.std((0, 2, 3))
    levels = torch.arange(256, dtype=torch.float64) / 255
    moments = []
    for channel in inputs.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256) / channel.numel()
        mean = (share * levels).sum()
        moments.append((mean, (share * (levels - mean).square()).sum().sqrt()))
    return torch.stack([m for m, _ in moments]).float(), torch.stack([s for _, s in moments]).float()
