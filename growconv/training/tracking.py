"""Trackers: where metrics and growth events go besides the run directory."""

import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from growconv.errors import ConfigError
from growconv.network.event import GrowthEvent
from growconv.reporting.records import METRICS, csv_text
from growconv.training.checkpoint import Checkpoint, position_of
from growconv.training.rundir import write_atomically

COLUMNS = (
    "step", "site", "method", "channels", "width_before", "width_after", "amplitude", "parameters_after", "reason",
)  # fmt: skip
"""What tables of growth events show."""
PACKAGES = {"tensorboard": "growconv[track]", "wandb": "wandb"}
"""What loggers need besides growconv's own dependencies, and how to have it."""

PATIENCE = 4
"""Seconds to wait for a server's login, and again for the run's start; twice that at the run's end."""


class Tracker:
    """Keeps nothing.

    Attributes:
        identity: what a resumed run passes to go on in the same place; None where there is no such thing.
    """

    identity: str | None = None

    def metrics(self, record: Mapping[str, Any], step: int) -> None:
        """Take the numbers of an epoch."""

    def events(self, history: Sequence[GrowthEvent], fresh: Sequence[GrowthEvent], widths: Mapping[str, int]) -> None:
        """Take new growth events, and all events so far."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Take the final figures."""


class WandbTracker(Tracker):
    """Weights & Biases: config, metrics, growth events, widths, spectra; of a run `identity` that goes on, if any."""

    def __init__(self, config: Mapping[str, Any], directory: Path, identity: str | None) -> None:
        self.directory = directory
        self.run = _start_wandb(config, directory, identity)
        self.identity = self.run.id

    def metrics(self, record: Mapping[str, Any], step: int) -> None:
        """Log the numbers of an epoch at their optimizer step."""
        self.run.log(dict(record), step=step)

    def events(self, history: Sequence[GrowthEvent], fresh: Sequence[GrowthEvent], widths: Mapping[str, int]) -> None:
        """Log widths and gain spectra, and the table of all events so far."""
        import wandb

        logged: dict[str, Any] = {f"width/{site}": width for site, width in widths.items()}
        for event in fresh:
            if any(gain > 0 for gain in event.gains):
                logged[f"gains/{event.site}"] = wandb.Histogram(list(event.gains))
        logged["growth"] = table = wandb.Table(columns=list(COLUMNS))
        for event in history:
            table.add_data(*(getattr(event, column) for column in COLUMNS))
        self.run.log(logged, step=fresh[-1].step if fresh else None)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the final figures into the run's summary."""
        self.run.summary.update(dict(summary))
        try:
            self.run.finish()
        except TimeoutError:
            warnings.warn(
                f"wandb's server does not answer; unsent data is in {self.directory / 'wandb'}: send it later "
                "with `wandb sync`",
                stacklevel=2,
            )


class TensorBoardTracker(Tracker):
    """TensorBoard's event files, in the folder tensorboard of the run directory.

    Args:
        directory: the run directory.
        step: step of the checkpoint that the run goes on from; later points of an interrupted run are taken back.
    """

    def __init__(self, directory: Path, step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=None if step is None else step + 1)

    def metrics(self, record: Mapping[str, Any], step: int) -> None:
        """Write the numbers of an epoch at their optimizer step."""
        for name, value in record.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def events(self, history: Sequence[GrowthEvent], fresh: Sequence[GrowthEvent], widths: Mapping[str, int]) -> None:
        """Write the widths, and each new event as a line of text."""
        step = fresh[-1].step
        for site, width in widths.items():
            self.writer.add_scalar(f"width/{site}", width, step)
        self.writer.add_text("growth", "\n\n".join(str(event) for event in fresh), step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the final figures."""
        for name, value in summary.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(f"summary/{name}", value, summary["steps"])
        self.writer.close()


class CsvTracker(Tracker):
    """metrics.csv and growth.csv in the run directory, each whole after every epoch and growth."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def metrics(self, record: Mapping[str, Any], step: int) -> None:
        """Write all epochs so far; the run directory knows those of an interrupted part."""
        lines = (self.directory / METRICS).read_text(encoding="utf-8").splitlines()
        text = csv_text(list(record), [json.loads(line) for line in lines])
        write_atomically(self.directory / "metrics.csv", text)

    def events(self, history: Sequence[GrowthEvent], fresh: Sequence[GrowthEvent], widths: Mapping[str, int]) -> None:
        """Write all events so far."""
        text = csv_text(COLUMNS, [{name: getattr(event, name) for name in COLUMNS} for event in history])
        write_atomically(self.directory / "growth.csv", text)


def require_installed(options: Mapping[str, Any]) -> None:
    """Refuse loggers of the group logger whose package is not installed."""
    for name, package in PACKAGES.items():
        if options[name] and find_spec(name) is None:
            fix = f"pip install '{package}', or choose another logger"
            raise ConfigError(f"this needs {name}, which is not installed", where=f"logger={name}", fix=fix)


def make_trackers(config: Mapping[str, Any], directory: Path, found: Checkpoint | None = None) -> list[Tracker]:
    """The trackers of the group logger; those of a run that goes on from a checkpoint go on, too."""
    options = config["logger"]
    members: list[Tracker] = [CsvTracker(directory)] if options["csv"] else []
    if options["tensorboard"]:
        members.append(TensorBoardTracker(directory, None if found is None else position_of(found).step))
    if options["wandb"]:
        members.append(WandbTracker(config, directory, None if found is None else found.state.get("tracker")))
    return members


def _start_wandb(config: Mapping[str, Any], directory: Path, identity: str | None) -> Any:
    import wandb

    options = config["logger"]
    server = {} if options["server"] is None else {"base_url": options["server"]}
    limits = {"init_timeout": PATIENCE, "login_timeout": PATIENCE, "finish_timeout": 2 * PATIENCE}
    settings = wandb.Settings(silent=True, console="off", finish_timeout_raises=True, **limits, **server)

    def start(mode: Any) -> Any:
        return wandb.init(
            project=options["project"],
            entity=options["entity"],
            group=options["group"],
            tags=list(options["tags"]),
            name=directory.name,
            id=identity,
            resume="allow" if identity else None,
            config=dict(config),
            dir=str(directory),
            mode=mode,
            settings=settings,
        )

    try:
        return start(options["mode"])
    except (wandb.Error, OSError, TimeoutError) as error:
        if options["mode"] != "online":
            raise
        warnings.warn(
            f"wandb cannot be reached ({error}); training goes on, and wandb writes offline to {directory / 'wandb'}: "
            "send it later with `wandb sync`",
            stacklevel=2,
        )
        return start("offline")
