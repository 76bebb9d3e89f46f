"""The fit behind `functional`: filters by L-BFGS, with the consumers' weights solved for at every step.

δz is linear in the outgoing weights ω, so that for given filters the best ω is a small least-squares problem: the Gram
matrix of what the consumers read, and its correlation with v⊥ (variable projection, Golub and Pereyra 1973). What is left
is a function of the filters alone, whose gradient needs no derivative of ω, since ω is optimal.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from growconv.linalg import solve_psd
from growconv.network.remainder import apply_columns, apply_filters
from growconv.solvers.columns import columns, positions
from growconv.solvers.exact import descending
from growconv.solvers.filters import Filters, each
from growconv.solvers.parametrization import Parametrization
from growconv.solvers.rank_one import rank_one_least_squares

COLUMN_BYTES = {"cpu": 4 * 2**20, "cuda": 512 * 2**20}
"""Memory of the columns of one chunk of samples: what a CPU's cache holds is read back twice as fast."""

RIDGE = 1e-6
"""Added to the diagonal of a Gram matrix scaled to ones on it: keeps the solve finite, changes nothing else."""

Between = Callable[[dict[str, Any]], dict[str, Any]]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """What new channels are fitted to.

    Attributes:
        inputs: per producer what it reads, as the module receives it, samples first.
        targets: per consumer v⊥, laid out as its output.
        old: per consumer what it reads of the channels that there are.
        producers: per producer the layer, for its geometry.
        consumers: per consumer the layer, for its geometry.
        between: from what new filters give, per producer (n, K, *hidden), to what each consumer would read of them.
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    old: dict[str, Tensor]
    producers: dict[str, nn.Module]
    consumers: dict[str, nn.Module]
    between: Between

    def __len__(self) -> int:
        """Number of samples n."""
        return next(iter(self.inputs.values())).shape[0]

    def part(self, index: slice) -> "Samples":
        """Some of the samples."""
        return replace(
            self,
            inputs={path: tensor[index] for path, tensor in self.inputs.items()},
            targets={path: tensor[index] for path, tensor in self.targets.items()},
            old={path: tensor[index] for path, tensor in self.old.items()},
        )

    @cached_property
    def energy(self) -> float:
        """‖v⊥‖², summed over samples and consumers."""
        norms = [torch.linalg.vector_norm(target.flatten(), dtype=torch.float64) for target in self.targets.values()]
        return float(torch.stack(norms).square().sum())

    def write(self, filters: Filters) -> dict[str, Tensor]:
        """What these filters give, per producer."""
        return {path: apply_filters(module, self.inputs[path], *filters[path]) for path, module in self.producers.items()}

    def read(self, filters: Filters) -> dict[str, Tensor]:
        """What each consumer would read of new channels with these filters."""
        return self.between(self.write(filters))

    def added(self, filters: Filters, outgoing: Weights) -> dict[str, Tensor]:
        """δz per consumer."""
        return {path: apply_columns(self.consumers[path], h, outgoing[path]) for path, h in self.read(filters).items()}

    def chunks(self, filters: Filters) -> list["Samples"]:
        """The samples in pieces whose columns fit into the scratch memory."""
        first = next(iter(filters.values()))[0]
        with torch.no_grad():
            one = self.part(slice(0, 1)).read(filters)
        size = sum(columns(self.consumers[path], h).numel() for path, h in one.items()) * first.element_size()
        step = max(1, COLUMN_BYTES.get(first.device.type, COLUMN_BYTES["cuda"]) // max(size, 1))
        return [self.part(slice(start, start + step)) for start in range(0, len(self), step)]


@dataclass
class Normal:
    """The normal equations of one consumer's outgoing weights.

    Attributes:
        gram: (d, d) Σ over positions of columns · columnsᵀ, d running over new channels and taps.
        cross: (d, c) Σ of columns · v⊥.
    """

    gram: Tensor
    cross: Tensor

    def solve(self, ridge: float) -> Float[Tensor, "d c"]:
        """The outgoing weights, each column of the design scaled to the same size; zeros for one that is never read."""
        scale = self.gram.diagonal().clamp_min(0).sqrt()
        inverse = torch.where(scale > 0, 1 / torch.where(scale > 0, scale, 1.0), 0.0)
        gram = self.gram * inverse[:, None] * inverse
        gram.diagonal().add_(ridge)
        cross = self.cross * inverse[:, None]
        factor, failed = torch.linalg.cholesky_ex(gram)
        solution = solve_psd(gram, cross) if bool(failed) else torch.cholesky_solve(cross, factor)
        return solution * inverse[:, None]


def normal_equations(samples: Samples, filters: Filters) -> dict[str, Normal]:
    """Gram matrices and correlations of what the consumers would read; float64.

    Args:
        samples: what to fit.
        filters: the new filters.
    """
    result: dict[str, Normal] = {}
    with torch.no_grad():
        for chunk in samples.chunks(filters):
            for path, h in chunk.read(filters).items():
                module = samples.consumers[path]
                design, target = columns(module, h), positions(module, chunk.targets[path])
                gram, cross = (design @ design.mT).double(), (design @ target.mT).double()
                if path in result:
                    result[path].gram += gram
                    result[path].cross += cross
                else:
                    result[path] = Normal(gram, cross)
    return result


def best_outgoing(
    equations: Mapping[str, Normal], consumers: Mapping[str, nn.Module], like: Tensor, separable: bool, ridge: float
) -> Weights:
    """The weights (out, K·ratio, *kernel) per consumer that take the most off v⊥.

    Args:
        equations: normal equations per consumer.
        consumers: the layers.
        like: a tensor of the dtype and on the device that the weights should have.
        separable: restrict every channel's kernel to rank one.
        ridge: see `Normal.solve`.
    """
    result = {}
    for path, normal in equations.items():
        kernel = tuple(getattr(consumers[path], "kernel_size", ()))
        weights = normal.solve(ridge)
        weights = weights.mT.reshape(weights.shape[1], -1, *kernel)
        if separable:
            start = weights.movedim(1, 0)
            weights = rank_one_least_squares(normal.gram, normal.cross, start).movedim(0, 1)
        # in torch's own layout: a convolution picks its algorithm by the strides of its weights
        result[path] = weights.to(like).contiguous()
    return result


def captured_share(samples: Samples, filters: Filters, outgoing: Weights) -> float:
    """⟨v⊥, δz⟩² / (‖δz‖² ‖v⊥‖²): the captured energy at the best single scale.

    Args:
        samples: what to measure on.
        filters: the new filters.
        outgoing: per consumer (out, K·ratio, *kernel).
    """
    agreement, size = 0.0, 0.0
    with torch.no_grad():
        for chunk in samples.chunks(filters):
            for path, delta in chunk.added(filters, outgoing).items():
                agreement += float((chunk.targets[path] * delta).sum(dtype=torch.float64))
                size += float(delta.square().sum(dtype=torch.float64))
    energy = samples.energy
    return 0.0 if size <= 0 or energy <= 0 or agreement <= 0 else agreement**2 / (size * energy)


@dataclass
class Point:
    """One place of the search.

    Attributes:
        theta: parameters of the filters (K, q).
        loss: what is left of ‖v⊥‖² on the fitting samples, as a share, minus one.
        gradient: of the loss with respect to theta.
        curvature: (K,) size of the loss's second derivative per channel, up to a common factor: ‖ω_k‖².
        outgoing: per consumer the best weights (out, K·ratio, *kernel).
    """

    theta: Tensor
    loss: float
    gradient: Tensor
    curvature: Tensor
    outgoing: Weights


@dataclass(frozen=True)
class Objective:
    """The loss as a function of the filters alone.

    Attributes:
        samples: what to fit.
        parametrization: from parameters to filters.
        ridge: added to the diagonal of the scaled Gram matrix; small, it keeps the solve finite.
        separable: restrict every channel's outgoing kernel to rank one.
    """

    samples: Samples
    parametrization: Parametrization
    ridge: float = RIDGE
    separable: bool = False

    def __call__(self, theta: Tensor) -> Point:
        """Loss and gradient at one place."""
        samples, energy = self.samples, self.samples.energy
        theta = theta.detach().requires_grad_()
        filters = self.parametrization.filters(theta)
        fixed = each(filters, torch.Tensor.detach)
        equations = normal_equations(samples, fixed)
        outgoing = best_outgoing(equations, samples.consumers, theta, self.separable, self.ridge)
        loss = 0.0
        for path, normal in equations.items():
            weights = outgoing[path].flatten(1).mT.double()
            loss += float((weights * (normal.gram @ weights - 2 * normal.cross)).sum()) / energy
        leaves = each(fixed, lambda tensor: tensor.clone().requires_grad_())
        flat = [tensor for pair in leaves.values() for tensor in pair if tensor is not None]
        totals = [torch.zeros_like(tensor) for tensor in flat]
        for chunk in samples.chunks(fixed):
            added = chunk.added(leaves, outgoing)
            seeds = [(added[path].detach() - chunk.targets[path]) * (2 / energy) for path in added]
            for total, part in zip(totals, torch.autograd.grad(list(added.values()), flat, seeds), strict=True):
                total += part
        ends = [tensor for pair in filters.values() for tensor in pair if tensor is not None]
        (gradient,) = torch.autograd.grad(ends, theta, totals)
        curvature = sum(
            weights.unflatten(1, (theta.shape[0], -1)).movedim(1, 0).flatten(1).square().sum(1)
            for weights in outgoing.values()
        )
        return Point(theta.detach(), loss, gradient, torch.as_tensor(curvature), outgoing)


@dataclass
class Search:
    """What a search found.

    Attributes:
        point: the best place by held-out captured energy.
        held_out: that energy, as a share of ‖v⊥‖².
        iterations: steps taken.
        history: (fitted share, held-out share) of every step.
    """

    point: Point
    held_out: float
    iterations: int
    history: list[tuple[float, float]]


def minimize(
    objective: Objective,
    held_out: Samples,
    start: Tensor,
    iterations: int,
    patience: int = 5,
    memory: int = 12,
) -> Search:
    """L-BFGS with backtracking, stopped when the captured energy on held-out samples has not risen for some steps.

    Args:
        objective: the loss of the filters.
        held_out: samples that the objective does not see.
        start: parameters to start from (K, q).
        iterations: steps at most.
        patience: steps without a better held-out captured energy before stopping.
        memory: pairs of steps and gradient changes kept.
    """
    point = objective(start)
    share = _share(objective, held_out, point)
    best = Search(point, share, 0, [(-point.loss, share)])
    pairs: list[tuple[Tensor, Tensor]] = []
    waited = 0
    for iteration in range(1, iterations + 1):
        direction = _direction(point, pairs)
        slope = float((point.gradient * direction).sum())
        if not slope < 0:
            pairs.clear()
            direction = _direction(point, pairs)
            slope = float((point.gradient * direction).sum())
            if not slope < 0:
                break
        length, following = 1.0, None
        for _ in range(8):
            candidate = objective(point.theta + length * direction)
            if candidate.loss <= point.loss + 1e-4 * length * slope:
                following = candidate
                break
            length *= 0.35
        if following is None:
            break
        step, change = following.theta - point.theta, following.gradient - point.gradient
        if float((step * change).sum()) > 1e-10 * float(step.norm() * change.norm()):
            pairs.append((step, change))
            del pairs[:-memory]
        point = following
        share = _share(objective, held_out, point)
        best.history.append((-point.loss, share))
        best.iterations = iteration
        if share > best.held_out:
            best.point, best.held_out, waited = point, share, 0
        else:
            waited += 1
            if waited >= patience:
                break
    return best


def _share(objective: Objective, held_out: Samples, point: Point) -> float:
    with torch.no_grad():
        filters = objective.parametrization.filters(point.theta)
    return captured_share(held_out, filters, point.outgoing)


def _direction(point: Point, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The two-loop recursion; the first inverse Hessian is diagonal, one entry a channel."""
    inverse = 1 / (point.curvature + 1e-3 * point.curvature.mean() + torch.finfo(point.curvature.dtype).tiny)[:, None]
    if not pairs:
        direction = -point.gradient * inverse
        size = direction.norm()
        return direction * (0.1 * point.theta.norm() / size) if bool(size > 0) else direction
    q, weights = point.gradient.clone(), []
    for step, change in reversed(pairs):
        weight = (step * q).sum() / (step * change).sum()
        weights.append(weight)
        q -= weight * change
    step, change = pairs[-1]
    q = q * inverse * ((step * change).sum() / (change.square() * inverse).sum())
    for (step, change), weight in zip(pairs, reversed(weights), strict=True):
        q += step * (weight - (change * q).sum() / (step * change).sum())
    return -q


