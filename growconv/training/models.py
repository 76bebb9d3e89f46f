"""The models under conf/model: plain `nn.Module`s whose widths are factors, so that a run can start small.

Every builder takes the arguments of `Kit`.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from growconv.errors import ConfigError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(max(count for count in range(1, 9) if channels % count == 0), channels),
    "none": nn.Identity,
}


def scaled(channels: int, factor: float) -> int:
    """A channel count times a factor, rounded, one at least."""
    if not factor > 0:
        where = "model.width, model.hidden"
        raise ConfigError("a width factor must be positive", expected="> 0", got=factor, where=where)
    return max(1, round(channels * factor))


@dataclass(frozen=True)
class Kit:
    """What every builder is given, and the layers of such a network."""

    in_channels: int  # of the images
    classes: int  # outputs of the last layer
    image_size: int  # side of an image in pixels
    width: float = 1.0  # factor on every channel count
    # factor on the channels that no skip connection ties to others (inside a residual block, or everywhere in a
    # plain chain): what most methods grow
    hidden: float = 1.0
    norm: str = "batch"  # a key of NORMS
    activation: str = "relu"  # a key of ACTIVATIONS

    def free(self, channels: int) -> int:
        """A channel count that no skip connection ties to others."""
        return scaled(channels, self.width * self.hidden)

    def tied(self, channels: int) -> int:
        """A channel count of a stream."""
        return scaled(channels, self.width)

    def normed(self, channels: int, norm: str | None = None) -> nn.Module:
        """The norm layer, or that of another name in NORMS."""
        norm = norm or self.norm
        if norm not in NORMS:
            raise ConfigError("there is no such norm", expected=", ".join(NORMS), got=norm, where="model.norm")
        return NORMS[norm](channels)

    def active(self) -> nn.Module:
        """The activation."""
        if self.activation not in ACTIVATIONS:
            expected, where = ", ".join(ACTIVATIONS), "model.activation"
            raise ConfigError("there is no such activation", expected=expected, got=self.activation, where=where)
        return ACTIVATIONS[self.activation]()

    def conv(
        self, incoming: int, outgoing: int, size: int, stride: int = 1, groups: int = 1, norm: str | None = None
    ) -> nn.Conv2d:
        """A convolution that keeps the grid at stride 1, with a bias only where no norm follows that has one."""
        bias = (norm or self.norm) in ("none", "group")
        return nn.Conv2d(incoming, outgoing, size, stride, padding=size // 2, groups=groups, bias=bias)

    def unit(
        self, incoming: int, outgoing: int, size: int, stride: int = 1, groups: int = 1, norm: str | None = None
    ) -> tuple[nn.Conv2d, nn.Module, nn.Module]:
        """A convolution, and the norm and the activation that follow it."""
        convolution = self.conv(incoming, outgoing, size, stride, groups, norm)
        return convolution, self.normed(outgoing, norm), self.active()

    def classifier(self, channels: int) -> dict[str, nn.Module]:
        """The mean over the grid and a linear layer: the end of a network, by the names of its parts."""
        ends = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        return {**ends, "classifier": nn.Linear(channels, self.classes)}


class ConvPair(nn.Module):
    """conv → activation → conv, a label map out: the student of the synthetic teacher; no norm unless one is named."""

    def __init__(self, norm: str = "none", **arguments: Any) -> None:
        super().__init__()
        kit = Kit(norm=norm, **arguments)
        middle = kit.free(12)
        self.conv1 = kit.conv(kit.in_channels, middle, 3, norm="none")
        self.norm = kit.normed(middle)
        self.activation = kit.active()
        self.conv2 = kit.conv(middle, kit.classes, 3, norm="none")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.activation(self.norm(self.conv1(x))))


class PlainNet(nn.Sequential):
    """Convolutions one after the other, halving the grid where the plan says so, its mean, and a linear layer.

    Args:
        plan: channels of each convolution at factor 1, and "pool" for a 2×2 max-pooling (left out on a one-pixel grid).
        **arguments: of `Kit`.
    """

    def __init__(self, plan: Sequence[int | str], **arguments: Any) -> None:
        kit = Kit(**arguments)
        features: list[nn.Module] = []
        channels, size = kit.in_channels, kit.image_size
        for entry in plan:
            if isinstance(entry, int):
                features += kit.unit(channels, kit.free(entry), 3)
                channels = kit.free(entry)
            elif size >= 2:
                features.append(nn.MaxPool2d(2))
                size //= 2
        features = [layer for layer in features if not isinstance(layer, nn.Identity)]
        super().__init__(OrderedDict(features=nn.Sequential(*features), **kit.classifier(channels)))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a skip connection (He et al. 2016); `middle` channels between them are free to grow.

    Args:
        inner: norm between the convolutions; None: the kit's.
    """

    def __init__(self, kit: Kit, incoming: int, middle: int, outgoing: int, stride: int, inner: str | None = None):
        super().__init__()
        self.conv1, self.norm1, self.activation1 = kit.unit(incoming, middle, 3, stride, norm=inner)
        self.conv2, self.norm2, self.activation2 = kit.unit(middle, outgoing, 3)
        self.shortcut = nn.Identity()
        if stride != 1 or incoming != outgoing:
            self.shortcut = nn.Sequential(kit.conv(incoming, outgoing, 1, stride), kit.normed(outgoing))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.activation1(self.norm1(self.conv1(x)))))
        return self.activation2(y + self.shortcut(x))


