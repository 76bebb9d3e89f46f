"""Statistics of several collections together, and without some of the samples."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from growconv.errors import StatisticsError
from growconv.statistics import collect_statistics
from growconv.statistics.pair import without
from tests.statistics.test_collector import X, Y, assert_same, collected, network, site_of


def test_merged_statistics_are_those_of_all_samples():
    model = network().double()
    x = X.double()
    options = {"reduction": "sum", "keep_samples": 3, "quantities": ("S", "N", "patch", "samples"), "full": True}
    loss = lambda z, y: F.cross_entropy(z, y, reduction="sum")  # noqa: E731
    whole = collected(model, x, Y, loss, **options)
    merged = collected(model, x[:2], Y[:2], loss, **options) + collected(model, x[2:], Y[2:], loss, **options)
    assert_same(merged, whole, 1e-12)
    torch.testing.assert_close(merged.N, whole.N, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(merged.patch_gram, whole.patch_gram)
    torch.testing.assert_close(merged.samples_kept.x["0"], x[:5])
    assert merged.gradient_energy == pytest.approx(whole.gradient_energy)


def test_statistics_that_do_not_belong_together_are_not_merged():
    wide = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(StatisticsError, match="belong together"):
        collected(network()) + collected(wide)
    with pytest.raises(StatisticsError, match="quantities"):
        collected(network()) + collected(network(), quantities=("S",))


def test_samples_taken_out_of_held_batches_leave_the_rest():
    model = network().double()
    site, batches = site_of(model), [(X.double(), Y), (X.double() - 1, Y)]
    options = {"quantities": ("S", "N", "samples"), "keep_samples": 6}
    loss = lambda z, y: F.cross_entropy(z, y, reduction="sum")  # noqa: E731
    whole = collect_statistics(model, site, batches, loss, reduction="sum", **options)[site.name]
    rest = collect_statistics(model, site, batches[1:], loss, reduction="sum", **options)[site.name]
    assert whole.consumer.held is not None
    remaining = without(whole, whole.samples_kept, rest.samples_kept)
    torch.testing.assert_close(remaining.N, rest.N, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(remaining.P, rest.P)
