"""What ends a run from outside, as one message: what, where, what to do; and signals that ask it to end."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from growconv.errors import GrowthError, TrainingError
from growconv.reporting.terminal import printable

RESUME = "then go on with growconv resume=RUN_DIR"
ADVICE = {
    errno.ENOSPC: f"free some space or write elsewhere (hydra.run.dir=...), {RESUME}",
    errno.EDQUOT: f"free some of your quota or write elsewhere (hydra.run.dir=...), {RESUME}",
    errno.EFBIG: f"raise the limit on the size of files (ulimit -f), {RESUME}",
    errno.EROFS: "choose a folder that can be written: hydra.run.dir=...",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give yourself the right to it, or choose another folder"),
    errno.ENAMETOOLONG: "choose a shorter name",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file stands where a folder should be; choose another folder"),
    errno.EISDIR: "a folder stands where a file should be; move it away",
    errno.ENOENT: "make the folder first, or correct the path; what a run still writes to has to stay in place",
    errno.EMFILE: "raise the number of open files (ulimit -n)",
    errno.ESTALE: f"the file system went away; mount it again, {RESUME}",
    errno.EIO: f"look after the disk or the terminal, {RESUME}",
}
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc")
LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo", "NCCL")

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What asks a run to end, where nobody else handles it."""
PATIENCE = 60
"""Seconds after which a launcher's handler is called although the run has not come to its checkpoint."""


class Stopped(SystemExit):
    """A signal asked the run to end; its checkpoint is written. The exit status is the one that a shell expects."""

    def __init__(self, number: signal.Signals, message: str) -> None:
        super().__init__(number, message)
        self.code, self.number, self.message = 128 + number, number, message


class RunFailed(TrainingError):
    """One run of a sweep ended with an error, which has been told; the others go on."""


@dataclass(frozen=True)
class SavesFirst:
    """A launcher's signal handler that lets a run save itself first, if that takes no longer than `PATIENCE`."""

    handler: Callable[[int, FrameType | None], Any]

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Do what the launcher does: nothing is being trained."""
        self.handler(number, frame)


@contextmanager
def noted_signals() -> Iterator[list[signal.Signals]]:
    """Inside, the signals that ask a process to end are written into a list instead of ending it.

    Signals that somebody else handles already (torchrun), or that are ignored (nohup), are left alone.
    """
    noted: list[signal.Signals] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        noted.append(signal.Signals(number))
        if isinstance(before[signal.Signals(number)], SavesFirst):
            signal.signal(signal.SIGALRM, lambda *_: before[noted[0]](noted[0], None))
            signal.alarm(PATIENCE)

    with suppress(ValueError):  # not the main thread
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler is signal.SIG_DFL or isinstance(handler, SavesFirst):
                before[number] = handler
                signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
            if isinstance(handler, SavesFirst):
                signal.alarm(0)


def complain(text: str) -> None:
    """Say on standard error what went wrong, without control characters."""
    with suppress(OSError):  # the terminal may be gone
        print(f"growconv: {printable(text)}", file=sys.stderr, flush=True)


def explain(error: Exception) -> str:
    """One message for an error that ends a command; a GrowthError speaks for itself."""
    if isinstance(error, GrowthError):
        return str(error)
    first = next(iter(str(error).strip().splitlines()), "no more is known")
    where, got = None, first
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        problem = "There is not enough memory."
        fix = "lower trainer.batch_size, growth.batch_size or model.width, or raise trainer.accumulate"
    elif isinstance(error, OSError) and error.errno is not None:
        problem, got = f"The operating system refuses: {error.strerror}.", None
        names = [str(name)[:200] for name in (error.filename, error.filename2) if name is not None]
        where, fix = " -> ".join(names), ADVICE.get(error.errno, f"mend it, {RESUME}")
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1 and any(words in str(error) for words in LOST_PROCESS):
        problem, fix = "Another process of this run was lost, or hangs.", f"look at its output, {RESUME}"
    else:
        problem, got = "An unexpected error ended this.", f"{type(error).__name__}: {first}"
        fix = "HYDRA_FULL_ERROR=1 in front of the command shows where; if it is a bug in growconv, please report it"
    return str(TrainingError(problem, where=where, got=got, fix=fix))


def leave_closed_pipe() -> None:
    """Nobody reads standard output any more: keep the interpreter from writing to it at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
