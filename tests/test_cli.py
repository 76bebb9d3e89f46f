"""The command line as a user types it: runs, sites, sweeps, and errors that say what to do."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from growconv import __version__
from growconv.cli import main

QUICK = [
    "trainer.epochs=2",
    "data.limit=160",
    "growth.samples=64",
    "growth.batch_size=32",
    "growth.times=2",
    "report=false",
]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def summary(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def test_a_run_leaves_what_the_readme_promises(here, capsys):
    assert main([*QUICK, "hydra.run.dir=run", "baselines=[large]", "report=true"]) == 0
    out = capsys.readouterr().out
    assert "grown, tiny" in out
    assert "fixed large" in out
    assert "run directory: run" in out
    assert "3 sites to grow" in out
    assert "grows at " in out
    assert out.splitlines()[-1] == "report: run/report.html"
    run = here / "run"
    for name in ("config.yaml", "metrics.jsonl", "growth.jsonl", "summary.json", "environment.json", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["epochs"] == 2
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == [1, 2]
    promised = {"step", "epoch", "train_loss", "val_accuracy", "parameters", "train_flops", "seconds", "learning_rate"}
    assert promised <= set(metrics[0])
    assert metrics[0]["parameters"] < metrics[1]["parameters"]
    events = [json.loads(line) for line in (run / "growth.jsonl").read_text().splitlines()]
    result = summary(run)
    promised = {
        "test_accuracy",
        "best_val_accuracy",
        "parameters",
        "train_flops",
        "seconds",
        "growth_events",
        "seed",
        "method",
    }
    assert promised | {"growth_seconds"} <= set(result)
    assert result["growth_events"] == len(events) > 0
    assert result["parameters"] == events[-1]["parameters_after"] == metrics[-1]["parameters"]
    assert 0 < result["growth_seconds"] < result["seconds"]
    large = summary(run / "fixed_large")
    assert large["parameters"] > result["parameters"]
    assert large["growth_events"] == 0


def test_same_seed_same_numbers(here, capsys):
    for name in ("first", "second"):
        assert main([*QUICK, f"hydra.run.dir={name}", "baselines=[]", "data.augmentation=crop"]) == 0
    assert main([*QUICK, "hydra.run.dir=other", "baselines=[]", "data.augmentation=crop", "seed=1"]) == 0
    timed = ("seconds", "growth_seconds")

    def lines(name):
        records = [json.loads(line) for line in (here / name / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in record.items() if key not in timed} for record in records]

    assert lines("first") == lines("second")
    assert lines("first") != lines("other")


def test_fixed_training_flops_are_twice_the_macs(here, capsys):
    """One linear algebra away from torch: forward 2·MACs, backward twice that but for the first layer's input."""
    assert main([*QUICK, "growth=none", "hydra.run.dir=run", "trainer.progress=none"]) == 0
    # convolutions: 8x8 (1->32), 4x4 (32->64), 2x2 (64->64), linear 64->10
    forward = [2 * 64 * 9 * 32, 2 * 16 * 9 * 32 * 64, 2 * 4 * 9 * 64 * 64, 2 * 64 * 10]
    expected = sum(3 * flops for flops in forward) - forward[0]
    steps = summary("run")["steps"]
    assert summary("run")["train_flops"] == expected * 32 * steps


