"""Statistics that are older than a change of the model: exactly right, or an error that names what changed."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import growconv
from growconv.errors import GrowthError
from growconv.network.site import GrowthSite
from growconv.solvers import get_solver
from growconv.statistics import PairStatistics
from tests.methods import METHODS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fewer kept"),
    pytest.mark.filterwarnings("ignore:.*what lies between"),
]
READING = [name for name in METHODS if get_solver(name).reads]


def build() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    return model.double(), torch.randn(12, 3, 9, 9, dtype=torch.float64), torch.randint(0, 3, (12,))


@pytest.mark.parametrize("method", READING)
def test_collect_once_and_grow_every_site_in_any_order(method: str) -> None:
    reads = get_solver(method).reads
    options = {"random_starts": 1} if method == "exact" else {}  # the same descents early and late, so one is enough

    def solved(site: GrowthSite, statistics: dict[str, PairStatistics]) -> growconv.ChannelGrowth:
        generator = torch.Generator().manual_seed(0)
        return growconv.solve(statistics[site.name], method, 2, generator=generator, **options)

    model, x, y = build()
    sites = growconv.find_sites(model, x)
    kept = {"keep_samples": 12} if "samples" in reads else {}
    found = growconv.collect_statistics(model, sites, [(x, y)], F.cross_entropy, quantities=reads, **kept)
    untouched = model, sites, found
    early = [solved(site, found) for site in sites]
    for order in itertools.permutations(range(3)):
        model, sites, found = copy.deepcopy(untouched)
        for index in order:
            late = solved(sites[index], found)
            if method != "splitting":  # which gives old weights other values, and the next site sees them
                for path, weight in early[index].incoming.items():
                    torch.testing.assert_close(late.incoming[path], weight)
                for path, weight in early[index].outgoing.items():
                    torch.testing.assert_close(late.outgoing[path], weight)
            before = model.eval()(x)
            if late.channels:
                growconv.grow(model, sites[index], late, amplitude=0.0)
            if method != "splitting":
                torch.testing.assert_close(model(x), before)
        model.train()(x).sum().backward()


@pytest.mark.parametrize("method", READING)
def test_channels_that_have_gone_are_named(method: str) -> None:
    model, x, y = build()
    sites = growconv.find_sites(model, x)
    reads = get_solver(method).reads
    kept = {"keep_samples": 12} if "samples" in reads else {}
    found = growconv.collect_statistics(model, sites, [(x, y)], F.cross_entropy, quantities=reads, **kept)
    growconv.shrink(model, sites[0], [1])
    with pytest.raises(GrowthError, match=r"(?s)taken away.*units of 0"):
        growconv.solve(found[sites[1].name], method, 2)


CHANGES: dict[str, Callable[[nn.Sequential, list[GrowthSite]], object]] = {
    "grown in front": lambda model, sites: growconv.grow(model, sites[0], growconv.solve(sites[0], "random", 2)),
    "grown behind": lambda model, sites: growconv.grow(model, sites[2], growconv.solve(sites[2], "random", 2)),
    "grown itself": lambda model, sites: growconv.grow(model, sites[1], growconv.solve(sites[1], "random", 2)),
    "shrunk in front": lambda model, sites: growconv.shrink(model, sites[0], [1]),
    "shrunk behind": lambda model, sites: growconv.shrink(model, sites[2], [1]),
    "shrunk itself": lambda model, sites: growconv.shrink(model, sites[1], [1]),
    "a layer inserted": lambda model, sites: growconv.insert_layer(model, sites[1]),
    "a layer inserted in front": lambda model, sites: growconv.insert_layer(model, sites[0]),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_older_than_a_change_grows_rightly_or_is_refused_by_name(method: str) -> None:
    """Proposals and statistics alike; the same proposal may come twice. Only splitting moves outputs."""
    solver, amplitude = get_solver(method), 1.0 if method == "net2net" else 0.0  # copies take over from old channels
    options = {"random_starts": 1} if method == "exact" else {}
    model, x, y = build()
    sites = growconv.find_sites(model, x)
    subjects = {site.name: site for site in sites}
    if solver.reads:
        kept = {"keep_samples": 12} if "samples" in solver.reads else {}
        subjects = growconv.collect_statistics(model, sites, [(x, y)], F.cross_entropy, quantities=solver.reads, **kept)
    early = growconv.solve(subjects[sites[1].name], method, 2, **options)
    untouched = model, sites, subjects, early
    for change in CHANGES.values():
        for late in (False, True):
            model, sites, subjects, growth = copy.deepcopy(untouched)
            change(model, sites)
            before, shapes = model.eval()(x), [parameter.shape for parameter in model.parameters()]
            for _ in range(2):
                refused = None
                try:
                    if late:
                        growth = growconv.solve(subjects[sites[1].name], method, 2, **options)
                    growconv.grow(model, sites[1], growth, amplitude=amplitude)
                except GrowthError as error:
                    refused = str(error)
                if refused is not None:
                    assert refused.startswith((sites[1].name, *sites[1].producers, *sites[1].consumers))
                    assert [parameter.shape for parameter in model.parameters()] == shapes
                if refused is not None or method != "splitting":
                    torch.testing.assert_close(model(x), before)
                before, shapes = model(x), [parameter.shape for parameter in model.parameters()]
            model.train()(x).sum().backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
