"""What is written for a terminal."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from growconv.reporting.terminal import make_table, metric, printable, shown


def test_tables_show_words_and_numbers_as_they_stand():
    out = io.StringIO()
    Console(file=out, width=60).print(make_table(["layer [bold]"], ["width"], [["[red]conv", "7"], ["head", "16"]]))
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip(" ─")]
    assert lines == [["layer", "[bold]", "width"], ["[red]conv", "7"], ["head", "16"]]


def test_numbers_stand_on_the_right():
    out = io.StringIO()
    Console(file=out, width=60).print(make_table(["layer"], ["width"], [["conv", "7"]]))
    header, *_, row = [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]
    assert len(header) == len(row)


@pytest.mark.parametrize(("size", "scale", "prefix"), [(999, 1.0, ""), (12_345, 1e3, "k"), (10**9, 1e9, "G")])
def test_one_to_three_digits_before_the_point(size, scale, prefix):
    assert metric(size) == (scale, prefix)


def test_paths_and_texts_are_shown_without_control_characters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "runs" / "a\x1b[31m") == Path("runs/a[31m")
    assert shown(Path("/elsewhere")) == Path("/elsewhere")
    assert printable("a\tb\nc\x07") == "ab\nc"
