"""Widths found by short growing."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from growconv.cli import main
from growconv.errors import SiteError
from growconv.growth.cost import ModelCost
from growconv.growth.widths import set_widths
from growconv.network.find import find_sites
from growconv.training.build import make_model
from growconv.training.config import compose, plain
from growconv.training.rundir import RunDirectory
from growconv.training.search import filled, found_table
from tests.training.test_family import QUICK


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)
    )


def test_widths_are_set_and_weights_drawn_as_in_a_model_that_was_made_so() -> None:
    torch.manual_seed(0)
    model, x = chain(), torch.randn(4, 1, 9, 9)
    sites = find_sites(model, x)
    set_widths(model, sites, {"0 -> 3": 400, "3 -> 5": 3})
    assert (model[0].weight.shape[0], model[1].weight.shape[0], model[3].weight.shape[:2]) == (400, 400, (3, 400))
    assert model(x).shape == (4, 2, 3, 3)
    for layer in (model[0], model[3]):  # torch's own range, ±1/√fan-in, filled
        bound = layer.weight[0].numel() ** -0.5
        assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound
    assert bool((model[1].weight == 1).all())
    with pytest.raises(SiteError, match="no such site"):
        set_widths(model, sites, {"3 -> 4": 9})


@pytest.mark.slow
def test_a_search_fills_its_budget_and_its_widths_train_from_scratch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, budget = tmp_path / "search", 600_000
    command = [*QUICK, f"growth.budget.flops={budget}", "growth.times=6", "growth.where.rounds=6", "trainer.epochs=2"]
    assert main(["search", *command, f"hydra.run.dir={run}"]) == 0
    said = capsys.readouterr().out
    found = yaml.safe_load((run / "experiment" / "found.yaml").read_text())["model"]
    reached = RunDirectory(run).summary()["widths"]
    ratios = [[(found["widths"][site] + half) / width for site, width in reached.items()] for half in (-0.5, 0.5)]
    assert max(ratios[0]) <= min(ratios[1])  # one factor, rounded
    assert f"growconv --config-dir {run} experiment=found growth=none" in said
    events = [json.loads(line) for line in (run / "growth.jsonl").read_text().splitlines()]
    for site, width in found["widths"].items():
        decreases = [event["realised_decrease"] for event in events if event["site"] == site]
        (row,) = [line.split() for line in said.splitlines() if line.strip().startswith(f"{site} ")]
        assert row[-4:-1] == [str(width), str(len(decreases)), f"{sum(decreases):.3g}"]
    overrides = [f"hydra.searchpath=[file://{run}]", "experiment=found", "growth=none"]
    model = make_model(plain(compose(overrides)), (1, 8, 10))
    flops = ModelCost.measure(model, torch.zeros(2, 1, 8, 8)).flops()
    assert 0.9 * budget < flops <= budget
    parameters = sum(p.numel() for p in model.parameters())
    assert f"{parameters} parameters, {flops} FLOPs" in (run / "experiment" / "found.yaml").read_text()
    scratch = ["--config-dir", str(run), "experiment=found", "growth=none", *QUICK[-1:], "data.limit=64"]
    assert main([*scratch, "trainer.epochs=1", "report=false", f"hydra.run.dir={tmp_path / 'scratch'}"]) == 0
    assert RunDirectory(tmp_path / "scratch").summary()["parameters"] == parameters


@pytest.mark.parametrize("limit", ["parameters", "flops"])
def test_a_search_that_starts_at_its_budget_is_refused(
    limit: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", *QUICK, f"growth.budget.{limit}=3000", "hydra.run.dir=search"]) == 1
    said = capsys.readouterr().err
    assert f"growth.budget.{limit}: the network that the search starts from is as large as the budget" in said
    assert "growth.start=0.125" in said
    assert not (here / "search").exists()


def test_a_search_tells_what_its_channels_were_chosen_for() -> None:
    event = {"site": "a", "width_before": 2, "gains": [0.0], "parameters_before": 0, "parameters_after": 9}

    def told(**details: object) -> list[str]:
        return [
            str(cell)
            for column in found_table([{**event, **details}], {"a": 3}, {"a": 4}).columns
            for cell in column.cells
        ]

    chosen = {"details": {"slopes": [0.25, 0.5]}}
    assert told(**chosen) == ["a", "2", "3", "4", "1", "0.75", "9"]
    assert told(details={"decrease": 0.3}, realised_decrease=0.125)[-2] == "0.125"
    assert told(details={}, gains=[1.5, 0.5])[-2] == "2"


def test_what_a_run_left_of_its_budget_is_filled_in_the_models_own_proportions() -> None:
    model, x = chain(), torch.zeros(2, 1, 9, 9)
    sites, cost = find_sites(model, x), ModelCost.measure(model, x)
    widths = filled(model, sites, cost, {"flops": None, "parameters": 3000})

    def parameters(first: int, second: int) -> int:
        return 12 * first + 9 * first * second + second + 18 * second + 2

    first, second = widths["0 -> 3"], widths["3 -> 5"]
    assert abs(second - 1.5 * first) <= 1
    assert parameters(first, second) == sum(p.numel() for p in model.parameters()) <= 3000
    assert parameters(first + 1, second + 2) > 3000
    assert filled(model, [], cost, {"flops": None, "parameters": 3000}) == {}


def test_a_search_needs_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", *QUICK, f"hydra.run.dir={tmp_path / 'run'}"]) == 1
    assert "growth.budget" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
