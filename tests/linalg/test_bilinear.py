"""Bilinear least squares against plain formulas, autograd, alternating least squares and known teachers."""

import pytest
import torch

from growconv.errors import ArgumentValueError
from growconv.linalg import DenseMetric, bilinear, bilinear_least_squares
from tests.linalg.test_spectral import gaussian


class Problem:
    """A random metric of rank `rank` and a target that lies in its range."""

    def __init__(self, a: int, b: int, c: int, rank: int, teacher: int | None = None, seed: int = 0) -> None:
        self.design = gaussian(rank, a * b, seed=seed) / rank**0.5
        self.metric = self.design.mT @ self.design
        if teacher is None:
            wanted = gaussian(rank, c, seed=seed + 1)
        else:
            theta = torch.einsum(
                "ka,kbc->abc", gaussian(teacher, a, seed=seed + 2), gaussian(teacher, b, c, seed=seed + 3)
            )
            wanted = self.design @ theta.flatten(0, 1)
        self.energy = float(wanted.square().sum())
        self.wanted = wanted
        self.target = (self.design.mT @ wanted).view(a, b, c)
        self.terms = [(self.metric, self.target)]

    def residual(self, left: torch.Tensor, right: torch.Tensor) -> float:
        theta = torch.einsum("ka,kbc->abc", left, right).flatten(0, 1)
        return float((self.wanted - self.design @ theta).square().sum()) / self.energy


def test_metrics_agree_with_the_plain_formula_and_with_autograd() -> None:
    problem = Problem(5, 3, 4, 30)
    dense = DenseMetric(problem.metric, 5)
    left = gaussian(2, 5, seed=7).requires_grad_()
    right = gaussian(2, 3, 4, seed=8)
    theta = torch.einsum("ka,kbc->abc", left, right).flatten(0, 1)
    (slope,) = torch.autograd.grad((theta * (problem.metric @ theta)).sum() / 2, left)
    units = torch.einsum("ka,be->kbae", left, torch.eye(3, dtype=torch.float64)).reshape(6, 15)
    flat = right.reshape(6, 4)
    torch.testing.assert_close(dense.gram(left.detach()), (units @ problem.metric @ units.mT).detach())
    torch.testing.assert_close(dense.pull(left.detach(), flat @ flat.mT), slope)
    blocks = problem.metric.view(5, 3, 5, 3)
    coupled = sum(
        flat.view(2, 3, 4)[:, b, c, None, None] * blocks[:, b, :, e] * flat.view(2, 3, 4)[:, e, c, None, None]
        for b in range(3)
        for e in range(3)
        for c in range(4)
    )
    torch.testing.assert_close(dense.curvature(right @ right.mT), coupled)
    torch.testing.assert_close(dense.reduced(), sum(blocks[:, b, :, b] for b in range(3)))


@pytest.mark.parametrize("rank", [60, 14])
def test_a_teacher_is_recovered(rank: int) -> None:
    problem = Problem(7, 4, 5, rank, teacher=2)
    fit = bilinear_least_squares(problem.terms, 2, energy=problem.energy)
    assert problem.residual(fit.left, fit.rights[0]) < 1e-8
    assert fit.objective == pytest.approx(-problem.energy, rel=1e-8)


def test_directions_without_data_are_left_out() -> None:
    problem = Problem(7, 4, 5, 60, teacher=2)
    dead = torch.zeros(8, 4, 8, 4, dtype=torch.float64)
    dead[:7, :, :7] = problem.metric.view(7, 4, 7, 4)
    target = torch.cat([problem.target, torch.zeros(1, 4, 5, dtype=torch.float64)])
    fit = bilinear_least_squares([(dead.view(32, 32), target)], 2, energy=problem.energy)
    assert fit.objective == pytest.approx(-problem.energy, rel=1e-8)
    assert not fit.left[:, 7].any()


def test_never_rises_and_beats_alternating_least_squares() -> None:
    problem = Problem(8, 3, 6, 100)
    fit = bilinear_least_squares(problem.terms, 3)
    assert all(later <= earlier for earlier, later in zip(fit.history, fit.history[1:], strict=False))
    assert problem.residual(fit.left, fit.rights[0]) * problem.energy == pytest.approx(problem.energy + fit.objective)
    form = problem.metric.view(8, 3, 8, 3)
    best = 1.0
    for seed in range(5):
        left = gaussian(3, 8, seed=seed)
        for _ in range(40):
            gram = torch.einsum("ka,abde,ld->kble", left, form, left).reshape(9, 9)
            right = torch.linalg.solve(gram, torch.einsum("ka,abc->kbc", left, problem.target).reshape(9, 6)).view(
                3, 3, 6
            )
            gram = torch.einsum("kbc,abde,lec->kald", right, form, right).reshape(24, 24)
            left = torch.linalg.solve(gram, torch.einsum("kbc,abc->ka", right, problem.target).flatten()).view(3, 8)
        best = min(best, problem.residual(left, right))
    assert problem.residual(fit.left, fit.rights[0]) <= best * 1.001


