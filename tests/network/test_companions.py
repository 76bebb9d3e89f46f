"""Companions: what is left out of them is nothing new."""

from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st

from growconv.network import companions
from growconv.network.companions import unrepeated


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 2**16))
def test_what_repeats_itself_is_left_out_and_no_pair_is_lost(shape: list[int], kinds: int, seed: int) -> None:
    """Companions whose entries are alike along most of every axis."""
    draw = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(-1, kinds, shape, generator=draw) for _ in range(2))
    for axis, size in enumerate(shape):
        rows = torch.randint(0, size, (1,), generator=draw) * (torch.arange(size) > size // 3)
        first, second = (each.index_select(axis, rows) for each in (first, second))

    def pairs(both: tuple[torch.Tensor, torch.Tensor]) -> set[tuple[int, int]]:
        return set(zip(*(each.flatten().tolist() for each in both), strict=True))

    with mock.patch.object(companions, "MANY", 0):
        thin = unrepeated(first, second)
    assert pairs(thin) == pairs((first, second))
    assert thin[0].shape == thin[1].shape
    assert all(new <= old for new, old in zip(thin[0].shape, shape, strict=True))
    assert first.numel() < 40 or thin[0].numel() < first.numel()
