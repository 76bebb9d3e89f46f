"""Hazard: proposals of one collection that neighbours, grown or shrunk in the meantime, make wrong."""

import itertools

import pytest
import torch
from torch import nn

import growconv
from growconv.errors import GrowthError

LOSS = nn.functional.cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore::growconv.solvers.FewSamplesWarning")


def collected(model, sites, method, batches):
    solver = growconv.solvers.get_solver(method)
    if not solver.reads:
        return {site.name: site for site in sites}
    keep = {"keep_samples": 64} if "samples" in solver.reads else {}
    return growconv.collect_statistics(model, sites, batches, LOSS, quantities=solver.reads, **keep)


def same_function(model, before, x):
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["tiny", "functional", "random"])
def test_all_sites_in_turn_in_every_order(chain, sites_of, batches_of, method):
    batches = batches_of(2, size=32, dtype=torch.float64)
    every = list(itertools.permutations(range(3)))
    for order in {"random": every, "tiny": every[1::2], "functional": every[4:5]}[method]:
        model = chain(3, 4, 5).double().eval()
        sites = sites_of(model)
        subjects, before, x = collected(model, sites, method, batches), model(batches[0][0]), batches[0][0]
        solved = {index: growconv.solve(subjects[sites[index].name], method, 2) for index in order[:2]}
        for index in order:
            growth = solved.get(index) or growconv.solve(subjects[sites[index].name], method, 2)
            growconv.grow(model, sites[index], growth, amplitude=0.0)
            same_function(model, before, x)
        assert [site.width for site in sites] == [5, 6, 7]
        LOSS(model(x), batches[0][1]).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["tiny", "functional", "random"])
@pytest.mark.parametrize("first", [0, 2])
def test_a_neighbour_that_shrinks_in_between_leaves_an_exact_growth_or_an_error(
    chain, sites_of, batches_of, method, first
):
    batches = batches_of(2, size=32, dtype=torch.float64)
    model = chain(3, 4, 5).double().eval()
    sites = sites_of(model)
    subjects = collected(model, sites, method, batches)
    early = growconv.solve(subjects[sites[1].name], method, 2)
    growconv.shrink(model, sites[first], [1])
    x, before = batches[0][0], model(batches[0][0])
    shapes = [parameter.shape for parameter in model.parameters()]
    for late in (False, True):
        refused = ""
        try:
            growth = growconv.solve(subjects[sites[1].name], method, 2) if late else early
            growconv.grow(model, sites[1], growth, amplitude=0.0)
        except GrowthError as error:
            refused = str(error)
        if refused:
            assert sites[1].name in refused
            assert [parameter.shape for parameter in model.parameters()] == shapes
        same_function(model, before, x)
        shapes = [parameter.shape for parameter in model.parameters()]
