"""What a run shows on a terminal."""

import pytest

from growconv import __version__
from growconv.cli import main
from tests.test_cli import QUICK, on_a_terminal


@pytest.mark.slow
def test_a_run_on_a_terminal_of_80_columns(here):
    lines = on_a_terminal(80, *QUICK, "growth=variance_transfer", "growth.times=1", "hydra.run.dir=run", "report=true")
    assert max(map(len, lines)) <= 80
    assert lines[0] == f"growconv {__version__}: small_cnn on digits, grown by variance_transfer, 2 epochs"
    assert lines[1] == "run directory: run"
    assert any(line.startswith("grown, variance_transfer ━") for line in lines)
    assert any(line.startswith("epoch 2/2  loss ") and "parameters" in line for line in lines)
    assert any(line.startswith("  features.0 -> features.4  8 -> ") for line in lines)
    table = lines[next(index for index, line in enumerate(lines) if line.startswith(" model ")) :]
    assert [line[:12] for line in table if line.startswith((" grown", " fixed"))] == [
        " grown,     ",
        " fixed small",
        " fixed large",
    ]
    assert lines[-1] == "report: run/report.html"


def test_no_progress_still_prints_the_table(here, capsys):
    assert main([*QUICK, "growth=none", "trainer.epochs=1", "trainer.progress=none", "hydra.run.dir=run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0].split()[:2] == ["model", "test"]
    assert lines[2].split()[0] == "fixed"
    assert len(lines) == 3
