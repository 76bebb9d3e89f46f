"""Small models with every operation that treats channels alike between two layers, and what must be found in them.

Each has a convolution `a` whose channels go through the operation into `b` (or a linear layer). A case names the sites
that must be found with the multiple in which their channels come, and nothing else may be found.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.network.hand import Net


@dataclass(frozen=True)
class Case:
    """A model, the shape of an example input, and its sites with the multiples of their channels."""

    build: Callable[[], nn.Module]
    sites: dict[str, int]
    shape: tuple[int, ...] = (2, 3, 6, 6)
    copied: tuple[str, ...] = field(default=())


def between(
    operation: Callable[[Net, Tensor], Tensor], outputs: int = 8, inputs: int = 8, **more: nn.Module
) -> Callable:
    """`a`, an operation, `b`."""

    def build() -> Net:
        return Net(
            lambda m, x: m.b(operation(m, F.relu(m.a(x)))),
            a=nn.Conv2d(3, outputs, 3, padding=1), b=nn.Conv2d(inputs, 2, 1), **more,
        )  # fmt: skip

    return build


def into_linear(operation: Callable[[Tensor], Tensor], inputs: int) -> Callable:
    """`a`, an operation, a linear layer `b`."""
    return lambda: Net(lambda m, x: m.b(operation(F.relu(m.a(x)))), a=nn.Conv2d(3, 4, 3), b=nn.Linear(inputs, 2))


def squeeze_excite(m: Net, y: Tensor) -> Tensor:
    b, c, _, _ = y.size()
    gate = m.up(F.relu(m.down(F.adaptive_avg_pool2d(y, 1).view(b, c)))).sigmoid()
    return y * gate.view(b, c, 1, 1)


def pooled_by_weights(m: Net, y: Tensor) -> Tensor:
    weights = m.weigh(y).flatten(2).softmax(2).unsqueeze(3)
    return y + torch.matmul(y.flatten(2).unsqueeze(1), weights).view(*y.shape[:2], 1, 1)


def shuffle(y: Tensor, groups: int) -> Tensor:
    n, c, h, w = y.size()
    return y.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


def shuffled_units(units: int = 2, channels: int = 10) -> Net:
    """Half of the channels goes by each unit, the other half through a layer, and both are shuffled (ShuffleNet V2)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = shuffle(torch.cat([m.a(x), m.b(F.relu(x))], 1), 2)
        for unit in range(units):
            by, through = y.chunk(2, 1)
            y = shuffle(torch.cat([by, F.relu(getattr(m, f"unit{unit}")(through))], 1), 2)
        return m.c(y)

    layers = {f"unit{unit}": nn.Conv2d(channels, channels, 3, padding=1) for unit in range(units)}
    return Net(
        forward, a=nn.Conv2d(3, channels, 1), b=nn.Conv2d(3, channels, 1), c=nn.Conv2d(2 * channels, 2, 1), **layers
    )


def temporal_shift(_: Net, y: Tensor) -> Tensor:
    """A quarter of the channels moves up, a quarter down, by assignment to slices."""
    part, out = y.size(1) // 4, torch.zeros_like(y)
    out[:, :part, 1:] = y[:, :part, :-1]
    out[:, part : 2 * part, :-1] = y[:, part : 2 * part, 1:]
    out[:, 2 * part :] = y[:, 2 * part :]
    return out


def halves(_: Net, y: Tensor) -> Tensor:
    first, second = y.chunk(2, 1)
    return first * second.sigmoid()


