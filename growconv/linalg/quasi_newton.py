"""L-BFGS whose first inverse Hessian the problem itself supplies."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Map = Callable[[Tensor], Tensor]


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
