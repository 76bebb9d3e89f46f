"""Ranks by number, by share, and what is impossible."""

import pytest

import growconv
from growconv.convolution.ranks import cp_rank, tucker_ranks
from growconv.errors import ArgumentTypeError, ArgumentValueError


def test_ranks_by_share_keep_the_number_of_parameters():
    shape = (128, 64, 3, 3)
    full = 128 * 64 * 9
    assert cp_rank(shape, "same") == full // (128 + 64 + 6)
    assert cp_rank(shape, 0.25) == int(0.25 * full / 198)
    for share in (0.1, 0.25, 1.0):
        outputs, inputs = tucker_ranks(shape, share)
        assert 0.9 * share * full < 128 * outputs + 64 * inputs + outputs * inputs * 9 <= share * full
    assert cp_rank((4, 4, 1), 0.001) == 1
    layer = growconv.CPConv2d(64, 64, 3, bias=False)
    assert layer.rank == 275
    assert sum(parameter.numel() for parameter in layer.parameters()) <= 64 * 64 * 9


@pytest.mark.parametrize("rank", [0, -1, 97, "full", float("nan"), 0.0, -0.5, 5.0, (2, 2), True, "2"])
def test_impossible_cp_ranks(rank):
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match=r"rank|share"):
        growconv.CPConv2d(12, 8, (3, 4), rank=rank)
    assert growconv.CPConv2d(12, 8, (3, 4), rank=96).rank == 96


@pytest.mark.parametrize("rank", [0, (3, 0), (9, 3), (3, 13), (3,), (1, 2, 3), -2, 3.5])
def test_impossible_tucker_ranks(rank):
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match="rank"):
        growconv.TuckerConv2d(12, 8, 3, rank=rank)
