"""Bilinear least squares: the best tensor of low rank in a quadratic form that couples two of its axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.errors import ArgumentValueError
from growconv.linalg.optimizers import LBFGS
from growconv.linalg.spectral import Whitening, fix_signs, leading_svd, require_finite, solve_psd, whiten

REACH = 10
"""Rounds at its present pace in which a descent must be able to reach the best one; else it stops."""
NARROWED = 256, 2048
"""Sizes of a dense metric between which it is looked whether a narrower factor serves."""
STREAMED, CACHE_BYTES = 16, 2**23
"""Rows that meet the left factors at a time where a dense metric is larger than the cache: for a few left factors that
takes two thirds of the time of the whole product."""
RIDGE = 1e-10
"""Added to the right factors' system, relative to its mean diagonal: keeps the search smooth where terms become
dependent."""
TWINS = 5e-2
"""Sum of the squared sines between the spans of two descents below which only the better one goes on."""


@runtime_checkable
class BilinearMetric(Protocol):
    """What `bilinear_least_squares` asks of a quadratic form ⟨Θ, GΘ⟩ over Θ (a, b, c), which couples a and b, not c."""

    def reduced(self) -> Float[Tensor, "a a"]:
        """Σ_b G_ab,a'b: the form with the taps taken as independent; it preconditions and starts the search."""
        ...

    def gram(self, left: Float[Tensor, "k a"]) -> Float[Tensor, "kb kb"]:
        """Σ_aa' left_ka G_ab,a'b' left_k'a', rows and columns in the order (k, b)."""
        ...

    def pull(self, left: Float[Tensor, "k a"], coupling: Float[Tensor, "kb kb"]) -> Float[Tensor, "k a"]:
        """Σ_b (GΘ)_abc right_kbc for Θ = Σ left_k right_k, given coupling_(kb),(k'b') = Σ_c right_kbc right_k'b'c.

        `gram` was called with the same `left` just before.
        """
        ...


class DenseMetric:
    """The quadratic form as a matrix (a·b, a·b), entries in the order (a, b).

    Args:
        matrix: symmetric positive semi-definite G.
        left_size: size of a.
    """

    def __init__(self, matrix: Float[Tensor, "ab ab"], left_size: int) -> None:
        if left_size < 1 or matrix.shape[0] % left_size:
            raise ArgumentValueError(
                "the metric's size is not a multiple of its left size",
                expected=f"a multiple of {left_size}",
                got=matrix.shape[0],
                where="matrix",
            )
        taps = matrix.shape[0] // left_size
        self._form = matrix.reshape(left_size, taps, left_size, taps)
        self._half: Tensor | None = None
        root = _narrow_root(matrix)
        self._root = None if root is None else root.view(left_size, -1)  # (a, b·r)
        self._tall = matrix if self._root is None else self._root.mT.contiguous()  # few columns from the right are fast

    def reduced(self) -> Tensor:
        """Sum over equal taps."""
        return torch.einsum("abdb->ad", self._form)

    def gram(self, left: Tensor) -> Tensor:
        """Contract both sides with the left factors."""
        rows = left.shape[0] * self._form.shape[1]
        if self._root is not None:
            self._half = (self._tall @ left.mT).mT.reshape(rows, -1)
            return self._half @ self._half.mT
        matrix = self._form.flatten(1)
        at_a_time = STREAMED if matrix.numel() * matrix.element_size() > CACHE_BYTES else len(matrix)
        half = left[:, :at_a_time] @ matrix[:at_a_time]
        for start in range(at_a_time, len(matrix), at_a_time):
            half.addmm_(left[:, start : start + at_a_time], matrix[start : start + at_a_time])
        self._half = half.view(-1, *self._form.shape[1:])  # shared with `pull`
        return torch.einsum("kbde,ld->kble", self._half, left).reshape(rows, -1)

    def pull(self, left: Tensor, coupling: Tensor) -> Tensor:
        """Contract the half product of `gram` with the coupling of the right factors."""
        channels, taps = left.shape[0], self._form.shape[1]
        if self._half is None:
            self.gram(left)
        if self._root is not None and self._half is not None:
            return (coupling @ self._half).view(channels, -1) @ self._root.mT
        return torch.einsum("kbde,kble->ld", self._half, coupling.view(channels, taps, channels, taps))


