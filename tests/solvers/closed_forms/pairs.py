"""Small models whose second layer has a known desire, and slow referees."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.network.find import find_sites
from growconv.network.site import GrowthSite
from growconv.statistics import PairStatistics, collect_statistics


def pair(
    c0: int = 3,
    c1: int = 2,
    c2: int = 4,
    first: Any = 3,
    second: Any = 3,
    padding: int = 1,
    between: Callable[[int], list[nn.Module]] = lambda _: [],
    bias: bool = True,
    seed: int = 0,
) -> nn.Sequential:
    """conv1 - between - conv2 in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(c0, c1, first, padding=padding, bias=bias),
        *between(c1),
        nn.Conv2d(c1, c2, second, padding=padding, bias=bias),
    ).double()


def silent(model: nn.Sequential) -> nn.Sequential:
    """The same model with old channels that are zero everywhere, so that v⊥ = v."""
    with torch.no_grad():
        model[0].weight.zero_()
    return model


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Half the summed squares, averaged over samples: v = target − output."""
    return (output - target).square().flatten(1).sum(1).mean() / 2


def teacher_batches(
    model: nn.Sequential,
    channels: int,
    noise: float = 0.0,
    samples: int = 96,
    size: tuple[int, ...] = (8, 7),
    seed: int = 1,
) -> list[tuple[Tensor, Tensor]]:
    """Targets that the model would reach exactly with `channels` more (linear) channels, in three batches.

    v is of rank `channels` then, but v⊥ is not: what old channels explain of v is taken off, by their own filters. Only
    for a silent model, whose old channels are zero, is v⊥ = v.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = model[0], model[-1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(samples, first.in_channels, *size)
    alpha = normal(channels, *first.weight.shape[1:]) / first.weight[0].numel() ** 0.5
    omega = normal(second.out_channels, channels, *second.weight.shape[2:]) / second.weight[0].numel() ** 0.5
    with torch.no_grad():
        extra = F.conv2d(
            F.conv2d(x, alpha, None, first.stride, first.padding), omega, None, second.stride, second.padding
        )
        target = model(x) + extra
    target = target + noise * extra.std() * normal(*target.shape)
    return list(zip(x.split(samples // 3), target.split(samples // 3), strict=True))


def collected(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], loss: Any = squared_error, **options: Any
) -> tuple[GrowthSite, PairStatistics]:
    """First site and its statistics."""
    site = find_sites(model, batches[0][0][:1])[0]
    options.setdefault("quantities", {"S", "N", "patch"})
    return site, collect_statistics(model, [site], batches, loss, **options)[site.name]


def desire(model: nn.Sequential, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Inputs, and v⊥ by plain least squares on everything that conv2 reads."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        hidden = model[:-1](x)
        v = y - model(x)
        second = model[-1]
        design = F.unfold(hidden, second.kernel_size, second.dilation, second.padding, second.stride)
        if second.bias is not None:
            design = torch.cat([design, torch.ones_like(design[:, :1])], 1)
        rows, wanted = design.transpose(1, 2).flatten(0, 1), v.flatten(2).transpose(1, 2).flatten(0, 1)
        fit = rows @ torch.linalg.lstsq(rows, wanted, driver="gelsd").solution
        return x, (wanted - fit).view(len(x), -1, v.shape[1]).transpose(1, 2).reshape(v.shape)


def added(model: nn.Sequential, growth: Any, x: Tensor) -> Tensor:
    """What linear new channels add to the output, by two plain convolutions."""
    first, second = model[0], model[-1]
    hidden = F.conv2d(x, growth.alpha, growth.alpha_bias, first.stride, first.padding)
    return F.conv2d(hidden, growth.omega, None, second.stride, second.padding)
