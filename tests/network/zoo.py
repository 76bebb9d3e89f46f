"""Small models of every kind of site, by name, each with an example input; and random new channels for a site."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.network import layers
from growconv.network.layout import ENTRY, GROUP_OUT, IN, OUT
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite


class Chain(nn.Module):
    """Functional operations between modules, sizes taken from the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 6, 3, stride=2, bias=False)
        self.c = nn.Linear(6 * 2 * 2, 5)
        self.d = nn.Linear(5, 3)
        self.p = 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(self.norm(self.a(x)), inplace=True), 2)
        y = F.avg_pool2d(F.leaky_relu(self.b(y), 0.1), 2, stride=1)
        y = y.view(y.size(0), -1)
        return self.d(torch.tanh(self.c(F.dropout(y, self.p, self.training))))


class Residual(nn.Module):
    """Two blocks with a projection, in-place additions and activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.n1, self.n2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.b1, self.b2 = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.short = nn.Conv2d(4, 6, 1, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.n2(self.a2(self.relu(self.n1(self.a1(x)))))
        y += x
        x = self.relu(y)
        y = self.b2(self.relu(self.b1(x))) + self.short(x)
        return self.head(F.adaptive_avg_pool2d(self.relu(y), 1).flatten(1))


class PaddedShortcut(nn.Module):
    """A shortcut that subsamples and pads channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, 2, 1), nn.Conv2d(5, 8, 3, padding=1)
        self.d = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = self.c(F.relu(self.b(x)))
        return self.d(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))))


class Dense(nn.Module):
    """Concatenated features, one of them twice, a concatenation added to a whole, and a norm across segments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1), nn.Conv2d(7, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(11)
        self.d = nn.Conv2d(11, 7, 1)
        self.e = nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.relu(self.b(a))
        c = self.c(torch.cat([a, b], 1))
        d = self.d(F.relu(self.norm(torch.cat((c, b, a, c), dim=1))))
        return self.e(torch.cat([a, b], 1) + d)


class Gated(nn.Module):
    """Squeeze and excitation, hand-written swish, a scale parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.c = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x * torch.sigmoid(x)
        y = self.b(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3))))))
        return self.c(x + self.scale * (y * gate.unsqueeze(-1).unsqueeze(-1)))


class Grouped(nn.Module):
    """Depthwise and grouped convolutions, GroupNorm and PReLU with a slope per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.dw, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Conv2d(8, 6, 1)
        self.act = nn.PReLU(8)
        self.group, self.norm = nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.GroupNorm(3, 6)
        self.c = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.act(self.dw(F.relu6(self.a(x)))))
        return self.c(F.relu(self.norm(self.group(x))))


class Shared(nn.Module):
    """A module that is called twice, and a weight that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.twice, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 1)
        self.c, self.d = nn.Conv2d(5, 5, 1), nn.Conv2d(5, 5, 1)
        self.d.weight = self.c.weight
        self.e = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = self.b(torch.tanh(self.twice(torch.tanh(self.twice(x)))))
        return self.e(F.relu(self.d(F.relu(self.c(F.relu(x))))))


class UNet(nn.Module):
    """Transposed convolution, interpolation and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, 2, 1)
        self.up, self.c = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Conv2d(6, 4, 3, padding=1)
        self.norm = nn.InstanceNorm2d(4, affine=True)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        up = F.elu(self.up(F.silu(self.b(a))))
        c = self.c(torch.cat([F.interpolate(up, size=a.shape[2:]), a], 1))
        return self.out(F.relu(self.norm(c)))


class ChannelsLast(nn.Module):
    """Convolution, permutation and linear layers on a grid, as in ConvNeXt, with a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dw = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm = nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.gamma = nn.Parameter(torch.rand(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean([-2, -1]))


class Ghost(nn.Module):
    """A cheap depthwise layer doubles the channels; a norm and another depthwise layer carry both halves."""

    def __init__(self) -> None:
        super().__init__()
        self.primary = nn.Conv2d(3, 4, 3, padding=1)
        self.cheap = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.primary(x))
        y = self.norm(torch.cat([y, self.cheap(y)], 1))
        return self.head(torch.relu(self.depthwise(y)))