def split_halves(_: Net, y: Tensor) -> Tensor:
    first, second = y.split(y.shape[1] // 2, dim=1)
    return F.gelu(first) + second


def quarter_by_slices(_: Net, y: Tensor) -> Tensor:
    count = y.shape[1] // 2
    return torch.cat([y[:, count:], y[:, :count].tanh()], 1)


def spatial_softmax(_: Net, y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    return y * F.softmax(y.reshape(n, c, h * w), dim=-1).reshape(n, c, h, w)


def stacked_mean(_: Net, y: Tensor) -> Tensor:
    return torch.stack([y, y.flip(-1), y.tanh()], 0).mean(0)


def written_in_place(_: Net, y: Tensor) -> Tensor:
    z = y.clone()
    z[:, :, ::2] *= 2
    z.mul_(0.5).add_(y)
    return z


def masked(_: Net, y: Tensor) -> Tensor:
    z = y.clone()
    z[z < 0.1] = -1.0
    return z


class Conditional(nn.Module):
    """A scale and a shift for every channel, by the class of the sample; not every class is met."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 2 * channels)

    def forward(self, y: Tensor) -> Tensor:
        scale, shift = self.table(torch.tensor([3, 1]))[..., None, None].chunk(2, 1)
        return y * scale + shift


def warped() -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return m.b(F.grid_sample(y, m.places(y).tanh().permute(0, 2, 3, 1), align_corners=False))

    return Net(forward, a=nn.Conv2d(3, 4, 1), places=nn.Conv2d(4, 2, 1), b=nn.Conv2d(4, 2, 1))


def centred(_: Net, y: Tensor) -> Tensor:
    groups = y.view(y.shape[0], -1, 4, *y.shape[2:])
    return (groups - groups.mean(2, keepdim=True)).view_as(y)


def mixer() -> Net:
    """Layers along the locations and layers along the channels in turn (MLP-Mixer)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).flatten(2)
        y = (y + m.gather(F.gelu(m.spread(y)))).transpose(1, 2)
        return m.b(y + m.shrink(F.gelu(m.widen(y))))

    return Net(
        forward, a=nn.Conv2d(3, 4, 1), spread=nn.Linear(36, 5), gather=nn.Linear(5, 36), widen=nn.Linear(4, 6),
        shrink=nn.Linear(6, 4), b=nn.Linear(4, 2),
    )  # fmt: skip


def by_weights(m: Net, y: Tensor) -> Tensor:
    return y.view(-1, m.b.weight.shape[1], 36).view(-1, len(m.a.weight), 6, 6)


def spatial_statistics(_: Net, y: Tensor) -> Tensor:
    return (y - y.mean((2, 3), keepdim=True)) / (y.std((2, 3), keepdim=True) + 1)


def composite(_: Net, y: Tensor) -> Tensor:
    return y * F.relu6(y + 3) / 6 + F.mish(y) * torch.where(y > 1, y, -y)


def functional_norms(m: Net, y: Tensor) -> Tensor:
    y = F.batch_norm(y, None, None, m.weight, m.bias, training=True)
    return F.instance_norm(y) + F.layer_norm(y, y.shape[2:])


class SplitAttention(nn.Module):
    """Two branches of one grouped convolution, weighed against each other by a softmax over the branches."""

    def __init__(self, radix: int = 2) -> None:
        super().__init__()
        self.radix = radix
        self.stem = nn.Conv2d(3, 4, 1)
        self.branches = nn.Conv2d(4, 4 * radix, 3, padding=1)
        self.down, self.up = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4 * radix, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.branches(F.relu(self.stem(x))))
        n, c, h, w = y.shape
        y = y.view(n, self.radix, c // self.radix, h, w)
        gap = F.adaptive_avg_pool2d(y.sum(1), 1)
        weights = self.up(F.relu(self.down(gap))).view(n, self.radix, -1).softmax(1)
        return self.head((y * weights.view(n, self.radix, c // self.radix, 1, 1)).sum(1))


class Standardised(nn.Conv2d):
    """A convolution whose weight has mean 0 and variance 1 for each output."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        mean, deviation = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (weight - mean) / (deviation + 1e-5), self.bias, self.stride, self.padding)


class Generator(nn.Module):
    """Linear, seen as a map, then convolutions, as in the generator of a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.norm = nn.Linear(5, 4 * 3 * 3), nn.BatchNorm2d(4)
        self.up, self.end = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x).view(len(x), -1, 3, 3)
        return self.end(F.relu(self.up(F.relu(self.norm(y)))))


class OddUNet(nn.Module):
    """A skip connection between maps of odd sizes: padded, cropped or interpolated to fit."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.down = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, 2, 1)
        self.up, self.join = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Conv2d(6, 4, 3, padding=1)
        self.end = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.a(x))
        up = F.relu(self.up(F.relu(self.down(F.pad(skip, (0, 1, 0, 1)) if self.how == "pad" else skip))))
        if self.how == "pad":
            rows, columns = skip.size(2) - up.size(2), skip.size(3) - up.size(3)
            up = F.pad(up, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        if self.how == "crop":
            up = up[..., : skip.shape[2], : skip.shape[3]]
        if self.how == "interpolate":
            up = F.interpolate(up, skip.shape[2:], mode="bilinear", align_corners=False)
        return self.end(F.relu(self.join(torch.cat([skip, up], 1))))


UNET = {"a -> down, join": 1, "down -> up": 1, "up -> join": 1, "join -> end": 1}


def padded(mode: str) -> Callable[[Net, Tensor], Tensor]:
    return lambda _, y: F.pad(y, (1, 2, 0, 1), mode=mode)


def mutable(**tensors: Tensor) -> Callable[[], Net]:
    """`a`, times a parameter and plus a buffer for each channel, `b`."""

    def build() -> Net:
        model = between(lambda m, y: y * m.weight.view(1, -1, 1, 1) + m.shift)()
        model.weight = nn.Parameter(torch.rand(8) + 0.5)
        model.register_buffer("shift", torch.rand(1, 8, 1, 1))
        return model

    return build


def blurred() -> Net:
    """`a`, a blur with a kernel for each channel in a buffer and their number in an attribute, and one for all, `b`."""

    def blur(m: Net, y: Tensor) -> Tensor:
        y = F.conv2d(F.pad(y, (1, 1, 1, 1), "reflect"), m.kernels, stride=2, groups=m.channels)
        y = F.conv_transpose2d(y, m.kernels, m.shift, stride=2, groups=m.channels)
        return F.conv2d(y, m.kernels[:1].expand(y.shape[1], 1, 3, 3), groups=y.shape[1])

    model = between(blur)()
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    model.register_buffer("kernels", torch.outer(kernel, kernel).repeat(8, 1, 1, 1))
    model.register_buffer("shift", torch.rand(8))
    model.channels = 8
    return model


def normed() -> Net:
    model = between(functional_norms)()
    model.weight, model.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.rand(8))
    return model


def module(layer: Callable[[], nn.Module], outputs: int = 8, inputs: int = 8) -> Callable:
    return lambda: between(lambda m, y: m.middle(y), outputs, inputs, middle=layer())()


ONE = {"a -> b": 1}
CASES: dict[str, Case] = {
    "view(b, c, 1, 1)": Case(
        lambda: between(squeeze_excite, down=nn.Linear(8, 3), up=nn.Linear(3, 8))(),
        {"a + up -> down, b": 1, "down -> up": 1},
    ),
    "view and back": Case(between(lambda _, y: y.view(y.size(0), y.size(1), -1).tanh().view_as(y)), ONE),
    "permuted": Case(between(lambda _, y: y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), ONE),
    "flatten(1)": Case(into_linear(lambda y: y.flatten(1), 64), ONE),
    "view(n, c * h * w)": Case(into_linear(lambda y: y.view(y.size(0), y.size(1) * y.size(2) * y.size(3)), 64), ONE),
    "view(n, -1)": Case(into_linear(lambda y: y.view(y.size(0), -1), 64), ONE),
    "channels last, flattened": Case(into_linear(lambda y: y.permute(0, 2, 3, 1).reshape(len(y), -1), 64), ONE),
    "pooled by weights": Case(  # as a global context: a map of one channel says how much every location counts
        between(pooled_by_weights, weigh=nn.Conv2d(8, 1, 1)), {"a -> weigh, b": 1}
    ),
    "mean": Case(into_linear(lambda y: y.mean((2, 3)), 4), ONE),
    "sequence": Case(into_linear(lambda y: y.flatten(2).transpose(1, 2), 4), ONE),
    "chunk": Case(between(halves, inputs=4), ONE),
    "split": Case(between(split_halves, inputs=4), ONE),
    "glu": Case(between(lambda _, y: F.glu(y, 1), inputs=4), ONE),
    "slices": Case(between(quarter_by_slices), {"a -> b": 2}),
    "every other": Case(between(lambda _, y: torch.cat([y[:, ::2], y[:, 1::2]], 1)), {"a -> b": 2}),
    "slice assignment": Case(between(temporal_shift), {"a -> b": 4}),
    "shuffle": Case(between(lambda _, y: shuffle(y, 2)), {"a -> b": 2}),
    "F.channel_shuffle": Case(between(lambda _, y: F.channel_shuffle(y, 4)), {"a -> b": 4}),
    "nn.ChannelShuffle": Case(module(lambda: nn.ChannelShuffle(2)), {"a -> b": 2}),
    "shuffle between groups": Case(
        lambda: Net(
            lambda m, x: m.b(shuffle(F.relu(m.g(F.relu(m.a(x)))), 2)),
            a=nn.Conv2d(3, 8, 1), g=nn.Conv2d(8, 12, 3, groups=2), b=nn.Conv2d(12, 2, 1),
        ),
        {"a -> g": 2, "g -> b": 2},
    ),
    "shuffle between grouped layers": Case(  # every group of the second reads some of every group of the first
        lambda: Net(
            lambda m, x: m.b(shuffle(F.relu(m.a(m.stem(x))), 3)),
            stem=nn.Conv2d(3, 12, 1), a=nn.Conv2d(12, 18, 1, groups=3), b=nn.Conv2d(18, 6, 3, groups=3),
        ),
        {"stem -> a": 3, "a -> b": 9},
    ),
    "shuffled units": Case(shuffled_units, {"a + 3 more -> unit0, unit1, c": 4}),
    "pixel shuffle": Case(module(lambda: nn.PixelShuffle(2), inputs=2), ONE),
    "pixel shuffle, padded and pooled": Case(
        between(lambda _, y: F.avg_pool2d(F.pad(F.pixel_shuffle(y, 2), (1, 0, 1, 0)), 2, 1), inputs=2), ONE
    ),
    "pixel unshuffle": Case(module(lambda: nn.PixelUnshuffle(2), inputs=32), ONE),
    "pad constant": Case(between(padded("constant")), ONE),
    "pad reflect": Case(between(padded("reflect")), ONE),
    "pad replicate": Case(between(padded("replicate")), ONE),
    "pad circular": Case(between(padded("circular")), ONE),
    "CircularPad2d": Case(module(lambda: nn.CircularPad2d(1)), ONE),
    "ReflectionPad2d": Case(module(lambda: nn.ReflectionPad2d(1)), ONE),
    "ReplicationPad2d": Case(module(lambda: nn.ReplicationPad2d(1)), ONE),
    "ZeroPad2d": Case(module(lambda: nn.ZeroPad2d(1)), ONE),
    "ConstantPad2d": Case(module(lambda: nn.ConstantPad2d(1, 0.5)), ONE),
    "roll": Case(between(lambda _, y: y.roll((1, -1), (2, 3)) + torch.roll(y, 2, -1)), ONE),
    "flip": Case(between(lambda _, y: y.flip(-1) - torch.rot90(y, 1, (2, 3))), ONE),
    "interpolate": Case(between(lambda _, y: F.interpolate(y, scale_factor=2) - F.interpolate(y, (12, 12))), ONE),
    "bilinear": Case(between(lambda _, y: F.interpolate(y, scale_factor=1.5, mode="bilinear")), ONE),
    "bicubic": Case(between(lambda _, y: F.interpolate(y, (9, 7), mode="bicubic")), ONE),
    "Upsample": Case(module(lambda: nn.Upsample(scale_factor=2)), ONE),
    "area": Case(between(lambda _, y: F.interpolate(y, (12, 12), mode="area")), ONE),
    "pooling": Case(between(lambda _, y: F.max_pool2d(y, 2) + F.avg_pool2d(y, 2) + F.lp_pool2d(y, 2, 2)), ONE),
    "unpooling": Case(
        lambda: Net(
            lambda m, x: m.b(F.max_unpool2d(*F.max_pool2d(m.a(x), 2, return_indices=True), 2)),
            a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1),
        ),
        ONE,
    ),
    "unfold": Case(between(lambda _, y: F.unfold(y, 3, padding=1).view(*y.shape[:2], 9, 6, 6).amax(2)), ONE),
    "masked by itself": Case(between(masked), ONE),
    "class embedding": Case(module(lambda: Conditional(8)), ONE),
    "sampled at places of its own": Case(warped, {"a -> places, b": 1}),
    "normalized by hand": Case(between(centred), {"a -> b": 4}),
    "tokens mixed": Case(mixer, {"a + shrink -> widen, b": 1, "spread -> gather": 1, "widen -> shrink": 1}),
    "shapes of weights": Case(between(by_weights), ONE),
    "stack and mean": Case(between(stacked_mean), ONE),
    "written in place": Case(between(written_in_place), ONE),
    "spatial softmax": Case(between(spatial_softmax), ONE),
    "spatial statistics": Case(between(spatial_statistics), ONE),
    "normalized over space": Case(between(lambda _, y: F.normalize(y.flatten(2), dim=2).view_as(y)), ONE),
    "functional norms": Case(normed, ONE),
    "composite activations": Case(between(composite), ONE),
    "Dropout2d": Case(module(lambda: nn.Dropout2d(0.5)), ONE),
    "layer scale and buffer": Case(mutable(), ONE),
    "blur": Case(blurred, ONE),
    "standardised weights": Case(
        lambda: nn.Sequential(Standardised(3, 4, 3), nn.ReLU(), Standardised(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)),
        {"2 -> 4": 1},  # weights of 0 change the standardised ones beside them
    ),
    "linear, view, convolution": Case(Generator, {"start -> up": 1, "up -> end": 1}, (2, 5)),
    "split attention": Case(SplitAttention, {"stem -> branches": 1, "branches + up -> down, head": 1, "down -> up": 1}),
    "U-Net, padded": Case(lambda: OddUNet("pad"), UNET, (2, 1, 7, 9)),
    "U-Net, cropped": Case(lambda: OddUNet("crop"), UNET, (2, 1, 7, 9)),
    "U-Net, interpolated": Case(lambda: OddUNet("interpolate"), UNET, (2, 1, 7, 9)),
}  # fmt: skip
