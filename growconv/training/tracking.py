"""Trackers: where metrics and growth events go besides the run directory."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from growconv.network.event import GrowthEvent

PATIENCE = 4
"""Seconds to wait for a server's login, and again for the run's start."""


class Tracker:
    """Keeps nothing; what a run without a tracker uses.

    Attributes:
        identity: what a resumed run passes to go on in the same place; None where there is no such thing.
    """

    identity: str | None = None

    def metrics(self, record: Mapping[str, Any], step: int) -> None:
        """Take the numbers of an epoch."""

    def events(self, history: Sequence[GrowthEvent], fresh: Sequence[GrowthEvent], widths: Mapping[str, int]) -> None:
        """Take new growth events, and all events so far.

        Args:
            history: all events.
            fresh: those of the last round.
            widths: width of every site now.
        """

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Take the final figures."""


class WandbTracker(Tracker):
    """Weights & Biases: config, metrics, growth events as a table, widths over the run, spectra of the gains.

    Args:
        options: the group logger.
        config: the run's config.
        directory: the run directory; wandb's own files lie in it.
        name: name of the run.
        identity: id of the run to go on in; None starts a new one.
    """

    COLUMNS = (
        "step",
        "site",
        "method",
        "channels",
        "width_before",
        "width_after",
        "amplitude",
        "parameters_after",
        "reason",
    )

    def __init__(
        self, options: Mapping[str, Any], config: Mapping[str, Any], directory: Path, name: str, identity: str | None
    ) -> None:
        self.run = _start_wandb(options, config, directory, name, identity)
        self.identity = self.run.id

    def metrics(self, record: Mapping[str, Any], step: int) -> None:
        """Log the numbers of an epoch at their optimizer step."""
        self.run.log(dict(record), step=step)

    def events(self, history: Sequence[GrowthEvent], fresh: Sequence[GrowthEvent], widths: Mapping[str, int]) -> None:
        """Log widths and gain spectra, and the table of all events so far."""
        import wandb

        table = wandb.Table(columns=list(self.COLUMNS))
        for event in history:
            table.add_data(*(getattr(event, column) for column in self.COLUMNS))
        spectra = {
            f"gains/{event.site}": wandb.Histogram(list(event.gains))
            for event in fresh
            if any(gain > 0 for gain in event.gains)
        }
        step = fresh[-1].step if fresh else None
        self.run.log(
            {f"width/{site}": width for site, width in widths.items()} | spectra | {"growth": table}, step=step
        )

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the final figures into the run's summary."""
        self.run.summary.update(dict(summary))
        self.run.finish()


def make_tracker(
    options: Mapping[str, Any], config: Mapping[str, Any], directory: Path, name: str, identity: str | None = None
) -> Tracker:
    """The tracker of the group logger.

    Args:
        options: the group logger.
        config: the run's config.
        directory: the run directory.
        name: name of the run.
        identity: identity of the tracker that the run had before it was interrupted.
    """
    if options["name"] == "none":
        return Tracker()
    return WandbTracker(options, config, directory, name, identity)


def _start_wandb(
    options: Mapping[str, Any], config: Mapping[str, Any], directory: Path, name: str, identity: str | None
) -> Any:
    import wandb

    server = {} if options["server"] is None else {"base_url": options["server"]}
    settings = wandb.Settings(silent=True, init_timeout=PATIENCE, login_timeout=PATIENCE, console="off", **server)

    def start(mode: Any) -> Any:
        return wandb.init(
            project=options["project"],
            entity=options["entity"],
            group=options["group"],
            tags=list(options["tags"]),
            name=name,
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
