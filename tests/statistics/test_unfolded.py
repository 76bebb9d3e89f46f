"""The unfold path."""

import torch

from growconv.statistics.unfolded import gram


def test_blocked_gram_is_the_product():
    rows = torch.randn(1500, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gram(rows), rows @ rows.T, rtol=1e-12, atol=1e-12)
