"""Every policy can be written in a config file."""

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from growconv.growth import (
    AllOf,
    Budget,
    Every,
    Exponential,
    Greedy,
    GrowthScheduler,
    LengtheningStages,
    NoGain,
    Plateau,
    PruneBack,
    StageRates,
    TargetAccuracy,
    ToWidth,
    WarmUp,
)  # fmt: skip

VARIANCE_TRANSFER = """
when: {_target_: growconv.growth.LengtheningStages, first: 100, rate: 0.2}
amount: {_target_: growconv.growth.Exponential, rate: 0.2, target: 4.0, rounds: 8}
learning_rate: {_target_: growconv.growth.StageRates}
"""


CAUTIOUS = """
when:
  _target_: growconv.growth.AllOf
  policies:
    - {_target_: growconv.growth.Plateau, metric: val_loss, patience: 2}
    - {_target_: growconv.growth.Every, interval: 2, unit: epoch}
amount: {_target_: growconv.growth.ToWidth, target: 16, rounds: 4}
where: {_target_: growconv.growth.Greedy, per: flop, channels: 8}
stop:
  - {_target_: growconv.growth.NoGain, threshold: 1}
  - {_target_: growconv.growth.TargetAccuracy, value: 0.97}
budget: {_target_: growconv.growth.Budget, parameters: 20000, seconds: 3600}
learning_rate: {_target_: growconv.growth.WarmUp, steps: 50}
pruning: {_target_: growconv.growth.PruneBack, when: {_target_: growconv.growth.AtSteps, steps: [900]}, flops: 100000}
"""


@pytest.mark.parametrize("text", [VARIANCE_TRANSFER, CAUTIOUS])
def test_schedules_compose_in_yaml(chain, sites_of, text):
    options = dict(instantiate(OmegaConf.create(text), _convert_="all"))
    model = chain(4, 4)
    scheduler = GrowthScheduler(model, None, sites_of(model), **options)
    assert not scheduler.due(1)
    assert scheduler.explain()
    for policy in options.values():
        assert "(" in str(policy)


def test_yaml_gives_what_python_gives():
    first = instantiate(OmegaConf.create(VARIANCE_TRANSFER), _convert_="all")
    assert first["when"] == LengtheningStages(100)
    assert first["amount"] == Exponential(0.2, 4.0, 8)
    assert first["learning_rate"] == StageRates()
    second = instantiate(OmegaConf.create(CAUTIOUS), _convert_="all")
    assert second["when"] == AllOf([Plateau("val_loss", patience=2), Every(2, "epoch")])
    assert (second["amount"], second["where"]) == (ToWidth(16, 4), Greedy("flop", channels=8))
    assert second["stop"] == [NoGain(1), TargetAccuracy(0.97)]
    assert second["budget"] == Budget(parameters=20000, seconds=3600)
    assert second["learning_rate"] == WarmUp(50)
    assert isinstance(second["pruning"], PruneBack)
