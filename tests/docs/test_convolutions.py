"""The cost table of the documentation is what its command prints."""

from pathlib import Path

from experiments.benchmarks.costs import table

PAGE = Path(__file__).parents[2] / "docs" / "convolutions.md"


def test_cost_table_is_current():
    text = PAGE.read_text()
    assert "python -m experiments.benchmarks.costs" in text
    assert table() in text
