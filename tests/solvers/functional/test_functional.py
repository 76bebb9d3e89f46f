"""The functional solver: planted channels come back, every kind of site, and what it says to bad input."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import growconv
from growconv.errors import ArgumentValueError, StatisticsError
from growconv.network.site import GrowthSite
from growconv.solvers import FewSamplesWarning, solve
from growconv.solvers.energy import captured_energy
from growconv.statistics import PairStatistics, collect_statistics

pytestmark = pytest.mark.filterwarnings("ignore::growconv.solvers.FewSamplesWarning")


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def distance(output: Tensor, target: Tensor) -> Tensor:
    """½‖z − target‖² per sample, averaged: v is target − z."""
    return 0.5 * (output - target).square().flatten(1).sum(1).mean()


def kept(model: nn.Module, site: GrowthSite, batches: list, loss=distance, samples: int = 10_000) -> PairStatistics:
    collected = collect_statistics(model, [site], batches, loss, quantities={"samples"}, keep_samples=samples)
    return collected[site.name]


def between_layers(kind: str, width: int) -> list[nn.Module]:
    return {
        "relu": [nn.ReLU()],
        "leaky_relu": [nn.LeakyReLU(0.1)],
        "gelu": [nn.GELU()],
        "silu": [nn.SiLU()],
        "selu": [nn.SELU()],
        "tanh": [nn.Tanh()],
        "norm": [nn.BatchNorm2d(width), nn.ReLU(inplace=True)],
        "max pool": [nn.ReLU(), nn.MaxPool2d(2)],
        "average pool": [nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(0.5)],
    }[kind]


KINDS = ["relu", "leaky_relu", "gelu", "silu", "selu", "tanh", "norm", "max pool", "average pool"]


def student_and_data(kind: str) -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """A model of width 1 whose consumer should also give what two planted channels would add."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(2, 1, 3, padding=1), *between_layers(kind, 1), nn.Conv2d(1, 3, 3, padding=1))
    planted = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), *between_layers(kind, 2), nn.Conv2d(2, 3, 3, padding=1))
    student.eval(), planted.eval()
    batches = []
    for _ in range(3):
        x = torch.randn(120, 2, 8, 8)
        with torch.no_grad():
            batches.append((x, student(x) + planted(x)))
    return student, batches[:2], batches[2:]


@pytest.mark.parametrize("kind", KINDS)
def test_planted_channels_come_back(kind: str) -> None:
    student, batches, held_out = student_and_data(kind)
    (site,) = growconv.find_sites(student, batches[0][0][:1])
    functional = solve(kept(student, site, batches), "functional", 2, iterations=60, generator=seed())
    assert functional.channels == 2
    assert functional.reason is None
    found = captured_energy(student, site, functional, held_out, distance)
    tiny_statistics = collect_statistics(student, [site], batches, distance, quantities={"S", "N", "patch"})[site.name]
    closed = captured_energy(student, site, solve(tiny_statistics, "tiny", 2, signs=False), held_out, distance)
    assert found > 0.75
    assert 1 - found < 0.7 * (1 - closed)
    with torch.no_grad():
        x, target = held_out[0]
        before = student.eval()(x)
        growconv.grow(student, site, functional)
        wanted, added = target - before, student.eval()(x) - before
        # L(0) − L(γ) = γ⟨v, δz⟩ − γ²‖δz‖²/2: amplitude 1 takes away most of what the best scale would
        agreement, size = float((wanted * added).sum()), float(added.square().sum())
        assert agreement - size / 2 > 0.8 * agreement**2 / (2 * size)


