"""Ranks as sites: terms come and go like channels."""

import copy

import pytest
import torch
from torch import Tensor, nn

from growconv.convolution.cp import CPConv1d, CPConv2d
from growconv.convolution.tucker import TuckerConv2d
from growconv.errors import ArgumentValueError, SiteError, SurgeryError
from growconv.network.event import GrowthHistory, grow, shrink
from growconv.network.plan import plan_size
from growconv.network.proposal import ChannelGrowth
from growconv.network.rank import RankSite, find_rank_sites


def build() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    layers = [
        CPConv2d(3, 4, 3, rank=2),
        nn.ReLU(),
        TuckerConv2d(4, 5, 3, rank=(2, 3)),
        nn.Flatten(2),
        CPConv1d(5, 2, 2, rank=1),
    ]
    return nn.Sequential(*layers).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)


def growth(site: RankSite, terms: int) -> ChannelGrowth:
    def new(path: str, axis: int) -> Tensor:
        shape = [size for dim, size in enumerate(site.model.get_parameter(path).shape) if dim != site.layout.dims[path]]
        shape.insert(axis, terms)
        return torch.randn(shape, dtype=torch.float64)

    return ChannelGrowth(
        site.name,
        "rank",
        {path: new(path, 0) for path in site.producers},
        {path: new(path, 1) for path in site.consumers},
        torch.zeros(terms),
        entries={path: new(path, 0) for path in site.followers},
        units=site.units,
    )


@pytest.mark.parametrize("index", range(4))
def test_new_terms_add_their_kernel(index: int) -> None:
    model, example = build()
    site = find_rank_sites(model)[index]
    optimizer = torch.optim.Adam(model.parameters())
    model(example).sum().backward()
    optimizer.step()
    for amplitude in (0.0, 0.7):
        kernel, width, expected = site.module.weight.detach(), site.width, model(example)
        new = growth(site, 2)
        added = site.kernel(new)
        predicted = plan_size(site, 2)
        event = grow(model, site, new, amplitude, optimizer)
        torch.testing.assert_close(site.module.weight.detach(), kernel + amplitude * added)
        assert event.parameters_after - event.parameters_before == predicted
        assert (site.width, event.width_after) == (width + 2, width + 2)
        if amplitude == 0:
            torch.testing.assert_close(model(example), expected, rtol=0, atol=1e-12)
    shrink(model, site, [site.width - 1, 0], optimizer)
    assert site.width == width
    model(example).sum().backward()
    optimizer.step()
    assert all(len(norms) == site.width for norms in site.term_norms())
    assert site.cap(new) > 0


def test_both_ranks_of_a_tucker_kernel_that_were_solved_together_grow_in_turn() -> None:
    model, example = build()
    out, inp = find_rank_sites(model)[1:3]
    growths = [growth(out, 2), growth(inp, 1)]
    old = model[2].core.detach().clone()
    fresh = copy.deepcopy(model)
    events = [grow(model, site, new) for site, new in zip((out, inp), growths, strict=True)]
    core = model[2].core.detach()
    assert torch.equal(core[:2, :3], old)
    assert torch.equal(core[2:, :3], growths[0].incoming["2.core"])
    assert torch.equal(core[:2, 3:], growths[1].outgoing["2.core"])
    assert core[2:, 3:].abs().max() == 0
    replica = copy.deepcopy(fresh)
    for event in events:
        event.apply_to(replica)
    assert torch.equal(replica(example), model(example))
    GrowthHistory(events).replay(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(example), model(example))


def test_sites_of_a_layer_alone_and_refusals() -> None:
    layer = CPConv2d(3, 4, 3, rank=2)
    site = RankSite(layer, "")
    assert (site.name, site.width, site.bound) == ("CPConv2d rank", 2, 27)
    grow(layer, site, ChannelGrowth(
        site.name, "rank", {"in_factor": torch.ones(1, 3)}, {"out_factor": torch.ones(4, 1)}, torch.zeros(1),
        entries={"axis_factor_0": torch.ones(1, 3), "axis_factor_1": torch.ones(1, 3)},
    ))  # fmt: skip
    assert layer.rank == 3
    for terms in (0, 25, True):
        with pytest.raises(ArgumentValueError, match="number of new terms is impossible"):
            site.require_room(terms)
    with pytest.raises(ArgumentValueError, match="two ranks"):
        RankSite(layer, "", "in")
    with pytest.raises(SiteError, match="no such module"):
        RankSite(layer, "nowhere")
    with pytest.raises(SiteError, match="only a factorized"):
        RankSite(nn.Sequential(nn.Conv2d(1, 1, 1)), "0").check()
    with pytest.raises(SurgeryError, match="wrong shape"):
        grow(
            layer,
            site,
            ChannelGrowth(
                site.name, "rank", {"in_factor": torch.ones(1, 9)}, {"out_factor": torch.ones(4, 1)}, torch.zeros(1)
            ),
        )
    with pytest.raises(SiteError, match="no such module"):
        RankSite(nn.Sequential(layer), "0").of(nn.Sequential())
    assert "of at most 27" in str(site)
    assert copy.deepcopy(site).width == 3