def test_a_start_at_the_minimum_stays_there() -> None:
    problem = Problem(6, 3, 4, 50)
    dense = bilinear_least_squares(problem.terms, 2)
    warm = bilinear_least_squares(problem.terms, 2, starts=[dense.left], random_starts=0)
    assert warm.objective <= dense.objective * (1 - 1e-9)


def test_terms_with_shared_left_factors_are_one_stacked_problem() -> None:
    first = Problem(6, 3, 4, 50)
    second_target = first.metric @ gaussian(18, 2, seed=5)
    terms = [(first.metric, first.target), (first.metric, second_target.view(6, 3, 2))]
    together = bilinear_least_squares([(first.metric, torch.cat([first.target, second_target.view(6, 3, 2)], 2))], 2)
    shared = bilinear_least_squares(terms, 2)
    assert shared.objective == pytest.approx(together.objective, rel=1e-6)
    assert [right.shape for right in shared.rights] == [(2, 3, 4), (2, 3, 2)]


def test_the_scale_of_the_problem_does_not_matter() -> None:
    problem = Problem(6, 3, 4, 50)
    plain = bilinear_least_squares(problem.terms, 2, random_starts=2)
    scaled = bilinear_least_squares([(1e-8 * problem.metric, 1e-5 * problem.target)], 2, random_starts=2)
    assert scaled.objective == pytest.approx(1e-2 * plain.objective, rel=1e-5)


def test_nothing_to_approach_gives_no_terms() -> None:
    fit = bilinear_least_squares([(torch.eye(12).double(), torch.zeros(4, 3, 2).double())], 2)
    assert (fit.left.shape, fit.rights[0].shape, fit.objective) == ((0, 4), (0, 3, 2), 0.0)
    with pytest.raises(ArgumentValueError, match="at least one term"):
        bilinear_least_squares([(torch.eye(12), torch.zeros(4, 3, 2))], 0)
    with pytest.raises(ArgumentValueError, match="not a multiple"):
        bilinear_least_squares([(torch.eye(13), torch.ones(4, 3, 2))], 1)
    with pytest.raises(ArgumentValueError, match="left factors of every term"):
        bilinear_least_squares([(torch.eye(12), torch.ones(4, 3, 2))], 2, starts=[torch.ones(1, 4)])


@pytest.mark.parametrize("rank", [1, 90, 149, 200])
def test_a_narrow_metric_is_the_same_metric(rank: int) -> None:
    problem = Problem(45, 6, 4, rank)  # 270 rows: up to 150 columns serve instead
    assert (DenseMetric(problem.metric, 45)._root is None) == (rank > 150)
    dense = DenseMetric(problem.metric, 45)
    form = problem.metric.view(45, 6, 45, 6)
    left, right = gaussian(3, 45, seed=7), gaussian(18, 4, seed=8)
    gram = torch.einsum("ka,abde,ld->kble", left, form, left).reshape(18, 18)
    torch.testing.assert_close(dense.gram(left), gram)
    theta = torch.einsum("ka,kbc->abc", left, right.view(3, 6, 4))
    pulled = torch.einsum("abc,kbc->ka", (problem.metric @ theta.flatten(0, 1)).view(45, 6, 4), right.view(3, 6, 4))
    torch.testing.assert_close(dense.pull(left, right @ right.mT), pulled)


def test_a_metric_of_zeros_gives_no_terms() -> None:
    fit = bilinear_least_squares([(torch.zeros(270, 270).double(), torch.ones(45, 6, 4).double())], 2)
    assert fit.left.shape == (0, 45)


@pytest.mark.parametrize("teacher", [None, 2])
def test_a_large_metric_is_searched_in_float32_first(monkeypatch: pytest.MonkeyPatch, teacher: int | None) -> None:
    problem = Problem(7, 4, 5, 60, teacher)
    exact = bilinear_least_squares(problem.terms, 2, energy=problem.energy)
    monkeypatch.setattr(bilinear, "ROUGH_BYTES", 0)
    rough = bilinear_least_squares(problem.terms, 2, random_starts=16, rounds=60, energy=problem.energy)
    assert rough.left.dtype == torch.float64
    assert rough.objective == pytest.approx(exact.objective, rel=1e-8)
    assert problem.residual(rough.left, rough.rights[0]) * problem.energy == pytest.approx(
        problem.energy + rough.objective, abs=1e-12 * problem.energy
    )
