"""What is Tucker's own."""

import pytest
import torch
from torch import nn

import growconv
from growconv.errors import ArgumentValueError


def test_tucker_with_full_ranks_is_exact_and_with_fewer_the_best_of_a_kind():
    conv = nn.Conv2d(5, 6, 3)
    assert growconv.TuckerConv2d.from_conv(conv, rank=(6, 5)).fit.error < 1e-6
    values = torch.linalg.svdvals(conv.weight.detach().flatten(1).double())
    layer = growconv.TuckerConv2d.from_conv(conv, rank=(3, 5))  # only outputs are cut: a truncated SVD
    assert layer.fit.error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-4)


def test_mobilenet_is_for_cp():
    with pytest.raises(ArgumentValueError, match="factorized or reconstructed"):
        growconv.TuckerConv2d(4, 4, 3, rank=2, implementation="mobilenet")
