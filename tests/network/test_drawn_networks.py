"""Networks drawn at random: whatever is found to be a site grows exactly, and its function is the predicted one."""

import random

import torch
import torch.nn.functional as F
from growconv.network.remainder import Remainder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import growconv
from growconv.network.site import find_sites
from tests.network import zoo

KINDS = ("conv",) * 3 + (
    *("norm", "act", "add", "cat", "depthwise", "gate", "pad", "slice", "twice", "pool", "linear", "group"),
)


class Drawn(nn.Module):
    """A program of random steps over a growing list of feature maps, all of one grid."""

    def __init__(self, seed: int, steps: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.layers = nn.ModuleDict()
        self.program: list[tuple[str, str, int, int]] = []
        widths = [3]

        def layer(module: nn.Module) -> str:
            name = f"l{len(self.layers)}"
            self.layers[name] = module
            return name

        def step(kind: str, name: str, first: int, second: int, width: int) -> None:
            self.program.append((kind, name, first, second))
            widths.append(width)

        for _ in range(steps):
            first, second = draw.randrange(len(widths)), draw.randrange(len(widths))
            width = widths[first]
            kind = draw.choice(KINDS)
            if kind == "conv":
                out, size = draw.randint(1, 5), draw.choice([1, 3])
                conv = nn.Conv2d(width, out, size, padding=size // 2, bias=draw.random() < 0.5)
                step("call", layer(conv), first, 0, out)
            elif kind == "norm":
                step("call", layer(nn.BatchNorm2d(width)), first, 0, width)
            elif kind == "act":
                step("call", layer(draw.choice([nn.ReLU(), nn.GELU(), nn.Tanh(), nn.PReLU(width)])), first, 0, width)
            elif kind == "depthwise":
                ratio = draw.choice([1, 2])
                step(
                    "call", layer(nn.Conv2d(width, ratio * width, 3, padding=1, groups=width)), first, 0, ratio * width
                )
            elif kind == "group" and width % 2 == 0:
                step("call", layer(nn.Conv2d(width, width, 1, groups=width // 2)), first, 0, width)
                step("call", layer(nn.GroupNorm(width // 2, width)), len(widths) - 1, 0, width)
            elif kind == "linear":
                step("last", layer(nn.Linear(width, 4)), first, 0, 4)
            elif kind == "add" and widths[second] == width:
                step("add", "", first, second, width)
            elif kind == "gate" and width > 1:
                squeeze = layer(nn.Conv2d(width, width, 1))
                step("gate", squeeze, first, 0, width)
            elif kind == "cat":
                step("cat", "", first, second, width + widths[second])
            elif kind == "twice":
                step("cat", "", first, first, 2 * width)
            elif kind == "pad":
                step("pad", "", first, 1, width + 1)
            elif kind == "slice" and width > 2:
                step("slice", "", first, 1, width - 1)
            elif kind == "pool":
                step("pool", "", first, 0, width)
        self.head = nn.Conv2d(sum(widths[-3:]), 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, name, first, second in self.program:
            y = values[first]
            if kind == "call":
                y = self.layers[name](y)
            elif kind == "last":
                y = self.layers[name](y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            elif kind == "add":
                y = y + values[second]
            elif kind == "gate":
                y = y * torch.sigmoid(self.layers[name](F.adaptive_avg_pool2d(y, 1)))
            elif kind == "cat":
                y = torch.cat([y, values[second]], 1)
            elif kind == "pad":
                y = F.pad(y, (0, 0, 0, 0, 0, second))
            elif kind == "slice":
                y = y[:, second:]
            elif kind == "pool":
                y = F.avg_pool2d(y, 3, 1, 1)
            values.append(y)
        return self.head(torch.cat(values[-3:], 1))


def build(seed: int, steps: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    model = Drawn(seed, steps).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model, torch.randn(2, 3, 4, 4, dtype=torch.float64)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(3, 14))
def test_whatever_is_found_grows_exactly(seed: int, steps: int) -> None:
    model, example = build(seed, steps)
    expected = model(example)
    table = growconv.explain_sites(model, example)
    assert all(row.growable or row.reason for row in table)
    sites = find_sites(model, example)
    for site in sites:
        growth = zoo.random_growth(site, 2)
        predicted = Remainder(site, example).grown(growth, 0.3)
        before = sum(parameter.numel() for parameter in model.parameters())
        added = site.parameters_for(growth.channels)
        growconv.grow(model, site, growth, 0.3)
        assert sum(parameter.numel() for parameter in model.parameters()) == before + added
        torch.testing.assert_close(model(example), predicted, rtol=1e-8, atol=1e-8)
        growconv.shrink(model, site, range(site.width - growth.channels, site.width))
        torch.testing.assert_close(model(example), expected, rtol=1e-9, atol=1e-9)
    for site in sites:
        growconv.grow(model, site, zoo.random_growth(site, 1), 0.0)
    torch.testing.assert_close(model(example), expected, rtol=1e-9, atol=1e-9)
    again = find_sites(model, example)
    assert [site.name for site in again] == [site.name for site in sites]
    assert [site.width for site in again] == [site.width for site in sites]
