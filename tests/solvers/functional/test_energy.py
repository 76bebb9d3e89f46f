"""Captured energy and first-order decrease against the model that has really grown."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growconv
from growconv.errors import StatisticsError
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite
from growconv.solvers import LinearisationWarning, expected_decrease, solve
from growconv.solvers.base import linearisation_note
from growconv.solvers.energy import captured_energy
from growconv.statistics import collect_statistics


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
