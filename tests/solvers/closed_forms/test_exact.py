"""exact: teachers recovered, three routes one result, and J measured by plain convolutions."""

from typing import Any

import pytest
import torch
from torch import nn

from growconv.errors import ArgumentValueError, StatisticsError
from growconv.linalg import DenseMetric, bilinear_least_squares
from growconv.network.find import find_sites
from growconv.solvers import exact, solve
from growconv.statistics import collect_statistics

from .pairs import added, collected, desire, pair, silent, squared_error, teacher_batches

EVERYTHING = {"S", "N", "S_full", "patch"}


def left_over(model: nn.Sequential, batches: list, growth: Any) -> float:
    x, wanted = desire(model, batches)
    return float((wanted - added(model, growth, x)).square().sum() / wanted.square().sum())


def test_the_teacher_of_the_study_geometry_is_recovered() -> None:
    """(3, 5) behind (5, 3) without padding: S_full has rank 96 of 1125, and two convs are one."""
    model = silent(pair(5, 2, 7, (3, 5), (5, 3), padding=0, bias=False))
    batches = teacher_batches(model, channels=6, samples=150, size=(9, 10))
    _, stats = collected(model, batches, quantities=EVERYTHING)
    growth = solve(stats, "exact", channels=6, signs=False)
    assert left_over(model, batches, growth) < 1e-8  # a relative residual of 1e-4
    assert left_over(model, batches, solve(stats, "tiny", channels=6, signs=False)) > 0.2


@pytest.mark.parametrize("channels", [2, 4])
def test_a_padded_teacher_is_recovered(channels: int) -> None:
    model = silent(pair(4, 2, 5, bias=False))
    batches = teacher_batches(model, channels)
    _, stats = collected(model, batches, quantities=EVERYTHING)
    growth = solve(stats, "exact", channels=channels, signs=False)
    assert left_over(model, batches, growth) < 1e-8
    more = solve(stats, "exact", channels=channels + 2, signs=False)
    assert more.channels == channels
    assert "the best Θ has no more directions" in str(more.reason)


def test_old_channels_cost_their_own_number_on_top() -> None:
    """v⊥ is the teacher less what the two old filters explain of it."""
    model = pair(4, 2, 5, bias=False)
    batches = teacher_batches(model, channels=2)
    _, stats = collected(model, batches, quantities=EVERYTHING)
    assert left_over(model, batches, solve(stats, "exact", channels=4, signs=False)) < 1e-8
    assert left_over(model, batches, solve(stats, "exact", channels=3, signs=False)) > 1e-3


@pytest.mark.slow
def test_within_a_percent_of_twenty_restarts() -> None:
    model = pair(4, 2, 6)
    _, stats = collected(model, teacher_batches(model, channels=8, noise=0.5, size=(5, 6)), quantities=EVERYTHING)
    energy, N, generator = stats.bottleneck_energy, stats.N, torch.Generator().manual_seed(0)
    for channels in (1, 3):
        found = energy - float(solve(stats, "exact", channels=channels, signs=False).gains.sum())
        others = [
            bilinear_least_squares(
                [(DenseMetric(stats.S_full, len(N)), N)],
                channels,
                starts=[torch.randn(channels, len(N), generator=generator, dtype=N.dtype)],
                random_starts=0,
            ).objective
            for _ in range(20)
        ]
        assert found <= (energy + min(others)) * 1.01


def test_gains_add_up_to_what_real_convolutions_capture_and_more_never_hurts() -> None:
    model = pair(4, 2, 6)
    batches = teacher_batches(model, channels=8, noise=0.5, size=(5, 6))
    _, stats = collected(model, batches, quantities=EVERYTHING)
    energy = stats.bottleneck_energy
    last = 1.0
    for channels in (1, 4):
        growth = solve(stats, "exact", channels=channels, signs=False)
        remaining = left_over(model, batches, growth)
        assert growth.channels == channels
        assert float(growth.gains.sum()) == pytest.approx((1 - remaining) * energy, rel=1e-4)
        assert all(a >= b - 1e-12 for a, b in zip(growth.gains, growth.gains[1:], strict=False))
        assert remaining < last
        last = remaining
        other = solve(stats, "tiny", channels=channels, signs=False)
        x, wanted = desire(model, batches)
        delta = added(model, other, x)
        best_scale = 1 - float((wanted * delta).sum() ** 2 / (delta.square().sum() * wanted.square().sum()))
        assert remaining <= best_scale + 1e-9


def test_the_first_filters_capture_what_their_gains_say() -> None:
    model = pair(4, 2, 6)
    _, stats = collected(model, teacher_batches(model, channels=8, noise=0.5, size=(5, 6)), quantities=EVERYTHING)
    found = exact(stats.S_full, stats.N, channels=4)
    metric, N = DenseMetric(stats.S_full, len(stats.N)), stats.N
    for first in range(1, 5):
        left = found.alpha[:first]
        linear = torch.einsum("ka,abc->kbc", left, N).flatten(0, 1)
        captured = (linear * torch.linalg.lstsq(metric.gram(left), linear).solution).sum()
        assert float(captured) == pytest.approx(float(found.gains[:first].sum()), rel=1e-3)
    assert all(later <= earlier for earlier, later in zip(found.history, found.history[1:], strict=False))


