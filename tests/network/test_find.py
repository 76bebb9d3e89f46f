"""What lies between two layers, found and grown by brute force; the public surface of finding."""

import pytest
import torch

from growconv.network.find import find_sites
from tests.network import referee
from tests.network.between_layers import CASES


@pytest.mark.parametrize("name", CASES)
def test_what_treats_channels_alike_is_found_and_grows_exactly(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, example = referee.prepared(case.build()), torch.randn(case.shape, dtype=torch.float64)
    sites = find_sites(model, example)
    assert {site.name: site.granularity for site in sites} == case.sites
    grown = referee.check(model, example, sites)
    assert referee.untrained(grown, example) == []
    referee.check(model, example, sites, units=[max(site.width // site.granularity, 4) for site in sites])
