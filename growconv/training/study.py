"""The command ``growconv study``: every variant with every seed, at equal epochs and at equal training FLOPs.

A study is a YAML file: `base` overrides for all runs, `variants` with overrides of their own, `seeds`, a `baseline`,
and `equal_flops`: the fixed variants that are trained again for the training FLOPs that growing runs took. Started
again, a study leaves out finished runs and goes on with interrupted ones.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from dataclasses import field as with_default
from pathlib import Path
from typing import Any

import yaml

from growconv.errors import ConfigError, TrainingError, did_you_mean
from growconv.reporting.compare import to_markdown, write_comparison
from growconv.reporting.comparison import compare
from growconv.reporting.records import read_yaml
from growconv.reporting.terminal import shown
from growconv.training import config as settings

SAME_FOR_ALL = ("report=false", "baselines=[]", "trainer.progress=none", "logger=none")


@dataclass(frozen=True)
class Study:
    """What a study.yaml says.

    Attributes:
        name: of the study; its runs lie in a folder of this name.
        base: overrides of every run.
        variants: name to overrides.
        seeds: of every variant.
        baseline: variant that the others are measured against.
        equal_flops: fixed variants that are run again at the growing variants' median training FLOPs.
        epochs: passes over the data of the first part.
    """

    name: str
    base: list[str]
    variants: dict[str, list[str]]
    seeds: list[int]
    baseline: str
    epochs: int
    equal_flops: list[str] = with_default(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Study":
        """Read and check a study's file, the settings of every variant included.

        Raises:
            ConfigError: an entry is missing, unknown or of another form, or names what is not there.
        """
        try:
            entries = read_yaml(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError("this is not a YAML file", where=str(path), got=str(error).splitlines()[0]) from error
        _check_entries(entries, path)
        study = cls(**entries)
        for variant in (study.baseline, *study.equal_flops):
            study.require(variant, str(path))
        for name, overrides in study.variants.items():
            try:
                settings.plain(settings.compose([*SAME_FOR_ALL, *study.base, *overrides]))
            except ConfigError as error:
                where = f"{path}, variant {name}: {error.where}"
                raise ConfigError(
                    error.problem, where=where, expected=error.expected, got=error.got, fix=error.fix
                ) from error
        return study

    def require(self, variant: str, where: str) -> None:
        """Refuse a variant that is not there.

        Raises:
            ConfigError: names those that are.
        """
        if variant not in self.variants:
            fix = did_you_mean(variant, self.variants)
            raise ConfigError(
                "there is no such variant", where=where, expected=", ".join(self.variants), got=variant, fix=fix
            )

    def part(self, only: Sequence[str] | None, seeds: Sequence[int] | None) -> "Study":
        """The study with some of its variants and other seeds.

        Args:
            only: names of variants; None keeps all.
            seeds: in place of the study's; None keeps those.

        Raises:
            ConfigError: a variant that is not there.
        """
        chosen = list(self.variants if only is None else only)
        for name in chosen:
            self.require(name, "--only")
        return replace(
            self,
            variants={name: self.variants[name] for name in chosen},
            seeds=list(self.seeds if seeds is None else seeds),
            baseline=self.baseline if self.baseline in chosen else chosen[0],
            equal_flops=[name for name in self.equal_flops if name in chosen],
        )

    @property
    def growing(self) -> list[str]:
        """Variants that grow."""
        return [name for name, overrides in self.variants.items() if "growth=none" not in overrides]


@dataclass(frozen=True)
class Job:
    """One run: where, and the command-line overrides."""

    directory: Path
    overrides: tuple[str, ...]

    @property
    def done(self) -> bool:
        """Whether the run wrote its summary."""
        return (self.directory / "summary.json").is_file()

    def run(self, threads: int) -> tuple["Job", int, str]:
        """Train in a process of its own; goes on where an interrupted run stopped."""
        resumable = (self.directory / "checkpoint").is_dir() and any((self.directory / "checkpoint").iterdir())
        arguments = [f"resume={self.directory}"] if resumable else [*self.overrides, f"hydra.run.dir={self.directory}"]
        if not resumable and self.directory.exists():
            for name in ("metrics.jsonl", "config.yaml", "environment.json"):
                (self.directory / name).unlink(missing_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "growconv", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return self, done.returncode, (done.stdout + done.stderr)[-2000:]


def first_part(study: Study, runs: Path) -> Iterator[Job]:
    """All variants at equal epochs, seed by seed, so that an early stop leaves whole seeds."""
    for seed in study.seeds:
        for name, overrides in study.variants.items():
            yield _job(study, runs / "equal_epochs", name, overrides, seed, study.epochs)


def second_part(study: Study, runs: Path) -> Iterator[Job]:
    """The fixed variants again, for the growing variants' training FLOPs."""
    length = f"trainer.flops={flops_of_growing(study, runs)}"
    for name in study.equal_flops:
        for seed in study.seeds:
            yield _job(study, runs / "equal_flops", name, [*study.variants[name], length], seed, study.epochs)


