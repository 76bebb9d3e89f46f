"""Loggers without a network: what they wrote is read back, a resumed run goes on in it, a dead server stops nothing."""

import contextlib
import csv
import json
import shutil
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from growconv.cli import main
from growconv.network.event import GrowthEvent
from growconv.training import tracking

wandb = pytest.importorskip("wandb")

QUICK = [
    "trainer.epochs=3",
    "data.limit=160",
    "growth.samples=64",
    "growth.batch_size=32",
    "growth.times=2",
    "baselines=[]",
    "report=false",
    "trainer.progress=none",
    "logger=wandb",
]


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def payloads(content: bytes):
    """The records of a LevelDB log: blocks of 32 KiB, each piece with checksum, length and type."""
    assert content[:4] == b":W&B"
    position, parts = 7, []
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        if kind == 0:
            break
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def records(folder: Path):
    """Every record of the offline runs in a run directory, from their transaction logs, once those have their end."""
    from google.protobuf.message import DecodeError

    def logs():
        return [records_of(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]

    for _ in range(300):
        with contextlib.suppress(DecodeError):  # a record that is half written
            if all(any(record.WhichOneof("record_type") == "exit" for record in log) for log in logs()):
                break
        time.sleep(0.1)  # on a busy machine wandb's own process writes a little later
    return [record for log in logs() for record in log]


def records_of(path: Path):
    from wandb.proto import wandb_internal_pb2

    found = []
    for payload in payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        found.append(record)
    return found


def history(folder: Path):
    rows = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


def test_an_offline_run_reads_back(tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*QUICK, f"hydra.run.dir={run}"]) == 0
    rows = history(run)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "val_accuracy" in row]
    assert [row["val_accuracy"] for row in logged] == [line["val_accuracy"] for line in metrics]
    assert [row["train_flops"] for row in logged] == [line["train_flops"] for line in metrics]
    events = [json.loads(line) for line in (run / "growth.jsonl").read_text().splitlines()]
    widths = [row for row in rows if any(key.startswith("width/") for key in row)]
    assert widths[-1][f"width/{events[-1]['site']}"] == events[-1]["width_after"]
    assert any(key.startswith("gains/") for row in rows for key in row)
    tables = list(run.glob("wandb/offline-run-*/files/media/table/growth_*.table.json"))
    largest = max((json.loads(path.read_text()) for path in tables), key=lambda table: len(table["data"]))
    assert len(largest["data"]) == len(events)
    assert largest["columns"][:2] == ["step", "site"]
    kinds = {record.WhichOneof("record_type") for record in records(run)}
    assert {"run", "summary", "exit"} <= kinds
    configs = [r.run.config for r in records(run) if r.WhichOneof("record_type") == "run"]
    assert any(update.key == "growth" and "tiny" in update.value_json for c in configs for update in c.update)


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*QUICK, f"hydra.run.dir={run}"]) == 0
    (run / "summary.json").unlink()
    assert main([f"resume={run}"]) == 0
    identities = {record.run.run_id for record in records(run) if record.WhichOneof("record_type") == "run"}
    assert len(list(run.glob("wandb/offline-run-*"))) == 2
    assert len(identities) == 1


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_is_warned_about(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "PATIENCE", 3)
    run = tmp_path / "run"
    server = "logger.server=http://127.0.0.1:9"
    with pytest.warns(UserWarning, match="wandb cannot be reached"):
        assert main([*QUICK, "logger.mode=online", server, f"hydra.run.dir={run}"]) == 0
    assert history(run)
    assert (run / "summary.json").is_file()


def online_tracker(address, folder):
    options = {"project": "p", "entity": None, "group": None, "tags": [], "mode": "online", "wandb": True}
    options |= {"csv": False, "tensorboard": False, "server": address}
    (tracker,) = tracking.make_trackers({"logger": options}, folder)
    return tracker


