"""samples="auto": collecting stops when the gains are known, not before, and not after."""

import pytest
import torch
from torch import nn

import growconv
from growconv.errors import ArgumentValueError, ScheduleError, SolverError, StatisticsError
from growconv.solvers import collect_until_known, get_solver
from growconv.solvers.counting import held_out_gains
from growconv.solvers.request import Request

from .pairs import pair, squared_error, teacher_batches


def noisy() -> tuple[nn.Sequential, list[tuple[torch.Tensor, torch.Tensor]]]:
    model = pair(between=lambda _: [nn.ReLU()])
    parts = teacher_batches(model, channels=3, noise=1.0, samples=384)
    return model, [(x, y) for xs, ys in parts for x, y in zip(xs.split(8), ys.split(8), strict=True)]


def test_collection_stops_when_the_gains_are_known() -> None:
    model, batches = noisy()
    site = growconv.find_sites(model, batches[0][0])[0]
    used = []
    for error in (0.5, 0.1, 1e-6):
        source = iter(batches)
        stats = collect_until_known(model, {site: 2}, source, squared_error, "tiny", error)[site.name]
        used.append(stats.samples)
        assert stats.samples + 8 * len(list(source)) == 384  # nothing was read that was not used
        if error > 1e-6:
            _, measured = held_out_gains(get_solver("tiny").solve, Request(site, 2, stats))
            assert measured.relative_error * (measured.samples / stats.samples) ** 0.5 <= error
    assert used[0] < used[1] < used[2] == 384


def test_the_statistics_are_those_of_the_batches_read() -> None:
    model, batches = noisy()
    site = growconv.find_sites(model, batches[0][0])[0]
    stats = collect_until_known(model, {site: 2}, batches, squared_error, "tiny", 0.3)[site.name]
    first = batches[: stats.samples // 8]
    again = growconv.collect_statistics(model, [site], first, squared_error, quantities={"S", "N"})[site.name]
    torch.testing.assert_close(stats.S, again.S, rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.N, again.N, rtol=1e-9, atol=1e-12)


def test_a_schedule_reads_what_it_needs() -> None:
    taken = {}
    for error in (0.5, 1e-6):
        model, batches = noisy()
        sites = growconv.find_sites(model, batches[0][0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = growconv.GrowthScheduler(
            model, optimizer, sites, every=1, amount=1, held_out=0.25, samples="auto", relative_error=error
        )
        assert scheduler.due(1)
        (event,) = scheduler.grow(batches, squared_error)
        taken[error] = event.details["samples"]
    assert taken[0.5] < taken[1e-6] == 288  # three quarters of the batches; the rest chooses the amplitude


def test_bad_arguments() -> None:
    model, batches = noisy()
    site = growconv.find_sites(model, batches[0][0])[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(StatisticsError, match="no batches"):
        collect_until_known(model, {site: 2}, [], squared_error)
    with pytest.raises(ArgumentValueError, match="must be positive"):
        collect_until_known(model, {site: 2}, batches, squared_error, relative_error=0.0)
    with pytest.raises(SolverError, match="no gains to estimate from samples"):
        collect_until_known(model, {site: 2}, batches, squared_error, "net2net")
    with pytest.raises(SolverError, match="no gains to estimate from samples"):
        growconv.GrowthScheduler(model, optimizer, [site], method="random", samples="auto")
    with pytest.raises(ScheduleError, match="no number of samples"):
        growconv.GrowthScheduler(model, optimizer, [site], samples="many")
    with pytest.raises(ScheduleError, match="must be positive"):
        growconv.GrowthScheduler(model, optimizer, [site], samples="auto", relative_error=0)
