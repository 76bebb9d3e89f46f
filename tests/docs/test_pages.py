"""What the pages tell: their Python runs, in order, page by page; the site builds without a warning."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from growconv import cli
from growconv.cli import main
from growconv.training import commands as usage
from growconv.training.config import compose, plain
from growconv.training.options import RunConfig

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "```python" in path.read_text())
TRAINERS = ("lightning.md", "huggingface.md")  # other trainers warn of loaders without workers and the like
WARN = [pytest.mark.filterwarnings("ignore")]


def blocks(page):
    """(language, title, text) of a page's code blocks."""
    return [match.groups() for match in BLOCK.finditer(page.read_text())]


def write_files(found, folder):
    """Write the blocks that have a title to the files of that name."""
    for language, title, text in found:
        if title and language in ("python", "yaml"):
            (folder / title).parent.mkdir(parents=True, exist_ok=True)
            (folder / title).write_text(text)


def forget_modules(folder):
    """Take back the imports of files below a folder: another page has files of the same names."""
    for name in [name for name, module in sys.modules.items() if str(folder) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=WARN if page.name in TRAINERS else []) for page in PAGES],
    ids=[str(page.relative_to(DOCS)) for page in PAGES],
)
def test_the_python_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    """Blocks with a title are written to that file first; a block "text" is what the Python block before it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict = {"__name__": "page"}
    found = blocks(page)
    if "runs/first" in page.read_text():
        run = ["trainer.epochs=2", "data.limit=160", "growth=random", "growth.times=1", "baselines=[large]"]
        assert main([*run, "hydra.run.dir=runs/first", "trainer.progress=none"]) == 0
        capsys.readouterr()
    write_files(found, tmp_path)
    printed = ""
    for language, title, text in found:
        if language == "python" and not title:
            exec(compile(text, str(page), "exec"), names)
            printed = capsys.readouterr().out
        elif language == "text":
            assert printed.split() == text.split()
    forget_modules(tmp_path)


@pytest.mark.slow
def test_the_examples_of_the_readme_print_what_they_say(capsys):
    """Losses and the accuracy depend on the number of threads in their last digits: only their places count."""
    found = blocks(ROOT / "README.md")
    own, said, other, other_said = (text for language, _, text in found if language in ("python", "text"))
    names: dict = {"__name__": "readme"}
    exec(compile(own, "README.md", "exec"), names)
    shown = capsys.readouterr().out
    effect = re.compile("held-out loss [^,]+|silent at first")
    assert [effect.sub("", line) for line in shown.splitlines()[:-1]] == [
        effect.sub("", line) for line in said.splitlines()[:-1]
    ]
    assert abs(float(shown.splitlines()[-1].split("%")[0]) - float(said.splitlines()[-1].split("%")[0])) < 2
    exec(compile(other, "README.md", "exec"), names)
    shown = capsys.readouterr().out.splitlines()
    said = other_said.splitlines()
    assert shown[0] == said[0]
    assert len(shown) == len(said)
    assert all("channels by tiny" in line for line in shown[1:])


def test_every_paper_that_is_named_has_its_title_venue_and_link():
    listed = (DOCS / "papers.md").read_text().splitlines()
    cited, numbers = set(), set()
    for folder in ("growconv", "docs", "conf", "experiments"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml") and path != DOCS / "papers.md":
                text = path.read_text()
                cited |= set(
                    re.findall(r"([A-Z][a-z]+)(?: et al\.| (?:and|&) [A-Z][a-z]+),? \(?((?:19|20)\d\d)\b", text)
                )
                numbers |= set(re.findall(r"arXiv[: ](\d{4}\.\d{5})|arxiv\.org/abs/(\d{4}\.\d{5})", text))
    assert len(cited) > 20
    for name, year in cited:
        assert any(name in line and year in line and "](https://" in line for line in listed), (name, year)
    for number in {old or new for old, new in numbers}:
        assert any(number in line for line in listed), number


def commands(page):
    """The commands that a page tells the reader to type, completion of one shell or another left out."""
    text = page.read_text()
    typed = [
        line[2:]
        for language, _, block in blocks(page)
        if language == "console"
        for line in block.splitlines()
        if line.startswith("$ ")
    ]
    if page.name == "README.md":  # tables of other pages have placeholders
        typed += re.findall(r"^\| `(growconv .*?)` \|", text, re.MULTILINE)
    return [line for line in typed if "--shell-completion" not in line]


def test_commands_mean_the_same_in_bash_and_in_zsh_as_printed(tmp_path):
    """An interactive zsh knows no comments behind a command, and reads brackets and stars as patterns."""
    typed = {page: commands(page) for page in [ROOT / "README.md", *DOCS.rglob("*.md")]}
    assert len(typed[ROOT / "README.md"]) == 9
    assert [line for lines in typed.values() for line in lines if "#" in shlex.split(line, comments=False)] == []
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    (tmp_path / "bin").mkdir()
    for name in ("growconv", "make", "pip", "python", "torchrun"):
        program = tmp_path / "bin" / name
        program.write_text('#!/bin/sh\nprintf "<%s>" "$0" "$@"; echo\n')
        program.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    script = "set -e\n" + "\n".join(line for lines in typed.values() for line in lines) + "\n"
    told = []
    for shell in (["bash", "--norc"], ["zsh", "-f"]):
        done = subprocess.run(
            [*shell, "-c", script],
            cwd=tmp_path,
            env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert told[0] == told[1]
    assert told[0].count("\n") == sum(len(lines) for lines in typed.values()) - 1  # activating prints nothing


def lines_of_growconv():
    """Every command line of growconv that the pages, the help and the configs show."""
    shown = [line for page in [ROOT / "README.md", *DOCS.rglob("*.md")] for line in commands(page)]
    shown += [example for _, example in usage.COMMANDS.values()]
    configs = [path.read_text() for path in (ROOT / "conf").rglob("*.yaml")]
    shown += [line.strip() for text in configs for line in re.findall(r"^# +(growconv .*)$", text, re.MULTILINE)]
    words = [shlex.split(line) for line in dict.fromkeys(shown)]
    return [line[line.index("growconv") + 1 :] for line in words if "growconv" in line]


@pytest.mark.slow
def test_every_command_line_that_is_shown_is_accepted(tmp_path, monkeypatch, capsys):
    """Up to where a run would begin; what needs files of its reader is read as arguments only."""
    monkeypatch.chdir(tmp_path)
    for name in ("run_job", "_with_hydra"):
        monkeypatch.setattr(cli, name, lambda *_, **__: None)
    monkeypatch.setattr(cli, "show_sites", lambda overrides: plain(compose(overrides)))
    lines = lines_of_growconv()
    assert len(lines) > 60
    for line in lines:
        if line and line[0] in cli.MODULES:
            cli.CommandParser(line[0]).parse_args(line[1:])
        elif not any(word.startswith(("resume", "--config-dir")) for word in line):
            assert main(line) == 0, (line, capsys.readouterr().err)


def test_one_file_and_one_yaml_add_a_method_to_the_command_line(tmp_path):
    write_files(blocks(ROOT / "docs" / "how-to" / "own-method.md"), tmp_path)
    arguments = (
        "--config-dir my_conf growth=mirror growth.solver.scale=0.5 growth.times=1 trainer.epochs=1 baselines=[] "
        "report=false"
    )
    done = subprocess.run(
        [sys.executable, "-m", "growconv", *arguments.split(), f"hydra.run.dir={tmp_path}/run"],
        cwd=tmp_path,
        env={
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    events = (tmp_path / "run" / "growth.jsonl").read_text()
    assert '"method": "mirror"' in events
    assert '"method": "my_growth.Mirror"' in (tmp_path / "run" / "summary.json").read_text()


@pytest.mark.parametrize("name", ["own-data.md", "own-model.md"])
def test_the_commands_of_a_page_run(name, tmp_path, monkeypatch):
    """One after the other in one process; the runs without what the page does not speak of: baselines and a report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as the page asks for
    found = blocks(DOCS / "how-to" / name)
    write_files(found, tmp_path)
    if name == "own-data.md":  # its first block writes the pictures
        exec(compile(next(text for language, title, text in found if language == "python"), name, "exec"), {})
    typed = [
        shlex.split(line.removeprefix("$ growconv "))
        for _, _, text in found
        for line in text.splitlines()
        if "$ grow" in line
    ]
    for words in typed:
        assert main(words if words[0] == "sites" else [*words, "baselines=[]", "report=false"]) == 0
    for folder in {word.partition("=")[2] for words in typed for word in words if word.startswith("hydra.run.dir=")}:
        assert (tmp_path / folder / "summary.json").is_file()
        assert (tmp_path / folder / "growth.jsonl").read_text()
    forget_modules(tmp_path)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        env={"NO_MKDOCS_2_WARNING": "1", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    solvers = (tmp_path / "site" / "reference" / "solvers" / "index.html").read_text()
    assert "Net2Net" in solvers
    assert "Which old channel each new one copies" in solvers
    assert (tmp_path / "site" / "tutorial" / "index.html").exists()
    options = (tmp_path / "site" / "options" / "index.html").read_text()
    for path, default, meaning, _ in usage._described(RunConfig):
        assert path in options, (default, meaning)
    assert "Keep a Changelog" in (tmp_path / "site" / "changelog" / "index.html").read_text()
    assert "notebooks/03_growing_your_own_model" in (tmp_path / "site" / "index.html").read_text()
    page = tmp_path / "site" / "how-to" / "sweeps" / "index.html"
    assert 'href="../../../docs/how-to/sweeps.md"' in page.read_text()
