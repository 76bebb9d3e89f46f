"""Run the study when_growing_pays, piece by piece; README.md beside this file is the protocol.

python -m experiments.studies.when_growing_pays.run --hours 2
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.studies.when_growing_pays.pieces import Piece
from experiments.studies.when_growing_pays.questions import QUESTIONS, SEEDS_OF, SETTINGS
from experiments.studies.when_growing_pays.rates import rates
from experiments.studies.when_growing_pays.record import Record, Result


def pieces(record: Record, questions: Sequence[str], seeds: Sequence[int]) -> Iterator[Piece]:
    """All that is to be run, in order: the rates, then every question seed by seed."""
    yield from rates(record, SETTINGS)
    for seed in seeds:
        for question in questions:
            if seed in SEEDS_OF[question]:
                yield from QUESTIONS[question](record, seed)


def perform(piece: Piece, folder: Path, threads: int) -> int | None:
    """Run a piece's commands.

    Args:
        piece: what to run.
        folder: where; what a piece that was cut left there is deleted.
        threads: of each command.

    Returns:
        The largest process's memory in MiB; None where all was run before.

    Raises:
        SystemExit: a command failed.
    """
    if all((folder / place / "summary.json").is_file() for place in piece.outcomes.values()):
        return None
    shutil.rmtree(folder, ignore_errors=True)
    peak = 0
    for arguments in piece.commands(folder):
        log = folder.with_name(f"{folder.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "growconv", *arguments],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(
                f"growconv {' '.join(arguments)}\nFAILED with {process.returncode}\n{log.read_text()[-2000:]}"
            )
        peak = max(peak, usage.ru_maxrss // 1024)
    return peak


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's own text; gives 1 where time ran out."""
    parser = argparse.ArgumentParser(description="Run pieces of the study; started again, it goes on.")
    parser.add_argument("questions", nargs="*", help=f"which questions, in order: {', '.join(QUESTIONS)}; default: all")
    every = sorted({seed for seeds in SEEDS_OF.values() for seed in seeds})
    parser.add_argument("--seeds", type=int, nargs="+", default=every, help="which seeds; default: all")
    parser.add_argument("--hours", type=float, default=float("inf"), help="start no piece after so many hours")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--runs", type=Path, default=Path("runs/when_growing_pays"), help="where the runs lie")
    arguments = parser.parse_args(argv)
    questions = arguments.questions or list(QUESTIONS)
    if unknown := set(questions) - set(QUESTIONS):
        parser.error(f"there is no question {', '.join(sorted(unknown))}")
    record, began = Record(), time.monotonic()
    for piece in pieces(record, questions, arguments.seeds):
        missing = {
            name: place for name, place in piece.outcomes.items() if piece.seed not in record.of(piece.question, name)
        }
        if not missing:
            continue
        if time.monotonic() - began > 3600 * arguments.hours:
            print("time is up; started again, it goes on here")
            return 1
        folder = arguments.runs.resolve() / piece.question / piece.variant / f"seed{piece.seed}"
        peak = perform(piece, folder, arguments.threads)
        record.add(
            Result.read(piece.question, name, piece.seed, folder / place, peak) for name, place in missing.items()
        )
        print(f"{time.strftime('%H:%M:%S')} {piece.question} {piece.variant} seed {piece.seed}: done", flush=True)
    print("all is done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
