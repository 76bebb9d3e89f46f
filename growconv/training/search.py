"""`growconv search`: what a short growing run says about the widths of a model, as a config and a table."""

import math
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
from growconv.reporting.terminal import make_console, make_table, shown
from growconv.training.build import data_shape, make_model
from growconv.training.experiment import baseline_config
from growconv.training.progress import si
from growconv.training.rundir import RunDirectory, write_atomically

FOUND = Path("experiment") / "found.yaml"
MOST = 64
"""By what factor a budget that hardly depends on the widths is filled, at most."""


def require_budget(config: Mapping[str, Any]) -> None:
    """Refuse a search that does not know how large the model may become, or that begins with all of it.

    Raises:
        ConfigError: neither FLOPs nor parameters are limited, nothing grows, or the start leaves no room to grow.
    """
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
    channels, size, _ = shape = data_shape(config["data"])
    model = make_model(config, shape)
    flops = ModelCost.measure(model, torch.zeros(2, channels, size, size)).flops()
    for name, start in (("flops", flops), ("parameters", count_parameters(model))):
        limit = growth["budget"][name]
        if limit is not None and limit <= start:
            raise ConfigError(
                "the network that the search starts from is as large as the budget",
                where=f"growth.budget.{name}",
                expected=f"more than {start}",
                got=limit,
                fix=f"raise the budget, or start smaller: growth.start={growth['start'] / 2:g}",
            )


def found_config(config: Mapping[str, Any], widths: Mapping[str, int]) -> dict[str, Any]:
    """The config of a fixed model with the widths that a run ended with, to be trained from scratch.

    Args:
        config: of the run.
        widths: channels by the name of the site.
    """
    small = baseline_config(config, "small")
    return {**small, "model": {**small["model"], "widths": dict(widths)}}


def write_found(directory: Path) -> Path:
    """Write the config of what a search found, and print the table.

    Args:
        directory: of the finished run.

    Returns:
        The file: `growconv --config-dir DIRECTORY experiment=found growth=none` trains it from scratch.

    Raises:
        CheckpointError: no finished run lies there.
    """
    files = RunDirectory(directory)
    config, reached = files.config(), files.summary()["widths"]
    budget = config["growth"]["budget"]
    found = found_config(config, reached)
    channels, size, _ = shape = data_shape(config["data"])
    model = make_model(found, shape)
    sites = find_sites(model, torch.zeros(2, channels, size, size))
    cost = ModelCost.measure(model, torch.zeros(2, channels, size, size))
    widths = filled(model, [site for site in sites if site.name in reached], cost, budget)
    found["model"]["widths"] = widths
    flops, parameters = cost.flops(), count_parameters(model)
    text = yaml.safe_dump({"model": found["model"]}, sort_keys=False, allow_unicode=True)
    note = f"# {parameters} parameters, {flops} FLOPs of a sample's forward pass."
    target = directory / FOUND
    target.parent.mkdir(exist_ok=True)
    write_atomically(target, f"# @package _global_\n# Widths that `growconv search` found.\n{note}\n{text}")
    console = make_console()
    console.print(found_table(read_run(directory).events, reached, widths))
    limits = [f"{si(limit)} {name}" for name, limit in budget.items() if limit is not None]
    print(
        f"{si(parameters)} parameters, {si(flops)} FLOPs of a sample's forward pass; the budget was {', '.join(limits)}"
    )
    print("to train these widths from scratch, with the data and the other options of this search:")
    print(f"  growconv --config-dir {shown(directory)} experiment=found growth=none")
    return target


def filled(
    model: nn.Module, sites: Sequence[GrowthSite], cost: ModelCost, budget: Mapping[str, float | None]
) -> dict[str, int]:
    """Widen a model in its proportions as far as a budget allows: a short run may end before its budget is spent.

    Args:
        model: untrained; its weights are drawn anew for the last widths.
        sites: those that are widened, of the model.
        cost: of the model.
        budget: `flops` of one sample's forward pass and `parameters`, at most; None: no limit.

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
        start = own[0]["width_before"] if own else reached[site]
        gain = sum(_gained(event) for event in own)
        added = sum(event["parameters_after"] - event["parameters_before"] for event in own)
        rows.append([site, str(start), str(reached[site]), str(width), str(len(own)), f"{gain:.3g}", f"{added:,}"])
    return make_table(["site"], ("start", "reached", "found", "rounds", gained, "parameters"), rows)


def _gained(event: Mapping[str, Any]) -> float:
    """What the channels of an event were chosen for: squared gradients, a share of the held-out decrease, or gains."""
    if "slopes" in event["details"]:
        return sum(event["details"]["slopes"])
    return event["realised_decrease"] if "decrease" in event["details"] else sum(event["gains"])
