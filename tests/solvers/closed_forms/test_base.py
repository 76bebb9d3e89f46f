"""The registry of methods: names, hyperparameters, and a method of one's own."""

import inspect
import itertools
from dataclasses import dataclass

import pytest
import torch

import growconv
from growconv.errors import ArgumentTypeError, SolverError
from growconv.network.proposal import ChannelGrowth
from growconv.solvers import SOLVERS, Request, Solver, get_solver, register, solve

from .pairs import pair


def test_names_and_hyperparameters_are_checked_with_a_suggestion() -> None:
    with pytest.raises(SolverError, match="did you mean 'tiny'"):
        get_solver("tinny")
    with pytest.raises(SolverError, match="did you mean 'shrinkage'"):
        get_solver("tiny", shrinkige=0.1)
    with pytest.raises(SolverError, match="belong to the solver object"):
        get_solver(get_solver("tiny"), shrinkage=0.1)


def test_what_cannot_be_solved_is_named() -> None:
    model = pair()
    site = growconv.find_sites(model, torch.randn(1, 3, 6, 6).double())[0]
    with pytest.raises(SolverError, match="needs statistics"):
        solve(site, "tiny", 2)
    with pytest.raises(ArgumentTypeError, match="takes the statistics of a site"):
        inspect.unwrap(solve)(model, "tiny", 2)  # without the types that the tests check at run time
    with pytest.raises(SolverError, match="no measure by which to choose"):
        solve(site, "random", "auto")


def test_a_method_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growconv.solvers.base.SOLVERS", dict(SOLVERS))
    counter = itertools.count()

    @register("ones")
    @dataclass(frozen=True)
    class Ones(Solver):
        value: float = 1.0

        def solve(self, request: Request) -> ChannelGrowth:
            next(counter)
            site, channels = request.site, request.number
            alpha = torch.full((channels, 3, 3, 3), self.value, dtype=torch.float64)
            return ChannelGrowth(
                site.name, self.name, {"0": alpha}, {"1": torch.zeros(4, channels, 3, 3)}, torch.zeros(channels)
            )

    model = pair(bias=False)
    site = growconv.find_sites(model, torch.randn(1, 3, 6, 6).double())[0]
    assert solve(site, "ones", 2, value=3.0).alpha.mean() == 3
    assert next(counter) == 1
    with pytest.raises(SolverError, match="not finite"):
        solve(site, "ones", 2, value=float("nan"))
    with pytest.raises(SolverError, match="is taken"):
        register("tiny")(Ones)
