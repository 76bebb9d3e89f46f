"""Runs of a stranger in reports and tables: nothing of them is run, nothing is endless, the others are compared."""

import csv
import json
import os

import pytest

from growconv.cli import main
from growconv.errors import CheckpointError
from growconv.reporting.compare import write_comparison
from growconv.reporting.comparison import compare
from growconv.reporting.records import plain_text, read_run

EVIL = '=HYPERLINK("http://x")\n# heading\n\n<script>alert(1)</script>![x](http://y/z.png)\x1b]0;title\x07\u202e|`*'
DEEP = "[" * 100_000
BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'k{k}: *a{i - 1}' for k in range(9))}}}\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))
METRIC = {"step": 1, "epoch": 1, "train_loss": 1.0, "val_accuracy": 0.5, "seconds": 1.0, "train_flops": 9.0}
EVENT = {
    "step": 1,
    "site": "a -> b",
    "width_before": 1,
    "width_after": 2,
    "gains": [1.0],
    "details": {"seconds": {"x": 1}},
}


def change(file, **values):
    """One file of a good run with other values."""

    def apply(run):
        if file == "growth.jsonl":
            (run / file).write_text(json.dumps(EVENT | values) + "\n")
        elif file == "metrics.jsonl":
            (run / file).write_text(json.dumps(METRIC | values) + "\n")
        else:
            (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | values))

    return apply


def text(file, content):
    return lambda run: (run / file).write_text(content)


def replaced(file, make):
    def apply(run):
        (run / file).unlink()
        make(run / file)

    return apply


ODD = {
    "YAML bomb": text("config.yaml", BOMB),
    "YAML bomb of merges": text("config.yaml", MERGES),
    "YAML that contains itself": text("config.yaml", "r: &r {r: *r}\n"),
    "deep YAML": text("config.yaml", DEEP),
    "deep YAML by indentation": text("config.yaml", "".join(f"{' ' * i}a:\n" for i in range(200))),
    "a date that is none": text("config.yaml", "data: 2020-13-45\n"),
    "YAML number of 6000 digits": text("config.yaml", f"seed: {'1' * 6000}\n"),
    "YAML number of 20000 hexadecimal digits": text("config.yaml", f"seed: 0x{'f' * 20000}\n"),
    "YAML tag of Python": text("config.yaml", "x: !!python/object/apply:os.system ['true']\n"),
    "YAML of two million characters": text("config.yaml", "a: " + "x" * 2_000_000),
    "keys that are no words": text("config.yaml", "1: {2.5: x}\n[1, 2]: y\n"),
    "config a list": text("config.yaml", "[1]"),
    "config of bytes": lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"),
    "deep JSON": text("summary.json", DEEP),
    "deep summary": change("summary.json", method=json.loads("[" * 300 + "]" * 300)),
    "deep metrics": text("metrics.jsonl", DEEP),
    "deep growth": text("growth.jsonl", '{"site": ' + DEEP),
    "number of 400 digits": change("summary.json", parameters=10**400),
    "number of 6000 digits": text("summary.json", '{"seed": 1' + "0" * 6000 + "}"),
    "number near the largest": change("summary.json", parameters=1.7e308, seconds=1.7e308, test_accuracy=1.7e308),
    "number near zero": change("summary.json", parameters=5e-324, seconds=5e-324, train_flops=5e-324),
    "infinity": change("summary.json", test_accuracy=float("inf"), seconds=float("-inf")),
    "NaN": change("summary.json", test_accuracy=float("nan")),
    "accuracy a list": change("summary.json", test_accuracy=[0.5]),
    "no seconds": change("summary.json", seconds=0.0),
    "negative seconds": change("summary.json", seconds=-1.0, growth_seconds=-5.0),
    "seed true": change("summary.json", seed=True),
    "seed a list": change("summary.json", seed=[0]),
    "method a mapping": change("summary.json", method={"a": {"b": 1}}),
    "method of a million letters": change("summary.json", method="x" * 1_000_000),
    "halves of letters": text("summary.json", '{"method": "\\ud800x", "seed": 1, "seconds": 1.0}'),
    "summary a list": text("summary.json", "[1]"),
    "metrics a number": text("metrics.jsonl", "5\n"),
    "metrics of odd types": change("metrics.jsonl", epoch="one", step=[1], val_accuracy={}, seconds="x"),
    "metrics of huge numbers": change("metrics.jsonl", epoch=1e300, step=1e300, val_accuracy=1e300, seconds=1e300),
    "epoch a list": change("metrics.jsonl", epoch=[1]),
    "event with a site that is none": change("growth.jsonl", site=[1, {"a": 2}]),
    "event with details a text": change("growth.jsonl", details="long"),
    "event with details a list": change("growth.jsonl", details=[1]),
    "event with gains a text": change("growth.jsonl", gains="long"),
    "event with gains of odd types": change("growth.jsonl", gains=[None, "x", [1], 1e300], details={"spectrum": "x"}),
    "event with seconds of odd types": change("growth.jsonl", details={"seconds": {"x": "y", "": None}}),
    "event with many phases": change("growth.jsonl", details={"seconds": {f"p{i}": 1.0 for i in range(30)}}),
    "event with odd numbers": change(
        "growth.jsonl", step="x", width_before=None, width_after=[2], amplitude="x", predicted_decrease=[1]
    ),
    "event with huge numbers": change("growth.jsonl", step=1e308, width_after=1e308, predicted_decrease=1e308),
    "event with energy a list": change("growth.jsonl", details={"captured_energy": [1]}),
    "environment a list": text("environment.json", "[1]"),
    "environment deep": text("environment.json", DEEP),
    "environment with odd commands": text("environment.json", json.dumps({"command": [{"a": 1}, None, EVIL]})),
    "metrics a folder": replaced("metrics.jsonl", os.mkdir),
    "metrics a pipe": replaced("metrics.jsonl", os.mkfifo),
    "config a folder": replaced("config.yaml", os.mkdir),
    "summary a link to itself": replaced("summary.json", lambda path: path.symlink_to(path.name)),
    "evil everywhere": lambda run: [
        change("summary.json", method=EVIL)(run),
        change("growth.jsonl", site=EVIL, reason=EVIL, details={"seconds": {EVIL: 1.0}})(run),
        text("config.yaml", json.dumps({"seed": 1, "data": {"name": "digits"}, EVIL: {EVIL: EVIL}}))(run),
    ],
}  # fmt: skip


