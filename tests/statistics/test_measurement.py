"""N where P does not fit: the second pass; second moments of some losses only."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import growconv
from growconv.errors import ArgumentValueError, StatisticsError
from growconv.statistics import StatisticsCollector, best_updates, collect_statistics
from growconv.training.models import BasicBlock, ResidualNet
from tests.statistics.test_collector import X, Y, collected, network, site_of


def test_the_second_pass_gives_the_same_n():
    model = network(norm=True).double().eval()
    batches = [(X[:2].double(), Y[:2]), (X[2:].double(), Y[2:])]
    site = site_of(model)
    loss = lambda z, y: F.cross_entropy(z, y, reduction="sum")  # noqa: E731
    one = collect_statistics(model, site, batches, loss, reduction="sum")[site.name]
    two = collect_statistics(model, site, batches, loss, reduction="sum", scratch_bytes=10_000)[site.name]
    assert two.P is None
    assert one.P is not None
    torch.testing.assert_close(two.N, one.N, rtol=1e-9, atol=1e-12)
    assert two.bottleneck_energy == pytest.approx(one.bottleneck_energy)
    assert any("second pass" in note for note in two.notes)
    with pytest.raises(StatisticsError, match="cannot be merged"):
        two + two


@pytest.mark.parametrize(
    "quantities", [{"N"}, {"S", "N", "patch"}, {"N", "N_raw", "S_full", "update"}, {"N", "P"}], ids=sorted
)
@pytest.mark.parametrize("moments_every", [1, 2])
def test_with_w_known_n_is_summed_at_once(quantities, moments_every):
    """Against statistics that learn W* from the same batches."""
    model = network(norm=True).double().eval()
    site = site_of(model)
    batches = [(X[part].double(), Y[part]) for part in (slice(0, 2), slice(2, 4), slice(4, 6))]
    options = {"quantities": quantities, "moments_every": moments_every, "hold_bytes": 0}
    expected = collect_statistics(model, site, batches, F.cross_entropy, **options)[site.name]
    first = collect_statistics(model, site, batches, F.cross_entropy, **options | {"quantities": {"update"}})
    known = {**options, "updates": best_updates(first)}
    found = collect_statistics(model, site, batches, F.cross_entropy, **known)[site.name]
    assert not found.notes
    assert found.samples == 6
    if moments_every == 1 or "P" not in quantities:  # with P it is computed from M and S2, not summed
        assert found.bottleneck_energy == pytest.approx(expected.bottleneck_energy)
    assert found.gradient_energy == pytest.approx(expected.gradient_energy)
    own = {"update": {"M", "S2", "update"}, "patch": {"patch_mean", "patch_gram"}}
    for name in set().union(*(own.get(each, {each}) for each in quantities)):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    parts = [collect_statistics(model, site, part, F.cross_entropy, **known) for part in (batches[:2], batches[2:])]
    both = parts[0][site.name] + parts[1][site.name]
    torch.testing.assert_close(both.N, found.N, rtol=1e-9, atol=1e-12)


def test_how_n_is_summed_with_w_known_is_told_once():
    model = network()
    site = site_of(model)
    first = collect_statistics(model, site, [(X, Y)], F.cross_entropy, quantities={"update"})
    collector = StatisticsCollector(model, site, quantities={"S", "N", "N_raw"}, updates=best_updates(first))
    with collector:
        F.cross_entropy(model(X), Y).backward()
    told = [line.split(" by ")[0].strip() for line in collector.explain().splitlines()[1:]]
    assert sorted(told) == ["N", "N_raw", "S"]


def test_w_alone_asks_nothing_of_producers():
    """Of residual streams and of a linear layer behind a flattened map, against W* from the held batches."""
    torch.manual_seed(0)
    blocks = ResidualNet(BasicBlock, ((4, 2), (6, 1)), 4, in_channels=3, classes=5, image_size=8)
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))
    batches = [(torch.randn(3, 3, 8, 8).double(), torch.tensor([0, 1, 4])) for _ in range(2)]
    for model in (blocks.double().eval(), flat.double()):
        sites = growconv.find_sites(model, batches[0][0])
        asked = {"quantities": {"S", "update"}}
        expected = collect_statistics(model, sites, batches, F.cross_entropy, **asked)
        found = collect_statistics(model, sites, batches, F.cross_entropy, quantities={"update"})
        wanted = best_updates(expected)
        assert best_updates(found).keys() == wanted.keys()
        assert len(wanted) == sum(len(site.consumers) for site in sites)
        for key, value in best_updates(found).items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-7, atol=1e-10)
        assert [each.incoming_shapes for each in found.values()] == [each.incoming_shapes for each in expected.values()]


def test_a_hand_written_loop_is_told_about_the_second_pass():
    model = network()
    site = site_of(model)
    collector = StatisticsCollector(model, site, scratch_bytes=1)
    with collector:
        F.cross_entropy(model(X), Y).backward()
    assert collector.needs_second_pass
    assert collector.statistics[site.name].S is not None
    with pytest.raises(StatisticsError, match="second_pass"):
        _ = collector.statistics[site.name].N
    with collector.second_pass():
        F.cross_entropy(model(X), Y).backward()
    torch.testing.assert_close(collector.statistics[site.name].N, collected(model).N, rtol=1e-4, atol=1e-6)
    assert not collector.needs_second_pass
    with pytest.raises(StatisticsError, match="no second pass"), collector.second_pass():
        pass
    assert "second pass" in collector.explain()


@pytest.mark.parametrize("hold_bytes", [None, 0])
def test_second_moments_of_every_second_loss(hold_bytes):
    """Each statistic against a collection of just the losses that it is taken from."""
    model = network().double()
    site = site_of(model)
    loss = lambda z, y: F.cross_entropy(z, y, reduction="sum")  # noqa: E731
    batches = [(X[part].double(), Y[part]) for part in (slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 6))]
    options = {"reduction": "sum", "quantities": ("S", "N", "N_raw", "patch"), "hold_bytes": hold_bytes}
    found = collect_statistics(model, site, batches, loss, moments_every=2, **options)[site.name]
    every = collect_statistics(model, site, batches, loss, **options)[site.name]
    half = collect_statistics(model, site, batches[::2], loss, **options)[site.name]
    assert found.samples == every.samples == 6
    for name in ("S", "patch_gram", "patch_mean"):
        torch.testing.assert_close(getattr(found, name), getattr(half, name))
    torch.testing.assert_close(found.consumer.S2, half.consumer.S2)
    torch.testing.assert_close(found.consumer.M, every.consumer.M)
    torch.testing.assert_close(found.N_raw, every.N_raw)
    cross = collect_statistics(model, site, batches, loss, reduction="sum", quantities=("P",))[site.name].P
    best = torch.linalg.lstsq(half.consumer.S2, every.consumer.M, driver="gelsd").solution
    expected = every.N_raw - torch.einsum("abd,dc->abc", cross, best)
    torch.testing.assert_close(found.N, expected, rtol=1e-5, atol=1e-8)


def test_moments_every_is_positive():
    model = network()
    with pytest.raises(ArgumentValueError, match="moments_every must be at least 1"):
        StatisticsCollector(model, site_of(model), moments_every=0)
