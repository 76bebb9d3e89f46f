"""RunRecord: what a finished or broken run left in its directory, read without trusting it."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from growconv.errors import CheckpointError

MOST_DEPTH, MOST_DIGITS, MOST_SIZE = 64, 20, 1e30
"""A run's files nest no deeper, and hold no longer and no larger numbers."""
MOST_BYTES = {"yaml": 1 << 20, "json": 1 << 28}
"""Sizes above which a file is not read: a config has a few kilobytes, a history of growth at most some megabytes."""

CONFIG, METRICS, GROWTH, SUMMARY = "config.yaml", "metrics.jsonl", "growth.jsonl", "summary.json"
ENVIRONMENT = "environment.json"


@dataclass(frozen=True)
class RunRecord:
    """The text files of one run directory.

    Attributes:
        path: the run directory.
        config: nested settings of the run; empty where config.yaml is missing.
        metrics: one dictionary an epoch, in file order.
        events: one dictionary a growth event, in file order.
        summary: final figures; empty where the run did not finish.
        environment: command, versions and layers that the run wrote down at its start; empty where it wrote nothing.
    """

    path: Path
    config: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    events: tuple[dict[str, Any], ...]
    summary: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the run wrote its summary."""
        return bool(self.summary)

    @property
    def settings(self) -> dict[str, Any]:
        """The config as one level: {"trainer.epochs": 20, ...}."""
        return dict(flatten(self.config))

    @property
    def method(self) -> str:
        """Growth method as the run names itself, "fixed" for a run that does not grow."""
        settings = self.settings
        named = self.summary.get("method") or settings.get("growth.method") or settings.get("growth.solver.name")
        return str(named) if named not in (None, "", "none") else "fixed"

    @property
    def data(self) -> str:
        """Name of the dataset."""
        settings = self.settings
        return str(settings.get("data.name", settings.get("data", "unknown data")))

    @property
    def model(self) -> str:
        """Name of the class or function that built the model."""
        return str(self.settings.get("model._target_", "a network")).rpartition(".")[-1]

    @property
    def seed(self) -> int | None:
        """Seed of the run, None where neither summary nor config says."""
        seed = self.summary.get("seed", self.config.get("seed"))
        return seed if isinstance(seed, int) and not isinstance(seed, bool) else None

    @property
    def growth_seconds(self) -> float:
        """Seconds spent on growth: from the summary, else summed over the events."""
        told = number(self.summary, "growth_seconds")
        return sum((number(event, "seconds", 0.0) for event in self.events), 0.0) if math.isnan(told) else told

    @property
    def growth_phases(self) -> dict[str, float]:
        """Seconds of each phase of growing, summed over the events; empty where they were not recorded."""
        phases: dict[str, float] = {}
        for event in self.events:
            parts = detail(event, "seconds")
            for name in parts if isinstance(parts, dict) else ():
                phases[name] = phases.get(name, 0.0) + number(parts, name, 0.0)
        return dict(islice(phases.items(), 8))

    def column(self, key: str) -> list[float]:
        """One metric over the epochs, NaN where a line lacks it."""
        return [number(line, key) for line in self.metrics]


def read_run(path: str | Path) -> RunRecord:
    """Read a run directory.

    Args:
        path: the directory; a file inside it (metrics.jsonl, say) is accepted too.

    Returns:
        What is there. Missing files leave their part empty; the caller decides what it needs.

    Raises:
        CheckpointError: no such directory, nothing of a run in it, or a file that is there but damaged.
    """
    directory = Path(path)
    if directory.is_file():
        directory = directory.parent
    if not directory.is_dir():
        raise CheckpointError("no such run directory", where=str(path), fix="give the folder that holds summary.json")
    if not any((directory / name).exists() for name in (CONFIG, METRICS, SUMMARY)):
        raise CheckpointError(
            "not a run directory",
            where=str(directory),
            expected=f"a folder with {CONFIG}, {METRICS} and {SUMMARY}",
            got=", ".join(sorted(entry.name for entry in directory.iterdir())[:8]) or "an empty folder",
        )
    return RunRecord(
        path=directory,
        config=_read_mapping(directory / CONFIG, "yaml", "settings"),
        metrics=tuple(_read_lines(directory / METRICS, needed="epoch")),
        events=tuple(map(_usual, _read_lines(directory / GROWTH, needed="site"))),
        summary=_read_mapping(directory / SUMMARY, "json", "figures"),
        environment=_read_environment(directory / ENVIRONMENT),
    )


def _usual(event: dict[str, Any]) -> dict[str, Any]:
    """A growth event whose parts are of the usual types; parts of other types are dropped."""
    usual = {key: value for key, value in event.items() if isinstance(value, _PARTS.get(key, object))}
    return {**usual, "site": plain_text(event["site"])}


_PARTS: dict[str, type] = {"details": dict, "gains": list, "reason": str}


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dictionary with dotted names; lists are leaves."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def is_number(value: object) -> bool:
    """Whether a value read from JSON is a number that a run can have."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (value == 0 or 1 / MOST_SIZE <= abs(value) <= MOST_SIZE)
    )


