"""N of batches that are held until W* is known."""

import pytest
import torch
import torch.nn.functional as F

from growconv.statistics import StatisticsCollector
from tests.statistics.test_collector import X, Y, network, site_of


@pytest.mark.parametrize("calls", [2, 12])
def test_n_of_held_batches_is_that_of_p(calls):
    model = network(norm=True).double().eval()
    site = site_of(model)
    limit = 100_000  # P has 92,736 bytes
    batches = [(X.double() + number, Y) for number in range(calls)]
    collectors = [StatisticsCollector(model, site, hold=hold, scratch_bytes=limit) for hold in (True, False)]
    for collector in collectors:
        with collector:
            for x, y in batches:
                F.cross_entropy(model(x), y).backward()
                x.zero_()  # what is held does not change with the caller's own tensors
        batches = [(X.double() + number, Y) for number in range(calls)]
    held, summed = (collector.statistics[site.name] for collector in collectors)
    assert ("held of 2 calls" in collectors[0].explain()) == (calls == 2)
    assert ("P" in held.consumer.moments) == (calls > 2)
    assert "P" in summed.consumer.moments
    for name in ("S", "S2", "M", "N_raw", "P", "N"):
        torch.testing.assert_close(getattr(held, name), getattr(summed, name), rtol=1e-9, atol=1e-12)
    both = held + summed
    torch.testing.assert_close(both.N, summed.N, rtol=1e-8, atol=1e-12)
