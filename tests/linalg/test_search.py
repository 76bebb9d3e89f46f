"""The iterations against dense solves, on problems with a known answer."""

import pytest
import torch

from growconv.linalg import Point, QuasiNewton, conjugate_gradients, descending, eliminated, solve_blocks
from tests.linalg.test_spectral import gaussian, gram_of


@pytest.mark.parametrize("rank", [12, 7])
def test_conjugate_gradients_are_the_pseudo_inverse(rank: int) -> None:
    gram = gram_of(12, rank)
    right = gram @ gaussian(12, seed=1)
    found = conjugate_gradients(lambda vector: gram @ vector, right, 100, 1e-10)
    torch.testing.assert_close(found, torch.linalg.pinv(gram, hermitian=True) @ right, rtol=1e-6, atol=1e-8)
    some = conjugate_gradients(lambda vector: gram @ vector, right, 2, 1e-10)
    basis = torch.linalg.qr(torch.stack([right, gram @ right], 1))[0]
    best = basis @ torch.linalg.solve(basis.mT @ gram @ basis, basis.mT @ right)
    torch.testing.assert_close(some, best)
    assert not conjugate_gradients(lambda vector: gram @ vector, torch.zeros_like(right), 100, 1e-10).any()


def test_the_search_goes_to_the_minimum_and_says_when_it_is_there() -> None:
    gram, wanted = gram_of(12, 30), gaussian(3, 4)

    def objective(theta: torch.Tensor) -> Point:
        error = (theta - wanted).flatten()
        return Point(theta, float(error @ gram @ error) / 2, (gram @ error).view_as(theta))

    start = objective(torch.ones(3, 4, dtype=torch.float64))
    few, last = QuasiNewton(5).run(objective, start, 2)
    assert not last
    assert few.loss < start.loss
    found, last = QuasiNewton(12).run(objective, start, 500)
    assert last
    torch.testing.assert_close(found.theta, wanted, rtol=1e-6, atol=1e-6)
    at_once = QuasiNewton(5)
    exact = objective(start.theta)
    for _ in range(8):  # with the true inverse Hessian only the length of the step is to be found
        exact, _ = at_once.run(objective, exact, 1, lambda g: torch.linalg.solve(gram, g.flatten()).view_as(g))
    torch.testing.assert_close(exact.theta, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chosen", [0, 2])
def test_elimination_leaves_what_the_others_add(chosen: int) -> None:
    gram, cross = gram_of(12, 30), gaussian(12, 5, seed=1)
    left, rest = eliminated(gram.view(4, 3, 4, 3), cross.view(4, 3, 5), chosen)
    at = list(range(3 * chosen, 3 * chosen + 3))
    own = float((cross[at] * torch.linalg.solve(gram[at][:, at], cross[at])).sum())
    added = float((rest.flatten(0, 1) * torch.linalg.solve(left.reshape(9, 9), rest.flatten(0, 1))).sum())
    assert own + added == pytest.approx(float((cross * torch.linalg.solve(gram, cross)).sum()))


def test_blocks_without_an_inverse_give_nothing() -> None:
    grams = torch.stack([gram_of(3, 5), torch.zeros(3, 3).double()])
    found = solve_blocks(grams, torch.ones(2, 3, 1).double())
    torch.testing.assert_close(found[0], torch.linalg.solve(grams[0], torch.ones(3, 1).double()))
    assert not found[1].any()


def test_gains_that_rise_are_pooled_and_keep_their_sum() -> None:
    assert descending([3.0, 1.0, 2.0, 0.5]) == [3.0, 1.5, 1.5, 0.5]
    assert descending([1.0, 2.0, 6.0]) == [3.0, 3.0, 3.0]
