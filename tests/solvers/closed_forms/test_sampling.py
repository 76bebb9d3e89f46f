"""Error bars of gains, channels="auto" and samples="auto": collecting stops when the gains are known, not before."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import growconv
from growconv.errors import ArgumentValueError, ScheduleError, SolverError, StatisticsError
from growconv.solvers import Request, collect_until_known, get_solver, measure_gains, solve
from growconv.solvers.energy import captured_by_sample
from growconv.solvers.sampling import held_out_gains
from growconv.statistics.pair import without
from tests.solvers.closed_forms.test_assembly import SAMPLED

from .pairs import collected, pair, squared_error, teacher_batches


def test_error_bars_shrink_with_the_samples_and_cover_the_truth() -> None:
    model = pair(between=lambda _: [nn.ReLU()])
    batches = teacher_batches(model, channels=3, noise=1.0, samples=300)
    _, stats = collected(model, batches, quantities=SAMPLED, keep_samples=300)
    growth = solve(stats, "tiny", channels=2)
    full = measure_gains(stats, growth)
    part = measure_gains(replace(stats, samples_kept=stats.samples_kept.subset(slice(0, 75))), growth)
    torch.testing.assert_close(part.errors, 2 * full.errors, rtol=0.35, atol=0)
    assert ((part.gains - full.gains).abs() < 4 * part.errors).all()
    per_sample = captured_by_sample(stats, growth)
    draws = torch.randint(0, 300, (400, 300), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(per_sample[draws].mean(1).std(0), full.errors, rtol=0.15, atol=0)
    assert "±" in str(full)


def test_gains_of_linear_channels_are_the_gains_on_the_object() -> None:
    model = pair()
    _, stats = collected(model, teacher_batches(model, channels=3, noise=0.5), quantities=SAMPLED, keep_samples=96)
    growth = solve(stats, "tiny", channels=3)
    torch.testing.assert_close(measure_gains(stats, growth).gains, growth.gains, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_taking_samples_out_equals_never_having_seen_them(bias: bool) -> None:
    model = pair(bias=bias, between=lambda _: [nn.ReLU(), nn.AvgPool2d(2)])
    batches = teacher_batches(nn.Sequential(model[0], model[-1]), channels=3, samples=48)
    batches = [(x, model(x).detach() + torch.randn_like(model(x))) for x, _ in batches]
    _, stats = collected(model, batches, quantities=SAMPLED, keep_samples=32)
    _, rest = collected(model, batches[1:], quantities=SAMPLED, keep_samples=32)
    kept = stats.samples_kept
    reduced = without(stats, kept.subset(slice(0, 16)), kept.subset(slice(16, None)))
    assert (reduced.samples, len(reduced.samples_kept)) == (32, 16)
    for name in ("S", "N_raw", "M", "S2", "S_full", "N"):
        torch.testing.assert_close(getattr(reduced.consumer, name), getattr(rest.consumer, name), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(reduced.patch_gram, rest.patch_gram)


def test_auto_finds_the_planted_number_and_nothing_in_noise() -> None:
    model = pair(4, 2, 5, second=1, padding=0, bias=False)
    with torch.no_grad():
        model[0].weight.zero_()
    batches = teacher_batches(model, channels=3, noise=0.3, samples=600, size=(6, 6))
    _, stats = collected(model, batches, quantities=SAMPLED, keep_samples=400)
    growth = solve(stats, "tiny", channels="auto")
    assert growth.channels == 3
    assert "3 of" in str(growth.reason)
    assert "error bars" in str(growth.reason)
    noise = [(x, torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))) for x, y in batches]
    _, stats = collected(model, noise, quantities=SAMPLED, keep_samples=400)
    assert solve(stats, "tiny", channels="auto").channels <= 1


def test_auto_and_error_bars_need_samples() -> None:
    model = pair()
    _, stats = collected(model, teacher_batches(model, channels=2))
    with pytest.raises(StatisticsError, match="needs kept samples"):
        solve(stats, "tiny", channels="auto")
    with pytest.raises(StatisticsError, match="needs kept samples"):
        measure_gains(stats, solve(stats, "tiny", channels=2))
    _, stats = collected(model, teacher_batches(model, channels=2), quantities=SAMPLED, keep_samples=1000)
    few = replace(stats, samples=40, consumers=tuple(replace(r, samples=40) for r in stats.consumers))
    with pytest.raises(StatisticsError, match="no samples would be left"):
        solve(few, "tiny", channels="auto")


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
