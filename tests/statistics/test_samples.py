"""Kept samples are what the modules saw."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import growconv
from growconv.statistics import collect_statistics
from tests.statistics.test_collector import X, Y, collected, network
from tests.statistics.test_passes import data


def test_kept_samples_are_what_the_modules_saw():
    model = network()
    kept = collected(model, keep_samples=4).samples_kept
    torch.testing.assert_close(kept.x["0"], X[:4])
    torch.testing.assert_close(kept.h["2"], model[:2](X[:4]).detach())
    z = model[:3](X).detach().requires_grad_()
    F.cross_entropy(model[3:](z), Y, reduction="sum").backward()
    torch.testing.assert_close(kept.v["2"], -z.grad[:4], rtol=1e-4, atol=1e-6)


def test_kept_samples_can_wait_in_a_shorter_type() -> None:
    """They come back as float32, the statistics are the same; layers that read one map still share it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 3), nn.Flatten()
    )
    sites = growconv.find_sites(model, X[:2])
    options = {"quantities": {"S", "N", "samples"}, "keep_samples": 6}
    long, short = (
        collect_statistics(model, sites, [(X, Y)] * 2, F.cross_entropy, keep_dtype=dtype, **options)
        for dtype in (None, torch.bfloat16)
    )
    for site in sites:
        one, two = long[site.name], short[site.name]
        torch.testing.assert_close(two.S, one.S)
        torch.testing.assert_close(two.N, one.N)
        for kind in ("x", "h", "v"):
            for path, kept in getattr(one.samples_kept, kind).items():
                assert torch.equal(getattr(two.samples_kept, kind)[path], kept.bfloat16().float())
    first, second = (short[site.name].samples_kept.passes[0] for site in sites)
    assert first.h["2"][0] is second.x["2"][0]


def test_samples_of_several_image_sizes_stay_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    ).double()
    batches = [
        (data(n, size, seed), torch.zeros(n, dtype=torch.long))
        for seed, (n, size) in enumerate([(4, 10), (4, 8), (3, 10)])
    ]
    sites = growconv.find_sites(model, batches[0][0])
    found = collect_statistics(
        model, sites, batches, F.cross_entropy, quantities={"S", "N", "samples"}, keep_samples=10
    )
    for site, layers in zip(sites, ((model[0], model[1:2]), (model[2], model[3:6])), strict=True):
        kept = found[site.name].samples_kept
        assert kept is not None
        assert len(kept) == 10
        for each in kept.passes:
            x, h = each.x[site.producers[0]][0], each.h[site.consumers[0]][0]
            torch.testing.assert_close(layers[1](layers[0](x)).detach(), h)
        x, h = kept.x[site.producers[0]], kept.h[site.consumers[0]]
        assert len(x) == len(h) == len(kept.v[site.consumers[0]]) == 4 + 2
        for method in ("tiny", "functional", "firefly", "senn", "splitting"):
            if method == "functional":
                with pytest.warns():
                    growth = growconv.solve(found[site.name], method, 2)
            else:
                growth = growconv.solve(found[site.name], method, 2)
            assert growth.channels in (0, 1, 2)


def test_layers_that_read_the_same_map_share_its_copy() -> None:
    class TwoReaders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(4, 5, 3)

        def forward(self, x):
            hidden = torch.relu(self.first(x))
            return (self.left(hidden) * self.right(hidden)).mean((2, 3))

    torch.manual_seed(0)
    model, x = TwoReaders(), data(4, 8, 0).float()
    (site,) = growconv.find_sites(model, x)
    batches, quantities = [(x, torch.zeros(4, dtype=torch.long))], {"samples"}
    found = collect_statistics(model, site, batches, F.cross_entropy, keep_samples=4, quantities=quantities)
    ((kept,),) = (batch.passes for batch in found[site.name].samples_kept.batches)
    (left,), (right,) = kept.h["left"], kept.h["right"]
    assert left.data_ptr() == right.data_ptr() != kept.x["first"][0].data_ptr()
    torch.testing.assert_close(left, torch.relu(model.first(x)).detach())
    assert kept.v["left"][0].data_ptr() != kept.v["right"][0].data_ptr()
