"""`growconv family`: models of several sizes from one run at constant rate, each with a decay of its own.

A trunk trains and grows at constant learning rate. Before every growth, and at the end, a copy of it is trained on
alone while its rate falls: a member. Each member is a run of its own length with its own decay, but for the order of
its samples, and the trunk is paid for once (arXiv 2504.00623: 25 % less in total for language models).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growconv.errors import ConfigError
from growconv.reporting.terminal import magnitude, make_console
from growconv.training.build import grows, growth_flops, make_dataset
from growconv.training.devices import make_devices
from growconv.training.experiment import alone_in, run_one
from growconv.training.progress import closing_table


def stages(config: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The sizes of a family, smallest first: one more than there are growth rounds.

    Args:
        config: of the run that ends with the largest size: growth rounds spread over its FLOPs, and a decay.

    Returns:
        For each size the config of the trunk up to where it is taken, from where the size before was, and the config of
        the member: the run that ends with this size.

    Raises:
        ConfigError: a run that does not grow, has no length in FLOPs, or grows when its rate falls already.
    """
    growth, flops = config["growth"], config["trainer"]["flops"]
    if not grows(config) or growth["when"] is not None or growth["every"] is not None:
        got = f"growth.method={growth['method']}, growth.when={growth['when']}, growth.every={growth['every']}"
        fix = "set growth.times, growth.begin and growth.end"
        raise ConfigError("a family needs growth spread over the run", where="growth", got=got, fix=fix)
    if flops is None or config["lr_schedule"]["name"] != "trapezoid":
        raise ConfigError(
            "a family needs a trunk with a constant learning rate",
            where="trainer.flops, lr_schedule",
            expected="trainer.flops=... (of the largest member), lr_schedule=trapezoid",
            got=f"trainer.flops={flops}, lr_schedule={config['lr_schedule']['name']}",
        )
    decay = config["lr_schedule"]["decay"]
    marks, end = growth_flops(growth, flops), (1 - decay) * flops
    if marks[-1] >= end:
        raise ConfigError(
            "the last growth comes when the largest member's learning rate already falls",
            where="growth.end",
            expected=f"below {1 - decay:g}, where the decay begins",
            got=growth["end"],
        )

    def part(length: float, rate: str, rounds: list[float]) -> dict[str, Any]:
        when = {"_target_": "growconv.growth.AtFlops", "flops": rounds or [2 * flops]}  # the smallest never grows
        return {
            **config,
            "baselines": [],
            "report": False,
            "growth": {**growth, "when": when, "times": max(1, len(rounds))},
            "lr_schedule": {**config["lr_schedule"], "name": rate},
            "trainer": {**config["trainer"], "flops": length},
        }

    return [
        (part(length, "constant", marks[:grown]), part(length / (1 - decay), "trapezoid", marks[:grown]))
        for grown, length in enumerate([*marks, end])
    ]


def run(config: Mapping[str, Any], directory: Path) -> None:
    """Train a family into trunk_0, member_0, trunk_1, ...; finished parts are left out, interrupted ones go on."""
    plan, devices = stages(config), make_devices(config["trainer"])
    members: list[tuple[str, dict[str, Any]]] = []
    origin: Path | None = None
    reached = decays = 0.0
    with alone_in(directory, devices):
        dataset = make_dataset(config["data"]).to(devices.device)
        for number, (trunk, member) in enumerate(plan):
            place = directory / f"trunk_{number}"
            reached = run_one(trunk, place, devices, dataset, f"trunk {number}", True, origin)["train_flops"]
            name = f"member {number}"
            summary = run_one(member, directory / f"member_{number}", devices, dataset, name, True, place)
            members.append((name, summary))
            decays += summary["train_flops"] - reached
            origin = place
    if devices.is_first:
        make_console().print(closing_table(members, dataset.score))
        together, alone = map(magnitude, (reached + decays, sum(summary["train_flops"] for _, summary in members)))
        print(f"the family took {together}FLOP; its members one by one would have taken {alone}FLOP")