@pytest.mark.long
@pytest.mark.parametrize("address", ["silent", "http://10.255.255.1", "http://no-such-host.invalid"])
def test_a_server_that_never_answers_holds_training_for_ten_seconds_at_most(address, tmp_path, monkeypatch):
    """One that takes the connection and is silent, an address where nobody is, and a name that nobody has."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    import wandb  # its import is not the server's fault

    with socket.create_server(("127.0.0.1", 0)) as silent:
        here = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.warns(UserWarning, match="wandb cannot be reached"):
            tracker = online_tracker(here if address == "silent" else address, tmp_path)
        tracker.metrics({"loss": 1.0}, 1)
        tracker.finish({"loss": 1.0})
    assert time.monotonic() - began < 10
    assert wandb.run is None


class Server(BaseHTTPRequestHandler):
    """As much of a wandb server as lets a run begin; once lost, it answers nothing more."""

    protocol_version = "HTTP/1.1"
    lost = threading.Event()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode(errors="replace")
        while self.lost.is_set():
            time.sleep(0.1)
        entity = {"id": "e", "name": "e"}
        bucket = {"id": "b", "name": "r", "displayName": "r", "config": "{}", "historyLineCount": 0}
        bucket["project"] = {"id": "p", "name": "p", "entity": entity}
        features = {"features": [], "cliVersionInfo": {"max_cli_version": "0.99.0"}, "latestLocalVersionInfo": None}
        viewer = {"id": "u", "username": "u", "entity": "e", "email": "", "flags": "{}", "teams": {"edges": []}}
        begun = {"bucket": bucket, "inserted": True} if "upsertBucket" in body else None
        answer = json.dumps({"data": {"viewer": viewer, "serverInfo": features, "upsertBucket": begun}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        with contextlib.suppress(OSError):  # whoever asked has given up
            self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *_):
        pass


@pytest.mark.long
def test_a_server_that_is_lost_holds_neither_the_training_nor_its_end(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tracker = online_tracker(f"http://127.0.0.1:{server.server_address[1]}", tmp_path)
    assert not wandb.run.offline
    Server.lost.set()
    began = time.monotonic()
    for step in range(1, 300):
        tracker.metrics({"loss": 1.0}, step)
    assert time.monotonic() - began < 5
    with pytest.warns(UserWarning, match="send it later with `wandb sync`"):
        tracker.finish({"loss": 1.0})
    assert time.monotonic() - began < 15
    assert list(tmp_path.glob("wandb/run-*/run-*.wandb"))
    Server.lost.clear()
    server.shutdown()
    server.server_close()


def test_disabled_writes_nothing(tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*QUICK, "logger.mode=disabled", f"hydra.run.dir={run}"]) == 0
    assert not (run / "wandb").exists()
    assert (run / "summary.json").is_file()


def rows_of(path: Path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def points(folder: Path):
    """Every scalar that TensorBoard shows: (step, value) by tag."""
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = loading.EventAccumulator(str(folder)).Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_several_loggers_at_once_and_after_an_interruption(tmp_path, capsys):
    """CSV and TensorBoard show what metrics.jsonl and growth.jsonl say, once, also for a run that was resumed."""
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    options = [each for each in QUICK if not each.startswith("logger")]
    assert main([*options, "logger=[csv,tensorboard]", f"hydra.run.dir={run}"]) == 0
    (run / "summary.json").unlink()
    shutil.copy(run / "checkpoint" / "previous.safetensors", run / "checkpoint" / "last.safetensors")
    assert main([f"resume={run}"]) == 0
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (run / "growth.jsonl").read_text().splitlines()]
    table = rows_of(run / "metrics.csv")
    assert [float(row["val_loss"]) for row in table] == [line["val_loss"] for line in metrics]
    assert set(table[0]) == set(metrics[0])
    assert [(row["site"], int(row["width_after"])) for row in rows_of(run / "growth.csv")] == [
        (event["site"], event["width_after"]) for event in events
    ]
    shown = points(run / "tensorboard")
    assert [step for step, _ in shown["val_accuracy"]] == [line["step"] for line in metrics]
    assert [value for _, value in shown["val_loss"]] == pytest.approx([line["val_loss"] for line in metrics])
    assert shown[f"width/{events[-1]['site']}"][-1][1] == events[-1]["width_after"]
    assert not (run / "wandb").exists()


@pytest.mark.parametrize("sign", "=+-@")
def test_no_formula_of_a_stranger_s_run_reaches_a_spreadsheet(sign, tmp_path):
    """A resumed run writes what its checkpoint tells of earlier epochs and growths."""
    evil = f"{sign}HYPERLINK(1)\x1b[31m"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "train_loss": evil}) + "\n")
    tracker = tracking.CsvTracker(tmp_path)
    tracker.metrics({"epoch": 2, "train_loss": 1.0}, 2)
    tracker.events([GrowthEvent(evil, "tiny", 2, 4, 6, 1.0, (), evil, (), 10, 20)], [], {})
    cells = [cell for file in tmp_path.glob("*.csv") for row in rows_of(file) for cell in row.values()]
    assert cells.count(f"'{sign}HYPERLINK(1) [31m") == 3


def test_a_logger_that_is_not_installed_is_said_before_anything_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    assert main([*QUICK[:-1], "logger=[csv,tensorboard]", f"hydra.run.dir={tmp_path / 'run'}"]) == 1
    assert "pip install 'growconv[track]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