class Called(nn.Module):
    """Any function as a module."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def one_axis() -> nn.Module:
    """A network over sequences."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=2, dilation=2), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 3, 3),
        nn.GELU(), nn.Flatten(), nn.Linear(3 * 2, 2),
    )  # fmt: skip


def three_axes() -> nn.Module:
    """A network over volumes."""
    return nn.Sequential(
        nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3), nn.ReLU(inplace=True), nn.AvgPool3d(2), nn.Conv3d(3, 4, 2),
        nn.SELU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def normalized() -> nn.Module:
    """Weight- and spectral-normalized layers."""
    weight, spectral = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
    return nn.Sequential(
        weight(nn.Conv2d(3, 4, 3, padding=1)), nn.ReLU(), spectral(nn.Conv2d(4, 5, 3)), nn.ReLU(),
        weight(nn.ConvTranspose2d(5, 4, 2, stride=2)), nn.ReLU(), spectral(nn.Conv2d(4, 2, 1)),
    )  # fmt: skip


def perceptron() -> nn.Module:
    """Linear layers only."""
    return nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "chain": (Chain, (2, 3, 14, 14)),
    "residual": (Residual, (2, 3, 8, 8)),
    "padded_shortcut": (PaddedShortcut, (2, 3, 8, 8)),
    "dense": (Dense, (2, 3, 6, 6)),
    "gated": (Gated, (2, 3, 6, 6)),
    "grouped": (Grouped, (2, 3, 6, 6)),
    "ghost": (Ghost, (2, 3, 6, 6)),
    "shared": (Shared, (2, 3, 6, 6)),
    "unet": (UNet, (2, 1, 8, 8)),
    "channels_last": (ChannelsLast, (2, 3, 8, 8)),
    "one_axis": (one_axis, (2, 2, 8)),
    "three_axes": (three_axes, (2, 1, 6, 6, 6)),
    "normalized": (normalized, (2, 3, 6, 6)),
    "perceptron": (perceptron, (4, 6)),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A model in float64 with running statistics and norms that are not trivial, and an example input."""
    torch.manual_seed(seed)
    builder, shape = MODELS[name]
    model = builder().double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model, torch.randn(shape, dtype=torch.float64)


def without_dropout(model: nn.Module) -> nn.Module:
    """Training mode with every dropout at p = 0, so that two runs agree."""
    model.train()
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    return model


def random_growth(site: GrowthSite, channels: int, scale: float = 0.3) -> ChannelGrowth:
    """Random weights of new channels for every producer, consumer, norm and grouped layer of a site."""
    count = site.growable_channels(channels)
    incoming, biases, outgoing, norms, carried = {}, {}, {}, {}, {}
    drawn: dict[tuple[int, str], Tensor] = {}  # a weight that several modules share gets one draw

    def draw(module: nn.Module, side: str, shape: tuple[int, ...]) -> Tensor:
        return drawn.setdefault((id(module._parameters.get("weight", module)), side), torch.randn(shape).double())

    for path in site.producers:
        layer = layers.weighted(site.model.get_submodule(path))
        entries = int(count * site.ratio(path, OUT))
        incoming[path] = draw(layer.module, "in", layer.shape(OUT, entries))
        if layer.bias() is not None:
            biases[path] = torch.randn(entries, dtype=torch.float64)
    for path in site.consumers:
        layer = layers.weighted(site.model.get_submodule(path))
        outgoing[path] = scale * draw(layer.module, "out", layer.shape(IN, int(count * site.ratio(path))))
    for path in site.followers:
        if path in site.layout.dims:
            continue
        module = site.model.get_submodule(path)
        if layers.is_weighted(module):
            layer, entries = layers.weighted(module), int(count * site.ratio(path, GROUP_OUT))
            carried[path] = torch.randn(layer.shape(GROUP_OUT, entries), dtype=torch.float64)
        elif not isinstance(module, nn.PReLU):
            entries = int(count * site.ratio(path, ENTRY))
            norms[path] = (torch.randn(entries).double(), torch.rand(entries).double() + 0.5)
    return ChannelGrowth(
        site.name, "random", incoming, outgoing, torch.zeros(count), biases, count, norms=norms, carried=carried
    )


def output_of(value: Any) -> Tensor:
    """The first tensor of a model's output."""
    if isinstance(value, Tensor):
        return value
    return output_of(next(iter(value.values() if isinstance(value, dict) else value)))
