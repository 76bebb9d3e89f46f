"""Sums with the entries of the biases: symmetric ones exactly."""

import torch
from hypothesis import given, settings

from tests.statistics import cases
from tests.statistics.test_offset_path import SCRATCH


@settings(max_examples=40)
@given(cases.pairs(), SCRATCH)
def test_symmetric_statistics_are_exactly_symmetric(pair, scratch):
    problem = cases.problem_of(pair)
    names = cases.statistics_of(problem) & {"S", "S2", "S_full", "patch_gram"}
    maps = cases.tensors(problem, dtype=torch.float32)
    for found in (cases.by_offsets(problem, names, *maps, scratch), cases.unfolded(problem, names, *maps, scratch)):
        for name in names:
            assert torch.equal(found[name], found[name].T)