CASES = {
    "padded": {},
    "stride and dilation": {"first": 3, "second": 2, "padding": 0},
    "average pooling": {"between": lambda _: [nn.AvgPool2d(2)]},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("case", CASES)
def test_both_routes_have_one_result(case: str) -> None:
    model = pair(3, 2, 4, **CASES[case])
    if case == "stride and dilation":
        model[0].stride, model[-1].dilation = (2, 1), (1, 2)
    x = torch.randn(48, 3, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
    batches = [(x, y + torch.randn(y.shape, dtype=torch.float64))]
    _, stats = collected(model, batches, quantities=EVERYTHING | {"samples"}, keep_samples=48)
    options = {"random_starts": 0, "tolerance": 1e-8, "signs": False, "rounds": 80}
    dense, sampled = (solve(stats, "exact", channels=2, route=route, **options) for route in ("dense", "samples"))
    torch.testing.assert_close(sampled.gains, dense.gains, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(sampled.alpha, dense.alpha, rtol=0, atol=0.02 * float(dense.alpha.norm()))


def test_the_route_auto_takes_what_was_collected() -> None:
    model = silent(pair(bias=False))
    batches = teacher_batches(model, channels=2)
    _, full = collected(model, batches, quantities=EVERYTHING)
    _, samples = collected(model, batches, quantities={"update", "samples"}, keep_samples=96)
    first, second = solve(full, "exact", channels=2, signs=False), solve(samples, "exact", channels=2, signs=False)
    assert left_over(model, batches, first) < 1e-8
    assert left_over(model, batches, second) < 1e-8
    _, neither = collected(model, batches)
    for route, message in (("auto", "needs kept samples"), ("dense", "S_full was not collected")):
        with pytest.raises(StatisticsError, match=message):
            solve(neither, "exact", channels=2, route=route)
    with pytest.raises(ArgumentValueError, match=r"Exact\.route"):
        solve(full, "exact", channels=2, route="sideways")


class Fan(nn.Module):
    """One producer, two consumers of different kernels and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.producer = nn.Conv2d(3, 2, 3, padding=1)
        self.left = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.right = nn.Conv2d(2, 4, 1, stride=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.producer(x)
        return torch.cat([self.left(hidden).flatten(1), self.right(hidden).flatten(1)], 1)


def test_consumers_share_their_filters() -> None:
    torch.manual_seed(0)
    model, teacher = Fan().double(), Fan().double()
    x = torch.randn(90, 3, 7, 7, dtype=torch.float64)
    with torch.no_grad():
        model.producer.weight.zero_()
        model.producer.bias.zero_()
        batches = [(x, model(x) + teacher(x))]
    site = next(s for s in find_sites(model, x[:1]) if s.producers == ("producer",))
    assert site.kind == "fan"
    stats = collect_statistics(model, [site], batches, squared_error, quantities=EVERYTHING)[site.name]
    growth = solve(stats, "exact", channels=2, signs=False)
    assert set(growth.outgoing) == {"left", "right"}
    assert float(growth.gains.sum()) == pytest.approx(stats.bottleneck_energy, rel=1e-6)
    reduced = solve(stats, "tiny", channels=2, signs=False)
    assert {path: tuple(weight.shape) for path, weight in reduced.outgoing.items()} == {
        "left": (3, 2, 3, 3),
        "right": (4, 2, 1, 1),
    }


def test_a_linear_consumer_behind_a_flattened_map_is_a_kernel_of_the_whole_grid() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2 * 9, 5, bias=False)).double()
    teacher = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3 * 9, 5, bias=False)).double()
    x = torch.randn(150, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
        batches = [(x, model(x) + teacher(x))]
    _, stats = collected(model, batches, quantities=EVERYTHING)
    growth = solve(stats, "exact", channels=3, signs=False)
    assert growth.outgoing["3"].shape == (5, 3 * 9)
    assert float(growth.gains.sum()) == pytest.approx(stats.bottleneck_energy, rel=1e-6)


def test_float32_statistics_do_not_break_the_search() -> None:
    model = silent(pair(4, 2, 5, bias=False))
    batches = [(x.float(), y.float()) for x, y in teacher_batches(model, channels=3)]
    _, stats = collected(model.float(), batches, quantities=EVERYTHING)
    growth = solve(stats, "exact", channels=3, signs=False)
    assert growth.alpha.dtype == torch.float32
    assert float(growth.gains.sum()) == pytest.approx(stats.bottleneck_energy, rel=1e-4)


def test_bare_tensors_that_do_not_fit() -> None:
    with pytest.raises(ArgumentValueError, match="do not belong together"):
        exact(torch.eye(7), torch.ones(2, 3, 4))
    with pytest.raises(ArgumentValueError, match="not finite"):
        exact(torch.eye(6) * float("nan"), torch.ones(2, 3, 4))
    assert exact(torch.eye(6).double(), torch.zeros(2, 3, 4).double()).alpha.shape == (0, 2)
