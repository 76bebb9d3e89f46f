"""N where P does not fit: the second pass; second moments of some losses only."""

import pytest
import torch
import torch.nn.functional as F

from growconv.errors import ArgumentValueError, StatisticsError
from growconv.statistics import StatisticsCollector, collect_statistics
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
