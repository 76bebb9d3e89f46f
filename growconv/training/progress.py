"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere, and a table at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from growconv.network.event import GrowthEvent
from growconv.network.find import LayerRow
from growconv.reporting.terminal import make_console, make_table, metric, printable


def si(number: float | int) -> str:
    """A number with a metric prefix and three digits: 12345 -> 12.3k."""
    scale, prefix = metric(abs(number))
    return f"{number / scale:.3g}{prefix}"


class TrainingProgress:
    """Reports the state of one run.

    Args:
        mode: "auto" (a bar on a terminal, else lines), "bar", "lines" or "none".
        title: what is trained.
        total: length of the run, in the unit of `step`.
        console: where to print; None prints to standard output.
    """

    def __init__(self, mode: str, title: str, total: int, console: Console | None = None) -> None:
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
                BarColumn(bar_width=None),  # what the rest leaves of the line
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[state]}"),
                console=self.console,
                expand=True,
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
            step: what is done of the total.
            state: numbers, of which the accuracy is shown beside it.
        """
        if self._bar is not None:
            accuracy = state.get("val_accuracy")
            self._bar.update(self._task, completed=step, state="" if accuracy is None else f"val {100 * accuracy:.2f}%")

    def epoch(self, state: Mapping[str, Any]) -> None:
        """Print the line of a finished epoch; without a bar the title stands before it, for runs side by side."""
        label = "" if self.mode == "bar" else f"{self.title}  "
        width = self.console.width - len(label) if self.console.is_terminal else None
        self.say(label + describe(state, width))

    def events(self, step: int, events: Sequence[GrowthEvent]) -> None:
        """Print what one growth round did."""
        self.say(f"growth at step {step}:")
        for event in events:
            self.say(f"  {describe_event(event)}")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.mode != "none":
            self.console.print(printable(text), highlight=False, markup=False)


def describe(state: Mapping[str, Any], width: int | None = None) -> str:
    """One line of loss, accuracy, width, cost and the next growth.

    Args:
        width: characters of the line; what does not fit after epoch and loss is left out. None leaves nothing out.
    """
    last = "" if state["epochs"] is None else f"/{state['epochs']}"
    parts = [f"epoch {state['epoch']:>{len(last) - 1 if last else 2}}{last}", f"loss {state['train_loss']:.4f}"]
    if state.get("val_accuracy") is not None:
        name = "R² " if state["score"] == "R²" else ""
        parts.append(f"val {name}{100 * state['val_accuracy']:.2f}%")
    if state["width"] != "fixed":
        parts.append(f"width {state['width']}")
    parts.append(f"{si(state['parameters'])} parameters")
    if state.get("next_growth") is not None:
        parts.append(f"grows at {state['next_growth']}")
    parts.append(f"{si(state['train_flops'])}{f' of {si(end)}' if (end := state.get('flops')) else ''}FLOP")
    while width is not None and len("  ".join(parts)) > width and len(parts) > 2:
        parts.pop()
    return "  ".join(parts)


def describe_event(event: GrowthEvent) -> str:
    """One line of a growth: site, widths, parameters, and the held-out loss before and after where it was measured."""
    more = event.parameters_after - event.parameters_before
    parts = [f"{event.site}  {event.width_before} -> {event.width_after}", f"{more:+,} parameters"]
    losses = dict(event.details.get("losses", ()))
    if event.amplitude == 0:
        parts.append("silent at first")
    elif 0 in losses and event.amplitude in losses:
        parts.append(f"loss {losses[0]:.4g} -> {losses[event.amplitude]:.4g}")
    return "  ".join(parts)


def closing_table(rows: Sequence[tuple[str, Mapping[str, Any]]], score: str) -> Table:
    """The results of a run and its baselines.

    Args:
        rows: (label, summary) pairs.
        score: what the accuracies are, "accuracy" or "R²".
    """
    name = "R²" if score == "R²" else "acc"
    titles = (f"test {name} %", f"val {name} %", "parameters", "FLOPs", "seconds", "growing")
    shown = []
    for label, summary in rows:
        growth = summary["growth_seconds"]
        shown.append(
            [
                printable(label),
                f"{100 * summary['test_accuracy']:.2f}",
                f"{100 * summary['best_val_accuracy']:.2f}",
                f"{summary['parameters']:,}",
                si(summary["train_flops"]),
                f"{summary['seconds']:.1f}",
                f"{growth:.1f}" if growth else "",
            ]
        )
    return make_table(["model"], titles, shown)


def sites_table(rows: Sequence[LayerRow], method: str | None = None) -> Table:
    """Every layer, and the site at which it grows or the reason why it does not.

    Args:
        rows: as explain_sites gives them.
        method: a growth method, for a column that says which sites it serves.
    """
    cells = []
    for row in rows:
        cells.append([row.path, row.layer, row.kind or "", row.site or f"no: {row.reason}"])
        if method is not None:
            refused = None if row.grows is None else row.grows.refusal(method)
            cells[-1].append("" if row.grows is None else "yes" if refused is None else f"no: {refused}")
    heading = ["layer", "type", "kind", "growable, or why not", *([] if method is None else [method])]
    return make_table(heading, (), cells)
