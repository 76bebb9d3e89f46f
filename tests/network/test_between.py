"""What lies between layers, cut out of tapes that hold their tensors or do not."""

import weakref

import pytest
import torch
from torch import Tensor, nn

from growconv.errors import SiteError
from growconv.network.between import is_plain, region_of
from growconv.network.find import find_sites
from growconv.network.tape import Tape


class Squeezed(nn.Module):
    """A plain pair, and one with a gate of the mean over its locations in between."""

    def __init__(self, trunk: nn.Sequential) -> None:
        super().__init__()
        self.trunk, self.wide, self.narrow = trunk, nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.gate = nn.Parameter(torch.randn(1, 1, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Through both."""
        return self.narrow(torch.relu(self.wide(self.trunk(x))) * self.gate)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_tape_that_holds_nothing_serves_plain_sites_and_refuses_others(mode: str) -> None:
    plain = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(), nn.Conv2d(4, 3, 1)
    )
    model, x = getattr(Squeezed(plain), mode)(), torch.randn(3, 2, 10, 10)
    first, *_, gated = find_sites(model, x)
    assert is_plain(first)
    assert not is_plain(gated)
    alive: list[weakref.ref] = []
    plain[1].register_forward_hook(lambda _, args, output: alive.append(weakref.ref(output.untyped_storage())))
    regions = []
    with torch.no_grad():
        for holds in (True, False):
            torch.manual_seed(0)
            with Tape(model, holds) as tape:
                model(x)
            regions.append(region_of(tape, first))
            assert (alive.pop()() is None) == (not holds)
            if holds:
                region_of(tape, gated)
            else:
                with pytest.raises(SiteError, match="not what it was"):
                    region_of(tape, gated)
    new = {"trunk.0": [torch.randn(3, 5, 8, 8)]}
    held, light = (region.read(new)["trunk.5"] for region in regions)
    torch.testing.assert_close(light, held)


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class Swish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.sigmoid()


HEADS = {
    "pool": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    "grid": lambda: nn.Sequential(nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
    "mean": lambda: nn.Sequential(Mean(), nn.Linear(4, 3)),
    "written out": lambda: nn.Sequential(Swish(), nn.Upsample(scale_factor=2), Mean(), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_what_treats_channels_one_by_one_needs_nothing_held(head: str, memory: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), HEADS[head]())
    (site,) = find_sites(model, torch.randn(2, 2, 6, 6))
    assert is_plain(site)
    x = torch.randn(3, 2, 6, 6).to(memory_format=memory)
    regions = []
    for holds in (True, False):
        with torch.no_grad(), Tape(model, holds) as tape:
            model(x)
        regions.append(region_of(tape, site))
    new = torch.randn(3, 5, 4, 4)
    held, light = (region.read({"0": [new]})[site.consumers[0]][0] for region in regions)
    torch.testing.assert_close(light, held)
    torch.testing.assert_close(light, model[2][:-1](new.relu()))