def _narrow_root(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n r"] | None:
    """F with F Fᵀ = matrix, where that has little more than half as many columns as rows; None elsewhere.

    A Cholesky factorisation that takes the largest remaining diagonal entry first (Higham 1990), to the rounding error.
    Second moments of patches are that narrow where several pairs of taps read one entry of the input.
    """
    size = len(matrix)
    if not NARROWED[0] <= size <= NARROWED[1]:
        return None
    left = matrix.diagonal().clone()
    threshold = 1e-13 * float(left.max())
    rows = matrix.new_empty(size * 5 // 9, size)
    for rank in range(len(rows)):
        value, pivot = left.max(0)
        if float(value) <= threshold:
            return rows[:rank].mT.contiguous() if rank else None
        rows[rank] = (matrix[pivot] - rows[:rank, pivot] @ rows[:rank]) / value.sqrt()
        left -= rows[rank].square()
    return None


@dataclass(frozen=True, eq=False)
class BilinearFit:
    """Result of a bilinear least-squares problem.

    Attributes:
        left: (k, a), rows orthonormal in the reduced metric.
        rights: per term (k, b, c), the best partner of `left`.
        objective: Σ ⟨Θ, GΘ⟩ − 2⟨target, Θ⟩ reached, 0 for Θ = 0.
        history: the objective after each round of the winning descent, never rising.
        converged: the last round's progress fell below the tolerance.
    """

    left: Tensor
    rights: tuple[Tensor, ...]
    objective: float
    history: tuple[float, ...]
    converged: bool

    @property
    def right(self) -> Tensor:
        """(k, b, c) of the first, usually only, term."""
        return self.rights[0]


def bilinear_least_squares(
    metric: Tensor | BilinearMetric, target: Float[Tensor, "a b c"], rank: int, **options: Any
) -> BilinearFit:
    """Minimise ⟨Θ, GΘ⟩ − 2⟨target, Θ⟩ over Θ_abc = Σ_k left_ka right_kbc, with K = `rank`.

    To approach a tensor Y in the metric, ‖Y − Θ‖²_G, pass target = G·Y.

    Args:
        metric: G as a matrix (a·b, a·b) in the order (a, b), or anything with the methods of `BilinearMetric`.
        target: linear term (a, b, c).
        rank: number of terms K; cut to the number of directions that the reduced metric supports.
        **options: of `shared_left_least_squares`.

    Returns:
        The best fit found. Its `left` spans what matters: any invertible mix of the K terms is as good.

    Raises:
        ArgumentValueError: a rank below 1, shapes that do not fit, or entries that are not finite.
    """
    return shared_left_least_squares([(metric, target)], rank, **options)


def shared_left_least_squares(
    terms: Sequence[tuple[Tensor | BilinearMetric, Tensor]],
    rank: int,
    *,
    starts: Sequence[Float[Tensor, "k a"]] = (),
    random_starts: int = 16,
    tolerance: float = 1e-9,
    rounds: int = 60,
    energy: float | None = None,
) -> BilinearFit:
    """Bilinear least squares with several (metric, target) terms whose Θs share their left factors.

    Variable projection (Golub & Pereyra 1973): for given left factors the best right factors solve one linear system of
    size K·b, so only the left factors are searched, by L-BFGS in the coordinates that whiten the reduced metric.
    Alternating the two linear solves descends the same function, but crawls where factors are nearly collinear. The
    problem has local minima: every start runs one round and the better half goes on, each until it has fallen too far
    behind the best for its pace, or has come so close to a better one that both end in the same minimum.

    Args:
        terms: per term its metric and linear target (a, b, c); b and c may differ between terms.
        rank: number of terms K; cut to the number of directions that the reduced metrics support.
        starts: left factors (k, a) to start from, besides the closed form of the reduced metric.
        random_starts: 16 came within 1 % of the best of 20 full descents in 36 of 36 problems; fewer cost less. Their
            seed is fixed, so that the same statistics give the same channels.
        tolerance: stop when a round of ten iterations lowers the objective by less than this share of what it has
            captured so far and, with `energy`, of what is left.
        rounds: most rounds of ten iterations.
        energy: ‖Y‖² of what is approached, so that energy + objective is the residual; lets noiseless problems go on
            to the end. None where it is not known.

    Returns:
        The best fit found; never worse than the closed form of the reduced metric with its best right factors.

    Raises:
        ArgumentValueError: a rank below 1, shapes that do not fit, or entries that are not finite.
    """
    if rank < 1:
        raise ArgumentValueError("at least one term is needed", expected="rank ≥ 1", got=rank, where="rank")
    targets = [target for _, target in terms]
    size = targets[0].shape[0]
    for target in targets:
        require_finite(target=target)
    for start in starts:
        if start.shape[0] < rank or start.shape[1] != size:
            raise ArgumentValueError(
                "a start must hold the left factors of every term",
                expected=f"({rank}, {size})",
                got=tuple(start.shape),
                where="starts",
            )
    forms = [DenseMetric(metric, size) if isinstance(metric, Tensor) else metric for metric, _ in terms]
    whitening = whiten(torch.stack([form.reduced() for form in forms]).mean(0))
    rank = min(rank, whitening.rank)
    stacked = torch.cat([target.flatten(1) for target in targets], 1)
    if rank == 0 or not bool((stacked != 0).any()):
        rights = tuple(target.new_zeros(0, *target.shape[1:]) for target in targets)
        return BilinearFit(stacked.new_zeros(0, size), rights, 0.0, (0.0,), converged=True)
    problem = _LeftProblem(forms, targets, whitening)
    candidates = [leading_svd(whitening.whiten(stacked), rank)[0].mT]
    candidates += [whitening.embed(start[:rank].mT).mT for start in starts]
    random = torch.Generator().manual_seed(0)
    for _ in range(random_starts):
        noise = torch.randn(rank, whitening.rank, generator=random, dtype=torch.float64)
        candidates.append(noise.to(stacked))
    descents = [_Descent(problem, candidate, energy) for candidate in candidates]
    survivors = (len(descents) + 1) // 2
    for count in (len(descents), survivors):
        if len(descents) > 1:
            for descent in descents[:count]:
                descent.advance(1, tolerance)
            descents.sort(key=lambda descent: descent.history[-1])
    best = _winner(descents[:survivors], rounds, tolerance)
    left = whitening.unwhiten(torch.linalg.qr(best.best.mT)[0]).mT.contiguous()
    rights = problem.partners(left)[0]
    widths = [right[0].numel() for right in rights]
    left, joined = fix_signs(left, torch.cat([right.flatten(1) for right in rights], 1))
    parts = joined.split(widths, 1)
    rights = tuple(part.view_as(right) for part, right in zip(parts, rights, strict=True))
    return BilinearFit(left, rights, best.history[-1], tuple(best.history), best.converged)


def _winner(descents: "Sequence[_Descent]", rounds: int, tolerance: float) -> "_Descent":
    """The best of descents that all go on, but for those that cannot win."""
    running = list(descents)
    for _ in range(rounds):
        for descent in running:
            descent.advance(1, tolerance)
        running.sort(key=lambda descent: descent.history[-1])
        kept: list[_Descent] = []
        for descent in running:
            behind, pace = descent.history[-1] - running[0].history[-1], descent.history[-2] - descent.history[-1]
            if behind <= REACH * pace and not any(descent.joins(better) for better in kept):
                kept.append(descent)
        running = kept
        if all(descent.converged for descent in running):
            break
    return running[0]


class _LeftProblem:
    """The objective as a function of the whitened left factors alone, and its gradient."""

    def __init__(self, forms: Sequence[BilinearMetric], targets: Sequence[Tensor], whitening: Whitening) -> None:
        self.forms, self.targets, self.whitening = forms, targets, whitening

    def partners(self, left: Tensor) -> tuple[list[Tensor], Tensor]:
        """Best right factors (k, b, c) of every term for given left factors, and the objective there."""
        rights, objective = [], left.new_zeros(())
        for form, target in zip(self.forms, self.targets, strict=True):
            linear = (left @ target.flatten(1)).view(-1, target.shape[2])
            gram = form.gram(left)
            lifted = gram.clone()
            lifted.diagonal().add_(RIDGE * gram.diagonal().mean())
            factor, failed = torch.linalg.cholesky_ex(lifted)
            right = solve_psd(gram, linear, 1e-9) if bool(failed) else torch.cholesky_solve(linear, factor)
            objective = objective + ((gram @ right - 2 * linear) * right).sum()
            rights.append(right.view(left.shape[0], *target.shape[1:]))
        return rights, objective

    def value_and_gradient(self, whitened: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and its gradient; the right factors are at their optimum, so only the direct dependence counts."""
        left = self.whitening.unwhiten(whitened.mT).mT
        rights, objective = self.partners(left)
        slope = torch.zeros_like(left)
        for form, target, right in zip(self.forms, self.targets, rights, strict=True):
            flat = right.reshape(-1, right.shape[2])
            slope += form.pull(left, flat @ flat.mT)
            slope.addmm_(right.flatten(1), target.flatten(1).mT, alpha=-1)
        return objective, 2 * self.whitening.whiten(slope.mT).mT.contiguous()


class _Descent:
    """One L-BFGS run on a `_LeftProblem`, advanced in rounds of ten iterations."""

    def __init__(self, problem: _LeftProblem, start: Tensor, energy: float | None) -> None:
        self._problem, self._energy = problem, energy
        self._point = torch.nn.Parameter(torch.linalg.qr(start.mT)[0].mT.contiguous())
        self._optimizer = LBFGS(
            [self._point],
            max_iter=10,
            history_size=20,
            line_search_fn="strong_wolfe",
            tolerance_grad=0,
            tolerance_change=0,
        )
        self.best = self._point.detach().clone()
        value = float(problem.value_and_gradient(self.best)[0])
        self._unit = abs(value) or 1.0
        self.history = [value]
        self.converged = False
        self._lowest = value

    def joins(self, other: "_Descent") -> bool:
        """Whether it has come so close to another one's span that it will end in the same minimum."""
        mine, its = (torch.linalg.qr(each.best.mT)[0] for each in (self, other))
        return len(self.best) - float((mine.mT @ its).square().sum()) < TWINS

    def _evaluate(self) -> Tensor:
        value, gradient = self._problem.value_and_gradient(self._point.detach())
        self._point.grad = gradient / self._unit
        if float(value) < self._lowest:
            self._lowest = float(value)
            self.best = self._point.detach().clone()
        return value / self._unit

    def advance(self, rounds: int, tolerance: float) -> None:
        """Go on for so many rounds, or until one of them gains too little."""
        for _ in range(rounds):
            if self.converged:
                return
            before = self._lowest
            self._optimizer.step(self._evaluate)  # pyright: ignore[reportArgumentType]
            self.history.append(self._lowest)
            scale = abs(self._lowest)
            if self._energy is not None:
                # Below a rounding error of the whole there is nothing left to gain.
                scale = min(scale, max(self._energy + self._lowest, 1e-14 * self._energy / tolerance))
            self.converged = before - self._lowest <= tolerance * scale