def test_a_model_from_elsewhere(here, capsys, monkeypatch):
    (here / "mymodels.py").write_text(
        "from torch import nn\n"
        "def net(in_channels, classes, channels=6):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, channels, 3), nn.ReLU(), nn.Conv2d(channels, classes, 3),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(here)
    command = [*QUICK, "model._target_=mymodels.net", "+model.args.channels=4", "baselines=[]", "growth.amount=2"]
    assert main([*command, "hydra.run.dir=run"]) == 0
    assert summary("run")["widths"] == {"0 -> 2": 8}


def test_policies_are_composed_in_yaml(here, capsys):
    command = [
        *QUICK,
        "growth.when={policy: AnyOf, policies: [{policy: AtSteps, steps: [2]}, {policy: Every, interval: 4}]}",
        "growth.amount={policy: ToWidth, target: 2.0, rounds: 2}",
        "growth.where={policy: Greedy, per: parameter}",
        "growth.stop=[{policy: NoGain, threshold: 1e-9}]",
        "growth.budget.parameters=20000",
        "baselines=[]",
        "hydra.run.dir=run",
    ]
    assert main(command) == 0
    assert summary("run")["growth_events"] > 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.epoch=3"], ["trainer.epoch"]),
        (["trainer.epochs=0"], ["trainer.epochs", "1 or more"]),
        (["trainer.epochs=three"], ["trainer.epochs"]),
        (["model=resnet21"], ["resnet21", "resnet20"]),
        (["model._target_=torch.nn.Nothing"], ["model._target_", "torch.nn.Nothing"]),
        (["+model.args.levels=2", "model=unet", "data=synthetic", "+model.args.level=1"], ["level"]),
        (["growth.method=tiney"], ["tiney", "tiny"]),
        (["+growth.solver.colour=1"], ["colour"]),
        (["growth.times=0"], ["growth.times"]),
        (["growth.times=5000"], ["growth.times", "too short"]),
        (["growth.begin=0.9", "growth.end=0.1"], ["growth.begin"]),
        (["growth.start=0"], ["growth.start"]),
        (["growth.amplitude=strong"], ["amplitude", "strong"]),
        (["growth.where={policy: Sideways}"], ["growth.where", "Sideways"]),
        (["growth.when={policy: Plateau, patient: 3}"], ["growth.when", "patient", "did you mean 'patience'"]),
        (["growth.sites=[head*]"], ["growth.sites", "features.0 -> features.4"]),
        (["growth.budget.parameters=-1"], ["growth.budget.parameters"]),
        (["growth.amount={policy: Fixed, count: -1}"], ["growth.amount", "count"]),
        (["+growth.scheduler.method=tiny"], ["growth.scheduler", "growth.method"]),
        (["optimizer.lr=0"], ["optimizer.lr"]),
        (["optimizer.name=adam"], ["optimizer.name"]),
        (["lr_schedule.name=step"], ["lr_schedule.name"]),
        (["lr_schedule.warmup=2"], ["lr_schedule.warmup"]),
        (["trainer.precision=8-bit"], ["trainer.precision"]),
        (["trainer.accelerator=abacus"], ["trainer.accelerator"]),
        (["trainer.sync_batchnorm=true", "trainer.accelerator=cpu"], ["trainer.sync_batchnorm", "model.norm=group"]),
        (["trainer.accumulate=1000"], ["trainer.accumulate"]),
        (["trainer.label_smoothing=1"], ["trainer.label_smoothing"]),
        (["trainer.progress=loud"], ["trainer.progress"]),
        (["logger=notebook"], ["notebook", "tensorboard"]),
        (["logger=[csv,wandbb]"], ["did you mean logger=wandb?"]),
        (["logger=wandb", "logger.mode=sometimes"], ["logger.mode"]),
        (["baselines=[medium]"], ["baselines", "medium"]),
        (["growth=none", "baselines=[large]"], ["baselines"]),
        (["model=unet"], ["output does not fit", "data=digits"]),
        (["data=fashion_mnist", "model=conv_pair", "data.limit=100"], ["output does not fit"]),
        (["data=fashion_mnist", "data.root=/nowhere"], ["data.root=/nowhere", "does not exist"]),
        (["data.limit=1"], ["data.limit", "two samples"]),
        (["data.limit=0"], ["data.limit"]),
        (["+surprise=1"], ["surprise"]),
        (["optimizer.lr=1e30", "growth=none", "optimizer=sgd"], ["finite", "optimizer.lr"]),
    ],
)
def test_what_cannot_work_is_said_in_one_message(overrides, words, here, capsys):
    assert main([*QUICK, *overrides, "hydra.run.dir=run"]) == 1
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert "Traceback" not in message
    assert "overrides" not in message
    if (here / "run").exists():  # it began, and went wrong then
        assert (here / "run" / "config.yaml").exists()
        assert not (here / "run" / "summary.json").exists()