def test_filters_have_the_norm_of_the_old_ones_where_the_activation_is_homogeneous() -> None:
    student, batches, _ = student_and_data("relu")
    (site,) = growconv.find_sites(student, batches[0][0][:1])
    growth = solve(kept(student, site, batches), "functional", 2, iterations=3, generator=seed())
    assert growth.alpha_bias is not None
    norms = torch.cat([growth.alpha.flatten(1), growth.alpha_bias[:, None]], 1).norm(dim=1)
    old = torch.cat([student[0].weight.flatten(1), student[0].bias[:, None]], 1).norm(dim=1).mean().detach()
    torch.testing.assert_close(norms, old.expand(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", [True, False])
def test_filters_behind_a_curved_activation_are_no_steeper_than_the_old_ones(norm: bool) -> None:
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.SELU(), nn.Conv2d(4, 5, 3)
    )
    x, y = torch.randn(96, 3, 8, 8), torch.randn(96, 5, 6, 6)
    conv, bn = student[0], student[1]
    if isinstance(bn, nn.BatchNorm2d):
        nn.init.uniform_(bn.weight, 0.5, 3.0)
    student(3 * x)
    (site,) = growconv.find_sites(student.eval(), x[:1])
    growth = solve(kept(student, site, [(x, y)], F.mse_loss), "functional", 3, iterations=4, generator=seed())
    fused = fuse_conv_bn_eval(conv, bn) if norm else conv
    slope = (fused.weight.flatten(1).norm(dim=1) / conv.weight.flatten(1).norm(dim=1)).detach()
    own = torch.cat([conv.weight.flatten(1), conv.bias[:, None]], 1).norm(dim=1).detach()
    assert growth.alpha_bias is not None
    norms = torch.cat([growth.alpha.flatten(1), growth.alpha_bias[:, None]], 1).norm(dim=1)
    assert float(norms.max()) <= float((slope * own).mean()) * (1 + 1e-5)


def residual_model() -> nn.Module:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = (nn.Conv2d(n, m, 3, padding=1) for n, m in ((2, 4), (4, 5), (5, 4)))
            self.norm, self.head = nn.BatchNorm2d(5), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            x = F.relu(x + self.b(F.relu(self.norm(self.a(x)))))
            return self.head(x).mean((2, 3))

    return Residual()


def fan_model() -> nn.Module:
    class Fan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 3, 1)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.stem(x))
            return self.head(F.relu(self.a(x)).mean((2, 3))) + self.b(x).mean((2, 3))

    return Fan()


def tail(channels: int, axes: int = 2) -> list[nn.Module]:
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[axes - 1](1)
    return [pool, nn.Flatten(), nn.Linear(channels, 3)]


MODELS = {
    "strided": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.SiLU(), nn.Conv2d(3, 4, (1, 3)), *tail(4)), 2),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), *tail(4)),
        2,
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU6(), nn.Conv2d(4, 3, 1), *tail(3)
        ),
        2,
    ),
    "flatten": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 5), nn.Tanh(), nn.Linear(5, 3)
        ),
        2,
    ),
    "1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.GELU(), nn.Conv1d(3, 4, 3, dilation=2), *tail(4, 1)), 1),
    "3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU(), nn.Conv3d(3, 4, 2), *tail(4, 3)), 3),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 3, 2, stride=2),
            nn.ReLU(),
            nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
            *tail(4),
        ),
        2,
    ),
    "stream": (residual_model, 2),
    "fan": (fan_model, 2),
    "tokens": (lambda: nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 5), nn.Flatten(1), nn.Linear(80, 3)), 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_sites_of_every_kind(name: str) -> None:
    torch.manual_seed(0)
    build, axes = MODELS[name]
    model = build().double().eval()
    x = torch.randn(60, 2, *[8] * axes, dtype=torch.float64) if axes < 3 else torch.randn(60, 2, 5, 5, 5).double()
    y = (x.flatten(1).square().mean(1) * 30).long() % 3
    for site in growconv.find_sites(model, x[:1]):
        statistics = kept(model, site, [(x[:30], y[:30]), (x[30:], y[30:])], F.cross_entropy)
        growth = solve(statistics, "functional", 2, iterations=4, trial_iterations=1, generator=seed())
        assert growth.channels == site.growable_channels(2)
        assert growth.gains.tolist() == sorted(growth.gains.tolist(), reverse=True)
        assert float(growth.gains[0]) > 0
        # all samples: the weights solve the least-squares problem, so that they cannot fail to capture something
        assert captured_energy(model, site, growth, [(x, y)], F.cross_entropy) > 0
        grown, same = copy.deepcopy((model, site))
        growconv.grow(grown, same, growth, amplitude=0.0)
        torch.testing.assert_close(grown(x), model(x), rtol=1e-10, atol=1e-10)


