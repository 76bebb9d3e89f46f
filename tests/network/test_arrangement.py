"""How classes fall into units, and in whole groups."""

import torch
import torch.nn.functional as F
from torch import nn

from growconv.network import layers
from growconv.network.find import explain_sites, find_sites
from growconv.network.layout import IN, Run
from tests.network import referee
from tests.network.hand import Net

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_channels_that_are_normalised_together_but_lie_in_several_groups_say_so() -> None:
    """A group of the norm that is new would move half of the channels of the last convolution to its other group."""
    for groups in (1, 2):
        layers = nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.Conv2d(8, 4, 1, groups=groups)
        row = explain_sites(nn.Sequential(*layers).double(), X)[0]
        part = "its channels depend on each other, and the groups of 2 part them"
        assert row.reason == (None if groups == 1 else part)


def test_groups_of_convolutions_get_equal_shares() -> None:
    model = Net(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
        a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 6, 1, groups=2), c=nn.Conv2d(6, 2, 1),
    ).double()  # fmt: skip
    assert not layers.in_whole_groups(model.b)
    assert layers.in_whole_groups(nn.Conv2d(8, 8, 1, groups=8))
    sites = find_sites(model, X)
    assert [(site.name, site.granularity) for site in sites] == [("a -> b", 2), ("b -> c", 2)]
    assert sites[0].layout.axes["b", IN] == (Run(0, 2, 1, (0, 1)),)
    referee.check(model, X, sites)


def test_presuming_lays_out_without_trying() -> None:
    model = Net(lambda m, x: m.b(m.a(x)[:, :8]), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1)).double()
    assert find_sites(model, X) == ()
    assert [site.name for site in find_sites(model, X, rehearse=False)] == ["a -> b"]
