"""Bilinear least squares: the best tensor of low rank in a quadratic form that couples two of its axes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.errors import ArgumentValueError
from growconv.linalg.search import Point, QuasiNewton
from growconv.linalg.spectral import Whitening, fix_signs, leading_svd, require_finite, solve_psd, whiten

NARROWED = 256, 2048
"""Sizes of a dense metric between which it is looked whether a narrower factor serves."""
STREAMED, CACHE_BYTES = 16, 2**23
"""Rows that meet the left factors at a time where a dense metric is larger than the cache: for a few left factors that
takes two thirds of the time of the whole product."""
ROUGH_BYTES = 2**26
"""Size of a dense metric above which the search begins in float32, which takes half of the time there."""
RIDGE = 1e-10
"""Added to the right factors' system, relative to its mean diagonal: keeps the search smooth where terms become
dependent."""
DAMPING = 0.1
"""Added to a filter's curvature, relative to its mean: the curvature of the right factors' answer is not in it."""
MEMORY = 20
"""Steps that L-BFGS remembers."""


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
    """The quadratic form as a symmetric positive semi-definite matrix (a·b, a·b), entries in the order (a, b)."""

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
        self._half = matrix[:0]  # of `gram`, for `pull`
        root = _narrow_root(matrix)
        self._root = None if root is None else root.view(left_size, -1)  # (a, b·r)
        self._tall = matrix if self._root is None else self._root.mT.contiguous()  # few columns from the right are fast

    def reduced(self) -> Tensor:
        """Sum over equal taps."""
        return torch.einsum("abdb->ad", self._form)

    def rough(self) -> "DenseMetric":
        """The form in float32 where it is large; else itself."""
        large = self._form.numel() * self._form.element_size() > ROUGH_BYTES
        return DenseMetric(self._form.flatten(2).flatten(0, 1).float(), len(self._form)) if large else self

    def curvature(self, couplings: Float[Tensor, "k b b"]) -> Float[Tensor, "k a a"]:
        """Σ_bb' G_ab,a'b' coupling_kbb'."""
        flat = couplings.flatten(1).to(self._form)
        parts = [
            (flat @ rows.permute(1, 3, 0, 2).reshape(flat.shape[1], -1)).view(len(flat), len(rows), -1)
            for rows in self._form.split(STREAMED)
        ]
        return torch.cat(parts, 1)

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
        self._half = half.view(-1, *self._form.shape[1:])
        return torch.einsum("kbde,ld->kble", self._half, left).reshape(rows, -1)

    def pull(self, left: Tensor, coupling: Tensor) -> Tensor:
        """Contract the half product of `gram` with the coupling of the right factors."""
        channels, taps = left.shape[0], self._form.shape[1]
        if self._root is not None:
            return (coupling @ self._half).view(channels, -1) @ self._root.mT
        return torch.einsum("kbde,kble->ld", self._half, coupling.view(channels, taps, channels, taps))


def _narrow_root(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n r"] | None:
    """F with F Fᵀ = matrix, where that has little more than half as many columns as rows; None elsewhere.

    A Cholesky factorisation that takes the largest remaining diagonal entry first (Higham 1990), to the rounding error.
    Second moments of patches are that narrow where several pairs of taps read one entry of the input.
    """
    size = len(matrix)
    if matrix.dtype != torch.float64 or not NARROWED[0] <= size <= NARROWED[1]:
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
    """

    left: Tensor
    rights: tuple[Tensor, ...]
    objective: float
    history: tuple[float, ...]


