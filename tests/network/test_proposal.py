"""Proposals: parts of them, and what they say about themselves."""

from dataclasses import replace

import pytest
import torch

from growconv.errors import SolverError
from growconv.network.event import grow
from growconv.network.layout import ENTRY, GROUP_OUT, IN, OUT
from tests.network import hand

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("name", hand.SITES)
def test_a_subset_of_units_is_their_rows_and_columns(name: str) -> None:
    model, example, site = hand.build(name)
    whole = hand.growth(site, 3)
    size = site.granularity
    channels = [*range(2 * size, 3 * size), *range(size)]
    part = whole.subset(channels, "cut")
    assert (part.channels, part.reason) == (2 * size, "cut")
    for path, weight in part.incoming.items():
        rows = int(site.ratio(path, OUT) * size)
        assert torch.equal(weight, torch.cat([whole.incoming[path][2 * rows :], whole.incoming[path][:rows]]))
    for path, weight in part.outgoing.items():
        columns = whole.outgoing[path].shape[1] // 3
        assert torch.equal(
            weight, torch.cat([whole.outgoing[path][:, 2 * columns :], whole.outgoing[path][:, :columns]], 1)
        )
    for path, (mean, _) in part.norms.items():
        assert len(mean) == 2 * size * site.ratio(path, ENTRY)
    for path, filters in part.carried.items():
        assert len(filters) == 2 * size * site.ratio(path, GROUP_OUT)
    grow(model, site, part)
    model(example)
    assert site.ratio(site.consumers[0], IN) > 0


def test_a_subset_needs_whole_units_of_this_proposal() -> None:
    _, _, site = hand.build("inside groups")
    whole = hand.growth(site, 2)
    with pytest.raises(SolverError, match="whole groups"):
        whole.subset([1, 2])
    for channels in ([], [4], [-1]):
        with pytest.raises(SolverError, match="channels of this proposal"):
            whole.subset(channels)


def test_alpha_and_omega_of_a_pair() -> None:
    _, _, site = hand.build("pair")
    growth = hand.growth(site, 2)
    assert growth.alpha is growth.incoming["a"]
    assert growth.alpha_bias is growth.incoming_bias["a"]
    assert growth.omega is growth.outgoing["b"]
    assert "2 channels by random" in str(growth)
    with pytest.raises(SolverError, match="2 producers"):
        _ = replace(growth, incoming={"a": growth.alpha, "z": growth.alpha}).alpha
