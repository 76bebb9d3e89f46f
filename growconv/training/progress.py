"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere, and a table at the end."""

import errno
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from growconv.errors import ConfigError

MODES = ("auto", "bar", "lines", "none")


def si(number: float | int) -> str:
    """A number with a metric prefix and three digits: 12345 -> 12.3k."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{prefix}"
    return f"{number:.3g}"


class _PlainConsole(Console):
    """rich ends the process by itself where nobody reads any more; here the command line does, with a message."""

    def on_broken_pipe(self) -> None:
        """Tell it as any other write does."""
        self.quiet = True
        raise BrokenPipeError(errno.EPIPE, "standard output is closed")


def make_console(width: int = 120, soft_wrap: bool = True) -> Console:
    """Standard output; without a terminal of this width, so that whole tables fit."""
    console = _PlainConsole(soft_wrap=soft_wrap)
    return console if console.is_terminal else _PlainConsole(soft_wrap=soft_wrap, width=width)


class TrainingProgress:
    """Reports the state of one run.

    Args:
        mode: "auto" (a bar on a terminal, else lines), "bar", "lines" or "none".
        title: what is trained.
        total: optimizer steps of the run.
        console: where to print; None prints to standard output.
    """

    def __init__(self, mode: str, title: str, total: int, console: Console | None = None) -> None:
        if mode not in MODES:
            raise ConfigError(
                "there is no such progress", where="trainer.progress", expected=", ".join(MODES), got=mode
            )
        self.console = console or make_console()
        if mode == "auto":
            mode = "bar" if self.console.is_terminal else "lines"
        self.mode, self.title, self.total = mode, title, total
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "TrainingProgress":
        if self.mode == "bar":
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[state]}"),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, state="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def step(self, step: int, state: Mapping[str, Any]) -> None:
        """Move the bar.

        Args:
            step: optimizer steps done.
            state: numbers to show beside it.
        """
        if self._bar is not None:
            self._bar.update(self._task, completed=step, state=describe(state))

    def epoch(self, state: Mapping[str, Any]) -> None:
        """Print the line of a finished epoch."""
        if self.mode in ("lines", "bar"):
            self.say(f"{self.title}  {describe(state)}")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.mode != "none":
            self.console.print(text, highlight=False, markup=False)


def describe(state: Mapping[str, Any]) -> str:
    """One line of loss, accuracy, width, cost and the next growth."""
    parts = []
    if "epoch" in state:
        parts.append(f"epoch {state['epoch']:>3}/{state['epochs']}")
    if state.get("train_loss") is not None:
        parts.append(f"loss {state['train_loss']:.4f}")
    if state.get("val_accuracy") is not None:
        parts.append(f"val {state['score']} {100 * state['val_accuracy']:.2f}%")
    parts.append(f"width {state['width']}")
    parts.append(f"{si(state['parameters'])} parameters")
    parts.append(f"{si(state['train_flops'])}FLOP")
    if state.get("next_growth") is not None:
        parts.append(f"next growth at step {state['next_growth']}")
    return "  ".join(parts)


def closing_table(rows: Sequence[tuple[str, Mapping[str, Any]]], score: str) -> Table:
    """The results of a run and its baselines.

    Args:
        rows: (label, summary) pairs.
        score: what the accuracies are, "accuracy" or "R²".
    """
    table = Table(box=box.SIMPLE)
    table.add_column("model", no_wrap=True)
    for title in (f"test {score} %", f"val {score} %", "parameters", "training FLOPs", "seconds", "of it growing"):
        table.add_column(title, justify="right", no_wrap=True)
    for label, summary in rows:
        growth = summary["growth_seconds"]
        table.add_row(
            label,
            f"{100 * summary['test_accuracy']:.2f}",
            f"{100 * summary['best_val_accuracy']:.2f}",
            f"{summary['parameters']:,}",
            si(summary["train_flops"]),
            f"{summary['seconds']:.1f}",
            f"{growth:.1f} s" if growth else "",
        )
    return table
