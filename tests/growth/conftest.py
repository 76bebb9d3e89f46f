"""Small models and data that the growth tests share."""

from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from growconv.network.find import find_sites


def build_chain(*widths, norm=True, seed=0, activation=nn.ReLU):
    """A chain of 3×3 convolutions over 8×8 digits with a linear head."""
    torch.manual_seed(seed)
    layers, before = [], 1
    for index, width in enumerate(widths):
        layers += [nn.Conv2d(before, width, 3, padding=1)]
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers += [activation()]
        layers += [nn.MaxPool2d(2)] if index == 0 else []
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * before, 10))


@pytest.fixture
def chain():
    """The builder of chains."""
    return build_chain


@pytest.fixture
def sites_of():
    """All sites of a model for digits."""
    return lambda model: find_sites(model, torch.zeros(2, 1, 8, 8, dtype=next(model.parameters()).dtype))


@pytest.fixture(scope="session")
def digits():
    """Images (1797, 1, 8, 8) scaled to unit variance, and labels."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None]
    return (images - images.mean()) / images.std(), torch.tensor(raw.target)


@pytest.fixture
def batches_of(digits):
    """Growth batches from the digits."""

    def cut(count, size=64, start=0, dtype=torch.float32):
        images, labels = digits
        return [
            (images[i : i + size].to(dtype), labels[i : i + size]) for i in range(start, start + count * size, size)
        ]

    return cut


@pytest.fixture
def three(chain, sites_of):
    model = chain(4, 6, 8)
    return SimpleNamespace(model=model, sites=sites_of(model))
