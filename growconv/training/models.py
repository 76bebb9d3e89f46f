"""The models under conf/model: plain `nn.Module`s whose widths are factors, so that a run can start small.

Every builder takes the same arguments. `width` scales every channel count; `hidden` scales only the channels that no
skip connection ties to others (inside a residual block, or everywhere in a plain chain): what most methods grow.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

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


def make_norm(kind: str, channels: int) -> nn.Module:
    """The norm layer of a name in NORMS."""
    if kind not in NORMS:
        raise ConfigError("there is no such norm", expected=", ".join(NORMS), got=kind, where="model.norm")
    return NORMS[kind](channels)


def make_activation(kind: str) -> nn.Module:
    """The activation of a name in ACTIVATIONS."""
    if kind not in ACTIVATIONS:
        expected = ", ".join(ACTIVATIONS)
        raise ConfigError("there is no such activation", expected=expected, got=kind, where="model.activation")
    return ACTIVATIONS[kind]()


def conv(incoming: int, outgoing: int, size: int, stride: int = 1, groups: int = 1, norm: str = "batch") -> nn.Conv2d:
    """A convolution that keeps the grid at stride 1, with a bias only where no norm follows."""
    bias = norm in ("none", "group")
    return nn.Conv2d(incoming, outgoing, size, stride, padding=size // 2, groups=groups, bias=bias)


def unit(
    incoming: int, outgoing: int, size: int, norm: str, activation: str, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.Module, nn.Module]:
    """A convolution, and the norm and the activation that follow it."""
    convolution = conv(incoming, outgoing, size, stride, groups, norm)
    return convolution, make_norm(norm, outgoing), make_activation(activation)


def classifier(channels: int, classes: int) -> dict[str, nn.Module]:
    """The mean over the grid and a linear layer: the end of a network, by the names of its parts."""
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": nn.Linear(channels, classes)}


class ConvPair(nn.Module):
    """conv → activation → conv, a label map out: the student of the synthetic teacher."""

    def __init__(
        self,
        in_channels: int,
        classes: int,
        image_size: int,
        width: float = 1.0,
        hidden: float = 1.0,
        norm: str = "none",
        activation: str = "relu",
    ):
        super().__init__()
        middle = scaled(12, width * hidden)
        self.conv1 = conv(in_channels, middle, 3, norm="none")
        self.norm = make_norm(norm, middle)
        self.activation = make_activation(activation)
        self.conv2 = conv(middle, classes, 3, norm="none")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.activation(self.norm(self.conv1(x))))


class PlainNet(nn.Sequential):
    """Convolutions one after the other, halving the grid where the plan says so, its mean, and a linear layer.

    Args:
        plan: channels of each convolution at factor 1, and "pool" for a 2×2 max-pooling (left out on a one-pixel grid).
    """

    def __init__(
        self,
        plan: Sequence[int | str],
        in_channels: int,
        classes: int,
        image_size: int,
        width: float = 1.0,
        hidden: float = 1.0,
        norm: str = "batch",
        activation: str = "relu",
    ):
        features: list[nn.Module] = []
        channels, size = in_channels, image_size
        for entry in plan:
            if isinstance(entry, int):
                wide = scaled(entry, width * hidden)
                features += unit(channels, wide, 3, norm, activation)
                channels = wide
            elif size >= 2:
                features.append(nn.MaxPool2d(2))
                size //= 2
        features = [layer for layer in features if not isinstance(layer, nn.Identity)]
        super().__init__(OrderedDict(features=nn.Sequential(*features), **classifier(channels, classes)))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a skip connection (He et al. 2016); `middle` channels between them are free to grow."""

    def __init__(self, incoming: int, middle: int, outgoing: int, stride: int, norm: str, activation: str, inner: str):
        super().__init__()
        self.conv1, self.norm1, self.activation1 = unit(incoming, middle, 3, inner, activation, stride)
        self.conv2, self.norm2, self.activation2 = unit(middle, outgoing, 3, norm, activation)
        self.shortcut = nn.Identity()
        if stride != 1 or incoming != outgoing:
            self.shortcut = nn.Sequential(conv(incoming, outgoing, 1, stride, norm=norm), make_norm(norm, outgoing))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.activation1(self.norm1(self.conv1(x)))))
        return self.activation2(y + self.shortcut(x))


