"""What a growth event keeps for reports: the whole spectrum, and the share of energy where gains are energies."""

import copy
import json

import pytest
import torch
from torch.nn import functional

from growconv.growth import GrowthScheduler


@pytest.mark.parametrize(
    ("method", "spectrum", "energy"),
    [("tiny", True, True), ("gradmax", True, False), ("firefly", True, False), ("random", False, False)],
)
def test_events_hold_spectrum_and_captured_energy(chain, sites_of, batches_of, method, spectrum, energy):
    model = chain(3, 4)
    scheduler = GrowthScheduler(model, None, sites_of(model)[1:], method=method, amount=2, statistics={})
    (event,) = scheduler.grow(batches_of(3), functional.cross_entropy, 1)
    details = json.loads(json.dumps(event.to_dict()))["details"]
    assert ("spectrum" in details) == spectrum
    assert ("captured_energy" in details) == energy
    if spectrum:
        assert len(details["spectrum"]) > event.channels == 2
        assert details["spectrum"] == sorted(details["spectrum"], reverse=True)
        assert details["spectrum"][:2] == pytest.approx(list(event.gains))
    told = str(event)
    if method in ("gradmax", "random"):
        assert "outputs unchanged" in told
        assert event.realised_decrease is None
    else:
        losses = dict(event.details["losses"])
        before, after = losses[0.0], losses[event.amplitude]
        assert before - after == event.realised_decrease > 0
        assert f"held-out loss {before:.4g} -> {after:.4g}" in told
    assert "amplitude" not in told
    if energy:
        assert 0 < details["captured_energy"] < 1


def test_splitting_says_what_it_changes(chain, sites_of, batches_of):
    model = chain(3, 4)
    scheduler = GrowthScheduler(model, None, sites_of(model)[1:], method="splitting", amount=2, held_out=1 / 3)
    batches = batches_of(3)
    model.train()

    def loss():
        with torch.no_grad():
            return float(functional.cross_entropy(copy.deepcopy(model)(batches[-1][0]), batches[-1][1]))

    before = loss()
    (event,) = scheduler.grow(batches, functional.cross_entropy, 1)
    losses = dict(event.details["losses"])
    assert losses == pytest.approx({0.0: before, 1.0: loss()}, rel=1e-5)
    assert losses[0.0] != losses[1.0]
    assert f"held-out loss {losses[0.0]:.4g} -> {losses[1.0]:.4g}" in str(event)
