"""A finished run made wider or deeper once."""

import torch

import growconv
from growconv.cli import main
from growconv.training.rundir import RunDirectory
from tests.training.finished import summary
from tests.training.test_trained import lines


def test_a_grown_run_is_a_run(mine, capsys):
    """Twice as wide everywhere; exported, grown again, and trained on from where the first run stood."""
    assert main(["grow", str(mine), "--factor", "2", "--method", "tiny"]) == 0
    said = capsys.readouterr().out
    assert "validation loss" in said
    output = mine.with_name("run-grown")
    before, after = growconv.load_run(mine), growconv.load_run(output)
    for layer in ("features.0", "features.4"):
        assert before.get_submodule(layer).out_channels < after.get_submodule(layer).out_channels
    count = sum(each.numel() for each in after.parameters())
    assert main(["export", str(output)]) == 0
    assert main([f"resume={output}", "trainer.epochs=3"]) == 0
    assert [line["epoch"] for line in lines(output)] == [1, 2, 3]
    assert lines(output)[:2] == lines(mine)
    assert lines(output)[2]["train_flops"] > lines(output)[1]["train_flops"]
    assert summary(output)["parameters"] == count
    assert main(["grow", str(output), "--width", "features.0 -> features.4=96", "--method", "random"]) == 0
    assert growconv.load_run(mine.with_name("run-grown-grown")).get_submodule("features.0").out_channels == 96


def test_growing_into_a_budget_and_of_a_fixed_run(mine, capsys):
    small = mine / "fixed_small"
    have = summary(small)["parameters"]
    assert main(["grow", str(small), "--parameters", str(have + 3000), "--output", str(mine / "wide")]) == 0
    grown = sum(each.numel() for each in growconv.load_run(mine / "wide").parameters())
    assert have + 1500 < grown <= have + 3000


def test_deeper_begins_as_the_same_function(mine, capsys):
    name = "features.0 -> features.4"
    assert main(["grow", str(mine), "--deepen", name, "--output", str(mine / "deep")]) == 0
    deep, before, x = growconv.load_run(mine / "deep"), growconv.load_run(mine), torch.randn(4, 1, 8, 8)
    assert len(list(deep.modules())) > len(list(before.modules()))
    torch.testing.assert_close(deep(x), before(x))
    assert main([f"resume={mine / 'deep'}", "trainer.epochs=3"]) == 0
    summed = summary(mine / "deep")
    assert summed["growth_events"] == summary(mine)["growth_events"] + 1
    assert main(["grow", str(mine / "deep"), "--factor", "1.5", "--output", str(mine / "deep and wide")]) == 0


def test_growing_twice_at_once_spoils_nothing(mine, capsys):
    """Whoever comes second is told before it computes, and removes nothing; what a killed process left is nothing."""
    output = mine.with_name("out")
    with RunDirectory(output).locked():
        assert main(["grow", str(mine), "--factor", "1.5", "--output", str(output)]) == 1
    assert "Another process works in this run directory" in capsys.readouterr().err
    assert main(["grow", str(mine), "--factor", "1.5", "--output", str(output)]) == 0
    assert main(["grow", str(mine), "--factor", "1.5", "--output", str(output)]) == 1
    assert (output / "checkpoint" / "last.safetensors").is_file()
    output.with_name("link").symlink_to("nowhere")
    assert main(["grow", str(mine), "--factor", "1.5", "--output", str(output.with_name("link"))]) == 1
    assert capsys.readouterr().err.count("there is already something here") == 2
