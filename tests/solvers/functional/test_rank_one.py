"""Factors of rank one: planted ones come back, and none is better."""

import torch

from growconv.solvers.rank_one import outer_product, rank_one_factors, rank_one_least_squares


def test_rank_one_factors_find_planted_ones() -> None:
    factors = [torch.randn(3, size, dtype=torch.float64) for size in (4, 3, 5)]
    planted = outer_product(factors)
    torch.testing.assert_close(outer_product(rank_one_factors(planted)), planted)


def test_rank_one_least_squares() -> None:
    design = torch.randn(200, 2 * 6, dtype=torch.float64)
    planted = outer_product([torch.randn(2, size, dtype=torch.float64) for size in (3, 2, 3)])  # (k, c, row, column)
    target = torch.einsum("pkb,kcb->pc", design.view(200, 2, 6), planted.flatten(2))
    start = planted + 0.3 * torch.randn_like(planted)
    found = rank_one_least_squares(design.mT @ design, design.mT @ target, start, sweeps=60)
    torch.testing.assert_close(found, planted, rtol=1e-6, atol=1e-6)
