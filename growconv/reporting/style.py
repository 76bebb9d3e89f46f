"""How every figure looks: colours of light and dark pages, one colour and marker a method, numbers on axes."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from growconv.reporting.terminal import magnitude

INK, SOFT, GRID, PAPER = "#1f2933", "#616e7c", "#e3e6e9", "#fefefe"
BLUE, VERMILION, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#b8578f"
ORANGE, SKY, PURPLE = "#b97d00", "#2f97c9", "#7f3c8d"
DARK = {
    INK: "#e4e7eb", SOFT: "#9aa5b1", GRID: "#323b45", PAPER: "#1b2127", BLUE: "#5ab0ea", VERMILION: "#ff8a4c",
    GREEN: "#3ccb9b", PINK: "#e8a0cb", ORANGE: "#f2b632", SKY: "#8ad0f5", PURPLE: "#c08bcb",
}  # fmt: skip
"""Every colour of a figure's SVG with the one that a dark page shows in its place."""

METHODS = {
    "tiny": (BLUE, "o"), "exact": (SKY, "s"), "functional": (VERMILION, "D"), "gradmax": (GREEN, "^"),
    "firefly": (ORANGE, "v"), "north": (PURPLE, "P"), "senn": (PINK, "X"), "splitting": (GREEN, "<"),
    "net2net": (ORANGE, ">"), "variance_transfer": (PURPLE, "p"), "random": (PINK, "*"),
    "small": (SOFT, "v"), "large": (INK, "s"), "fixed": (INK, "h"),
}  # fmt: skip
"""Colour and marker of each method, and of fixed networks by what their label says: the same in every figure."""
OTHERS = tuple((colour, marker) for marker in ("d", "H", "8", "1") for colour in (SKY, BLUE, VERMILION, GREEN))
LINES = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, PURPLE, SOFT)
DASHES = ("-", "--", ":", "-.")

_SETTINGS: dict[Any, Any] = {
    **{"font.family": "sans-serif", "font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8},
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), SOFT),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6},
    **{"svg.fonttype": "none", "path.simplify": True},
}


def settings(salt: str = "growconv") -> Any:
    """Matplotlib settings of every figure, for a `with` block; `salt` tells the ids inside one SVG from another's."""
    return matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": salt})


def style_sheet() -> str:
    """CSS that shows a figure's colours as those of DARK on dark pages; programs without CSS see the light ones."""
    rules = (
        f'[style*="{part}: {light}"]{{{part}:{dark} !important}}'
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    )
    return f"@media (prefers-color-scheme:dark){{{''.join(rules)}}}"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def svg_text(draw: Callable[[bool], Figure], name: str) -> str:
    """A figure for wide and for narrow screens, as two inline SVG elements of which style sheets show one."""
    parts = []
    label = re.sub(r"[^\w ,]", "", name)
    for narrow in (False, True):
        with settings(f"{name} {narrow}"):
            text = _svg(draw(narrow)).replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        parts.append(f'<div class="{"narrow" if narrow else "wide"}">{text}</div>')
    return "\n".join(parts)


def save_figure(draw: Callable[[], Figure], *paths: Path) -> None:
    """Draw a figure and save it in the formats of the file names: .svg follows light and dark pages, .png is light."""
    with settings():
        figure = draw()
        for path in paths:
            if path.suffix == ".svg":
                head, _, rest = _svg(figure).partition(">")
                path.write_text(f"{head}><style>{style_sheet()}</style>{rest}", encoding="utf-8")
            else:
                figure.savefig(path, dpi=150, facecolor="white")


def method_style(method: str, label: str, known: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Colour and marker of a group of runs.

    Args:
        method: its growth method.
        label: its label, which tells a small fixed network from a large one.
        known: styles given out so far to methods that are not growconv's own; extended here.
    """
    if method == "fixed":
        method = next((size for size in ("small", "large") if size in label), method)
    if method in METHODS:
        return METHODS[method]
    return known.setdefault(method, OTHERS[len(known) % len(OTHERS)])


def log_ticks(axis: Axes, which: str) -> None:
    """A logarithmic axis, x or y, labelled 2 k, 5 M, 1e-4: plain text, without mathematical typesetting."""
    axis.set(**{f"{which}scale": "log"})
    low, high = sorted(axis.get_xlim() if which == "x" else axis.get_ylim())
    subs = (1.0, 2.0, 5.0) if low > 0 and high / low < 30 else (1.0,)
    (axis.xaxis if which == "x" else axis.yaxis).set_major_locator(LogLocator(subs=subs, numticks=8))
    magnitude_ticks(axis, which)


def magnitude_ticks(axis: Axes, which: str) -> None:
    """Label an axis 2 k, 5 M, 1e-4."""
    chosen = axis.xaxis if which == "x" else axis.yaxis
    chosen.set_major_formatter(FuncFormatter(lambda value, _: magnitude(value)))
    chosen.set_minor_formatter(NullFormatter())


def shortened(text: str, length: int) -> str:
    """A name that is no longer than `length`: its end says most."""
    return text if len(text) <= length else "…" + text[-(length - 1) :]
