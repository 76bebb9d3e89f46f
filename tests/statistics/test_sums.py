"""Arithmetic in full precision, whatever is switched on."""

import pytest
import torch
import torch.nn.functional as F

from growconv.statistics import sums
from growconv.statistics.sums import full_precision
from tests.hazards.test_precision import X, collected, difference, network


@pytest.mark.parametrize("path", ["dense", "unfold", "offset"])
def test_autocast_does_not_leak_into_the_products(path):
    model = network()
    found = collected(model, autocast=True, path=path, keep_samples=6, quantities=("S", "S2", "N_raw", "M"))
    # S depends on x alone, which autocast does not touch: bfloat16 products would be off by 1e-3
    assert difference(found.S, collected(model).S) < 1e-6
    kept = found.samples_kept  # what autocast made of h and v, in float32
    patches = F.unfold(kept.h["2"], 3, padding=1).double()
    exact = torch.einsum("idm,iem->de", patches, patches) / len(X)
    assert difference(found.S2[:-1, :-1], exact) < 1e-6
    exact = torch.einsum("idm,icm->dc", patches, kept.v["2"].flatten(2).double()) / len(X)
    assert difference(found.M[:-1], exact) < 1e-6


def test_switches_are_put_back():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision(torch.device("cpu")):
            assert not torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
            if hasattr(torch.backends.mkldnn, "matmul"):
                assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
        found = collected(network())
    finally:
        torch.set_float32_matmul_precision(before)
    assert difference(found.S, collected(network()).S) < 1e-6


def test_addends_come_in_parts_of_any_layout(monkeypatch):
    monkeypatch.setattr(sums, "PART", 5)
    values = [torch.randn(4, 3, dtype=torch.float32).T, torch.randn(3, 4), torch.randn(3, 4, dtype=torch.float64)]
    totals = sums.Totals()
    for value in values:
        totals.add("S", value)
    assert totals["S"].dtype == torch.float64
    assert torch.equal(totals["S"], values[0].double() + values[1].double() + values[2])
