"""The best change of a layer's own weights on samples, W*, with a ridge where they are few."""

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from growconv.errors import StatisticsError
from growconv.linalg import solve_psd
from growconv.network import layers
from growconv.network.layout import OUT
from growconv.statistics.columns import designs, positions

RIDGES = (1e-4, 1e-2, 1.0, 100.0, math.inf)
"""Ridges, in units of the design's mean eigenvalue, for an update that few samples determine; the last allows none."""


@dataclass(frozen=True)
class Equations:
    """Normal equations of a layer's own update: gram (d, d), cross (d, c), and the number of rows that they sum."""

    gram: Tensor
    cross: Tensor
    rows: int

    def ridged(self, ridge: float) -> Tensor:
        """The solution with a ridge; zeros for an infinite one."""
        if math.isinf(ridge):
            return torch.zeros_like(self.cross)
        lifted = self.gram.clone()
        lifted.diagonal().add_(ridge)
        return solve_psd(lifted, self.cross)

    def loss(self, weights: Tensor) -> float:
        """‖v − H·weights‖², less ‖v‖²."""
        return float((weights * (self.gram @ weights - 2 * self.cross)).sum())

    def __add__(self, other: "Equations") -> "Equations":
        """Those of both."""
        return Equations(self.gram + other.gram, self.cross + other.cross, self.rows + other.rows)


def best_update(module: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor | None]:
    """The best first-order change of a layer's own weights on samples: W* = S2⁺ M (TINY, proposition 3.1).

    It needs no site: any convolution or linear layer will do. The part of v that W* does not provide is the layer's
    expressivity bottleneck. With fewer than four rows (samples × output locations) per entry of a filter, a ridge
    chosen by cross-validation keeps W* from fitting what does not generalise to other samples.

    Args:
        module: convolution or linear layer.
        pairs: (h, v) for some samples each: the layer's input h, and v = −∂loss/∂output; images may differ in size
            between pairs.

    Returns:
        The change of the weight (out, in/groups, *kernel) and of the bias (None for a layer without one), in float64.

    Raises:
        SiteError: a layer of another kind.
        StatisticsError: there are no samples, or h and v do not fit the layer's input and output.

    Example:
        >>> layer = nn.Conv2d(1, 4, 3)
        >>> change, bias_change = growconv.best_update(layer, [(images, torch.randn(8, 4, 6, 6))])
        >>> change.shape
        torch.Size([4, 1, 3, 3])
    """
    samples = sum(len(h) for h, _ in pairs)
    if not samples:
        raise StatisticsError("an update needs at least one sample", got="no samples", where=str(module))
    halves: tuple[list[Equations], list[Equations]] = ([], [])
    seen = 0
    for h, v in pairs:
        cut = min(max(samples // 2 - seen, 0), len(h))
        seen += len(h)
        for half, part in zip(halves, (slice(0, cut), slice(cut, None)), strict=True):
            if len(h[part]):
                half.append(own_equations(module, h[part], v[part]))
    first, second = (sum(half[1:], half[0]) if half else None for half in halves)
    both = [each for each in (first, second) if each is not None]
    total = sum(both[1:], both[0])
    if total.rows >= 4 * total.gram.shape[-1] or first is None or second is None:
        weights = torch.stack([solve_psd(*each) for each in zip(total.gram, total.cross, strict=True)])
    else:
        weights = torch.stack([_carried_over(*each) for each in _by_group(first, second)])
    layer = layers.weighted(module)
    weights = weights.mT.flatten(0, 1)
    has_bias = layer.bias() is not None
    weight = (weights[:, :-1] if has_bias else weights).reshape(len(weights), -1, *layer.kernel_size).contiguous()
    return weight, weights[:, -1] if has_bias else None


def _by_group(first: Equations, second: Equations) -> Iterator[tuple[Equations, Equations]]:
    for parts in zip(first.gram, first.cross, second.gram, second.cross, strict=True):
        yield Equations(*parts[:2], first.rows), Equations(*parts[2:], second.rows)


def _carried_over(first: Equations, second: Equations) -> Tensor:
    """The update with the ridge under which each half of the samples explains the other best."""
    total = first + second
    unit = float(total.gram.diagonal().mean()) / total.rows

    def left_over(ridge: float) -> float:
        pairs = ((first, second), (second, first))
        return sum(other.loss(own.ridged(ridge * unit * own.rows)) for own, other in pairs)

    return total.ridged(min(RIDGES, key=left_over) * unit * total.rows)


def own_equations(module: nn.Module, h: Tensor, v: Tensor) -> Equations:
    """Normal equations of every group of a layer on some samples: gram (g, d, d) and cross (g, d, c), float64.

    Args:
        module: convolution or linear layer; d runs over the entries of a filter, its bias last.
        h: what it read.
        v: desired change of its output.

    Raises:
        StatisticsError: h and v are not input and output of the layer.
    """
    layer = layers.weighted(module)
    one = designs(module, [h[:1]], layer.groups)[0]
    targets = positions(module, v[:1]).shape
    if one.shape[0] != layer.filters()[0].numel() or targets != (layer.size(OUT), one.shape[1]) or len(h) != len(v):
        raise StatisticsError(
            "h and v are not the input and output of the layer",
            got=f"{tuple(h.shape)} and {tuple(v.shape)}",
            where=str(module),
        )

    def summed(values: Tensor, wanted: Tensor) -> Equations:
        rows = torch.stack(designs(module, [values], layer.groups))
        if layer.bias() is not None:
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        targets = positions(module, wanted).unflatten(0, (layer.groups, -1))
        return Equations((rows @ rows.mT).double(), (rows @ targets.mT).double(), rows.shape[2])

    step = max(1, 2**22 // max(1, one.numel()))
    return reduce(operator.add, map(summed, h.split(step), v.split(step)))
