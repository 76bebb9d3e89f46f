"""What the pages tell: their Python runs, in order, page by page; the site builds without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "```python" in path.read_text())


def blocks(page):
    """(language, title, text) of a page's code blocks."""
    return [match.groups() for match in BLOCK.finditer(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_the_python_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    """Blocks with a title are written to that file first; a block "text" is what the Python block before it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict = {"__name__": "page"}
    found = blocks(page)
    for language, title, text in found:
        if title and language in ("python", "yaml"):
            (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / title).write_text(text)
    printed = ""
    for language, title, text in found:
        if language == "python" and not title:
            exec(compile(text, str(page), "exec"), names)
            printed = capsys.readouterr().out
        elif language == "text":
            assert printed.split() == text.split()
    for module in [
        name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))
    ]:
        del sys.modules[module]


def test_the_loop_of_the_readme_prints_what_it_says(capsys):
    """Amplitudes and the accuracy depend on the number of threads in their last digits: only their places count."""
    found = blocks(ROOT / "README.md")
    start = next(index for index, (language, _, _) in enumerate(found) if language == "python")
    exec(compile(found[start][2], "README.md", "exec"), {"__name__": "readme"})
    said, shown = (
        [re.sub(r"amplitude [^,]+", "amplitude", line) for line in text.splitlines()]
        for text in (capsys.readouterr().out, found[start + 1][2])
    )
    assert said[:-1] == shown[:-1]
    assert abs(float(said[-1].rstrip("%")) - float(shown[-1].rstrip("%"))) < 5


def test_one_file_and_one_yaml_add_a_method_to_the_command_line(tmp_path):
    for _, title, text in blocks(ROOT / "docs" / "how-to" / "own-method.md"):
        if title:
            (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / title).write_text(text)
    arguments = (
        "--config-dir my_conf growth=mirror growth.solver.scale=0.5 growth.times=1 trainer.epochs=1 baselines=[]"
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
