"""`growconv report`: one file, complete, escaped, and right in a real browser."""

import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess

import pytest

from growconv.errors import CheckpointError
from growconv.reporting import report
from tests.reporting.conftest import write_run

CHROMIUM = next(
    (path for name in ("chromium", "google-chrome", "chromium-browser") if (path := shutil.which(name))), None
)


SECTIONS = [
    "Training",
    "Learning rate",
    "Network before and after",
    "Widths",
    "Spectra",
    "Captured energy",
    "Predicted and realised decrease",
    "Time",
    "Growth events",
    "How to reproduce",
    "Configuration",
]


class Page(html.parser.HTMLParser):
    """Tags, references and visible text of a page; complains about tags that do not nest."""

    VOID = frozenset(("meta", "br", "link", "img", "input", "hr"))

    def __init__(self, text):
        super().__init__()
        self.stack, self.references, self.tags, self.text, self.ids = [], [], [], [], []
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("style", "script"):
            self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of a run like any other, for all who only read it."""
    run = write_run(tmp_path_factory.mktemp("runs") / "run")
    path = report.write_report(run)
    assert path == run / "report.html"
    return path.read_text()


@pytest.fixture
def not_laid_out(monkeypatch):
    """Figures are made but neither laid out nor written, which takes most of the time: for tests of the words around.

    Others write each kind of figure.
    """
    monkeypatch.setattr(report, "svg_text", lambda draw, title: f"{draw(False)} {draw(True)}")


def test_the_report_is_complete_and_needs_nothing_else(written):
    text = written
    page = Page(text)
    assert re.findall(r"<h2>(.*?)</h2>", text) == SECTIONS
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in page.references)
    assert page.tags.count("script") == 1
    assert not re.search(r"url\((?!#)|@import", text)
    local = [identifier for identifier in page.ids if not identifier.startswith(("figure", "axes", "patch", "text"))]
    clips = [identifier for identifier in local if f"url(#{identifier})" in text]
    assert len(clips) == len(set(clips)) > 5
    shown = " ".join(page.text)
    for part in (
        "90.0 %",
        "4 k",
        "8 G",
        "18.0 %",
        "7 → 10",
        "method: tiny",
        "0.75",
        "0.625",
        "+250",
        "16.4 s (82 %)",
        "1.8 s (9 %)",
        "4 → 13",
        "a network on digits, grown by tiny, seed 0",
        "2026-01-31T12:00:00+00:00",
    ):
        assert part in shown


def test_everything_from_the_run_is_escaped(make_run):
    bad = "<script>alert('x')</script>&\"$y$ ${tiles} %s"
    run = make_run("run", method=bad, data=bad, model__note=bad)
    events = [json.loads(line) for line in (run / "growth.jsonl").read_text().splitlines()]
    events = [event | {"site": bad + event["site"], "reason": bad} for event in events]
    (run / "growth.jsonl").write_text("\n".join(map(json.dumps, events)))
    page = Page(report.write_report(run).read_text())
    assert page.tags.count("script") == 1  # the page's own
    shown = " ".join(page.text)
    assert shown.count("<script>alert('x')</script>") >= 5
    assert "$y$ ${tiles}" in shown


def test_a_run_without_growth_has_a_report(make_run):
    fixed = make_run("fixed", method="none", growth=False)
    text = report.write_report(fixed).read_text()
    assert "This run did not grow." in text
    assert "<h2>Widths</h2>" not in text
    assert "<h2>Network before and after</h2>" in text


@pytest.mark.usefixtures("not_laid_out")
def test_a_run_that_goes_on_has_a_report(make_run):
    running = make_run("running")
    (running / "summary.json").unlink()
    assert "unfinished, so far:" in report.write_report(running).read_text()


def test_methods_without_gains_or_predictions_leave_those_figures_out(make_run):
    run = make_run("run", method="net2net")
    keys = ("details", "predicted_decrease", "realised_decrease")
    events = [json.loads(line) for line in (run / "growth.jsonl").read_text().splitlines()]
    events = [{k: v for k, v in event.items() if k not in keys} | {"gains": [0.0, 0.0]} for event in events]
    (run / "growth.jsonl").write_text("\n".join(map(json.dumps, events)))
    sections = re.findall(r"<h2>(.*?)</h2>", report.write_report(run).read_text())
    assert sections == [name for name in SECTIONS if name not in SECTIONS[4:7]]


@pytest.mark.usefixtures("not_laid_out")
def test_the_command_to_reproduce_quotes_what_the_shell_would_split(make_run):
    run = make_run("run")
    command = ["/bin/growconv", "growth=tiny", "data.root=/my data", "hydra.run.dir=here"]
    (run / "environment.json").write_text(json.dumps({"command": command, "versions": {"torch": "2.6<"}}))
    text = report.write_report(run).read_text()
    assert "<pre>growconv growth=tiny &#x27;data.root=/my data&#x27;</pre>" in text
    assert "torch: 2.6&lt;" in text
    (run / "environment.json").write_text("{")
    assert "--config-name config" in report.write_report(run).read_text()


def test_runs_that_cannot_be_reported_say_why_and_leave_no_file(make_run, tmp_path):
    with pytest.raises(CheckpointError, match="no such run directory"):
        report.write_report(tmp_path / "nowhere")
    run = make_run("run")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="not finished an epoch"):
        report.write_report(run)
    (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: damaged: line 2"):
        report.write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.usefixtures("not_laid_out")
def test_the_fixed_networks_beside_a_run_are_in_its_report(make_run):
    run = make_run("run", accuracy=0.9)
    make_run("run/fixed_small", method="none", growth=False, accuracy=0.8125, parameters=100)
    make_run("run/fixed_large", method="none", growth=False, accuracy=0.9375, epochs=16)
    (make_run("run/fixed_odd", method="none") / "summary.json").write_text("{")
    text = report.write_report(run).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text)[:2] == ["What growing bought", "Accuracy against cost"]
    table = text[text.index("What growing bought") : text.index("Accuracy against cost")]
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", table)[1:]]
    assert {row[0]: (row[1], row[5]) for row in rows} == {
        "grown, tiny": ("90.00", "50.0 %"),
        "fixed small": ("81.25", "50.0 %"),
        "fixed large": ("93.75", "100.0 %"),
    }
    assert "Left out: " in table
    assert "fixed_odd" in table


def test_only_the_page_s_own_script_may_run(written):
    script = re.search("<script>(.*?)</script>", written, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in written


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 800, 400])
def test_a_real_browser_shows_the_page_without_sideways_scrolling(written, tmp_path, width):
    """The page is measured by itself: a script is added to a copy, the DOM is dumped after it ran."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", written)  # it would stop the probe
    probe = """<script>
    const shown = [...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().width > 0);
    const sizes = shown.flatMap(e => [...e.querySelectorAll('text')].map(t => t.getBoundingClientRect().height));
    const table = document.querySelector('table');
    const widths = () => [...table.tBodies[0].rows].map(row => parseFloat(row.cells[7].textContent));
    table.querySelectorAll('button')[7].click();
    const up = widths();
    table.querySelectorAll('button')[7].click();
    const down = widths();
    document.body.dataset.sorted = Number(up.every((x, i) => !i || x >= up[i - 1]) && up.join() !== down.join()
        && down.every((x, i) => !i || x <= down[i - 1]));
    document.body.dataset.overflow = document.documentElement.scrollWidth - window.innerWidth;
    document.body.dataset.figures = shown.length;
    document.body.dataset.smallest = Math.min(...sizes).toFixed(1);
    document.body.dataset.widest = Math.max(...shown.map(e => e.getBoundingClientRect().width)).toFixed(0);
    </script>"""
    page = tmp_path / "probe.html"
    # headless windows have a smallest width of about 500 pixels, so a phone's page is looked at through a frame
    page.write_text(text.replace("</body>", probe + "</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="probe.html" style="width:{width}px;height:900px;border:0"></iframe><script>'
        "f.onload = () => Object.assign(document.body.dataset, f.contentDocument.body.dataset);</script>"
    )
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --allow-file-access-from-files --virtual-time-budget=5000"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    measured = dict(re.findall(r'data-(\w+)="([-\d.]+)"', done.stdout))
    assert int(measured["overflow"]) <= 0
    assert int(measured["figures"]) == 8
    assert int(measured["sorted"]) == 1
    assert float(measured["smallest"]) >= 8
    assert int(measured["widest"]) <= width
