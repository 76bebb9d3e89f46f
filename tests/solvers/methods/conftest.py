"""Small networks with one of each thing that can lie between a producer and a consumer."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from growconv.network.find import find_sites
from growconv.statistics import collect_statistics


class Residual(nn.Module):
    """Stem and two blocks whose outputs are tied by skip connections."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.Conv2d(4, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = functional.relu(self.stem(x))
        x = x + self.second(functional.relu(self.first(x)))
        return self.head(functional.relu(x).mean((2, 3)))


class Fan(nn.Module):
    """One producer, two consumers, the second of them linear behind a flattened map."""

    def __init__(self):
        super().__init__()
        self.producer = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 3, 1)
        self.linear = nn.Linear(4 * 4 * 4, 3)

    def forward(self, x):
        h = functional.leaky_relu(self.norm(self.producer(x)))
        return self.conv(h).mean((2, 3)) + self.linear(h.flatten(1))


def _plain(*between, bias=True, kernel=3):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=bias),
        *between,
        nn.Conv2d(4, 5, kernel, bias=bias),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


def _depthwise():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        nn.Conv2d(4, 5, 1),
        nn.BatchNorm2d(5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


MODELS = {
    "relu": lambda: _plain(nn.ReLU()),
    "no bias": lambda: _plain(nn.ReLU(), bias=False),
    "norm": lambda: _plain(nn.BatchNorm2d(4), nn.ReLU(), bias=False),
    "norm behind": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 4, 3)
    ),
    "tanh": lambda: _plain(nn.Tanh()),
    "gelu and pooling": lambda: _plain(nn.GELU(), nn.MaxPool2d(2), kernel=2),
    "group norm": lambda: _plain(nn.GroupNorm(2, 4), nn.SELU()),
    "depthwise": _depthwise,
    "residual": Residual,
    "fan": Fan,
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 4), nn.ReLU(), nn.Linear(4, 3)),
}


def build(name, dtype=torch.float64, seed=0):
    """A model whose norm layers have seen data, its example input, and data."""
    torch.manual_seed(seed)
    model = MODELS[name]().to(dtype)
    x = torch.randn(24, 3, 6, 6, dtype=dtype)
    y = torch.randint(0, 3, (24,))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    model.train()
    for _ in range(20):
        model(x)
    return model, x, y


@pytest.fixture
def make():
    """A function that builds a named model and data."""
    return build


@pytest.fixture
def collect():
    """A function that collects what a solver reads, of one site or of the first that a model has."""

    def run(model, x, y, reads, samples=24, site=None):
        site = site or find_sites(model, x)[0]
        options = {"quantities": reads, "keep_samples": samples if "samples" in reads else 0}
        return collect_statistics(model, [site], [(x, y)], functional.cross_entropy, **options)[site.name]

    return run


@pytest.fixture(params=MODELS)
def any_model(request):
    """Each of the models in turn: name, model, inputs, targets."""
    return request.param, *build(request.param)