def greedy_order(
    equations: Mapping[str, Normal], channels: int, ridge: float = 1e-6
) -> tuple[list[int], Float[Tensor, " k"]]:
    """Order in which each channel adds the most captured energy to those before it, all outgoing weights refitted.

    A pivoted block elimination: what the chosen channels explain is projected out of the rest.

    Args:
        equations: normal equations per consumer.
        channels: number of channels K.
        ridge: as in `Normal.solve`.

    Returns:
        The order, and what each of the channels adds, in that order, in the unit of ‖v⊥‖² summed over samples. Channels
        that pay only together share their gain evenly, so that the gains descend and keep their sum.
    """
    grams, crosses = [], []
    for normal in equations.values():
        size = normal.gram.shape[0] // channels
        gram = normal.gram.clone()
        gram.diagonal().mul_(1 + ridge).add_(torch.finfo(gram.dtype).tiny)
        grams.append(gram.view(channels, size, channels, size))
        crosses.append(normal.cross.view(channels, size, -1).clone())
    left, order, gains = list(range(channels)), [], []
    while left:
        blocks = [(gram[left, :, left], cross[left]) for gram, cross in zip(grams, crosses, strict=True)]
        captured = torch.stack([(cross * _solve(gram, cross)).sum((1, 2)) for gram, cross in blocks]).sum(0)
        chosen = left.pop(int(captured.argmax()))
        order.append(chosen)
        gains.append(captured.max())
        for r, gram in enumerate(grams):
            explained = _solve(gram[chosen, :, chosen], gram[chosen].flatten(1)).view_as(gram[chosen])
            crosses[r] = crosses[r] - torch.einsum("bld,bc->ldc", explained, crosses[r][chosen])
            grams[r] = gram - torch.einsum("kgb,bld->kgld", gram[:, :, chosen], explained)
    added = torch.stack(gains).clamp_min(0)
    return order, added.new_tensor(descending(added.tolist()))


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """G⁻¹·right, one matrix or a batch; a block that is not positive definite any more has nothing left to give."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    solution = torch.cholesky_solve(right, factor)
    return torch.where((failed == 0)[..., None, None], solution.nan_to_num(), torch.zeros_like(right))
