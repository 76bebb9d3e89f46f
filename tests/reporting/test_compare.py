"""`growconv compare` as a command: its table, plots and CSV agree."""

import csv

import pytest

from growconv.errors import ArgumentValueError
from growconv.reporting import compare as command
from growconv.reporting.comparison import compare
from growconv.training.commands import CommandParser


def test_the_command_writes_table_plots_and_csv_that_agree(make_run, tmp_path, capsys):
    for method, accuracy in (("tiny", 0.9), ("random", 0.88)):
        for seed in range(3):
            make_run(f"runs/{method}{seed}", method=method, seed=seed, accuracy=accuracy + 0.001 * seed)
    output = tmp_path / "out"
    command.main(
        CommandParser("compare").parse_args([str(tmp_path / "runs"), "--baseline", "random", "--output", str(output)])
    )
    printed = capsys.readouterr().out
    assert "+2.00 [+2.00, +2.00] (n=3)" in printed
    with (output / "comparison.csv").open() as file:
        rows = {row["group"]: row for row in csv.DictReader(file)}
    assert float(rows["tiny"]["test_accuracy_mean"]) == pytest.approx(90.1)
    assert float(rows["tiny"]["difference"]) == pytest.approx(2.0)
    with (output / "runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    assert float(rows["tiny"]["test_loss_difference"]) == pytest.approx(-0.02)
    assert (output / "costs.svg").read_text().count("tiny (n=3)") == 1
    for name in ("comparison", "costs", "courses"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| tiny | 3 | 90.10 ± 0.10 | 0.099 ± 0.001 |" in (output / "comparison.md").read_text()
    assert r"tiny & 3 & 90.10 $\pm$ 0.10 & 0.099 $\pm$ 0.001 &" in (output / "comparison.tex").read_text()
    with pytest.raises(ArgumentValueError, match="already contains a comparison"):
        command.main(CommandParser("compare").parse_args([str(tmp_path / "runs"), "--output", str(output)]))
    command.main(CommandParser("compare").parse_args([str(tmp_path / "runs"), "--output", str(output), "--overwrite"]))


def test_runs_without_a_course_still_give_a_table(make_run, tmp_path):
    run = make_run("short", epochs=1)
    command.write_comparison(compare([run]), tmp_path / "out")
    assert "| tiny | 1 | 90.00 |" in (tmp_path / "out" / "comparison.md").read_text()