class PreactivationBlock(nn.Module):
    """Norm and activation before each convolution (Zagoruyko and Komodakis 2016); as `BasicBlock` otherwise."""

    def __init__(self, kit: Kit, incoming: int, middle: int, outgoing: int, stride: int, inner: str | None = None):
        super().__init__()
        self.norm1, self.activation1 = kit.normed(incoming), kit.active()
        self.conv1, self.norm2, self.activation2 = kit.unit(incoming, middle, 3, stride, norm=inner)
        self.conv2 = kit.conv(middle, outgoing, 3)
        self.shortcut = nn.Identity()
        if stride != 1 or incoming != outgoing:
            self.shortcut = kit.conv(incoming, outgoing, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation1(self.norm1(x))
        return self.conv2(self.activation2(self.norm2(self.conv1(y)))) + self.shortcut(x)


class ResidualNet(nn.Sequential):
    """A stem, stages of residual blocks that halve the grid from the second on, the mean over the grid, a linear layer.

    Args:
        block: `BasicBlock` or `PreactivationBlock`.
        stages: (channels at factor 1, blocks) of each stage.
        stem: channels of the first convolution at factor 1.
        inner_norm: norm between the two convolutions of a block; None: `norm`.
        downsampling_stem: 7×7 stride 2 and pooling in the stem, for images of 96 pixels and more.
        **arguments: of `Kit`.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[PreactivationBlock],
        stages: tuple[tuple[int, int], ...],
        stem: int,
        inner_norm: str | None = None,
        downsampling_stem: bool = False,
        **arguments: Any,
    ) -> None:
        kit = Kit(**arguments)
        channels = kit.tied(stem)
        preactivation = block is PreactivationBlock
        large = downsampling_stem and kit.image_size >= 96
        entry: list[nn.Module] = [kit.conv(kit.in_channels, channels, 7 if large else 3, 2 if large else 1)]
        if not preactivation:
            entry += [kit.normed(channels), kit.active()]
        if large:
            entry.append(nn.MaxPool2d(3, stride=2, padding=1))
        blocks = []
        for index, (planned, count) in enumerate(stages):
            for position in range(count):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(block(kit, channels, kit.free(planned), kit.tied(planned), stride, inner_norm))
                channels = kit.tied(planned)
        parts: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(*entry), blocks=nn.Sequential(*blocks))
        if preactivation:
            parts["head"] = nn.Sequential(kit.normed(channels), kit.active())
        super().__init__(parts | kit.classifier(channels))


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise 3×3, 1×1 projection (Sandler et al. 2018); the expanded channels are free to grow."""

    def __init__(self, kit: Kit, incoming: int, middle: int, outgoing: int, stride: int):
        super().__init__()
        self.expand, self.norm1, self.activation1 = kit.unit(incoming, middle, 1)
        self.depthwise, self.norm2, self.activation2 = kit.unit(middle, middle, 3, stride, middle)
        self.project = kit.conv(middle, outgoing, 1)
        self.norm3 = kit.normed(outgoing)
        self.residual = stride == 1 and incoming == outgoing

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation1(self.norm1(self.expand(x)))
        y = self.activation2(self.norm2(self.depthwise(y)))
        y = self.norm3(self.project(y))
        return x + y if self.residual else y


class DoubleConv(nn.Module):
    """Two 3×3 convolutions, each with norm and activation; the channels between them are free to grow."""

    def __init__(self, kit: Kit, incoming: int, middle: int, outgoing: int):
        super().__init__()
        self.conv1, self.norm1, self.activation1 = kit.unit(incoming, middle, 3)
        self.conv2, self.norm2, self.activation2 = kit.unit(middle, outgoing, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation1(self.norm1(self.conv1(x)))
        return self.activation2(self.norm2(self.conv2(y)))


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with padded convolutions and nearest-neighbour upsampling; a label map out.

    Args:
        levels: image sizes, each half the one before.
        **arguments: of `Kit`.
    """

    def __init__(self, levels: int = 3, **arguments: Any) -> None:
        super().__init__()
        kit = Kit(**arguments)
        if kit.image_size % 2 ** (levels - 1):
            raise ConfigError(
                "the image cannot be halved at every level",
                expected=f"a multiple of {2 ** (levels - 1)} pixels",
                got=kit.image_size,
                where="model=unet",
                fix="set model.args.levels to fewer",
            )
        planned = [32 * 2**level for level in range(levels)]
        self.down, self.pool, self.up = nn.ModuleList(), nn.MaxPool2d(2), nn.ModuleList()
        channels = kit.in_channels
        for count in planned:
            self.down.append(DoubleConv(kit, channels, kit.free(count), kit.tied(count)))
            channels = kit.tied(count)
        for count in reversed(planned[:-1]):
            self.up.append(DoubleConv(kit, channels + kit.tied(count), kit.free(count), kit.tied(count)))
            channels = kit.tied(count)
        self.classifier = nn.Conv2d(channels, kit.classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else self.pool(x))
            skipped.append(x)
        skipped.pop()
        for block in self.up:
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, skipped.pop()], 1))
        return self.classifier(x)


def small_cnn(**arguments: Any) -> PlainNet:
    """Three 3×3 convolutions of 32, 64 and 64 channels: the model of the default run."""
    return PlainNet((32, "pool", 64, "pool", 64), **arguments)


def vgg11(**arguments: Any) -> PlainNet:
    """The eight convolutions of VGG-11 (Simonyan and Zisserman 2015) with one linear layer."""
    plan = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")
    return PlainNet(plan, **arguments)


def resnet20(**arguments: Any) -> ResidualNet:
    """ResNet-20 for small images (He et al. 2016), with 1×1 convolutions in the shortcuts that change the shape."""
    return ResidualNet(BasicBlock, ((16, 3), (32, 3), (64, 3)), 16, **arguments)


def resnet18(**arguments: Any) -> ResidualNet:
    """ResNet-18 (He et al. 2016); a 3×3 stem without pooling on images under 96 pixels."""
    stages = ((64, 2), (128, 2), (256, 2), (512, 2))
    return ResidualNet(BasicBlock, stages, 64, downsampling_stem=True, **arguments)


def wrn28(**arguments: Any) -> ResidualNet:
    """WRN-28-1 (Zagoruyko and Komodakis 2016); `width` is the paper's widening factor, applied to the stem too."""
    return ResidualNet(PreactivationBlock, ((16, 4), (32, 4), (64, 4)), 16, **arguments)


def mobilenet_v2(**arguments: Any) -> nn.Sequential:
    """MobileNetV2 (Sandler et al. 2018) with ReLU; on images under 96 pixels the first two halvings are left out."""
    kit = Kit(**arguments)
    step = 2 if kit.image_size >= 96 else 1
    # expansion, channels, blocks, stride of the first block (Table 2 of the paper)
    table = (
        (1, 16, 1, 1),
        (6, 24, 2, step),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    channels, last = kit.tied(32), kit.free(1280)
    stem = nn.Sequential(*kit.unit(kit.in_channels, channels, 3, step))
    blocks = []
    for expansion, planned, count, stride in table:
        for position in range(count):
            middle = scaled(channels * expansion, kit.hidden)
            blocks.append(InvertedResidual(kit, channels, middle, kit.tied(planned), stride if position == 0 else 1))
            channels = kit.tied(planned)
    head = nn.Sequential(*kit.unit(channels, last, 1))
    return nn.Sequential(OrderedDict(stem=stem, blocks=nn.Sequential(*blocks), head=head, **kit.classifier(last)))


def unet(**arguments: Any) -> UNet:
    """U-Net of three levels, 32 channels at the first."""
    return UNet(**arguments)
