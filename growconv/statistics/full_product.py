"""S_full as a product: S_full·Θ from correlations, where the matrix itself is too large to hold."""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.statistics.constants import full_border
from growconv.statistics.correlation import along_axis
from growconv.statistics.offset_path import OffsetPath
from growconv.statistics.totals import Totals


class FullProduct:
    """Θ to (Σ_im X_im X_imᵀ)·Θ, a sum over samples.

    An entry of S_full is a sum over the features of each axis of an integer coefficient times a correlation (c, c) of
    the channels, so the product applies the coefficients axis by axis and the correlations last.

    Args:
        path: an offset path that collected S_full.
        totals: its correlations.
        x: the producer's input summed over samples (c, *size).
        samples: how many samples were summed.
    """

    def __init__(self, path: OffsetPath, totals: Totals, x: Tensor, samples: int) -> None:
        correlation = path.correlations["xx"]
        self.problem = path.problem
        self.features = path.features(path.sums(totals, correlation), correlation, slice(None))
        self.weights = []
        self.shapes = [features.shapes["S_full"][:2] for features in correlation.features]
        for features, shape in zip(correlation.features, self.shapes, strict=True):
            weights = torch.from_numpy(features.weights["S_full"]).to(self.features)
            rows = shape[0] * shape[1]
            self.weights.append(weights.T.reshape(-1, rows, rows))  # (feature, (t, b), (t', b'))
        self.border = full_border(self.problem, {"x": x}, samples) if self.problem.first_bias else None

    def __call__(self, theta: Float[Tensor, "a b c"]) -> Float[Tensor, "a b c"]:
        """The product.

        Args:
            theta: Θ (a, b, c), the constant entry of a included.
        """
        theta = theta.to(self.features)
        if self.border is None:
            return self._apply(theta)
        rows, corner = self.border
        inner, constant = theta[:-1], theta[-1]
        result = self._apply(inner) + (rows.T @ constant).view_as(inner)
        last = rows @ inner.flatten(0, 1) + corner @ constant
        return torch.cat([result, last.unsqueeze(0)])

    def _apply(self, theta: Tensor) -> Tensor:
        axes = len(self.weights)
        channels, columns = self.problem.channels[0], theta.shape[2]
        first = [shape[0] for shape in self.shapes]
        second = [shape[1] for shape in self.shapes]
        split = theta.reshape(channels, *first, *second, columns)
        pairs = [place for axis in range(axes) for place in (1 + axis, 1 + axes + axis)]
        value = split.permute(0, *pairs, 2 * axes + 1).reshape(
            channels, *(a * b for a, b in zip(first, second, strict=True)), columns
        )
        result = torch.zeros_like(value)
        for chosen in itertools.product(*(range(len(weights)) for weights in self.weights[:-1])):
            moved = value
            for axis, number in enumerate(chosen):
                moved = along_axis(self.weights[axis][number], moved, 1 + axis)
            if not bool(moved.any()):
                continue
            for number, weight in enumerate(self.weights[-1]):
                last = torch.matmul(weight, moved)  # the last axis of taps is the last but one
                products = self.features[(*chosen, number)]
                result += (products @ last.reshape(channels, -1)).view_as(result)
        merged = result.reshape(channels, *(n for shape in self.shapes for n in shape), columns)
        order = [1 + 2 * axis for axis in range(axes)] + [2 + 2 * axis for axis in range(axes)]
        return merged.permute(0, *order, 2 * axes + 1).reshape(channels * math.prod(first), math.prod(second), columns)