class PreactivationBlock(nn.Module):
    """Norm and activation before each convolution (Zagoruyko and Komodakis 2016); `middle` is free to grow."""

    def __init__(self, incoming: int, middle: int, outgoing: int, stride: int, norm: str, activation: str, inner: str):
        super().__init__()
        self.norm1, self.activation1 = make_norm(norm, incoming), make_activation(activation)
        self.conv1, self.norm2, self.activation2 = unit(incoming, middle, 3, inner, activation, stride)
        self.conv2 = conv(middle, outgoing, 3, norm=norm)
        self.shortcut = nn.Identity()
        if stride != 1 or incoming != outgoing:
            self.shortcut = conv(incoming, outgoing, 1, stride, norm=norm)

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
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[PreactivationBlock],
        stages: tuple[tuple[int, int], ...],
        stem: int,
        in_channels: int,
        classes: int,
        image_size: int,
        width: float = 1.0,
        hidden: float = 1.0,
        norm: str = "batch",
        activation: str = "relu",
        inner_norm: str | None = None,
        downsampling_stem: bool = False,
    ):
        channels = scaled(stem, width)
        preactivation = block is PreactivationBlock
        large = downsampling_stem and image_size >= 96
        entry: list[nn.Module] = [conv(in_channels, channels, 7 if large else 3, 2 if large else 1, norm=norm)]
        if not preactivation:
            entry += [make_norm(norm, channels), make_activation(activation)]
        if large:
            entry.append(nn.MaxPool2d(3, stride=2, padding=1))
        blocks = []
        for index, (planned, count) in enumerate(stages):
            outgoing, middle = scaled(planned, width), scaled(planned, width * hidden)
            for position in range(count):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(block(channels, middle, outgoing, stride, norm, activation, inner_norm or norm))
                channels = outgoing
        parts: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(*entry), blocks=nn.Sequential(*blocks))
        if preactivation:
            parts["head"] = nn.Sequential(make_norm(norm, channels), make_activation(activation))
        super().__init__(parts | classifier(channels, classes))


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise 3×3, 1×1 projection (Sandler et al. 2018); the expanded channels are free to grow."""

    def __init__(self, incoming: int, middle: int, outgoing: int, stride: int, norm: str, activation: str):
        super().__init__()
        self.expand, self.norm1, self.activation1 = unit(incoming, middle, 1, norm, activation)
        self.depthwise, self.norm2, self.activation2 = unit(middle, middle, 3, norm, activation, stride, middle)
        self.project = conv(middle, outgoing, 1, norm=norm)
        self.norm3 = make_norm(norm, outgoing)
        self.residual = stride == 1 and incoming == outgoing

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation1(self.norm1(self.expand(x)))
        y = self.activation2(self.norm2(self.depthwise(y)))
        y = self.norm3(self.project(y))
        return x + y if self.residual else y


class MobileNetV2(nn.Sequential):
    """MobileNetV2 (Sandler et al. 2018); on images under 96 pixels the first two halvings are left out."""

    def __init__(
        self,
        in_channels: int,
        classes: int,
        image_size: int,
        width: float = 1.0,
        hidden: float = 1.0,
        norm: str = "batch",
        activation: str = "relu",
    ):
        large = image_size >= 96
        # expansion, channels, blocks, stride of the first block (Table 2 of the paper)
        table = ((1, 16, 1, 1), (6, 24, 2, 2 if large else 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
        table += ((6, 160, 3, 2), (6, 320, 1, 1))
        channels, last = scaled(32, width), scaled(1280, width * hidden)
        stem = nn.Sequential(*unit(in_channels, channels, 3, norm, activation, 2 if large else 1))
        blocks = []
        for expansion, planned, count, stride in table:
            outgoing = scaled(planned, width)
            for position in range(count):
                middle = scaled(channels * expansion, hidden)
                step = stride if position == 0 else 1
                blocks.append(InvertedResidual(channels, middle, outgoing, step, norm, activation))
                channels = outgoing
        head = nn.Sequential(*unit(channels, last, 1, norm, activation))
        parts = OrderedDict(stem=stem, blocks=nn.Sequential(*blocks), head=head, **classifier(last, classes))
        super().__init__(parts)


class DoubleConv(nn.Module):
    """Two 3×3 convolutions, each with norm and activation; the channels between them are free to grow."""

    def __init__(self, incoming: int, middle: int, outgoing: int, norm: str, activation: str):
        super().__init__()
        self.conv1, self.norm1, self.activation1 = unit(incoming, middle, 3, norm, activation)
        self.conv2, self.norm2, self.activation2 = unit(middle, outgoing, 3, norm, activation)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation1(self.norm1(self.conv1(x)))
        return self.activation2(self.norm2(self.conv2(y)))


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with padded convolutions and nearest-neighbour upsampling; a label map out.

    Args:
        levels: image sizes, each half the one before.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        width: float = 1.0,
        hidden: float = 1.0,
        norm: str = "batch",
        activation: str = "relu",
        levels: int = 3,
    ):
        super().__init__()
        planned = [32 * 2**level for level in range(levels)]
        self.down = nn.ModuleList()
        channels = in_channels
        for count in planned:
            outgoing = scaled(count, width)
            self.down.append(DoubleConv(channels, scaled(count, width * hidden), outgoing, norm, activation))
            channels = outgoing
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList()
        for count in reversed(planned[:-1]):
            outgoing = scaled(count, width)
            self.up.append(DoubleConv(channels + outgoing, scaled(count, width * hidden), outgoing, norm, activation))
            channels = outgoing
        self.classifier = nn.Conv2d(channels, classes, 1)

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


def small_cnn(**arguments) -> PlainNet:
    """Three 3×3 convolutions of 32, 64 and 64 channels: the model of the default run."""
    return PlainNet((32, "pool", 64, "pool", 64), **arguments)


def vgg11(**arguments) -> PlainNet:
    """The eight convolutions of VGG-11 (Simonyan and Zisserman 2015) with one linear layer."""
    plan = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")
    return PlainNet(plan, **arguments)


def resnet20(**arguments) -> ResidualNet:
    """ResNet-20 for small images (He et al. 2016), with 1×1 convolutions in the shortcuts that change the shape."""
    return ResidualNet(BasicBlock, ((16, 3), (32, 3), (64, 3)), 16, **arguments)


def resnet18(**arguments) -> ResidualNet:
    """ResNet-18 (He et al. 2016); a 3×3 stem without pooling on images under 96 pixels."""
    stages = ((64, 2), (128, 2), (256, 2), (512, 2))
    return ResidualNet(BasicBlock, stages, 64, downsampling_stem=True, **arguments)


def wrn28(**arguments) -> ResidualNet:
    """WRN-28-1 (Zagoruyko and Komodakis 2016); `width` is the paper's widening factor, applied to the stem too."""
    return ResidualNet(PreactivationBlock, ((16, 4), (32, 4), (64, 4)), 16, **arguments)


def mobilenet_v2(**arguments) -> MobileNetV2:
    """MobileNetV2 with ReLU."""
    return MobileNetV2(**arguments)


def unet(image_size: int, levels: int = 3, **arguments) -> UNet:
    """U-Net of three levels, 32 channels at the first."""
    if image_size % 2 ** (levels - 1):
        raise ConfigError(
            "the image cannot be halved at every level",
            expected=f"a multiple of {2 ** (levels - 1)} pixels",
            got=image_size,
            where="model=unet",
            fix="set model.args.levels to fewer",
        )
    return UNet(levels=levels, **arguments)