def bilinear_least_squares(
    terms: Sequence[tuple[Tensor | BilinearMetric, Tensor]],
    rank: int,
    *,
    starts: Sequence[Float[Tensor, "k a"]] = (),
    random_starts: int | None = None,
    tolerance: float = 1e-9,
    rounds: int | None = None,
    energy: float | None = None,
) -> BilinearFit:
    """Minimise the sum over terms of ⟨Θ, GΘ⟩ − 2⟨target, Θ⟩ for Θ_abc = Σ_k left_ka right_kbc, `left` being shared.

    To approach a tensor Y in the metric, ‖Y − Θ‖²_G, pass target = G·Y.

    Variable projection (Golub & Pereyra 1973): for given left factors the best right factors solve one linear system of
    size K·b, so only the left factors are searched, by L-BFGS in the coordinates that whiten the reduced metric.
    Alternating the two linear solves descends the same function, but crawls where factors are nearly collinear. What
    L-BFGS takes for the first inverse Hessian is that of every filter with its right factors held, anew after 1, 2, 4,
    8 ... rounds. The problem has local minima: the better half of the starts goes on after as many rounds.

    Args:
        terms: per term its metric G, as a matrix (a·b, a·b) in the order (a, b) or anything with the methods of
            `BilinearMetric`, and its target (a, b, c); b and c may differ between terms.
        rank: number of terms K; cut to the number of directions that the reduced metrics support.
        starts: left factors (k, a) to start from, besides the closed form of the reduced metric.
        random_starts: descents from random filters. None takes 16, and 3 where a metric is above ROUGH_BYTES. Their
            seed is fixed, so that the same statistics give the same channels.
        tolerance: stop when a round of ten iterations lowers the objective by less than this share of what it has
            captured so far and, with `energy`, of what is left.
        rounds: most rounds of ten iterations; None takes 60, and 20 where a metric is above ROUGH_BYTES.
        energy: ‖Y‖² of what is approached, so that energy + objective is the residual; lets noiseless problems go on
            to the end. None where it is not known.

    Returns:
        The best fit found; never worse than the closed form of the reduced metric with its best right factors. Its
        `left` spans what matters: any invertible mix of the K filters is as good.

    Raises:
        ArgumentValueError: a rank below 1, shapes that do not fit, or entries that are not finite.
    """
    targets = [target for _, target in terms]
    size = targets[0].shape[0]
    _check(targets, rank, starts)
    forms = [DenseMetric(metric, size) if isinstance(metric, Tensor) else metric for metric, _ in terms]
    whitening = whiten(torch.stack([form.reduced() for form in forms]).mean(0))
    rank = min(rank, whitening.rank)
    stacked = torch.cat([target.flatten(1) for target in targets], 1)
    if rank == 0 or not bool((stacked != 0).any()):
        rights = tuple(target.new_zeros(0, *target.shape[1:]) for target in targets)
        return BilinearFit(stacked.new_zeros(0, size), rights, 0.0, (0.0,))
    problem = _LeftProblem(forms, targets, whitening)
    rough = problem.rough()
    dear = rough is not problem
    candidates = [leading_svd(whitening.whiten(stacked), rank)[0].mT]
    candidates += [whitening.embed(start[:rank].mT).mT for start in starts]
    random = torch.Generator().manual_seed(0)
    for _ in range((3 if dear else 16) if random_starts is None else random_starts):
        noise = torch.randn(rank, whitening.rank, generator=random, dtype=torch.float64)
        candidates.append(noise.to(stacked))
    rounds = rounds or (20 if dear else 60)
    best = _winner([_Descent(rough, candidate, energy) for candidate in candidates], rounds, tolerance)
    if best.stalled and dear:  # by the rounding of float32
        best = _winner([best.onto(problem)], rounds - best.rounds, tolerance)
    left = whitening.unwhiten(torch.linalg.qr(best.point.theta.mT)[0].to(stacked)).mT.contiguous()
    rights, objective = problem.partners(left)
    widths = [right[0].numel() for right in rights]
    left, joined = fix_signs(left, torch.cat([right.flatten(1) for right in rights], 1))
    parts = joined.split(widths, 1)
    rights = tuple(part.view_as(right) for part, right in zip(parts, rights, strict=True))
    reached = float(objective)
    history = (*(value for value in best.history if value > reached), reached)
    return BilinearFit(left, rights, reached, history)


def _check(targets: Sequence[Tensor], rank: int, starts: Sequence[Tensor]) -> None:
    """Refuse what does not belong together."""
    if rank < 1:
        raise ArgumentValueError("at least one term is needed", expected="rank ≥ 1", got=rank, where="rank")
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


