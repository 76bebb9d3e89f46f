"""`growconv search`: what a short growing run says about the widths of a model, as a config and a table."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table
from torch import nn

from growconv.errors import ConfigError
from growconv.growth.cost import ModelCost
from growconv.growth.widths import set_widths
from growconv.network.event import count_parameters
from growconv.network.find import find_sites
from growconv.network.site import GrowthSite
from growconv.reporting.records import read_run
from growconv.reporting.terminal import magnitude, make_console, make_table, shown
from growconv.training import experiment
from growconv.training.build import data_shape, make_model
from growconv.training.rundir import RunDirectory, write_atomically

MOST = 64
"""By what factor a budget that hardly depends on the widths is filled, at most."""


def run(config: Mapping[str, Any], directory: Path) -> None:
    """Grow within a budget, write the config of the widths found, and print the table.

    They lie in DIRECTORY/experiment/found.yaml: `growconv --config-dir DIRECTORY experiment=found growth=none` trains
    them from scratch.
    """
    _require_budget(config)
    experiment.run(config, directory, resume=(directory / "config.yaml").exists())
    if int(os.environ.get("RANK", "0")) == 0:
        _write_found(directory)


def _require_budget(config: Mapping[str, Any]) -> None:
    growth = config["growth"]
    if growth["method"] == "none":
        raise ConfigError(
            "a search needs a growth method", where="growth.method", got="none", fix="choose a growth method"
        )
    if growth["budget"]["flops"] is None and growth["budget"]["parameters"] is None:
        raise ConfigError(
            "a search needs a limit on the size of the model",
            where="growth.budget",
            expected="growth.budget.flops=... (FLOPs of one sample's forward pass) or growth.budget.parameters=...",
        )
    model, _, cost = _measured(config)
    for name, start in (("flops", cost.flops()), ("parameters", count_parameters(model))):
        limit = growth["budget"][name]
        if limit is not None and limit <= start:
            raise ConfigError(
                "the network that the search starts from is as large as the budget",
                where=f"growth.budget.{name}",
                expected=f"more than {start}",
                got=limit,
                fix=f"raise the budget, or start smaller: growth.start={growth['start'] / 2:g}",
            )


def _measured(config: Mapping[str, Any]) -> tuple[nn.Module, torch.Tensor, ModelCost]:
    """The untrained model of a config, inputs for it, and its cost."""
    channels, size, _ = shape = data_shape(config["data"])
    model, example = make_model(config, shape), torch.zeros(2, channels, size, size)
    return model, example, ModelCost.measure(model, example)


def _write_found(directory: Path) -> None:
    files = RunDirectory(directory)
    config, reached = files.config(), files.summary()["widths"]
    budget = config["growth"]["budget"]
    found = experiment.baseline_config(config, "small")
    found["model"]["widths"] = dict(reached)
    model, example, cost = _measured(found)
    sites = [site for site in find_sites(model, example) if site.name in reached]
    found["model"]["widths"] = widths = filled(model, sites, cost, budget)
    flops, parameters = cost.flops(), count_parameters(model)
    text = yaml.safe_dump({"model": found["model"]}, sort_keys=False, allow_unicode=True)
    note = f"# {parameters} parameters, {flops} FLOPs of a sample's forward pass."
    (directory / "experiment").mkdir(exist_ok=True)
    target = directory / "experiment" / "found.yaml"
    write_atomically(target, f"# @package _global_\n# Widths that `growconv search` found.\n{note}\n{text}")
    make_console().print(found_table(read_run(directory).events, reached, widths))
    limits = ", ".join(f"{magnitude(limit)} {name}" for name, limit in budget.items() if limit is not None)
    sizes = f"{magnitude(parameters)} parameters, {magnitude(flops)} FLOPs of a sample's forward pass"
    print(f"{sizes}; the budget was {limits}")
    print("to train these widths from scratch, with the data and the other options of this search:")
    print(f"  growconv --config-dir {shown(directory)} experiment=found growth=none")


def filled(
    model: nn.Module, sites: Sequence[GrowthSite], cost: ModelCost, budget: Mapping[str, float | None]
) -> dict[str, int]:
    """Widen an untrained model in its proportions, as far as a budget allows that a short run did not spend.

    Returns:
        Channels by the name of the site.
    """
    begun = {site: site.width for site in sites}

    def widen(factor: float) -> dict[str, int]:
        widths = {
            site.name: width + site.granularity * math.floor((factor - 1) * width / site.granularity + 0.5)
            for site, width in begun.items()
        }
        set_widths(model, sites, widths)
        return widths

    def fits() -> bool:
        sizes = {"flops": cost.flops(), "parameters": count_parameters(model)}
        return all(limit is None or sizes[name] <= limit for name, limit in budget.items())

    low, high = 1.0, 2.0
    while sites and high < MOST and widen(high) and fits():
        low, high = high, 2 * high
    for _ in range(10):
        middle = (low + high) / 2
        widen(middle)
        low, high = (middle, high) if fits() else (low, middle)
    return widen(low)


def found_table(events: Iterable[Mapping[str, Any]], reached: Mapping[str, int], widths: Mapping[str, int]) -> Table:
    """Per site where it began and ended, and what its channels gained, by what they were chosen for, and cost.

    Args:
        events: the lines of growth.jsonl.
        reached: channels at the end of the run, by the name of the site.
        widths: channels that the budget allows in these proportions.
    """
    listed, rows = list(events), []
    seen = {name for event in listed for name in event["details"]}
    gained = "gradient²" if "slopes" in seen else "decrease" if "decrease" in seen else "gain"
    for site, width in widths.items():
        own = [event for event in listed if event["site"] == site]
        start, gain, added = own[0]["width_before"] if own else reached[site], 0.0, 0
        for event in own:
            added += event["parameters_after"] - event["parameters_before"]
            if "slopes" in event["details"]:
                gain += sum(event["details"]["slopes"])
            else:
                gain += event["realised_decrease"] if "decrease" in event["details"] else sum(event["gains"])
        rows.append([site, str(start), str(reached[site]), str(width), str(len(own)), f"{gain:.3g}", f"{added:,}"])
    return make_table(["site"], ("start", "reached", "found", "rounds", gained, "parameters"), rows)
