"""Small models with sites written down by hand: the referee of surgery does not depend on finding them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.network import layers
from growconv.network.layout import ENTRY, GROUP_IN, GROUP_OUT, IN, OUT, Key, Layout, Run
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite


class Net(nn.Module):
    """Modules by name and a forward that uses them."""

    def __init__(self, forward: Callable[["Net", Tensor], Tensor], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def site(
    model: nn.Module,
    axes: dict[Key, tuple[Run, ...]],
    space: int = 0,
    channels: tuple[int, ...] = (1,),
    dims: dict[str, int] | None = None,
) -> GrowthSite:
    """The site of a space in a layout that is written down."""
    layout = Layout(axes, channels, dims or {})
    keys = layout.keys(space)
    producers = tuple(path for path, side in keys if side == OUT)
    consumers = tuple(path for path, side in keys if side == IN)
    followers = tuple(dict.fromkeys(path for path, side in keys if side in (ENTRY, GROUP_IN)))
    name = f"{' + '.join(producers)} -> {', '.join(consumers)}"
    return GrowthSite(model, name, "pair", producers, followers, consumers, (), {}, layout, space)


PLAIN = (Run(0, 1),)


def pair_forward(m: Net, x: Tensor) -> Tensor:
    return m.head(m.b(F.relu(m.n(m.a(x)))).mean((2, 3)))


def pair() -> tuple[Net, Tensor, GrowthSite]:
    model = Net(
        pair_forward,
        a=nn.Conv2d(3, 4, 3, padding=1), n=nn.BatchNorm2d(4), b=nn.Conv2d(4, 5, 3), head=nn.Linear(5, 2),
    )  # fmt: skip
    return model, torch.randn(4, 3, 7, 7), site(model, {("a", OUT): PLAIN, ("n", ENTRY): PLAIN, ("b", IN): PLAIN})


def stream() -> tuple[Net, Tensor, GrowthSite]:
    """A residual stream that a convolution reads and writes, with a layer scale."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y = y + m.scale * m.r(F.gelu(y))
        return m.head(y.mean((2, 3)))

    model = Net(
        forward, a=nn.Conv2d(3, 4, 3, padding=1), r=nn.Conv2d(4, 4, 3, padding=1), head=nn.Linear(4, 2),
        scale=nn.Parameter(torch.rand(1, 4, 1, 1)),
    )  # fmt: skip
    axes = dict.fromkeys((("a", OUT), ("r", OUT), ("r", IN), ("scale", ENTRY), ("head", IN)), PLAIN)
    return model, torch.randn(4, 3, 6, 6), site(model, axes, dims={"scale": 1})


def glu() -> tuple[Net, Tensor, GrowthSite]:
    model = Net(
        lambda m, x: m.b(F.glu(m.n(m.a(x)), 1)), a=nn.Conv2d(3, 8, 3), n=nn.BatchNorm2d(8), b=nn.Conv2d(4, 2, 1)
    )
    twice = (Run(0, 2, 1, (0, 1)),)
    return model, torch.randn(4, 3, 6, 6), site(model, {("a", OUT): twice, ("n", ENTRY): twice, ("b", IN): PLAIN})


def pixel_shuffle() -> tuple[Net, Tensor, GrowthSite]:
    model = Net(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), a=nn.Conv2d(3, 12, 3), b=nn.Conv2d(3, 2, 1))
    return model, torch.randn(4, 3, 6, 6), site(model, {("a", OUT): (Run(0, 1, 4, (0, 1, 2, 3)),), ("b", IN): PLAIN})


def flatten() -> tuple[Net, Tensor, GrowthSite]:
    model = Net(lambda m, x: m.b(F.relu(m.a(x)).flatten(1)), a=nn.Conv2d(3, 4, 3), b=nn.Linear(64, 2))
    return (
        model,
        torch.randn(4, 3, 6, 6),
        site(model, {("a", OUT): PLAIN, ("b", IN): (Run(0, 1, 16, tuple(range(16))),)}),
    )


