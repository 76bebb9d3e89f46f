"""The unfold path."""

import pytest
import torch
import torch.nn.functional as F

from growconv.statistics import collect_statistics, unfolded
from growconv.statistics.unfolded import gram
from tests.statistics.test_problem import Y, case


def test_blocked_gram_is_the_product():
    rows = torch.randn(1500, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gram(rows), rows @ rows.T, rtol=1e-12, atol=1e-12)


def test_small_chunks_of_patches_add_up_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, site = case("same padding, even kernel")
    batches = [(torch.cat([x, 2 * x, -x, x.flip(-1)]), Y.repeat(4))]  # more samples than a chunk has at least
    found, calls = [], []

    def counted(*args: object) -> None:
        calls.append(args)
        add(*args)

    add = unfolded._add_slab
    monkeypatch.setattr(unfolded, "_add_slab", counted)
    for size in (unfolded.CHUNK_BYTES, 1):
        monkeypatch.setattr(unfolded, "CHUNK_BYTES", size)
        wanted = {"path": "unfold", "quantities": {"S", "S2", "M", "N_raw"}}
        found.append(collect_statistics(model, site, batches, F.cross_entropy, **wanted)[site.name].consumers[0])
    assert len(calls) > 2
    for name, value in found[0].moments.items():
        torch.testing.assert_close(found[1].moments[name], value, rtol=1e-11, atol=1e-13)
