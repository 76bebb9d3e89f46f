"""The arguments of the commands; help, versions, mistakes and completion, without torch."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from growconv.cli import main
from growconv.errors import ConfigError
from growconv.training.commands import MODULES, CommandParser
from tests.test_cli import ROOT


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


def in_a_process(script, *arguments):
    """A Python script in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment)


def test_help_version_and_mistakes_need_no_torch(here):
    script = """
import sys
from growconv import __version__
from growconv.cli import main
for line in ("--help", "train --help", "sites --help", "resume --help", "grow --help", "study --help", "--version"):
    assert main(line.split()) == 0, line
for line in ("site", "grwoth=tiny", "trainer.epochs=-1", "-m growth=tiny,randm", "sites model=resnt", "study --x"):
    assert main(line.split()) == 1, line
assert not {"torch", "numpy", "matplotlib"} & set(sys.modules)
"""
    answer = in_a_process(script)
    assert answer.returncode == 0, answer.stderr
    for word in ("train ", "resume=", "sites", "compare", "report", "trainer.epochs=20", "growconv 0."):
        assert word in answer.stdout
    assert "growth.solver" in answer.stdout
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("site model=resnet20", "did you mean: growconv sites model=resnet20"),
        ("version", "did you mean: growconv --version"),
        ("model resnet20 seed=1", "did you mean: growconv model=resnet20 seed=1"),
        ("nonsense", "growconv --help"),
        ("resume run1", "did you mean resume=run1?"),
        ("resume", "growconv resume=RUN"),
        ("growth=tiny resnet20", "did you mean model=resnet20?"),
        ("seed=1 run1", "did you mean resume=run1?"),
        ("--mulitrun seed=1", "did you mean --multirun?"),
        ("-m growth=tiny,randm", "did you mean growth=random?"),
        ("sites model=resnt20", "did you mean model=resnet20?"),
    ],
)
def test_did_you_mean(line, fix, here, capsys):
    (here / "run1").mkdir()
    assert main(line.split()) == 1
    assert fix in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["run1"]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("growconv gr", {"grow", "growth="}),
        ("growconv model=res", {"model=resnet18", "model=resnet20"}),
        ("growconv growth=tiny trainer.ep", {"trainer.epochs="}),
        ("growconv sites model=res", {"model=resnet18", "model=resnet20"}),
    ],
)
def test_the_shell_completes(typed, offered, capsys, monkeypatch):
    monkeypatch.setenv("COMP_LINE", typed)
    assert main(["--shell-completion", "query=bash"]) == 0
    assert offered <= set(capsys.readouterr().out.split())


def test_behind_a_command_that_takes_files_the_shell_completes_files(here, capfd, monkeypatch):
    (here / "study.yaml").touch()
    monkeypatch.setenv("COMP_LINE", "growconv study st")
    for shell, offered in (("bash", ""), ("fish", "study.yaml\n")):
        assert main(["--shell-completion", f"query={shell}"]) == 0
        assert capfd.readouterr() == (offered, "")


def test_zsh_completes_by_the_line_of_the_page(here):
    """In a zsh without settings of its own, on a terminal."""
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    page = (ROOT / "docs" / "how-to" / "command-line.md").read_text()
    line = re.search(r"^\$ (autoload .*)$", page, re.MULTILINE)[1].replace("&& compinit &&", "&& compinit -u &&")
    script = f"""
    zmodload zsh/zpty; zpty z zsh -f -i
    zpty -w z {shlex.quote(line)}
    zpty -w -n z $'growconv growth=rand\\t'
    repeat 400; do zpty -r -t z part && shown+=$part; [[ $shown == *growth=random* ]] && exit 0; sleep 0.1; done
    print -r -- $shown; exit 1
    """
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(here), "TERM": "dumb"}
    subprocess.run(["zsh", "-f", "-c", script], cwd=here, env=environment, timeout=60, check=True)


def test_the_shell_gets_a_script_that_it_can_read(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["growconv"])
    assert main(["--shell-completion", "install=bash"]) == 0
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    assert "growconv" in script
    for wrong in (["--shell-completion"], ["-sc", "bash"], ["-sc", "install=tcsh"]):
        assert main(wrong) == 1
        assert "install=bash" in capsys.readouterr().err
