"""RunDirectory: the files of a run, each written so that a kill at any moment leaves it readable."""

import errno
import json
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from growconv.errors import CheckpointError, ConfigError
from growconv.reporting.records import CONFIG, ENVIRONMENT, GROWTH, METRICS, SUMMARY, read_mapping, replacing
from growconv.training.config import is_longer

CHECKPOINTS = "checkpoint"
LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems that cannot lock: network file systems mounted without a lock service, some FUSE ones."""


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step, see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class RunDirectory:
    """Where one run writes: config.yaml, metrics.jsonl, growth.jsonl, checkpoint/, summary.json, report.html.

    Args:
        active: False on ranks above 0, which write nothing.
    """

    def __init__(self, path: str | Path, active: bool = True) -> None:
        self.path = Path(path)
        self.active = active

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process works in this directory.

        The operating system holds the lock and takes it back when the process ends, however it ends.

        Raises:
            CheckpointError: another process works here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise CheckpointError(
                "Another process works in this run directory.",
                where=str(self.path),
                fix=f"wait until it ends, or stop it (fuser {shlex.quote(str(self.path / LOCK))} names it); "
                "a new run takes another directory: hydra.run.dir=...",
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"{self.path} is on a file system without locks ({error.strerror}): make sure yourself that no two "
                "processes work in it",
                stacklevel=2,
            )
        try:
            yield
        finally:
            lock.release()

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def finished(self) -> bool:
        """Whether the run wrote its summary."""
        return (self.path / SUMMARY).is_file()

    def start(self, config: Mapping[str, Any], versions: Mapping[str, Any]) -> None:
        """Make the directory of a new run, unless another lies there; write its config and how it was made."""
        if (self.path / METRICS).exists() or self.finished:
            fix = f"continue it: growconv resume={self.path}; or choose another: hydra.run.dir=..."
            raise ConfigError("this directory already contains a run", where=str(self.path), fix=fix)
        if self.active:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_config(config)
            write_atomically(self.path / ENVIRONMENT, json.dumps(versions, indent=2) + "\n")

    def prolong(self, config: Mapping[str, Any]) -> None:
        """Write the config of a run that goes on for longer, and take back the summary of the shorter one."""
        if self.active and is_longer(self.config(), config):
            (self.path / SUMMARY).unlink(missing_ok=True)
            self._write_config(config)

    def _write_config(self, config: Mapping[str, Any]) -> None:
        write_atomically(self.path / CONFIG, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    @property
    def config_file(self) -> Path:
        """Where the run's config lies."""
        early = self.path / ".hydra" / CONFIG  # all there is of a run that was killed in its very first moments
        return early if early.is_file() and not (self.path / CONFIG).is_file() else self.path / CONFIG

    def config(self) -> dict[str, Any]:
        """The config of the run that lies here; a CheckpointError where it is missing or damaged."""
        path = self.config_file
        config = read_mapping(path, fix="restore it, or start a new run")
        if not config:
            empty = not self.path.is_dir() or not any(self.path.iterdir())
            problem = "there is no run here" if empty else "a file is missing"
            fix = "give the directory of a run that has started: it holds config.yaml and checkpoint/"
            raise CheckpointError(problem, where=str(path), fix=fix)
        if "trainer" not in config:
            raise CheckpointError("the file is damaged: it contains no settings of a run", where=str(path))
        return config

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        self._append(METRICS, [record])

    def append_events(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add lines to growth.jsonl."""
        self._append(GROWTH, records)

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        if self.active and records:
            with (self.path / name).open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(record) + "\n" for record in records)

    def rewind(self, metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> None:
        """Bring metrics.jsonl and growth.jsonl back to what a checkpoint knows: all their lines up to it."""
        if self.active:
            for name, records in ((METRICS, metrics), (GROWTH, events)):
                write_atomically(self.path / name, "".join(json.dumps(record) + "\n" for record in records))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json: the sign that the run is complete."""
        if self.active:
            write_atomically(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")

    def summary(self) -> dict[str, Any]:
        """What `finish` wrote."""
        return read_mapping(self.path / SUMMARY, fix="delete it and resume")
