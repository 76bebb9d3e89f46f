"""Kills a training run at drawn moments, resumes it, and compares with the run that was left alone.

One process that forks a child for each run, so that torch is imported once. Prints one JSON line a moment.

    python kill_driver.py FOLDER MOMENT... -- OVERRIDE...

A moment is delay:SECONDS (from outside, so long after the run has its directory), step:N, growth:N (inside the N-th
surgery), write:N (the N-th checkpoint is half written), rename:N (before the N-th renaming of a checkpoint), metrics:N
(before the N-th line).
"""

import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import growconv.growth.round as round_module
from growconv.cli import main
from growconv.training import checkpoint, loop, rundir

torch.set_num_threads(1)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
    """Make this process kill itself at a moment."""
    kind, _, number = moment.partition(":")
    left = [int(number) if kind != "delay" else 0]

    def counted(original, before):
        def wrapper(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                before(*args, **kwargs)
                die()
            return original(*args, **kwargs)

        return wrapper

    def nothing(*args, **kwargs):
        pass

    def half_written(content, path, metadata=None):
        checkpoint_save(content, path, metadata)
        size = os.path.getsize(path)
        os.truncate(path, size // 2)

    checkpoint_save = checkpoint.save_file
    if kind == "step":
        loop.Trainer._step = counted(loop.Trainer._step, nothing)
    elif kind == "growth":
        surgery = round_module.grow
        round_module.grow = counted(surgery, lambda *args, **kwargs: surgery(*args, **kwargs))
    elif kind == "write":
        checkpoint.save_file = counted(checkpoint_save, half_written)
    elif kind == "rename":
        os.replace = counted(os.replace, nothing)
    elif kind == "metrics":
        rundir.RunDirectory.append_metrics = counted(rundir.RunDirectory.append_metrics, nothing)
    elif kind != "delay":
        raise ValueError(moment)


def child(arguments: list[str], log: Path, moment: str | None = None) -> int:
    """Run the command line in a fork; its wait status."""
    pid = os.fork()
    if pid == 0:
        with log.open("a") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        try:
            if moment is not None:
                arm(moment)
            code = main(arguments)
        except BaseException:
            traceback.print_exc()
            code = 3
        sys.stdout.flush()
        os._exit(code)
    if moment is not None and moment.startswith("delay:"):
        run = Path(arguments[-1].partition("=")[2])
        while not (run / "config.yaml").exists():
            time.sleep(0.01)
        time.sleep(float(moment.partition(":")[2]))
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def outcome(folder: Path) -> tuple[dict, list, list]:
    """What has to be equal: all tensors bit for bit, metrics and events without their seconds."""
    found = checkpoint.read_checkpoint(folder / "checkpoint" / "last.safetensors")
    tensors = {name: tensor.numpy().tobytes() for name, tensor in found.model.items()}
    for index, values in found.optimizer["state"].items():
        for key, value in values.items():
            tensors[f"{index}/{key}"] = value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
    tensors |= {name: tensor.numpy().tobytes() for name, tensor in found.tensors.items()}

    def lines(name: str, timed: tuple[str, ...]) -> list:
        records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        return [{key: value for key, value in record.items() if key not in timed} for record in records]

    summary = json.loads((folder / "summary.json").read_text())
    metrics = lines("metrics.jsonl", ("seconds", "growth_seconds"))
    figures = {key: value for key, value in summary.items() if "seconds" not in key and key != "peak_memory"}
    return tensors, [figures, *metrics], lines("growth.jsonl", ("seconds", "details"))


def drive(folder: Path, moments: list[str], overrides: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    reference = folder / "uninterrupted"
    began = time.monotonic()
    status = child([*overrides, f"hydra.run.dir={reference}"], folder / "uninterrupted.log")
    print(json.dumps({"moment": None, "status": status, "seconds": time.monotonic() - began}), flush=True)
    expected = outcome(reference)
    for number, moment in enumerate(moments):
        run, log = folder / f"run{number}", folder / f"run{number}.log"
        killed = child([*overrides, f"hydra.run.dir={run}"], log, moment)
        while moment.startswith("delay:") and not os.WIFSIGNALED(killed):  # it was faster than the one that was timed
            moment = f"delay:{float(moment.partition(':')[2]) / 2}"
            shutil.rmtree(run)
            killed = child([*overrides, f"hydra.run.dir={run}"], log, moment)
        lines = (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0
        resumed = child([f"resume={run}"], log)
        record = {"moment": moment, "killed": os.WIFSIGNALED(killed), "epochs": lines, "status": resumed, "equal": []}
        if resumed == 0:
            record["equal"] = [got == wanted for got, wanted in zip(outcome(run), expected, strict=True)]
        else:
            record["log"] = log.read_text()[-3000:]
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    split = sys.argv.index("--")
    drive(Path(sys.argv[1]), sys.argv[2:split], sys.argv[split + 1 :])
