"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere, and a table at the end."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from growconv.network.event import GrowthEvent
from growconv.network.find import LayerRow
from growconv.reporting.terminal import magnitude, make_console, make_table, printable


class TrainingProgress:
    """Reports the state of one run on standard output.

    Args:
        mode: "auto" (a bar on a terminal, else lines), "bar", "lines" or "none".
        title: what is trained.
        options: the group trainer, which says when the run ends.
        steps: optimizer steps of the run, where `trainer.flops` does not end it.
        score: what accuracies are called, see `Dataset.score`.
    """

    def __init__(self, mode: str, title: str, options: Mapping[str, Any], steps: int, score: str) -> None:
        self.console = make_console()
        if mode == "auto":
            mode = "bar" if self.console.is_terminal else "lines"
        self.mode, self.title, self.options, self.steps, self.score = mode, title, options, steps, score
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._state = ""

    def __enter__(self) -> "TrainingProgress":
        if self.mode == "bar":
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),  # what the rest leaves of the line
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[state]}"),
                console=self.console,
                expand=True,
            )
            self._bar.start()
            total = 100 if self.options["flops"] else self.steps  # FLOPs in per cent
            self._task = self._bar.add_task(self.title, total=total, state="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def step(self, step: int, flops: float) -> None:
        """Move the bar to what is done: optimizer steps and training FLOPs."""
        if self._bar is not None:
            limit = self.options["flops"]
            done = round(100 * flops / limit) if limit else step
            self._bar.update(self._task, completed=done, state=self._state)

    def epoch(self, record: Mapping[str, Any], next_growth: int | None) -> None:
        """Print the line of a finished epoch; without a bar the title stands before it, for runs side by side."""
        self._state = f"val {100 * record['val_accuracy']:.2f}%"
        self.step(record["step"], record["train_flops"])
        label = "" if self.mode == "bar" else f"{self.title}  "
        last = "" if self.options["flops"] else f"/{self.options['epochs']}"
        parts = [f"epoch {record['epoch']:>{len(last) - 1 if last else 2}}{last}", f"loss {record['train_loss']:.4f}"]
        parts.append(f"val {'R² ' if self.score == 'R²' else ''}{100 * record['val_accuracy']:.2f}%")
        parts += [f"width {record['width']}"] if record["width"] else []  # 0 of a fixed model
        parts.append(f"{magnitude(record['parameters'])} parameters")
        parts += [] if next_growth is None else [f"grows at {next_growth}"]
        limit = self.options["flops"]
        parts.append(f"{magnitude(record['train_flops'])}{f' of {magnitude(limit)}' if limit else ''}FLOP")
        width = self.console.width - len(label) if self.console.is_terminal else math.inf
        while len("  ".join(parts)) > width and len(parts) > 2:  # what does not fit after epoch and loss is left out
            parts.pop()
        self.say(label + "  ".join(parts))

    def events(self, step: int, events: Sequence[GrowthEvent]) -> None:
        """Print what one growth round did: site, widths, parameters, and the held-out loss where it was measured."""
        self.say(f"growth at step {step}:")
        for event in events:
            more = event.parameters_after - event.parameters_before
            parts = [f"  {event.site}  {event.width_before} -> {event.width_after}", f"{more:+,} parameters"]
            losses = dict(event.details.get("losses", ()))
            if event.amplitude == 0:
                parts.append("silent at first")
            elif 0 in losses and event.amplitude in losses:
                parts.append(f"loss {losses[0]:.4g} -> {losses[event.amplitude]:.4g}")
            self.say("  ".join(parts))

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.mode != "none":
            self.console.print(printable(text), highlight=False, markup=False)


def closing_table(rows: Sequence[tuple[str, Mapping[str, Any]]], score: str) -> Table:
    """The results of a run and its baselines, as (label, summary) pairs; for `score` see `Dataset.score`."""
    name = "R²" if score == "R²" else "acc"
    titles = (f"test {name} %", f"val {name} %", "parameters", "FLOPs", "seconds", "growing")
    shown = []
    for label, summary in rows:
        growing = f"{summary['growth_seconds']:.1f}" if summary["growth_seconds"] else ""
        scores = [f"{100 * summary[key]:.2f}" for key in ("test_accuracy", "best_val_accuracy")]
        costs = [f"{summary['parameters']:,}", magnitude(summary["train_flops"]), f"{summary['seconds']:.1f}", growing]
        shown.append([printable(label), *scores, *costs])
    return make_table(["model"], titles, shown)


def sites_table(rows: Sequence[LayerRow], method: str | None = None) -> Table:
    """Every layer as explain_sites gives it, and the site at which it grows or the reason why it does not.

    With a growth method, a further column says which sites it serves.
    """
    cells = [[row.path, row.layer, row.kind or "", row.site or f"no: {row.reason}"] for row in rows]
    heading = ["layer", "type", "kind", "growable, or why not"]
    if method is not None:
        heading.append(method)
        for row, cell in zip(rows, cells, strict=True):
            refused = None if row.grows is None else row.grows.refusal(method)
            cell.append("" if row.grows is None else "yes" if refused is None else f"no: {refused}")
    return make_table(heading, (), cells)
