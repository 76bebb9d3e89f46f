"""Sites that are collected and solved in parts, so that their samples fit into memory."""

import copy

import torch
from torch.nn.functional import cross_entropy

from growconv import GrowthScheduler
from growconv.growth import round as rounds
from growconv.growth.cost import ModelCost


def test_sites_in_parts_grow_as_all_at_once(chain, sites_of, batches_of, monkeypatch) -> None:
    whole = chain(3, 4).double()
    batches, parts = batches_of(4, dtype=torch.float64), copy.deepcopy(whole)
    GrowthScheduler(whole, None, sites_of(whole), method="tiny", amount=2).grow(batches, cross_entropy)
    monkeypatch.setattr(rounds, "ROOM_BYTES", 0)
    scheduler = GrowthScheduler(parts, None, sites_of(parts), method="tiny", amount=2)
    cost = ModelCost.measure(parts, batches[0][0])
    assert len(rounds.parts_of(scheduler.sites, cost, scheduler.solver.keep_samples, batches)) > 1
    scheduler.grow(batches, cross_entropy)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-9, atol=1e-12)


def test_parts_hold_every_site_once_and_no_more_than_there_is_room_for(
    chain, sites_of, batches_of, monkeypatch
) -> None:
    model, batches = chain(3, 4), batches_of(4)
    sites, cost = sites_of(model), ModelCost.measure(model, batches[0][0])
    assert rounds.parts_of(sites, cost, 0, batches) == [list(range(len(sites)))]
    monkeypatch.setattr(rounds, "ROOM_BYTES", 0)
    assert rounds.parts_of(sites, cost, 512, batches) == [[index] for index in range(len(sites))]