def flatten_last() -> tuple[Net, Tensor, GrowthSite]:
    model = Net(
        lambda m, x: m.b(F.relu(m.a(x)).permute(0, 2, 3, 1).flatten(1)), a=nn.Conv2d(3, 4, 3), b=nn.Linear(64, 2)
    )
    return (
        model,
        torch.randn(4, 3, 6, 6),
        site(model, {("a", OUT): PLAIN, ("b", IN): (Run(0, 16, 1, tuple(range(16))),)}),
    )


def concatenation() -> tuple[Net, Tensor, GrowthSite]:
    """Two layers in a concatenation that is read twice over, one of them with a fixed neighbour."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = torch.cat([x, F.relu(m.a(x)), m.c(x)], 1)
        return m.b(m.n(y))

    model = Net(
        forward, a=nn.Conv2d(3, 4, 3, padding=1), c=nn.Conv2d(3, 5, 1), n=nn.BatchNorm2d(12), b=nn.Conv2d(12, 2, 1)
    )
    both = (Run(None, 3), Run(0, 1), Run(1, 1))
    axes = {("a", OUT): PLAIN, ("c", OUT): (Run(1, 1),), ("n", ENTRY): both, ("b", IN): both}
    return model, torch.randn(4, 3, 6, 6), site(model, axes, channels=(1, 1))


def depthwise(multiplier: int = 2) -> tuple[Net, Tensor, GrowthSite]:
    model = Net(
        lambda m, x: m.b(F.relu(m.d(m.a(x)))),
        a=nn.Conv2d(3, 4, 3), d=nn.Conv2d(4, 4 * multiplier, 3, groups=4), b=nn.Conv2d(4 * multiplier, 2, 1),
    )  # fmt: skip
    many = (Run(0, 1, multiplier, tuple(range(multiplier))),)
    axes = {("a", OUT): PLAIN, ("d", GROUP_IN): PLAIN, ("d", GROUP_OUT): many, ("b", IN): many}
    return model, torch.randn(4, 3, 7, 7), site(model, axes)


def whole_groups(transposed: bool = False) -> tuple[Net, Tensor, GrowthSite]:
    """A grouped convolution of two inputs and three outputs a group, whole groups of which come and go."""
    grouped = nn.ConvTranspose2d(8, 12, 2, groups=4) if transposed else nn.Conv2d(8, 12, 3, groups=4)
    model = Net(lambda m, x: m.b(F.relu(m.d(m.a(x)))), a=nn.Conv2d(3, 8, 3), d=grouped, b=nn.Conv2d(12, 2, 1))
    two, three = (Run(0, 1, 2, (0, 1)),), (Run(0, 1, 3, (0, 1, 2)),)
    axes = {("a", OUT): two, ("d", GROUP_IN): two, ("d", GROUP_OUT): three, ("b", IN): three}
    return model, torch.randn(4, 3, 7, 7), site(model, axes, channels=(2,))


def inside_groups(transposed: bool = False) -> tuple[Net, Tensor, GrowthSite]:
    """Channels between two grouped convolutions that come inside every group."""
    first, second = nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 4, 3, groups=2)
    if transposed:
        first, second = nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 4, 3, groups=2)
    model = Net(lambda m, x: m.b(F.relu(m.n(m.a(x)))), a=first, n=nn.BatchNorm2d(6), b=second)
    shares = (Run(0, 2, 1, (0, 1)),)
    axes = {("a", OUT): shares, ("n", ENTRY): shares, ("b", IN): shares}
    return model, torch.randn(4, 4, 7, 7), site(model, axes, channels=(2,))


def transposed() -> tuple[Net, Tensor, GrowthSite]:
    model = Net(
        lambda m, x: m.b(F.relu(m.n(m.a(x)))),
        a=nn.ConvTranspose2d(3, 4, 3, stride=2), n=nn.InstanceNorm2d(4, affine=True), b=nn.ConvTranspose2d(4, 2, 2),
    )  # fmt: skip
    return model, torch.randn(4, 3, 5, 5), site(model, {("a", OUT): PLAIN, ("n", ENTRY): PLAIN, ("b", IN): PLAIN})


def group_norm() -> tuple[Net, Tensor, GrowthSite]:
    model = Net(
        lambda m, x: m.b(m.p(m.n(m.a(x)))),
        a=nn.Conv1d(3, 6, 3), n=nn.GroupNorm(3, 6), p=nn.PReLU(6), b=nn.Conv1d(6, 2, 1),
    )  # fmt: skip
    two = (Run(0, 1, 2, (0, 1)),)
    axes = dict.fromkeys((("a", OUT), ("n", ENTRY), ("p", ENTRY), ("b", IN)), two)
    return model, torch.randn(4, 3, 7), site(model, axes, channels=(2,))


def weight_norm(kind: str = "parametrization") -> tuple[Net, Tensor, GrowthSite]:
    norm = nn.utils.parametrizations.weight_norm if kind == "parametrization" else nn.utils.weight_norm
    model = Net(lambda m, x: m.b(F.relu(m.a(x))), a=norm(nn.Conv2d(3, 4, 3)), b=norm(nn.ConvTranspose2d(4, 2, 2)))
    return model, torch.randn(4, 3, 6, 6), site(model, {("a", OUT): PLAIN, ("b", IN): PLAIN})


def mlp() -> tuple[Net, Tensor, GrowthSite]:
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(3, 4), b=nn.Linear(4, 2, bias=False))
    return model, torch.randn(4, 5, 3), site(model, {("a", OUT): PLAIN, ("b", IN): PLAIN})


class Standardised(nn.Conv2d):
    """A convolution with standardised filters and a gain for each output."""

    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, self.gain * (self.weight - mean) / std, self.bias)


def standardised() -> tuple[Net, Tensor, GrowthSite]:
    model = Net(lambda m, x: m.b(F.relu(m.a(x))), a=Standardised(3, 4, 3), b=nn.Conv2d(4, 2, 1))
    return model, torch.randn(4, 3, 6, 6), site(model, {("a", OUT): PLAIN, ("b", IN): PLAIN})


SITES: dict[str, Callable[[], tuple[Net, Tensor, GrowthSite]]] = {
    "pair": pair,
    "stream": stream,
    "glu": glu,
    "pixel shuffle": pixel_shuffle,
    "flatten": flatten,
    "flatten last": flatten_last,
    "concatenation": concatenation,
    "depthwise": depthwise,
    "whole groups": whole_groups,
    "whole groups transposed": lambda: whole_groups(transposed=True),
    "inside groups": inside_groups,
    "inside groups transposed": lambda: inside_groups(transposed=True),
    "transposed": transposed,
    "group norm": group_norm,
    "weight norm": weight_norm,
    "weight norm hook": lambda: weight_norm("hook"),
    "mlp": mlp,
    "standardised": standardised,
}


def build(name: str, seed: int = 0) -> tuple[Net, Tensor, GrowthSite]:
    """A model in float64 with running statistics of its own, an example and its site."""
    torch.manual_seed(seed)
    model, example, found = SITES[name]()
    model, example = model.double(), example.double()
    with torch.no_grad():
        model(example)
    return model, example, found


def growth(found: GrowthSite, units: int, seed: int = 1) -> ChannelGrowth:
    """Random weights for new channels of a site."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels = units * found.granularity
    module = found.model.get_submodule

    def entries(path: str, side: str) -> int:
        return int(channels * found.ratio(path, side))

    outgoing = {path: layers.weighted(module(path)).shape(IN, entries(path, IN)) for path in found.consumers}
    incoming = {path: layers.weighted(module(path)).shape(OUT, entries(path, OUT)) for path in found.producers}
    followers = [path for path in found.followers if path not in found.layout.dims]
    norms = [path for path in followers if layers.is_norm(module(path))]
    grouped = [path for path in followers if path not in norms]
    return ChannelGrowth(
        site=found.name,
        method="random",
        incoming={path: random(*shape) for path, shape in incoming.items()},
        incoming_bias={
            path: random(shape[0])
            for path, shape in incoming.items()
            if layers.weighted(module(path)).bias() is not None
        },
        outgoing={path: random(*shape) for path, shape in outgoing.items()},
        gains=torch.zeros(channels, dtype=torch.float64),
        norms={path: (random(entries(path, ENTRY)), random(entries(path, ENTRY)).square()) for path in norms},
        carried={
            path: random(*layers.weighted(module(path)).shape(GROUP_OUT, entries(path, GROUP_OUT))) for path in grouped
        },
        units=found.units,
    )
