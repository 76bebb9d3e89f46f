"""Tables of measured results: each benchmark owns one section of RESULTS.md and rewrites only that."""

import datetime
import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

import growconv

RESULTS = Path(__file__).parent / "RESULTS.md"
_PREAMBLE = "# Benchmarks\n\nEvery section is written by the command it names, unless the section says otherwise.\n"


def machine() -> str:
    """Processor, threads, memory and accelerator of this machine, in one line."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), flags=re.MULTILINE)
        processor = names[0] if names else processor
    parts = [f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        parts.append(f"{memory / 2**30:.0f} GiB")
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def versions(*packages: str) -> str:
    """Python and package versions, in one line."""
    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}", f"growconv {growconv.__version__}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the cells are turned into text."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_section(
    name: str,
    title: str,
    command: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    notes: Sequence[str] = (),
    *,
    packages: Sequence[str] = (),
    path: Path = RESULTS,
) -> str:
    """Write a benchmark's section of the results file, between its own markers, and leave the others alone.

    Args:
        name: of the section, unique; it stands in the markers.
        title: heading.
        command: what was run, as a user would type it.
        columns: of the table.
        rows: cells, one list a row.
        notes: paragraphs below the table.
        packages: further packages whose versions matter.
        path: of the results file.

    Returns:
        The section as written.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    body = [
        f"## {title}",
        f"`{command}`, {date}; {machine()}; {versions(*packages)}.",
        markdown_table(columns, rows),
        *notes,
    ]
    section = f"{begin}\n" + "\n\n".join(body) + f"\n{end}"
    text = path.read_text() if path.exists() else _PREAMBLE
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), flags=re.DOTALL)
    text = pattern.sub(lambda _: section, text) if pattern.search(text) else text.rstrip() + "\n\n" + section + "\n"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
    return section