QUICK = ("evil everywhere", "metrics of odd types", "event with gains of odd types", "event with many phases")


def cells_of(folder):
    found = []
    for path in folder.glob("*.csv"):
        with path.open(newline="") as stream:
            found += list(csv.reader(stream))
    return found


def is_tame(text):
    return not set(text) & set("\x1b\x07\x9b\u202e") and "Traceback" not in text


@pytest.mark.slow
def test_odd_runs_do_not_stop_the_others(make_run, tmp_path, capsys):
    """All of them beside two good runs: every one is compared or named with the reason, in a line."""
    for seed in (0, 1):
        make_run(f"sweep/good{seed}", seed=seed, epochs=2, growth=False)
    for number, spoil in enumerate(ODD.values()):
        spoil(make_run(f"sweep/odd{number}", seed=number, epochs=2, method=f"m{number}"))
    assert main(["compare", str(tmp_path / "sweep"), "--output", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    markdown, rows = (tmp_path / "out" / "comparison.md").read_text(), cells_of(tmp_path / "out")
    assert sum(row[0] == "tiny" for row in rows) == 3  # the group, and its two runs
    compared = {row[-1].rpartition("/")[2] for row in rows}
    missing = [n for n in range(len(ODD)) if f"odd{n}" not in compared and f"/odd{n}: " not in markdown]
    assert missing == []
    assert is_tame(out + err + markdown)
    assert "<script>" not in markdown
    assert "\n# heading" not in markdown
    assert "](http" not in markdown
    assert max(map(len, markdown.splitlines())) < 5000
    assert not [cell for row in rows for cell in row if cell[:1] in tuple("=@\t\r")]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in ODD]
)
def test_an_odd_run_has_a_report_or_a_line(name, make_run, tmp_path, capsys):
    odd = make_run("odd", epochs=2)
    ODD[name](odd)
    code = main(["report", str(odd), "--output", str(tmp_path / "report.html")])
    out, err = capsys.readouterr()
    assert is_tame(out + err)
    assert (code == 0) == (tmp_path / "report.html").exists()
    assert code == 0 or str(odd) in err
    if code == 0:
        page = (tmp_path / "report.html").read_text()
        assert "<script>alert" not in page
        assert len(page) < 3_000_000


@pytest.mark.parametrize("sign", "=+-@")
def test_no_formula_reaches_a_spreadsheet(sign, make_run, tmp_path, monkeypatch):
    monkeypatch.setattr("growconv.reporting.compare.save_figure", lambda *_: None)
    make_run(f"{sign}run", method=f"{sign}1+1", growth=False)
    make_run("other", method=f"\t{sign}1+1", seed=1, growth=False)
    monkeypatch.chdir(tmp_path)
    write_comparison(compare([f"{sign}run", "other"]), tmp_path / "out")
    cells = [cell for row in cells_of(tmp_path / "out") for cell in row]
    assert f"'{sign}1+1" in cells
    assert f"'{sign}run" in cells
    assert not [cell for cell in cells if cell[:1] in tuple("=@\t\r")]


def test_plain_text():
    assert plain_text("a\x1b[31mb\n\tc\u202ed\x00") == "a [31mb c d"
    assert plain_text("x" * 10_000, 10) == "x" * 9 + "…"
    assert plain_text(None) == "None"


def test_a_file_larger_than_any_run_s_is_not_read(make_run, monkeypatch):
    run = make_run("run")
    monkeypatch.setattr("growconv.reporting.records.MOST_BYTES", {"yaml": 1 << 20, "json": 100})
    with pytest.raises(CheckpointError, match="larger than"):
        read_run(run)