def test_norms_are_inserted_with_the_channels_own_moments() -> None:
    student, batches, _ = student_and_data("norm")
    (site,) = growconv.find_sites(student, batches[0][0][:1])
    growth = solve(kept(student, site, batches), "functional", 2, iterations=3, generator=seed())
    x = torch.cat([x for x, _ in batches])
    own = F.conv2d(x, growth.alpha, growth.alpha_bias, padding=1)
    mean, variance = growth.norms["1"]
    torch.testing.assert_close(mean.float(), own.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variance.float(), own.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_channels() -> None:
    student, batches, _ = student_and_data("relu")
    (site,) = growconv.find_sites(student, batches[0][0][:1])
    statistics = kept(student, site, batches)
    first, second = (solve(statistics, "functional", 2, iterations=3, generator=seed()) for _ in range(2))
    torch.testing.assert_close(first.alpha, second.alpha, rtol=0, atol=0)
    torch.testing.assert_close(first.omega, second.omega, rtol=0, atol=0)


def test_auto_keeps_what_the_data_supports() -> None:
    student, batches, _ = student_and_data("relu")
    (site,) = growconv.find_sites(student, batches[0][0][:1])
    found = solve(kept(student, site, batches), "functional", "auto", iterations=15, generator=seed())
    assert 2 <= found.channels <= 4
    noise = [(x, student(x).detach() + torch.randn(120, 3, 8, 8)) for x, _ in batches]
    none = solve(kept(student, site, noise), "functional", "auto", iterations=5, generator=seed())
    assert none.channels <= 1
    assert "error bar" in str(none.reason)


def test_nothing_to_gain() -> None:
    student, batches, _ = student_and_data("relu")
    (site,) = growconv.find_sites(student, batches[0][0][:1])
    with torch.no_grad():
        solved = [(x, student(x)) for x, _ in batches]
    growth = solve(kept(student, site, solved), "functional", 2)
    assert growth.channels == 0
    assert "nothing to gain" in str(growth.reason)
    assert growth.expected_decrease == 0.0


def test_too_few_samples_are_said_with_the_number_needed() -> None:
    student, batches, _ = student_and_data("relu")
    (site,) = growconv.find_sites(student, batches[0][0][:1])
    parameters = 2 * (2 * 9 + 1 + 3 * 9)
    with pytest.warns(FewSamplesWarning, match=f"keep_samples={parameters}"):
        solve(kept(student, site, batches, samples=parameters - 1), "functional", 2, iterations=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(kept(student, site, batches, samples=parameters), "functional", 2, iterations=1)
    with pytest.raises(ArgumentValueError, match="at least 2"):
        solve(kept(student, site, batches, samples=1), "functional", 2)


def test_samples_that_are_not_finite() -> None:
    student, batches, _ = student_and_data("relu")
    (site,) = growconv.find_sites(student, batches[0][0][:1])
    statistics = kept(student, site, batches)
    assert statistics.samples_kept is not None
    statistics.samples_kept.passes[0].v["2"][0][3, 0, 0, 0] = float("nan")
    with pytest.raises(StatisticsError, match="not finite"):
        solve(statistics, "functional", 2)


@pytest.mark.parametrize(
    "options", [{"iterations": -1}, {"trial_iterations": -1}, {"patience": 0}, {"held_out": 1.0}, {"damping": 0.0}]
)
def test_impossible_hyperparameters(options: dict) -> None:
    with pytest.raises(ArgumentValueError):
        growconv.solvers.Functional(**options)


def test_half_precision_models() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.PReLU(3), nn.Conv2d(3, 4, 3)).bfloat16().eval()
    x, target = torch.randn(40, 2, 8, 8).bfloat16(), torch.randn(40, 4, 4, 4).bfloat16()
    (site,) = growconv.find_sites(model, x[:1])
    growth = solve(kept(model, site, [(x, target)]), "functional", 2, iterations=3, generator=seed())
    assert growth.alpha.dtype == growth.omega.dtype == torch.bfloat16
    growconv.grow(model, site, growth)
    assert model(x).dtype == torch.bfloat16
