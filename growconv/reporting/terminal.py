"""The screen that tables and progress are written for."""

import errno
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


class _Screen(Console):
    """rich ends the process by itself where nobody reads any more; here the command line does, with a message."""

    def on_broken_pipe(self) -> None:
        """Tell it as any other write does."""
        self.quiet = True
        raise BrokenPipeError(errno.EPIPE, "standard output is closed")


def metric(size: float | int) -> tuple[float, str]:
    """Scale and prefix that leave one to three digits before the point: 12 345 is 12.3 k."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if size >= 10**power:
            return 10.0**power, prefix
    return 1.0, ""


def magnitude(value: float | int) -> str:
    """A number with a suffix for its thousands: 12 345 is 12.3 k; small ones as 2e-4; a dash for NaN."""
    if math.isnan(value):
        return "–"
    scale, prefix = metric(abs(value))
    if prefix:
        return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g}" if abs(value) >= 0.01 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def make_console() -> Console:
    """Standard output: lines wrapped at words on a terminal and whole elsewhere, tables as wide as COLUMNS says."""
    console = _Screen()
    width = shutil.get_terminal_size((140, 24)).columns  # of a pipe: what COLUMNS says
    return console if console.is_terminal else _Screen(soft_wrap=True, width=width)


def make_table(words: Iterable[str], numbers: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table with columns of words, then columns of numbers; what looks like markup is shown as it stands."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in words:
        table.add_column(escape(name), overflow="fold")
    for name in numbers:
        table.add_column(escape(name), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def shown(path: Path) -> Path:
    """A path as one would type it here, but for control characters in it."""
    whole, here = path.absolute(), Path.cwd()
    return Path(printable(str(whole.relative_to(here) if whole.is_relative_to(here) else whole)))


def printable(text: str) -> str:
    """Text of any origin as a terminal may get it: letters and line ends, no control characters."""
    return "".join(letter for letter in text if letter.isprintable() or letter == "\n")


def told(value: float, form: str) -> str:
    """A number in a format; a dash where it is missing (NaN)."""
    return "–" if math.isnan(value) else f"{value:{form}}"