def test_sites_of_a_config(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # a narrower table folds the names of sites
    assert main(["sites", "model=resnet20", "data=cifar10"]) == 0
    out = capsys.readouterr().out
    assert "blocks.0.conv1 -> blocks.0.conv2" in out
    assert "classifier" in out
    assert "serves" not in out
    assert main(["sites", "model=resnet20", "growth=gradmax"]) == 0
    out = capsys.readouterr().out
    assert "growth=gradmax serves 9 of 12 sites" in out
    assert "layers produce the channels" in out
    assert main(["sites", "model=resnet20", "trainer.epoch=3"]) == 1
    assert "trainer.epoch" in capsys.readouterr().err


def test_a_sweep_skips_what_is_finished_and_goes_on_with_the_rest(here, capsys):
    command = ["-m", *QUICK, "growth=tiny,random", "seed=0,1", "hydra.sweep.dir=sweep", "trainer.progress=none"]
    assert main(command) == 0
    folders = sorted(path for path in (here / "sweep").iterdir() if path.is_dir())
    assert len(folders) == 4
    assert all("growth=" in path.name and "seed=" in path.name for path in folders)
    assert not list((here / "sweep").glob("*/fixed_*"))
    untouched, unfinished = folders[0] / "summary.json", folders[1] / "summary.json"
    marked = untouched.read_text().replace('"seed"', '"read_again": true, "seed"')
    untouched.write_text(marked)
    expected = json.loads(unfinished.read_text())
    unfinished.unlink()
    assert main(command) == 0
    assert untouched.read_text() == marked
    assert json.loads(unfinished.read_text())["test_loss"] == expected["test_loss"]
    command[command.index("seed=0,1")] = "seed=5"
    assert main([*command, f"hydra.sweep.subdir='{folders[0].name}'"]) == 1
    assert "other settings" in capsys.readouterr().err
    assert main(["compare", "sweep", "--output", "compared"]) == 0
    assert "tiny" in capsys.readouterr().out


def test_a_sweep_over_cores(here):
    command = [sys.executable, "-m", "growconv", "-m", *QUICK, "growth=random", "seed=0,1", "hydra.sweep.dir=sweep"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [*command, "hydra/launcher=cores", "trainer.progress=none"], capture_output=True, text=True, env=environment
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert sorted(summary(path.parent)["seed"] for path in (here / "sweep").glob("*/summary.json")) == [0, 1]


def test_a_search_by_optuna(here):
    """The shipped study, shortened: its best value is the best of its runs; started again, it runs none."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    command = [sys.executable, "-m", "growconv", "-m", "experiment=search_digits", *QUICK, "hydra.sweeper.n_trials=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([*command, "trainer.epochs=1"], capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr[-2000:]
    folder = here / "runs" / "search"
    found = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    runs = [summary(path.parent) for path in folder.glob("*/summary.json")]
    assert len(runs) == 3
    assert found["best_value"] == max(run["best_val_accuracy"] for run in runs)
    assert {"optimizer.lr", "growth.start"} <= set(found["best_params"])


def in_a_process(script, *arguments):
    """A Python script in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment)


def test_the_config_is_printed_by_hydra(here, capsys):
    assert main(["--cfg", "job", "seed=5"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 5
    assert not list(here.iterdir())


@pytest.mark.parametrize("line", ["--help", "study --help", "--cfg job"])
def test_a_closed_pipe_ends_a_command_in_silence(line, here):
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, "-m", "growconv", *line.split()], stdout=writing, stderr=subprocess.PIPE, env=environment
    )
    os.close(writing)
    assert answer.stderr == b""
    assert answer.returncode in (0, 141)  # argparse writes its pages without looking


def test_the_citation_is_of_this_version():
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert told["version"] == __version__
    assert {"cff-version", "message", "title", "authors"} <= set(told)


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
        ("resume run1", "did you mean: growconv resume=run1"),
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
    ],
)
def test_the_shell_completes(typed, offered, capsys, monkeypatch):
    monkeypatch.setenv("COMP_LINE", typed)
    assert main(["--shell-completion", "query=bash"]) == 0
    assert offered <= set(capsys.readouterr().out.split())


def test_the_shell_gets_a_script_that_it_can_read(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["growconv"])
    assert main(["--shell-completion", "install=bash"]) == 0
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    assert "growconv" in script
    for wrong in (["--shell-completion"], ["-sc", "bash"], ["-sc", "install=tcsh"]):
        assert main(wrong) == 1
        assert "install=bash" in capsys.readouterr().err


def test_what_fails_before_the_run_begins_leaves_nothing(here, capsys, monkeypatch):
    """Errors that only the model can tell, and a model that raises."""
    assert main([*QUICK, "growth.sites=[head*]"]) == 1
    assert main([*QUICK, "growth.sites=[head*]", "hydra.run.dir=deep/down/run"]) == 1
    assert main(["-m", *QUICK, "growth.sites=[head*]", "hydra.sweep.dir=sweep"]) == 1
    assert [path.name for path in (here / "sweep").iterdir()] == ["multirun.yaml"]
    (here / "broken.py").write_text("def net(classes):\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(here)
    assert main([*QUICK, "model._target_=broken.net"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["broken.py", "sweep"]


def on_a_terminal(columns, *arguments):
    """What a command writes to a terminal of that width, without colours and cursor movements."""
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-m", "growconv", *arguments]
    with subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=environment) as process:
        os.close(end)
        written = b""
        while True:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # its other end is closed
                break
            if not part:
                break
            written += part
    os.close(terminal)
    assert process.returncode == 0, written.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


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


def test_sites_on_a_terminal_of_80_columns(here):
    lines = on_a_terminal(80, "sites", "model=resnet20", "data=cifar10")
    assert max(map(len, lines)) <= 80
    assert any("blocks.0.conv1 ->" in line for line in lines)
    assert not any("…" in line for line in lines)


def test_no_progress_still_prints_the_table(here, capsys):
    assert main([*QUICK, "growth=none", "trainer.epochs=1", "trainer.progress=none", "hydra.run.dir=run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0].split()[:2] == ["model", "test"]
    assert lines[2].split()[0] == "fixed"
    assert len(lines) == 3


def test_ctrl_c_prints_the_command_that_goes_on(here, capsys):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "growconv", "growth=none", "trainer.epochs=400", "hydra.run.dir=a b/run"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background does not
    with subprocess.Popen(command, preexec_fn=hears, **options) as run:
        metrics = here / "a b" / "run" / "metrics.jsonl"
        while run.poll() is None and not metrics.exists():
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert said == "\ngrowconv: stopped; go on with:\n  growconv 'resume=a b/run'\n"
    assert "Traceback" not in said
    assert main(["resume=a b/run", "trainer.epochs=3"]) == 1
    assert "trainer.epochs: 400 -> 3" in capsys.readouterr().err
