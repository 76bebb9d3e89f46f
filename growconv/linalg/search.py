"""What solvers iterate: L-BFGS whose first inverse Hessian the problem supplies, conjugate gradients, elimination."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def _same(gradient: Tensor) -> Tensor:
    return gradient


@dataclass(eq=False)
class Point:
    """A place of a search: the parameters, the loss there and its gradient."""

    theta: Tensor
    loss: float
    gradient: Tensor


P = TypeVar("P", bound=Point)


class QuasiNewton:
    """L-BFGS (Nocedal 1980) with backtracking; `pairs` are steps and gradient changes, the newest last."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def run(
        self, objective: Callable[[Tensor], P], point: P, steps: int, inverse: Map = _same, tolerance: float = -1.0
    ) -> tuple[P, bool]:
        """The place after so many steps, or after the last one that there is; and whether there was no other.

        The search ends with a step that lowers the loss by no more than a share `tolerance` of it.
        """
        for _ in range(steps):
            following = self.step(objective, point, inverse)
            if following is None:
                return point, True
            gained, point = point.loss - following.loss, following
            if gained <= tolerance * abs(point.loss):
                break
        return point, False

    def step(self, objective: Callable[[Tensor], P], point: P, inverse: Map) -> P | None:
        """A place with a lower loss along the quasi-Newton direction; None where there is none.

        `inverse` is the first inverse Hessian times a gradient, up to a common factor.
        """
        direction = self._direction(point, inverse)
        slope = float((point.gradient * direction).sum())
        if not slope < 0:
            self.pairs.clear()
            direction = self._direction(point, inverse)
            slope = float((point.gradient * direction).sum())
            if not slope < 0:
                return None
        length = 1.0
        for _ in range(8):
            following = objective(point.theta + length * direction)
            if following.loss <= point.loss + 1e-4 * length * slope:
                break
            length *= 0.35
        else:
            return None
        step, change = following.theta - point.theta, following.gradient - point.gradient
        if float((step * change).sum()) > 1e-10 * float(step.norm() * change.norm()):
            self.pairs.append((step, change))
            del self.pairs[: -self.memory]
        return following

    def _direction(self, point: Point, inverse: Map) -> Tensor:
        """The two-loop recursion; a first step is a tenth of the parameters' size."""
        if not self.pairs:
            direction = -inverse(point.gradient)
            size = direction.norm()
            return direction * (0.1 * point.theta.norm() / size) if bool(size > 0) else direction
        q, weights = point.gradient.clone(), []
        for step, change in reversed(self.pairs):
            weight = (step * q).sum() / (step * change).sum()
            weights.append(weight)
            q -= weight * change
        step, change = self.pairs[-1]
        q = inverse(q) * ((step * change).sum() / (change * inverse(change)).sum())
        for (step, change), weight in zip(self.pairs, reversed(weights), strict=True):
            q += step * (weight - (change * q).sum() / (step * change).sum())
        return -q


def conjugate_gradients(product: Map, right: Tensor, iterations: int, tolerance: float) -> Tensor:
    """G⁺·right for a positive semi-definite G that is known by its products, to a relative residual of `tolerance`."""
    solution, residual, direction = torch.zeros_like(right), right, right
    energy = goal = residual.square().sum()
    for _ in range(iterations):
        if float(energy) <= tolerance**2 * float(goal):
            break
        image = product(direction)
        curvature = (direction * image).sum()
        if not float(curvature) > 0:
            break
        length = energy / curvature
        solution, residual = solution + length * direction, residual - length * image
        previous, energy = energy, residual.square().sum()
        direction = residual + (energy / previous) * direction
    return solution


def eliminated(
    gram: Float[Tensor, "k b k b"], cross: Float[Tensor, "k b c"], chosen: int
) -> tuple[Float[Tensor, "l b l b"], Float[Tensor, "l b c"]]:
    """Normal equations of k blocks of unknowns without one of them, whose part of the others is projected out."""
    rest = [each for each in range(len(cross)) if each != chosen]
    across = gram[chosen][:, rest]
    explained = solve_blocks(gram[chosen, :, chosen], across.flatten(1)).view_as(across)
    left = gram[rest][:, :, rest] - torch.einsum("kgb,bld->kgld", gram[rest][:, :, chosen], explained)
    return left, cross[rest] - torch.einsum("bld,bc->ldc", explained, cross[chosen])


def solve_blocks(gram: Float[Tensor, "*k b b"], right: Float[Tensor, "*k b c"]) -> Float[Tensor, "*k b c"]:
    """G⁻¹·right, one matrix or a batch; one that is not positive definite any more has nothing left to give: zeros."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    solution = torch.cholesky_solve(right, factor)
    return torch.where((failed == 0)[..., None, None], solution.nan_to_num(), torch.zeros_like(right))


def descending(gains: Sequence[float]) -> list[float]:
    """Pool neighbours that rise into their mean, until none does."""
    pools: list[tuple[float, int]] = []
    for gain in gains:
        pools.append((gain, 1))
        while len(pools) > 1 and pools[-1][0] > pools[-2][0]:
            (last, count), (before, more) = pools.pop(), pools.pop()
            pools.append(((last * count + before * more) / (count + more), count + more))
    return [mean for mean, count in pools for _ in range(count)]
