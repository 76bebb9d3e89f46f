"""The command ``growconv grow``: a run's model made wider or deeper once; the result is a run that can go on."""

import os
import shlex
import shutil
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from growconv.errors import CheckpointError, ConfigError, TrainingError
from growconv.growth.amount import Amount
from growconv.growth.decision import Situation
from growconv.growth.scheduler import GrowthScheduler
from growconv.growth.stop import Budget
from growconv.growth.where import All, Greedy
from growconv.network.depth import insert_copy, insert_layer
from growconv.network.event import GrowthEvent
from growconv.network.find import find_sites
from growconv.network.site import Site
from growconv.reporting.terminal import printable, shown
from growconv.solvers.base import get_solver, refusal_of
from growconv.training.build import grows, make_dataset
from growconv.training.checkpoint import Checkpoint
from growconv.training.config import length
from growconv.training.devices import make_devices
from growconv.training.experiment import baseline_config, environment
from growconv.training.loop import Trainer
from growconv.training.rundir import LOCK, RunDirectory
from growconv.training.trained import begun_model, distance, load_run, read_run
from growconv.training.trust import require_trusted_parts


@dataclass
class Targets(Amount):
    """What is missing to the width that each site is to have in the end, by the site's name."""

    widths: Mapping[str, int]

    def channels(self, site: Site, situation: Situation) -> int:
        """What is missing."""
        return max(0, self.widths[site.name] - site.width)


def main(arguments: Namespace) -> None:
    """Grow a run's model once, save it with its optimizer as a run of a fixed model, and print what grew."""
    _check(arguments)
    run = arguments.run.absolute()
    output = arguments.output or run.with_name(f"{run.stem}-grown")
    _require_free(output)
    found = read_run(arguments.run)
    if not arguments.trust and arguments.method is None:
        require_trusted_parts(found.state["config"], found.path, "growth")
    with RunDirectory(output).locked():
        _require_free(output)  # another process may have been faster
        try:
            trainer = _trainer(found, output, arguments.trust)
            _grow(trainer, arguments, found.state["config"]["growth"])
            _save(trainer)
        except BaseException:
            shutil.rmtree(output, ignore_errors=True)
            raise
    print(f"saved and read back: {shown(output)}")
    print(f"train it on with: growconv resume={shlex.quote(str(shown(output)))} {length(trainer.config)}=MORE")


def _check(wish: Namespace) -> None:
    limits = {"parameters": wish.parameters, "flops": wish.flops}
    if not (wish.width or wish.deepen or any(each is not None for each in (wish.factor, *limits.values()))):
        raise ConfigError(
            "what should grow, and by how much?", where="growconv grow",
            expected="--factor, --width, --parameters, --flops or --deepen",
        )  # fmt: skip
    if wish.factor is not None and not 1 < wish.factor < 1000:
        raise ConfigError("this factor makes nothing wider", where="--factor", expected="above 1", got=wish.factor)
    for name, limit in limits.items():
        if limit is not None and not limit >= 1:
            raise ConfigError("this value cannot be used", where=f"--{name}", expected="1 or more", got=limit)
    if wish.method is not None:
        get_solver(wish.method)


def _require_free(output: Path) -> None:
    """Refuse to write where something lies; the lock of a process that was killed before it wrote is nothing."""
    if os.path.lexists(output) and not (output.is_dir() and [entry.name for entry in output.iterdir()] == [LOCK]):
        raise CheckpointError("there is already something here", where=str(output), fix="name another: --output DIR")


def _trainer(found: Checkpoint, output: Path, trust: bool) -> Trainer:
    """The run where it stands, as one of a fixed model that has been grown; it writes nothing yet."""
    config: dict[str, Any] = dict(found.state["config"])
    config = baseline_config(config, "small") if grows(config) else {**config, "baselines": []}
    growth = config["growth"]
    config["growth"] = {**growth, "depth": {**growth["depth"], "at": []}}  # what has been copied is in the history
    devices = make_devices(config["trainer"]).for_one_run()
    dataset = make_dataset(config["data"]).to(devices.device)
    model = begun_model(found, trust).to(devices.device)
    if config["trainer"]["channels_last"]:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    trainer = Trainer(config, dataset, model, devices, RunDirectory(output, active=False), "grown once")
    trainer.resume(replace(found, state={**found.state, "world_size": 1}))
    return trainer