def _winner(descents: "list[_Descent]", rounds: int, tolerance: float) -> "_Descent":
    """The best of some descents, the better half of which goes on after 1, 2, 4, 8 ... rounds."""
    for done in range(1, rounds + 1):
        for descent in descents:
            descent.advance(tolerance)
        descents.sort(key=lambda descent: descent.point.loss)
        if done & (done - 1) == 0:
            del descents[(len(descents) + 1) // 2 :]
        if all(descent.converged for descent in descents):
            break
    return descents[0]


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

    def __call__(self, whitened: Tensor) -> Point:
        """Objective and its gradient; the right factors are at their optimum, so only the direct dependence counts."""
        left = self.whitening.unwhiten(whitened.mT).mT
        rights, objective = self.partners(left)
        slope = torch.zeros_like(left)
        for form, target, right in zip(self.forms, self.targets, rights, strict=True):
            flat = right.reshape(-1, right.shape[2])
            slope += form.pull(left, flat @ flat.mT)
            slope.addmm_(right.flatten(1), target.flatten(1).mT, alpha=-1)
        return Point(whitened, float(objective), 2 * self.whitening.whiten(slope.mT).mT.contiguous())

    def inverse(self, whitened: Tensor) -> Callable[[Tensor], Tensor]:
        """Inverse of the curvature with the right factors held: one block a filter.

        The filters are turned first so that the right factors of different ones are orthogonal; what couples them then
        is small and left out.
        """
        rights = self.partners(self.whitening.unwhiten(whitened.mT).mT)[0]
        joined = torch.cat([right.flatten(1) for right in rights], 1)
        sizes, turn = torch.linalg.eigh(joined @ joined.mT)
        turn, tiny = turn.mT, torch.finfo(whitened.dtype).tiny
        blocks = whitened.new_zeros(len(whitened), self.whitening.rank, self.whitening.rank)
        for form, right in zip(self.forms, rights, strict=True):
            if not isinstance(form, DenseMetric):  # the taps taken as independent
                damped = (sizes + 1e-3 * sizes.mean() + tiny)[:, None]
                return lambda rows: turn.mT @ ((turn @ rows) / damped)
            turned = torch.einsum("jk,kbc->jbc", turn, right)
            blocks += self._whitened(form.curvature(turned @ turned.mT))
        diagonals = blocks.diagonal(dim1=1, dim2=2)
        mean = diagonals.mean(1, keepdim=True)
        diagonals += DAMPING * mean + 1e-3 * mean.mean() + tiny
        inverses = torch.cholesky_inverse(torch.linalg.cholesky(blocks))  # a solve would copy the factors each time
        return lambda rows: turn.mT @ ((turn @ rows)[:, None] @ inverses)[:, 0]

    def _whitened(self, blocks: Float[Tensor, "k a a"]) -> Float[Tensor, "k r r"]:
        """Fᵀ·block·F."""
        for _ in range(2):
            blocks = (
                self.whitening.whiten(blocks.movedim(1, 0).flatten(1)).unflatten(1, (len(blocks), -1)).permute(1, 2, 0)
            )
        return blocks

    def rough(self) -> "_LeftProblem":
        """The problem in float32 where that takes less time; else itself."""
        forms = [form.rough() if isinstance(form, DenseMetric) else form for form in self.forms]
        if all(form is own for form, own in zip(forms, self.forms, strict=True)):
            return self
        w = self.whitening
        return _LeftProblem(forms, [t.float() for t in self.targets], Whitening(w.factor.float(), w.triangular, w.rank))


class _Descent:
    """One quasi-Newton run on a `_LeftProblem`, advanced in rounds of ten iterations."""

    def __init__(self, problem: _LeftProblem, start: Tensor, energy: float | None) -> None:
        self._problem, self._energy = problem, energy
        self.point = problem(torch.linalg.qr(start.mT)[0].mT.to(problem.targets[0]).contiguous())
        self._newton = QuasiNewton(MEMORY)
        self._inverse: Callable[[Tensor], Tensor] = lambda rows: rows
        self.rounds = 0
        self.history = [self.point.loss]
        self.converged = self.stalled = False

    def onto(self, problem: _LeftProblem) -> "_Descent":
        """Go on with another problem from here."""
        other = _Descent(problem, self.point.theta, self._energy)
        other.rounds = 1  # a curvature from the start
        other.history = [*self.history, other.point.loss]
        return other

    def _renew(self) -> None:
        """Orthonormal filters of the same span, what is known of the curvature with them, and the curvature there."""
        left, mix = torch.linalg.qr(self.point.theta.mT)
        self.point = Point(left.mT.contiguous(), self.point.loss, mix @ self.point.gradient)
        self._newton.pairs = [
            (torch.linalg.solve_triangular(mix.mT, step, upper=False), mix @ change)
            for step, change in self._newton.pairs
        ]
        self._inverse = self._problem.inverse(self.point.theta)

    def advance(self, tolerance: float) -> None:
        """Go on for ten iterations, unless the last ones gained too little."""
        if self.converged:
            return
        if self.rounds and self.rounds & (self.rounds - 1) == 0:
            self._renew()
        self.rounds += 1
        self.point, self.stalled = self._newton.run(self._problem, self.point, 10, self._inverse)
        self.history.append(self.point.loss)
        scale = abs(self.point.loss)
        if self._energy is not None:
            # Below a rounding error of the whole there is nothing left to gain.
            scale = min(scale, max(self._energy + self.point.loss, 1e-14 * self._energy / tolerance))
        self.converged = self.history[-2] - self.history[-1] <= tolerance * scale
