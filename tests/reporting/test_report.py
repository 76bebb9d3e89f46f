"""`growconv report`: one file, complete, escaped, and right in a real browser."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest

from growconv.errors import CheckpointError
from growconv.reporting import report

CHROMIUM = next(
    (path for name in ("chromium", "google-chrome", "chromium-browser") if (path := shutil.which(name))), None
)
SECTIONS = [
    "Training",
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
        if self.stack and self.stack[-1] != "style":
            self.text.append(data)


def test_the_report_is_complete_and_needs_nothing_else(make_run):
    run = make_run("run")
    path = report.write_report(run)
    text = path.read_text()
    page = Page(text)
    assert path == run / "report.html"
    assert re.findall(r"<h2>(.*?)</h2>", text) == SECTIONS
    assert all(reference.startswith("#") for reference in page.references)
    assert "script" not in page.tags
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
        "training 16.4 s (82 %)",
        "collect 1.8 s (9 %)",
    ):
        assert part in shown


def test_everything_from_the_run_is_escaped(make_run):
    bad = "<script>alert('x')</script>&\"$y$ ${tiles} %s"
    run = make_run("run", method=bad, data=bad, model__note=bad)
    events = [json.loads(line) for line in (run / "growth.jsonl").read_text().splitlines()]
    events = [event | {"site": bad + event["site"], "reason": bad} for event in events]
    (run / "growth.jsonl").write_text("\n".join(map(json.dumps, events)))
    page = Page(report.write_report(run).read_text())
    assert "script" not in page.tags
    shown = " ".join(page.text)
    assert shown.count("<script>alert('x')</script>") >= 5
    assert "$y$ ${tiles}" in shown


def test_a_run_without_growth_and_one_that_goes_on_have_a_report(make_run):
    fixed = make_run("fixed", method="none", growth=False)
    text = report.write_report(fixed).read_text()
    assert "This run did not grow." in text
    assert "<h2>Widths</h2>" not in text
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
    assert sections == [name for name in SECTIONS if name not in SECTIONS[2:5]]


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
    with pytest.raises(CheckpointError, match="no epoch"):
        report.write_report(run)
    (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: damaged: line 2"):
        report.write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_real_browser_shows_the_page_without_sideways_scrolling(make_run, tmp_path, width):
    """The page is measured by itself: a script is added to a copy, the DOM is dumped after it ran."""
    text = report.write_report(make_run("run")).read_text()
    probe = """<script>
    const shown = [...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().width > 0);
    const sizes = shown.flatMap(e => [...e.querySelectorAll('text')].map(t => t.getBoundingClientRect().height));
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
    assert int(measured["figures"]) == 6
    assert float(measured["smallest"]) >= 8
    assert int(measured["widest"]) <= width
