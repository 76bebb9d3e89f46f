"""Statistics without some of the samples."""

import torch
import torch.nn.functional as F

from growconv.statistics import collect_statistics
from growconv.statistics.held_out import without
from tests.statistics.test_collector import X, Y, network, site_of


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
