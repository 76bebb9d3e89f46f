"""Hazard: decisions that nobody can read."""

import logging

from torch import nn

from growconv.growth import Best, GrowthScheduler  # fmt: skip


def test_decisions_are_logged_with_their_reasons(chain, sites_of, batches_of, caplog):
    model = chain(4, 4)
    scheduler = GrowthScheduler(model, None, sites_of(model), every=5, where=Best("flop"), amount=1)
    with caplog.at_level(logging.INFO, logger="growconv.growth"):
        assert not scheduler.due(4)
        assert scheduler.due(5)
        scheduler.grow(batches_of(2), nn.functional.cross_entropy)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "growth is due at step 5: step 5: every 5 from 5" in said
    assert "decrease per flop" in said
    assert "strength 1, held-out loss" in said
    assert scheduler.explain().splitlines()[-1] == str(scheduler.history[0])
