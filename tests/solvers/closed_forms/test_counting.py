"""Error bars of gains and channels="auto"."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from growconv.errors import StatisticsError
from growconv.solvers import measure_gains, solve
from growconv.solvers.energy import captured_by_sample
from growconv.statistics.held_out import without
from tests.solvers.closed_forms.test_assembly import SAMPLED

from .pairs import collected, pair, teacher_batches


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
