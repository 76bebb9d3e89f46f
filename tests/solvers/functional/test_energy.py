"""Captured energy and decrease against the grown model; error bars of gains; "auto" channels and samples."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growconv
from growconv.errors import ArgumentValueError, ScheduleError, SolverError, StatisticsError
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite
from growconv.solvers import (
    LinearisationWarning,
    Request,
    collect_until_known,
    expected_decrease,
    get_solver,
    measure_gains,
    solve,
)
from growconv.solvers.base import linearisation_note
from growconv.solvers.energy import captured_by_sample, captured_energy, held_out_gains
from growconv.statistics import collect_statistics
from growconv.statistics.pair import without
from tests.solvers.closed_forms.pairs import collected, pair, squared_error, teacher_batches
from tests.solvers.closed_forms.test_assembly import SAMPLED


def small_model(activation: Callable[[], nn.Module], norm: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    between = [nn.BatchNorm2d(3), activation()] if norm else [activation()]
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), *between, nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)
    ).double()
    return model.eval()


def data(samples: int = 60, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, 8, 8, generator=generator, dtype=torch.float64)
    return x, (x.mean((1, 2, 3)) * 20).round().long().remainder(3)


def first_site(model: nn.Module) -> GrowthSite:
    return growconv.find_sites(model, data(1)[0])[0]


def proposal(model: nn.Module, method: str = "functional", channels: int = 2, **options) -> ChannelGrowth:
    site = first_site(model)
    quantities = {"samples"} if method == "functional" else {"samples", "S", "N", "patch"}
    statistics = collect_statistics(model, [site], [data()], F.cross_entropy, quantities=quantities, keep_samples=60)[
        site.name
    ]
    return solve(statistics, method, channels, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.filterwarnings("ignore::growconv.solvers.FewSamplesWarning")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_captured_energy_against_the_grown_model(activation: type[nn.Module], norm: bool) -> None:
    model = small_model(activation, norm)
    consumer_name = "3" if norm else "2"
    site, growth = first_site(model), proposal(model)
    x, y = data(40, seed=2)

    # an independent referee: differences of the consumer's output, and a least-squares fit of v on its patches
    outputs: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        outputs["h"], outputs["z"] = args[0], output

    consumer: nn.Conv2d = model.get_submodule(consumer_name)  # pyright: ignore[reportAssignmentType]
    handle = consumer.register_forward_hook(keep)
    loss = F.cross_entropy(model(x), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, outputs["z"])
    h, before = outputs["h"].detach(), outputs["z"].detach()
    handle.remove()
    patches = F.unfold(h, 3, stride=2)
    design = torch.cat([patches, torch.ones_like(patches[:, :1])], 1).transpose(1, 2).flatten(0, 1)
    v = -gradient.flatten(2).transpose(1, 2).flatten(0, 1)
    bottleneck = v - design @ torch.linalg.lstsq(design, v).solution
    grown = copy.deepcopy(model)
    growconv.grow(grown, first_site(grown), growth)
    handle = grown.get_submodule(consumer_name).register_forward_hook(keep)
    grown(x)
    handle.remove()
    delta = (outputs["z"].detach() - before).flatten(2).transpose(1, 2).flatten(0, 1)
    energy = float((bottleneck * delta).sum() ** 2 / (bottleneck.square().sum() * delta.square().sum()))

    measured = captured_energy(model, site, growth, [(x[:25], y[:25]), (x[25:], y[25:])], F.cross_entropy)
    if float((bottleneck * delta).sum()) < 0:
        assert measured == 0.0
    else:
        assert measured == pytest.approx(energy, rel=1e-4, abs=1e-9)


@pytest.mark.filterwarnings("ignore::growconv.solvers.FewSamplesWarning")
@pytest.mark.parametrize(
    ("activation", "tolerance"),
    [(nn.Identity, 0.02), (nn.Tanh, 0.02), (nn.GELU, 0.02), (nn.SiLU, 0.02), (nn.ReLU, 0.05), (nn.SELU, 0.05)],
)
@pytest.mark.parametrize("method", ["functional", "tiny"])
def test_predicted_decrease_against_the_measured_one(
    activation: type[nn.Module], tolerance: float, method: str
) -> None:
    model = small_model(activation)
    growth = proposal(model, method)
    x, y = data()
    with torch.no_grad():
        before = F.cross_entropy(model(x), y)
        amplitude = 1e-3 / max(float(weight.abs().max()) for weight in growth.outgoing.values())
        grown = copy.deepcopy(model)
        growconv.grow(grown, first_site(grown), growth, amplitude=amplitude)
        measured = float(before - F.cross_entropy(grown(x), y))
    assert growth.expected_decrease is not None
    assert measured > 0
    assert amplitude * growth.expected_decrease == pytest.approx(measured, rel=tolerance)


def test_without_samples_the_decrease_is_that_of_the_linear_part() -> None:
    model = small_model(nn.Identity)
    site = first_site(model)
    growth = proposal(model, "tiny")
    plain = collect_statistics(model, [site], [data()], F.cross_entropy, quantities={"N_raw"})[site.name]
    kept = collect_statistics(model, [site], [data()], F.cross_entropy, quantities={"samples"}, keep_samples=60)
    assert expected_decrease(plain, growth) == pytest.approx(expected_decrease(kept[site.name], growth), rel=1e-8)


def test_no_channels_capture_nothing() -> None:
    model = small_model(nn.ReLU)
    site, growth = first_site(model), proposal(model, "tiny")
    none = ChannelGrowth(
        site=site.name,
        method="none",
        incoming={path: weight[:0] for path, weight in growth.incoming.items()},
        outgoing={path: weight[:, :0] for path, weight in growth.outgoing.items()},
        gains=growth.gains[:0],
    )
    assert captured_energy(model, site, none, [data()], F.cross_entropy) == 0.0


def test_the_update_of_other_samples_defines_the_bottleneck() -> None:
    model = small_model(nn.ReLU)
    site, growth = first_site(model), proposal(model, "tiny")
    statistics = collect_statistics(model, [site], [data()], F.cross_entropy, quantities={"update"})[site.name]
    own = captured_energy(model, site, growth, [data()], F.cross_entropy)
    same = captured_energy(model, site, growth, [data()], F.cross_entropy, statistics=statistics)
    other = captured_energy(model, site, growth, [data(60, seed=5)], F.cross_entropy, statistics=statistics)
    assert same == pytest.approx(own, rel=1e-4)
    assert other != pytest.approx(own, rel=1e-4)


def test_samples_are_needed() -> None:
    model = small_model(nn.ReLU)
    site = first_site(model)
    statistics = collect_statistics(model, [site], [data()], F.cross_entropy, quantities={"S", "N"})[site.name]
    with pytest.raises(StatisticsError, match="keep_samples"):
        solve(statistics, "functional", 2)


def test_what_linear_methods_mean_behind_a_sigmoid() -> None:
    note = linearisation_note(first_site(small_model(nn.Sigmoid)))
    assert note is not None
    assert "0.5 at 0" in note
    assert linearisation_note(first_site(small_model(nn.ReLU, norm=True))) is None


@pytest.mark.parametrize("method", ["tiny", "exact", "functional"])
@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.ReLU])
@pytest.mark.filterwarnings("ignore::growconv.solvers.FewSamplesWarning")
def test_linear_methods_warn_behind_a_sigmoid(method: str, activation: Any) -> None:
    model = small_model(activation)
    site = first_site(model)
    reads = {"S", "N", "S_full", "samples"}
    stats = collect_statistics(model, [site], [data()], F.cross_entropy, quantities=reads, keep_samples=64)[site.name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solve(stats, method, 2)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, LinearisationWarning)]
    assert len(said) == (activation is nn.Sigmoid and method != "functional")
    assert all("0.5 at 0" in note and site.name in note for note in said)


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
