"""The screen that tables and progress are written for."""

import os
from pathlib import Path

from rich.console import Console


def make_console() -> Console:
    """Standard output: lines wrapped at words on a terminal and whole elsewhere, tables as wide as COLUMNS says."""
    console = Console()
    return console if console.is_terminal else Console(soft_wrap=True, width=int(os.environ.get("COLUMNS", "140")))


def shown(path: Path) -> Path:
    """A path as one would type it here."""
    whole, here = path.absolute(), Path.cwd()
    return whole.relative_to(here) if whole.is_relative_to(here) else whole
