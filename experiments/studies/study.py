"""Run a study: every variant with every seed, then tables and plots of equal epochs and of equal training FLOPs.

    python experiments/studies/study.py experiments/studies/digits_quick/study.yaml
    nohup python experiments/studies/study.py experiments/studies/fashion_mnist/study.yaml --processes 2 > study.log &

A study is a YAML file: `base` overrides for all runs, `variants` with overrides of their own, `seeds`, a `baseline`,
and `equal_flops`: the fixed variants that are trained again for as many epochs as the growing runs' training FLOPs pay
for. Started again, a study leaves out finished runs and goes on with interrupted ones. Results go beside the YAML file,
runs to --runs.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from growconv.errors import ConfigError
from growconv.reporting.compare import to_markdown, write_comparison
from growconv.reporting.comparison import compare

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
    equal_flops: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Study":
        """Read and check a study.yaml.

        Raises:
            ConfigError: an entry is missing, unknown or names a variant that is not there.
        """
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        known = set(cls.__dataclass_fields__)
        if not isinstance(entries, dict) or set(entries) - known or known - set(entries) - {"equal_flops"}:
            raise ConfigError("this is no study", where=str(path), expected=", ".join(sorted(known)), got=entries)
        study = cls(**entries)
        for variant in (study.baseline, *study.equal_flops):
            if variant not in study.variants:
                raise ConfigError(
                    "there is no such variant", where=str(path), expected=", ".join(study.variants), got=variant
                )
        return study

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
    for name, epochs in equal_flops_epochs(study, runs).items():
        for seed in study.seeds:
            yield _job(study, runs / "equal_flops", name, study.variants[name], seed, epochs)


def equal_flops_epochs(study: Study, runs: Path) -> dict[str, int]:
    """Epochs for which the growing variants' median training FLOPs pay, per fixed variant; at least 1."""
    spent = {name: _flops(runs / "equal_epochs" / name) for name in study.variants}
    budget = statistics.median(flops for name in study.growing for flops in spent[name])
    return {
        name: max(1, round(study.epochs * budget / statistics.median(spent[name])))
        for name in study.equal_flops
        if spent[name]
    }


def work(jobs: Sequence[Job], processes: int) -> list[tuple[Job, str]]:
    """Run what is not done yet.

    Args:
        jobs: the runs.
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
    print(output / "RESULTS.md")


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's own text; gives 1 where a run failed."""
    parser = argparse.ArgumentParser(description="Run a study: resumable, in the background if you like.")
    parser.add_argument("study", type=Path, help="study.yaml")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), help="where the runs lie")
    parser.add_argument("--output", type=Path, help="where tables and plots go (default: beside study.yaml)")
    parser.add_argument("--only", help="comma-separated variants, for a part of the study")
    parser.add_argument("--seeds", help="comma-separated seeds, in place of the study's")
    parser.add_argument("--tables", action="store_true", help="only write tables and plots of what is there")
    arguments = parser.parse_args(argv)
    study = Study.read(arguments.study)
    if arguments.only or arguments.seeds:
        chosen = arguments.only.split(",") if arguments.only else list(study.variants)
        seeds = [int(seed) for seed in arguments.seeds.split(",")] if arguments.seeds else study.seeds
        study = Study(
            study.name,
            study.base,
            {name: study.variants[name] for name in chosen},
            seeds,
            study.baseline if study.baseline in chosen else chosen[0],
            study.epochs,
            [name for name in study.equal_flops if name in chosen],
        )
    runs = arguments.runs.resolve() / study.name
    output = arguments.output or arguments.study.parent
    failed = []
    if not arguments.tables:
        failed = work(list(first_part(study, runs)), arguments.processes)
        if study.growing and not failed:
            failed = work(list(second_part(study, runs)), arguments.processes)
    write_results(study, runs, output)
    return 1 if failed else 0


def _job(study: Study, folder: Path, name: str, overrides: list[str], seed: int, epochs: int) -> Job:
    given = (*SAME_FOR_ALL, *study.base, *overrides, f"seed={seed}", f"trainer.epochs={epochs}")
    return Job(folder / name / f"seed{seed}", given)


def _flops(folder: Path) -> list[float]:
    """Training FLOPs of the finished runs of a variant."""
    summaries = [json.loads(path.read_text()) for path in sorted(folder.glob("seed*/summary.json"))]
    return [value for summary in summaries if math.isfinite(value := float(summary["train_flops"]))]


if __name__ == "__main__":
    sys.exit(main())
