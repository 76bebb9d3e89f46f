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


def summary(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def test_policies_are_composed_in_yaml(here, capsys):
    command = [
        *QUICK,
        "growth.when={_target_: growconv.growth.AnyOf, policies: [{_target_: growconv.growth.AtSteps, steps: [2]}, "
        "{_target_: growconv.growth.Every, interval: 4}]}",
        "growth.amount={_target_: growconv.growth.ToWidth, target: 2.0, rounds: 2}",
        "growth.where={_target_: growconv.growth.Greedy, per: parameter}",
        "growth.stop=[{_target_: growconv.growth.NoGain, threshold: 1e-9}]",
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
        (["growth.where={_target_: growconv.growth.Sideways}"], ["growth.where", "Sideways", "package.module.Name"]),
        (
            ["growth.when={_target_: growconv.growth.Plateau, patient: 3}"],
            ["growth.when", "patient", "did you mean 'patience'"],
        ),
        (["growth.sites=[head*]"], ["growth.sites", "features.0 -> features.4"]),
        (["growth.budget.parameters=-1"], ["growth.budget.parameters"]),
        (["growth.amount={_target_: growconv.growth.Fixed, count: -1}"], ["growth.amount", "count"]),
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
        (["a=["], ["a=[", "cannot be read", "quotes inside quotes"]),
        (["hydra.mode=RUN", "trainer.epoch=3"], ["trainer.epoch", "did you mean trainer.epochs=3?"]),
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
    assert main(["sites", "model=resnet20", "growth=tiny"]) == 0
    assert "growth=tiny serves 12 of 12 sites" in capsys.readouterr().out
    assert main(["sites", "model=unet", "growth=gradmax"]) == 0
    out = capsys.readouterr().out
    assert "growth=gradmax serves 8 of 10 sites" in out
    assert "upsample_nearest2d between" in out
    assert main(["sites", "model=resnet20", "trainer.epoch=3"]) == 1
    assert "trainer.epoch" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_skips_what_is_finished_and_goes_on_with_the_rest(here, capsys, monkeypatch):
    command = ["-m", *QUICK, "growth=random,net2net", "seed=0", "hydra.sweep.dir=sweep", "trainer.progress=none"]
    command += ["trainer.epochs=1"]
    assert main(command) == 0
    folders = sorted(path for path in (here / "sweep").iterdir() if path.is_dir())
    assert len(folders) == 2
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
    command[command.index("seed=0")] = "seed=5"
    assert main([*command, f"hydra.sweep.subdir='{folders[0].name}'"]) == 1
    assert "another config" in capsys.readouterr().err
    monkeypatch.setattr("growconv.reporting.compare.save_figure", lambda *_: None)
    assert main(["compare", "sweep", "--output", "compared"]) == 0
    assert "net2net" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_over_cores(here):
    command = [sys.executable, "-m", "growconv", "-m", *QUICK, "growth=random", "seed=0,1", "hydra.sweep.dir=sweep"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [*command, "hydra/launcher=cores", "trainer.progress=none"], capture_output=True, text=True, env=environment
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert sorted(summary(path.parent)["seed"] for path in (here / "sweep").glob("*/summary.json")) == [0, 1]


@pytest.mark.slow
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


def test_the_config_is_printed_by_hydra(here, capsys):
    for line in ("--cfg job seed=5 growth=random", "seed=5 --cfg job growth=random", "seed=5 growth=random -c job"):
        assert main(line.split()) == 0
        told = yaml.safe_load(capsys.readouterr().out)
        assert (told["seed"], told["growth"]["method"]) == (5, "random")
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


@pytest.mark.slow
def test_sites_on_a_terminal_of_80_columns(here):
    lines = on_a_terminal(80, "sites", "model=resnet20", "data=cifar10")
    assert max(map(len, lines)) <= 80
    assert any("blocks.0.conv1 ->" in line for line in lines)
    assert not any("…" in line for line in lines)


def test_ctrl_c_prints_the_command_that_goes_on(here, capsys):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = ["growth=none", "trainer.epochs=400", "data.limit=160", "hydra.run.dir=a b/run"]
    command = [sys.executable, "-m", "growconv", *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background does not
    with subprocess.Popen(command, preexec_fn=hears, **options) as run:
        metrics = here / "a b" / "run" / "metrics.jsonl"
        while run.poll() is None and not metrics.exists():
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert said == "\ngrowconv: stopped; go on with:\n  growconv 'resume=a b/run'\n"
    assert "Traceback" not in said
    assert main(["resume=a b/run", "trainer.epochs=3"]) == 1
    assert "trainer.epochs: 400 -> 3" in capsys.readouterr().err
