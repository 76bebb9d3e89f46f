"""Spectral solves against plain dense algebra, the pseudo-inverse and full decompositions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growconv.errors import ArgumentValueError
from growconv.linalg import fix_signs, leading_svd, shrink, solve_psd, whiten


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(size: int, rank: int, seed: int = 0) -> torch.Tensor:
    root = gaussian(size, rank, seed=seed)
    return root @ root.mT


def with_spectrum(rows: int, columns: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    count = len(values)
    left = torch.linalg.qr(gaussian(rows, count, seed=seed))[0]
    right = torch.linalg.qr(gaussian(columns, count, seed=seed + 1))[0]
    return (left * values) @ right.mT


@settings(max_examples=40)
@given(
    size=st.integers(1, 12), rank=st.integers(1, 14), scale=st.sampled_from([1e-12, 1.0, 1e9]), seed=st.integers(0, 99)
)
def test_whitening_is_an_inverse_root_on_the_support(size: int, rank: int, scale: float, seed: int) -> None:
    gram = scale * gram_of(size, rank, seed)
    whitening = whiten(gram, 1e-9)
    assert whitening.rank == torch.linalg.matrix_rank(gram, rtol=1e-9)
    factor = whitening.unwhiten(torch.eye(whitening.rank, dtype=gram.dtype))
    torch.testing.assert_close(
        factor.mT @ gram @ factor, torch.eye(whitening.rank, dtype=gram.dtype), atol=1e-5, rtol=0
    )
    inside = gram @ gaussian(size, 3, seed=seed)
    torch.testing.assert_close(
        whitening.unwhiten(whitening.embed(factor)), factor, rtol=1e-5, atol=1e-7 * float(factor.norm())
    )
    torch.testing.assert_close(
        gram @ whitening.unwhiten(whitening.whiten(inside)), inside, rtol=1e-5, atol=1e-6 * float(inside.norm())
    )


def test_thresholds_are_relative() -> None:
    gram = torch.diag(torch.tensor([1.0, 1e-3, 1e-8], dtype=torch.float64))
    for scale in (1e-20, 1.0, 1e20):
        assert whiten(scale * gram).rank == 2
        assert whiten(scale * gram, 1e-9).rank == 3
    assert whiten(0 * gram).rank == 0


def test_rank_deficiency_hidden_from_the_diagonal_is_found() -> None:
    gram = torch.ones(40, 40, dtype=torch.float64) + 1e-3 * gram_of(40, 30, seed=3)
    assert whiten(gram).rank == torch.linalg.matrix_rank(gram, rtol=1e-6) == 31


@settings(max_examples=40)
@given(size=st.integers(1, 10), rank=st.integers(0, 10), seed=st.integers(0, 99))
def test_solve_psd_is_the_pseudo_inverse(size: int, rank: int, seed: int) -> None:
    gram, right = gram_of(size, rank, seed), gaussian(size, 4, seed=seed + 1)
    expected = torch.linalg.pinv(gram, rtol=1e-9, hermitian=True) @ right
    torch.testing.assert_close(
        solve_psd(gram, right, 1e-9), expected, rtol=1e-4, atol=1e-5 * float(expected.norm() + 1e-30)
    )


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_large_rank_deficient_equations_lose_no_energy(scale: float) -> None:
    rows = gaussian(250, 400, seed=1) + 3 * gaussian(1, 400, seed=2)
    target = gaussian(250, 5, seed=3)
    gram, right = scale * rows.T @ rows, rows.T @ target
    expected = scale * torch.linalg.pinv(gram, rtol=1e-6, hermitian=True) @ right
    found = scale * solve_psd(gram, right)
    energies = [
        float((target - rows @ weights).square().sum() / target.square().sum()) for weights in (found, expected)
    ]
    assert energies[0] == pytest.approx(energies[1], abs=1e-7)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2 * float(expected.norm()))
    assert float(found.norm()) < 1.01 * float(expected.norm())


def test_large_well_conditioned_equations_are_solved() -> None:
    gram, right = gram_of(300, 900, seed=4), gaussian(300, 5, seed=5)
    torch.testing.assert_close(solve_psd(gram, right), torch.linalg.solve(gram, right), rtol=1e-6, atol=1e-9)
    assert not solve_psd(0 * gram, right).any()
    with pytest.raises(ArgumentValueError, match="no negative eigenvalues"):
        solve_psd(-gram + 2 * torch.eye(300, dtype=torch.float64), right)


def test_what_is_not_a_gram_matrix_is_refused() -> None:
    with pytest.raises(ArgumentValueError, match="no negative eigenvalues"):
        whiten(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)))
    with pytest.raises(ArgumentValueError, match=r"gram: .*not finite"):
        whiten(torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]], dtype=torch.float64))
    with pytest.raises(ArgumentValueError, match=r"right: .*not finite"):
        solve_psd(torch.eye(2), torch.full((2, 1), float("inf")))


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(torch.arange(1, 501.0, dtype=torch.float64) ** -1, id="decaying"),
        pytest.param(1 + torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64), id="flat"),
        pytest.param(torch.cat([torch.ones(30), 0.5 * torch.ones(470)]).double(), id="repeated"),
        pytest.param(torch.cat([torch.rand(5), torch.zeros(495)]).double(), id="rank 5"),
    ],
)
@pytest.mark.parametrize("shape", [(500, 700), (700, 500)])
def test_leading_svd_equals_the_full_one(values: torch.Tensor, shape: tuple[int, int]) -> None:
    matrix = with_spectrum(*shape, values)
    left, sigma, right = leading_svd(matrix, 12)
    expected = values.sort(descending=True).values
    torch.testing.assert_close(sigma, expected[:12], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(left.mT @ left, torch.eye(12, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(right @ right.mT, torch.eye(12, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (matrix @ right.mT - left * sigma).norm() < 1e-5 * expected[0]
    residual = matrix - (left * sigma) @ right
    torch.testing.assert_close(residual.norm(), expected[12:].norm(), rtol=1e-6, atol=1e-8)


def test_leading_svd_repeats_itself_and_follows_the_scale() -> None:
    matrix = with_spectrum(450, 600, torch.arange(1, 451.0, dtype=torch.float64) ** -0.5)
    left, sigma, right = leading_svd(matrix, 8)
    again = leading_svd(matrix, 8)
    assert torch.equal(left, again[0])
    assert torch.equal(right, again[2])
    scaled = leading_svd(1e-6 * matrix, 8)
    torch.testing.assert_close(scaled[0], left, atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled[1], 1e-6 * sigma)
    single = leading_svd(matrix.float(), 8)
    torch.testing.assert_close(single[1].double(), sigma, rtol=1e-5, atol=1e-6)


def test_leading_svd_of_float32_on_other_ranks_than_the_shape_allows() -> None:
    left, sigma, right = leading_svd(gaussian(4, 3).float(), 9)
    assert (left.shape, sigma.shape, right.shape) == ((4, 3), (3,), (3, 3))


@settings(max_examples=20)
@given(channels=st.integers(1, 5), seed=st.integers(0, 99))
def test_fixed_signs_forget_the_signs_they_were_given(channels: int, seed: int) -> None:
    left, right = gaussian(channels, 6, seed=seed), gaussian(channels, 4, seed=seed + 1)
    flips = gaussian(channels, 1, seed=seed + 2).sign()
    first, second = fix_signs(left, right), fix_signs(flips * left, flips * right)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first[0][:, :, None] * first[1][:, None], left[:, :, None] * right[:, None])


def test_fixed_signs_of_filters_of_zeros_look_at_the_partner() -> None:
    left, right = fix_signs(torch.zeros(1, 3), torch.tensor([[-1.0, 2.0, -3.0]]))
    assert torch.equal(right, torch.tensor([[1.0, -2.0, 3.0]]))
    assert torch.equal(left, torch.zeros(1, 3))


def test_shrinkage_keeps_the_trace_and_fades_with_the_samples() -> None:
    gram = gram_of(6, 4)
    for amount in (0.0, 0.3, 1.0):
        shrunk, used = shrink(gram, amount, 10)
        assert used == amount
        torch.testing.assert_close(shrunk.trace(), gram.trace())
    torch.testing.assert_close(shrink(gram, 1.0, 10)[0], gram.trace() / 6 * torch.eye(6, dtype=torch.float64))
    few, many = shrink(gram, "auto", 5)[1], shrink(gram, "auto", 100_000)[1]
    assert many < 1e-3 < few <= 1
    with pytest.raises(ArgumentValueError, match="shrinkage must be a weight"):
        shrink(gram, 1.5, 10)


def test_automatic_shrinkage_brings_few_samples_nearer_to_the_truth() -> None:
    truth = torch.diag(1 + torch.arange(20, dtype=torch.float64) / 20)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        draws = torch.randn(15, 20, generator=generator, dtype=torch.float64) * truth.diagonal().sqrt()
        sample = draws.mT @ draws / 15
        assert (shrink(sample, "auto", 15)[0] - truth).norm() < 0.8 * (sample - truth).norm()