def _grow(trainer: Trainer, wish: Namespace, growth: Mapping[str, Any]) -> None:
    """Deepen, then widen, and print each event and what both gave."""
    before, began = trainer.evaluate(trainer.dataset.validation), time.monotonic()
    events: list[GrowthEvent] = []
    for name in wish.deepen:
        model, optimizer, example = trainer.model, trainer.optimizer, _example(trainer)
        sites = {site.name: site for site in find_sites(model, example)}
        if name in sites:
            events.append(insert_layer(model, sites[name], optimizer=optimizer))
        elif name in dict(model.named_modules()):
            events.append(insert_copy(model, name, example_input=example, identity=True, optimizer=optimizer))
        else:
            raise _no_site("--deepen", name, [*sites])
    events += _widened(trainer, wish, growth)
    if not any(event.parameters_after > event.parameters_before for event in events):
        raise ConfigError("nothing grew", where=str(wish.run), fix="ask for more, or try another --method")
    trainer.follow(events)
    for event in events:
        print(printable(str(event)))
        trainer.history.append(replace(event, recipe=None))
    trainer.position.growth_seconds += time.monotonic() - began
    after = trainer.evaluate(trainer.dataset.validation)
    gained = f"{trainer.dataset.score} {before[1]:.2%} -> {after[1]:.2%}"
    print(f"validation loss {before[0]:.4f} -> {after[0]:.4f}, {gained}")


def _widened(trainer: Trainer, wish: Namespace, growth: Mapping[str, Any]) -> list[GrowthEvent]:
    limits = {"parameters": wish.parameters, "flops": wish.flops}
    limited = {name: limit for name, limit in limits.items() if limit is not None}
    factor = wish.factor or (2.0 if limited else None)
    if factor is None and not wish.width:
        return []
    own = growth["method"]
    method = wish.method or (own if own != "none" else "tiny")
    solver = get_solver(method, **(growth["solver"] if method == own else {}))
    sites = find_sites(trainer.model, _example(trainer))
    widths = {} if factor is None else {site.name: round(factor * site.width) for site in sites}
    for pattern, width in wish.width:
        matching = [site for site in sites if fnmatchcase(site.name, pattern) or site.name == pattern]
        if not matching:
            raise _no_site("--width", pattern, [site.name for site in sites])
        for site in matching:
            if width <= site.width:
                expected = f"more than {site.width}"
                raise ConfigError("this site already has this width", where=site.name, expected=expected, got=width)
            reason = refusal_of(solver, site) if site.name == pattern else None
            if reason is not None:
                raise ConfigError(f"method {method!r} cannot serve this site: {reason}", where=site.name)
            widths[site.name] = width
    scheduler = GrowthScheduler(
        trainer.model,
        trainer.optimizer,
        [site for site in sites if site.name in widths],
        method=solver,
        amount=Targets(widths),
        where=Greedy("flop" if wish.flops is not None else "parameter") if limited and solver.reads else All(),
        budget=Budget(**limited) if limited else None,
        seed=trainer.config["seed"],
    )
    events = scheduler.grow(trainer.growth_batches(), trainer.loss, trainer.position.step)
    trainer.position.growth_flops += scheduler.flops_spent
    return events


def _no_site(option: str, name: str, known: Sequence[str]) -> ConfigError:
    return ConfigError("there is no such site", where=option, expected="; ".join(known), got=name)


def _example(trainer: Trainer) -> torch.Tensor:
    return trainer.growth_batches()[0][0][:2]


def _save(trainer: Trainer) -> None:
    """Write the new run, and compare the model that is read back from it with the one that was written."""
    files = trainer.directory
    files.active = True
    files.start(trainer.config, environment())
    files.rewind(trainer.position.metrics, [event.to_dict() for event in trainer.history])
    trainer.save()
    x = _example(trainer)
    again = load_run(files.path, trust=True).to(x.device)
    with torch.no_grad():
        error = distance(again(x), trainer.judged.eval()(x))
    if not error <= (tolerance := 100 * torch.finfo(x.dtype).eps):
        raise TrainingError(
            "the saved model does not compute the same", where=str(files.path), expected=tolerance, got=error
        )