def number(line: dict[str, Any], key: str, default: float | int = math.nan) -> float:
    """The number under `key`, `default` where it is missing or none."""
    value = line.get(key)
    return float(value if isinstance(value, int | float) and is_number(value) else default)


def detail(event: dict[str, Any], key: str) -> Any:
    """An entry of a growth event's details; None where it is missing."""
    details = event.get("details")
    return details.get(key) if isinstance(details, dict) else None


def _damaged(path: Path, what: str, got: object = None) -> CheckpointError:
    return CheckpointError(f"damaged: {what}", where=str(path), got=got, fix="run again, or leave this run out")


def read_yaml(text: str) -> Any:
    """Read YAML as growconv writes it: without aliases (which can unfold without end), not deep, no endless numbers.

    Raises:
        yaml.YAMLError: what is wrong with it.
    """
    if len(text) > MOST_BYTES["yaml"]:
        raise yaml.YAMLError(f"more than {MOST_BYTES['yaml']} characters")
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise yaml.YAMLError("nested too deeply")
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias (*{event.anchor}), which growconv never writes")
        number = isinstance(event, yaml.ScalarEvent) and event.style is None and event.value[:1] in "+-.0123456789"
        if number and len(event.value) > 10 * MOST_DIGITS:
            raise yaml.YAMLError("a number of too many digits")
    try:
        return yaml.safe_load(text)
    except (ValueError, OverflowError) as error:  # numbers and dates that are none
        raise yaml.YAMLError(str(error)) from error


def read_json(text: str) -> Any:
    """Read JSON that is not deep; whole numbers of too many digits become floats.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        tree = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= MOST_DIGITS else float(digits))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [tree]
    for _ in range(MOST_DEPTH):
        level = [inner for each in level if isinstance(each, list | dict) for inner in _inside(each)]
    if level:
        raise ValueError("nested too deeply")
    return tree


def _inside(tree: list | dict) -> Iterable[Any]:
    return tree.values() if isinstance(tree, dict) else tree


def plain_text(value: object, most: int = 300) -> str:
    """Text of a stranger as it may be shown: one line, without control characters, not endless.

    Args:
        value: what to show.
        most: characters kept.
    """
    text = "".join(letter if letter.isprintable() else " " for letter in str(value)[: 2 * most])
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def csv_cell(value: object) -> object:
    """A cell of a CSV file: text that a spreadsheet would take for a formula gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    text = plain_text(value)
    return f"'{text}" if text[:1] in tuple("=+-@") else text


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Inside, a file to write, which then gets its name: readers see the old content or the new, also after a crash.

    Args:
        path: its name; its folder exists.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    temporary.unlink(missing_ok=True)  # nothing lies there that writing would follow
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read_text(path: Path, kind: str = "json") -> str | None:
    try:
        if not path.exists():
            return None
        if not path.is_file():
            raise _damaged(path, "no file")
        if path.stat().st_size > MOST_BYTES[kind]:
            raise _damaged(path, f"larger than {MOST_BYTES[kind]} bytes")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, "not UTF-8 text", error) from None
    except OSError as error:
        raise _damaged(path, "cannot be read", error) from None


def _read_mapping(path: Path, kind: str, what: str) -> dict[str, Any]:
    """The mapping that a file of YAML or JSON holds; empty where there is no file."""
    text = _read_text(path, kind)
    if text is None:
        return {}
    try:
        found = read_yaml(text) if kind == "yaml" else read_json(text)
    except (yaml.YAMLError, ValueError) as error:
        raise _damaged(path, f"not {kind.upper()}", str(error).partition("\n")[0]) from None
    if not isinstance(found, dict) or (kind == "json" and not found):
        raise _damaged(path, f"holds no {what}", type(found).__name__)
    return found


def _read_environment(path: Path) -> dict[str, Any]:
    """What is told about the run's start: it only adds to a report, so a damaged file counts as missing."""
    try:
        told = read_json(_read_text(path) or "{}")
    except (CheckpointError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _read_lines(path: Path, needed: str) -> Iterator[dict[str, Any]]:
    text = _read_text(path)
    for index, line in enumerate((text or "").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = read_json(line)
        except ValueError as error:
            raise _damaged(path, f"line {index} is not JSON", error) from None
        if not isinstance(entry, dict) or needed not in entry:
            raise _damaged(path, f"line {index} has no '{needed}'", line[:80])
        yield entry
