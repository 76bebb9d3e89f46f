"""From a closed form to a proposal: signs through the real activation, moments of norms, first-order decrease."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import growconv
from growconv.solvers import solve
from growconv.solvers.assembly import choose_signs

from .pairs import added, collected, pair, squared_error, teacher_batches

SAMPLED = {"S", "N", "S_full", "patch", "samples"}


def real_change(model: nn.Sequential, growth: Any, x: torch.Tensor) -> torch.Tensor:
    """What new channels add to the output, by plain calls of the model's own activation."""
    first, second = model[0], model[-1]
    hidden = nn.functional.conv2d(x, growth.alpha, growth.alpha_bias, first.stride, first.padding)
    for layer in model[1:-1]:
        hidden = hidden if isinstance(layer, nn.BatchNorm2d) else layer(hidden)
    return nn.functional.conv2d(hidden, growth.omega, None, second.stride, second.padding)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SELU, nn.Tanh])
@pytest.mark.parametrize("method", ["tiny", "exact"])
def test_the_chosen_signs_are_the_better_ones(activation: type[nn.Module], method: str) -> None:
    model = pair(between=lambda _: [activation()])
    batches = teacher_batches(model, channels=4, noise=0.3, samples=48)
    _, stats = collected(model, batches, quantities=SAMPLED, keep_samples=48)
    chosen = solve(stats, method, channels=3)
    kept = stats.samples_kept
    v_perp, x = kept.v_perp("2"), kept.x["0"]
    for channel in range(3):
        shares = []
        for sign in (1, -1):
            one = chosen.subset([channel])
            one = replace(
                one,
                incoming={"0": sign * one.alpha},
                incoming_bias={"0": sign * one.alpha_bias},
                outgoing={"2": sign * one.omega},
            )
            delta = real_change(model, one, x)
            shares.append(float((v_perp * delta).sum().clamp_min(0) ** 2 / delta.square().sum()))
        assert shares[0] >= shares[1] * (1 - 1e-6)
    fixed = solve(stats, method, channels=3, signs=False)
    torch.testing.assert_close(chosen.alpha.abs(), fixed.alpha.abs(), rtol=1e-5, atol=1e-9)
    if activation is nn.Tanh:  # an odd function cannot tell them apart
        torch.testing.assert_close(chosen.alpha, fixed.alpha)


def test_expected_decrease_is_the_slope_of_the_true_loss() -> None:
    for activation in (nn.Identity, nn.GELU, nn.ReLU, nn.SELU):
        model = pair(between=lambda _, activation=activation: [activation()])
        batches = teacher_batches(model, channels=4, noise=0.3, samples=48)
        site, stats = collected(model, batches, quantities=SAMPLED, keep_samples=48)
        growth = solve(stats, "tiny", channels=2)
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        with torch.no_grad():
            before = squared_error(model(x), y)
            growconv.grow(model, site, growth, amplitude=1e-5)
            after = squared_error(model(x), y)
        assert float(before - after) == pytest.approx(1e-5 * growth.expected_decrease, rel=1e-3)


def test_without_samples_a_curved_activation_leaves_the_decrease_open() -> None:
    model = pair(between=lambda _: [nn.ReLU()])
    _, stats = collected(model, teacher_batches(model, channels=3))
    assert solve(stats, "tiny", channels=2).expected_decrease is None
    model = pair()
    batches = teacher_batches(model, channels=3)
    _, stats = collected(model, batches)
    growth = solve(stats, "tiny", channels=2)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        slope = ((y - model(x)) * added(model, growth, x)).sum() / len(x)
    assert growth.expected_decrease == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("samples", [False, True])
def test_a_batch_norm_in_between_keeps_the_meaning_of_new_channels(samples: bool) -> None:
    model = pair(between=lambda width: [nn.BatchNorm2d(width), nn.LeakyReLU()])
    batches = teacher_batches(model.eval(), channels=3, noise=0.2, samples=48)
    model.train()
    options = {"quantities": SAMPLED, "keep_samples": 48} if samples else {}
    site, stats = collected(model, batches, **options)
    growth = solve(stats, "tiny", channels=2)
    x = torch.cat([x for x, _ in batches])
    values = nn.functional.conv2d(x, growth.alpha, growth.alpha_bias, 1, 1)
    mean, variance = growth.norms["1"]
    torch.testing.assert_close(mean, values.mean((0, 2, 3)))
    torch.testing.assert_close(variance, values.var((0, 2, 3), unbiased=False))
    expected = real_change(model, growth, x)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.eval()
        before = model(x)
        model.train()
        before_in_training = model(x)
        model.load_state_dict(frozen)
        growconv.grow(model, site, growth)
        torch.testing.assert_close(model(x) - before_in_training, expected, rtol=1e-4, atol=1e-5)
        model.eval()
        model[1].load_state_dict({**model[1].state_dict(), **_running(model[1], frozen, growth)})
        torch.testing.assert_close(model(x) - before, expected, rtol=1e-6, atol=1e-8)


def _running(norm: nn.BatchNorm2d, old: dict[str, torch.Tensor], growth: Any) -> dict[str, torch.Tensor]:
    """Running moments as they were before the training step, the new channels' own behind."""
    mean, variance = growth.norms["1"]
    return {
        "running_mean": torch.cat([old["1.running_mean"], mean]),
        "running_var": torch.cat([old["1.running_var"], variance]),
    }


def test_signs_are_repeatable() -> None:
    model = pair(between=lambda _: [nn.ReLU()])
    _, stats = collected(model, teacher_batches(model, channels=3), quantities=SAMPLED, keep_samples=64)
    growth = solve(stats, "tiny", channels=3)
    again = choose_signs(stats, growth)
    torch.testing.assert_close(again.alpha, growth.alpha)
    torch.testing.assert_close(again.norms, growth.norms)
