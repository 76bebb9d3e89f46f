"""The arguments of the commands."""

import argparse
from pathlib import Path

import pytest

from growconv.errors import ConfigError
from growconv.training.commands import MODULES, CommandParser


def parsed(command: str, *words: str) -> argparse.Namespace:
    return CommandParser(command).parse_args(list(words))


def test_arguments_arrive_in_their_types() -> None:
    grow = parsed("grow", "runs/a", "--width", "conv1=8", "--width", "conv*=9", "--factor", "1.5")
    assert (grow.run, grow.width, grow.factor, grow.trust) == (Path("runs/a"), [("conv1", 8), ("conv*", 9)], 1.5, False)
    study = parsed("study", "study.yaml", "--only", "tiny,random", "--seeds", "0,3")
    assert (study.only, study.seeds, study.runs) == (["tiny", "random"], [0, 3], Path("runs/studies"))
    assert parsed("export", "runs/a", "--trust").trust


@pytest.mark.parametrize(
    ("words", "where", "fix"),
    [
        (("grow", "runs/a", "--factr=2"), "grow", "did you mean --factor?"),
        (("export", "runs/a", "--outptu", "x"), "export", "did you mean --output?"),
        (("grow", "runs/a", "--width", "conv=x"), "grow", "growconv grow --help lists them"),
        (("study", "--seeds", "0"), "study", "growconv study --help lists them"),
        (("study", "study.yaml", "--seeds", "one"), "study", "growconv study --help lists them"),
    ],
)
def test_a_mistake_is_an_error_of_growconv_with_what_was_meant(words: tuple[str, ...], where: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(*words)
    assert (caught.value.where, caught.value.fix) == (where, fix)


@pytest.mark.parametrize("command", MODULES)
def test_help_shows_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(command, "--help")
    example = capsys.readouterr().out.split("for example:\n")[1].split()
    assert example[:2] == ["growconv", command]
    parsed(*example[1:])


def test_settings_and_flags_may_come_in_any_order() -> None:
    read = CommandParser("train").parse_intermixed_args(
        ["seed=1", "-m", "-cd", "mine", "growth=tiny,random", "~logger"]
    )
    assert (read.overrides, read.multirun, read.config_dir) == (
        ["seed=1", "growth=tiny,random", "~logger"],
        True,
        "mine",
    )
