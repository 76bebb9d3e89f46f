"""What starting costs: CPU seconds of fresh processes, against `import torch`.

    OMP_NUM_THREADS=1 python experiments/benchmarks/startup.py --repeats 7

Every line is one process, measured from its start to its end (user and system time), taken in turns with the others
so that a busy machine touches all alike. Printed are medians, their ratio to `import torch`, and the heavy packages
that were loaded. The runs train nothing to speak of: one epoch on 64 images.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "torch._dynamo", "torchmetrics", "transformers", "lightning_fabric", "sklearn", "scipy", "matplotlib")
SHORT = ["trainer.epochs=1", "data.limit=64", "baselines=[]", "report=false", "trainer.progress=none"]
GROWN = ["growth.times=1", "growth.samples=32", "growth.batch_size=16"]


def command_line(*arguments: str) -> str:
    """Code that runs growconv with these arguments."""
    return f"from growconv.cli import main; main({list(arguments)!r})"


CASES = {
    "import torch": "import torch",
    "import growconv": "import growconv",
    "from growconv import *": "from growconv import *",
    "growconv --version": command_line("--version"),
    "growconv --help": command_line("--help"),
    "growconv train --help": command_line("train", "--help"),
    "growconv site": command_line("site"),
    "growconv trainer.epoch=3": command_line("trainer.epoch=3"),
    "growconv trainer.epochs=-1": command_line("trainer.epochs=-1"),
    "growconv compare --help": command_line("compare", "--help"),
    "growconv sites": command_line("sites"),
    "a fixed run": command_line("growth=none", *SHORT),
    "a run grown by random": command_line("growth=random", *SHORT, *GROWN),
    "a run grown by tiny": command_line("growth=tiny", *SHORT, *GROWN),
}


def seconds_of(code: str) -> float:
    """CPU seconds of a fresh process that runs this code in an empty folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def loaded_by(code: str) -> list[str]:
    """Heavy packages that a process has loaded at its end."""
    listing = "import sys, atexit; atexit.register(lambda: sys.stderr.write('\\n' + ' '.join(sys.modules)))\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        answer = subprocess.run(
            [sys.executable, "-c", listing + code], cwd=folder, env=environment, capture_output=True, text=True
        )
    modules = set(answer.stderr.splitlines()[-1].split())
    return [name for name in HEAVY if name in modules]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes per line (default: 5)")
    repeats = parser.parse_args(argv).repeats
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for code in CASES.values():  # once for the file caches
        seconds_of(code)
    for _ in range(repeats):
        for name, code in CASES.items():
            times[name].append(seconds_of(code))
    unit = np.median(times["import torch"])
    print("| | CPU s | ÷ import torch | loaded |\n|---|---|---|---|")
    for name, values in times.items():
        median = np.median(values)
        print(f"| {name} | {median:.2f} | {median / unit:.2f} | {', '.join(loaded_by(CASES[name]))} |")


if __name__ == "__main__":
    main()