def flops_of_growing(study: Study, runs: Path) -> float:
    """The growing variants' median training FLOPs."""
    return statistics.median(flops for name in study.growing for flops in _flops(runs / "equal_epochs" / name))


def work(jobs: Sequence[Job], processes: int) -> list[tuple[Job, str]]:
    """Run what is not done yet.

    Args:
        processes: how many at a time; the cores are shared among them.

    Returns:
        The runs that failed, with the end of what they printed.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    waiting = [job for job in jobs if not job.done]
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} done already", flush=True)
    failed = []
    start = time.monotonic()
    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(job.run, threads) for job in waiting]
        for count, future in enumerate(as_completed(futures), start=1):
            job, code, output = future.result()
            hours = (time.monotonic() - start) / 3600
            left = hours / count * (len(waiting) - count)
            state = "done" if code == 0 else f"FAILED with exit code {code}"
            print(
                f"{count}/{len(waiting)} {job.directory}: {state}; {hours:.2f} h, about {left:.2f} h left", flush=True
            )
            if code != 0:
                failed.append((job, output))
                print(output, flush=True)
    return failed


def write_results(study: Study, runs: Path, output: Path) -> None:
    """Tables and plots of both parts, and RESULTS.md with the tables."""
    parts = [("Equal epochs", "equal_epochs", [runs / "equal_epochs"])]
    if study.equal_flops:
        folders = [runs / "equal_epochs" / name for name in study.growing] + [runs / "equal_flops"]
        parts.append(("Equal training FLOPs", "equal_flops", folders))
    lines = [f"# {study.name}", ""]
    for title, folder, places in parts:
        existing = [Path(os.path.relpath(place)) for place in places if place.exists()]
        if not any((runs / folder / study.baseline).glob("seed*/summary.json")):
            print(f"{title}: left out, {study.baseline} has no finished run yet")
            continue
        comparison = compare(existing, study.baseline, label=lambda run: run.path.parent.name)
        write_comparison(comparison, output / folder)
        lines += [f"## {title}", "", to_markdown(comparison), f"![{title}]({folder}/comparison.png)", ""]
    (output / "RESULTS.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"results: {shown(output / 'RESULTS.md')}")


def main(arguments: Namespace) -> None:
    """Run a study and write its tables.

    Args:
        arguments: what `study_parser` read.

    Raises:
        TrainingError: a run failed; the tables of the others are written.
    """
    if arguments.processes < 1:
        raise ConfigError(
            "at least one process is needed", where="--processes", expected="1 or more", got=arguments.processes
        )
    study = Study.read(arguments.study).part(arguments.only, arguments.seeds)
    runs, failed = arguments.runs.resolve() / study.name, []
    if not arguments.tables:
        failed = work(list(first_part(study, runs)), arguments.processes)
        if study.growing and not failed:
            failed = work(list(second_part(study, runs)), arguments.processes)
    write_results(study, runs, arguments.output or arguments.study.parent)
    if failed:
        got = ", ".join(str(shown(job.directory)) for job, _ in failed)
        raise TrainingError(f"{len(failed)} runs failed", got=got, fix="their output is above; start the study again")


def _check_entries(entries: object, path: Path) -> None:
    """Refuse a file whose entries are not those of a study."""
    example = "name: mine, base: [data=digits], epochs: 8, seeds: [0, 1], baseline: a, variants: {a: [growth=none]}"
    if not isinstance(entries, dict):
        raise ConfigError("this is not a study", where=str(path), expected=example, got=type(entries).__name__)
    known = [entry.name for entry in fields(Study)]
    unknown = [str(name) for name in entries if name not in known]
    missing = [name for name in known if name not in entries and name != "equal_flops"]
    if unknown or missing:
        raise ConfigError(
            "this is not a study" if missing else "there is no such entry",
            where=str(path),
            expected=example,
            got=f"without {', '.join(missing)}" if missing else ", ".join(unknown),
            fix=did_you_mean(unknown[0], known) if unknown else None,
        )

    def texts(value: object) -> bool:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)

    variants, seeds = entries["variants"], entries["seeds"]
    wrong: dict[str, Any] = {
        "name": not isinstance(entries["name"], str) or "/" in entries["name"],
        "base": not texts(entries["base"]),
        "epochs": type(entries["epochs"]) is not int or entries["epochs"] < 1,
        "seeds": not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds),
        "variants": not isinstance(variants, dict) or not variants or not all(map(texts, variants.values())),
        "equal_flops": not texts(entries.get("equal_flops", [])),
    }
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        raise ConfigError("this entry cannot be used", where=f"{path}: {name}", expected=example, got=entries[name])


def _job(study: Study, folder: Path, name: str, overrides: list[str], seed: int, epochs: int) -> Job:
    given = (*SAME_FOR_ALL, *study.base, *overrides, f"seed={seed}", f"trainer.epochs={epochs}")
    return Job(folder / name / f"seed{seed}", given)


def _flops(folder: Path) -> list[float]:
    """Training FLOPs of the finished runs of a variant."""
    summaries = [json.loads(path.read_text()) for path in sorted(folder.glob("seed*/summary.json"))]
    return [value for summary in summaries if math.isfinite(value := float(summary["train_flops"]))]
