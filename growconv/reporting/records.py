"""RunRecord: what a finished or broken run left in its directory, read without trusting it."""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
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
    """The text files of one run directory."""

    path: Path  # the run directory
    config: dict[str, Any]  # nested settings of the run; empty where config.yaml is missing
    metrics: tuple[dict[str, Any], ...]  # one dictionary an epoch, in file order
    # one dictionary a growth event, in file order, each with `details`, `gains` and `reason`
    events: tuple[dict[str, Any], ...]
    summary: dict[str, Any]  # final figures; empty where the run did not finish
    # command, versions and layers that the run wrote down at its start; empty where it wrote nothing
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
        named = self.summary.get("method") or self.settings.get("growth.method")
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
    try:
        environment = read_mapping(directory / ENVIRONMENT)
    except CheckpointError:  # it only adds to a report
        environment = {}
    return RunRecord(
        path=directory,
        config=read_mapping(directory / CONFIG),
        metrics=tuple(_read_lines(directory / METRICS, needed="epoch")),
        events=tuple(map(_with_usual_parts, _read_lines(directory / GROWTH, needed="site"))),
        summary=read_mapping(directory / SUMMARY),
        environment=environment,
    )


def _with_usual_parts(event: dict[str, Any]) -> dict[str, Any]:
    """A growth event as it is written: parts of other types count as empty."""
    usual: dict[str, Any] = {"details": {}, "gains": [], "reason": ""}
    usual |= {key: event[key] for key, empty in usual.items() if isinstance(event.get(key), type(empty))}
    return {**event, **usual, "site": plain_text(event["site"])}


def flatten(tree: Any, prefix: str = "", lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Leaves of a tree of mappings with dotted names; lists are leaves, or with `lists` have theirs by number."""
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        name = f"{prefix}{key}"
        if value and isinstance(value, (Mapping, list, tuple) if lists else Mapping):
            yield from flatten(value, f"{name}.", lists)
        else:
            yield name, value


def is_below(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted name is one of these or lies below one of them."""
    return f"{key}.".startswith(tuple(f"{name}." for name in names))


def to_number(value: object, default: float = math.nan) -> float:
    """A value read from JSON as a number, `default` where it is none that a run can have."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return default
    return float(value) if value == 0 or 1 / MOST_SIZE <= abs(value) <= MOST_SIZE else default


def is_number(value: object) -> bool:
    """Whether a value read from JSON is a number that a run can have."""
    return not math.isnan(to_number(value))


def number(line: dict[str, Any], key: str, default: float = math.nan) -> float:
    """The number under `key`, `default` where it is missing or none."""
    return to_number(line.get(key), default)


def read_yaml(text: str) -> Any:
    """Read YAML as growconv writes it: without aliases (which can unfold without end), not deep, no endless numbers."""
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
    """Read JSON that is not deep; whole numbers of too many digits become floats."""
    try:
        tree = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= MOST_DIGITS else float(digits))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level: list[Any] = [tree]
    for _ in range(MOST_DEPTH):
        parts = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, list | dict))
        level = list(chain.from_iterable(parts))
    if level:
        raise ValueError("nested too deeply")
    return tree


def plain_text(value: object, most: int = 300) -> str:
    """Text of a stranger as it may be shown: one line, without control characters, of at most so many letters."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value)[: 2 * most])
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def csv_cell(value: object) -> object:
    """A cell of a CSV file: text that a spreadsheet would take for a formula gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    text = plain_text(value, 10_000)
    return f"'{text}" if text[:1] in tuple("=+-@") else text


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table as CSV, its cells by `csv_cell`; rows may know more than the columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Inside, a file to write, which then gets its name: readers see the old content or the new, also after a crash."""
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


def read_mapping(path: Path, fix: str = "run again, or leave this run out") -> dict[str, Any]:
    """The mapping in a run's file of YAML or JSON, empty where there is none; a CheckpointError if damaged."""
    text = _read_text(path)
    if text is None:
        return {}
    try:
        found = read_yaml(text) if path.suffix == ".yaml" else read_json(text)
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise _damaged(path, f"not {path.suffix[1:].upper()}", reason, fix) from None
    if not isinstance(found, dict):
        raise _damaged(path, "no mapping", type(found).__name__, fix)
    return found


def _read_lines(path: Path, needed: str) -> Iterator[dict[str, Any]]:
    for index, line in enumerate((_read_text(path) or "").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = read_json(line)
        except ValueError as error:
            raise _damaged(path, f"line {index} is not JSON", error) from None
        if not isinstance(entry, dict) or needed not in entry:
            raise _damaged(path, f"line {index} has no '{needed}'", line[:80])
        yield entry


def _read_text(path: Path) -> str | None:
    most = MOST_BYTES["yaml" if path.suffix == ".yaml" else "json"]
    try:
        if not path.exists():
            return None
        if not path.is_file():
            raise _damaged(path, "no file")
        if path.stat().st_size > most:
            raise _damaged(path, f"larger than {most} bytes")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, "not UTF-8 text", error) from None
    except OSError as error:
        raise _damaged(path, "cannot be read", error) from None


def _damaged(
    path: Path, what: str, got: object = None, fix: str = "run again, or leave this run out"
) -> CheckpointError:
    return CheckpointError(f"damaged: {what}", where=str(path), got=got, fix=fix)
