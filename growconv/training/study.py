"""The command ``growconv study``: every variant with every seed, at equal epochs and at equal training FLOPs.

A study is a YAML file: `base` overrides for all runs, `variants` with overrides of their own, `seeds`, a `baseline`,
and `equal_flops`: the fixed variants that are trained again for the training FLOPs that growing runs took. Started
again, a study leaves out finished runs and goes on with interrupted ones.
"""

import math
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from growconv.errors import ConfigError, TrainingError, did_you_mean
from growconv.limits import limited
from growconv.reporting.compare import to_markdown, write_comparison
from growconv.reporting.comparison import compare
from growconv.reporting.records import read_json, read_yaml
from growconv.reporting.terminal import shown
from growconv.training import config as settings
from growconv.training.rundir import RunDirectory

SAME_FOR_ALL = ("report=false", "baselines=[]", "trainer.progress=none", "logger=none")


@dataclass
class Study:
    """What a study.yaml says."""

    name: str = MISSING  # of the study; its runs lie in a folder of this name
    base: list[str] = MISSING  # overrides of every run
    variants: dict[str, list[str]] = MISSING  # name to overrides
    seeds: list[int] = MISSING  # of every variant
    baseline: str = MISSING  # variant that the others are measured against
    epochs: int = limited(MISSING, least=1)  # passes over the data of the first part
    # fixed variants that are run again at the growing variants' median training FLOPs
    equal_flops: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Study":
        """Read and check a study's file, the settings of every variant included."""
        example = "name: mine, base: [data=digits], epochs: 8, seeds: [0, 1], baseline: a, variants: {a: [growth=none]}"
        try:
            entries = read_yaml(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError("this is not a YAML file", where=str(path), got=str(error).splitlines()[0]) from error
        if not isinstance(entries, dict):
            raise ConfigError("this is not a study", where=str(path), expected=example, got=type(entries).__name__)
        node: Any = OmegaConf.structured(cls)
        for name, value in entries.items():
            try:
                node[name] = value
            except OmegaConfBaseException as error:
                known = [entry.name for entry in fields(cls)]
                problem = "this entry cannot be used" if name in known else "there is no such entry"
                fix = None if name in known else did_you_mean(name, known)
                where = f"{path}: {name}"
                raise ConfigError(problem, where=where, expected=example, got=value, fix=fix) from error
        settings.check_options(node, f"{path}: ")
        values: Any = OmegaConf.to_container(node)  # references in overrides are the run's to resolve
        study = cls(**values)
        for name in ("seeds", "variants"):
            if not getattr(study, name):
                raise ConfigError("this entry is empty", where=f"{path}: {name}", expected=example)
        if "/" in study.name:
            raise ConfigError("this names no folder", where=f"{path}: name", got=study.name)
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
        """Refuse a variant that is not there, and name those that are."""
        if variant not in self.variants:
            fix = did_you_mean(variant, self.variants)
            raise ConfigError(
                "there is no such variant", where=where, expected=", ".join(self.variants), got=variant, fix=fix
            )

    def part(self, only: Sequence[str] | None, seeds: Sequence[int] | None) -> "Study":
        """The study with some of its variants, and with other seeds; None keeps what there is."""
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


Jobs = dict[Path, list[str]]
"""Run directories, each with the overrides of its run."""


def first_part(study: Study, runs: Path) -> Jobs:
    """All variants at equal epochs, seed by seed, so that an early stop leaves whole seeds."""
    folder = runs / "equal_epochs"
    return {folder / name / f"seed{seed}": _run(study, name, seed) for seed in study.seeds for name in study.variants}


def second_part(study: Study, runs: Path) -> Jobs:
    """The fixed variants again, for the growing variants' median training FLOPs."""
    folders = [runs / "equal_epochs" / name for name in study.growing]
    files = [path for folder in folders for path in sorted(folder.glob("seed*/summary.json"))]
    flops = [float(read_json(path.read_text(encoding="utf-8"))["train_flops"]) for path in files]
    length = f"trainer.flops={statistics.median(filter(math.isfinite, flops))}"
    folder, pairs = runs / "equal_flops", product(study.equal_flops, study.seeds)
    return {folder / name / f"seed{seed}": _run(study, name, seed, length) for name, seed in pairs}


def _run(study: Study, name: str, seed: int, *more: str) -> list[str]:
    own = [*study.variants[name], *more, f"seed={seed}", f"trainer.epochs={study.epochs}"]
    return [*SAME_FOR_ALL, *study.base, *own]


def work(jobs: Jobs, processes: int) -> list[Path]:
    """Run what is not done yet, so many at a time, which share the cores; those that failed are told and returned."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    waiting = {path: overrides for path, overrides in jobs.items() if not RunDirectory(path).finished}
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} done already", flush=True)
    failed = []
    start = time.monotonic()
    with ThreadPoolExecutor(processes) as pool:
        futures = {pool.submit(_train, path, overrides, threads): path for path, overrides in waiting.items()}
        for count, future in enumerate(as_completed(futures), start=1):
            path, (code, output) = futures[future], future.result()
            hours = (time.monotonic() - start) / 3600
            left = hours / count * (len(waiting) - count)
            state = "done" if code == 0 else f"FAILED with exit code {code}"
            told = f"{count}/{len(waiting)} {path}: {state}; {hours:.2f} h, about {left:.2f} h left"
            print(told if code == 0 else f"{told}\n{output}", flush=True)
            if code != 0:
                failed.append(path)
    return failed


def _train(path: Path, overrides: Sequence[str], threads: int) -> tuple[int, str]:
    """Train in a process of its own, or go on where it stopped: its exit status, and the end of what it printed."""
    resumable = (path / "checkpoint").is_dir() and any((path / "checkpoint").iterdir())
    arguments = [f"resume={path}"] if resumable else [*overrides, f"hydra.run.dir={path}"]
    if not resumable:
        for name in ("metrics.jsonl", "config.yaml", "environment.json"):
            (path / name).unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "growconv", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr)[-2000:]


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
    """Run a study and write its tables."""
    if arguments.processes < 1:
        raise ConfigError(
            "at least one process is needed", where="--processes", expected="1 or more", got=arguments.processes
        )
    study = Study.read(arguments.study).part(arguments.only, arguments.seeds)
    runs, failed = arguments.runs.resolve() / study.name, []
    if not arguments.tables:
        failed = work(first_part(study, runs), arguments.processes)
        if study.growing and not failed:
            failed = work(second_part(study, runs), arguments.processes)
    write_results(study, runs, arguments.output or arguments.study.parent)
    if failed:
        got = ", ".join(str(shown(path)) for path in failed)
        raise TrainingError(f"{len(failed)} runs failed", got=got, fix="their output is above; start the study again")
