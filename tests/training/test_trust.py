"""A stranger's run directory: nothing of it is run, nothing is sent, without the user's word."""

import base64
import contextlib
import copy
import json
import os
import pickle
import re
import shutil
import socket
import sys
import threading
from functools import cache

import pytest
import yaml

import growconv
from growconv.cli import main
from growconv.errors import CheckpointError
from growconv.training.config import compose, plain
from growconv.training.trust import is_known, place, strange_names
from tests.forged import forge

QUICK = ["data=digits", "data.limit=64", "growth=none", "trainer.epochs=1", "trainer.progress=none", "report=false"]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@cache
def quick_config():
    return plain(compose([*QUICK, "baselines=[]"]))


def store(run, *path, **values):
    """A config that somebody else wrote: one part of it replaced."""
    config = copy.deepcopy(quick_config())
    part = config
    for key in path:
        part = part[key]
    part |= values
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("good") / "run"
    assert main([*QUICK, "baselines=[]", f"hydra.run.dir={run}"]) == 0
    return run


PLACES = {
    "model._target_": (("model",), lambda call: {"_target_": "os.system", "args": call}),
    "growth.when._target_": (("growth",), lambda call: {"method": "tiny", "when": {"_target_": "os.system", **call}}),
    "growth.stop.0._target_": (
        ("growth",),
        lambda call: {"method": "tiny", "stop": [{"_target_": "os.system", **call}]},
    ),
    "growth.amount._target_": (
        ("growth",),
        lambda call: {"method": "tiny", "amount": {"_target_": "os.system", **call}},
    ),
    "growth.scheduler.pruning._target_": (
        ("growth",),
        lambda call: {"method": "tiny", "scheduler": {"pruning": {"_target_": "os.system", **call}}},
    ),
    "growth.when.policies.0._target_": (
        ("growth",),
        lambda call: {
            "when": {"_target_": "growconv.growth.AnyOf", "policies": [{"_target_": "os.system", **call}]},
            "method": "tiny",
        },
    ),
}


@pytest.mark.parametrize("key", PLACES)
def test_no_command_of_a_stored_config_is_run(key, run, tmp_path, capsys):
    part, values = PLACES[key]
    store(run, *part, **values({"command": f"touch {tmp_path / 'pwned'}"}))
    assert main([f"resume={run}"]) == 1
    assert not (tmp_path / "pwned").exists()
    said = capsys.readouterr().err
    line = 1 + next(i for i, text in enumerate((run / "config.yaml").read_text().splitlines()) if "os.system" in text)
    assert f"config.yaml, line {line}: {key}" in said
    assert "os.system" in said
    assert "trust=true" in said


def test_classes_of_optimizers_and_schedules_are_names_of_code_too():
    config = {"optimizer": {"name": "evil.Optimizer"}, "lr_schedule": {"name": "evil.Schedule"}}
    known = {"optimizer": {"name": "torch.optim.NAdam"}, "model": {"name": "resnet50.a1_in1k"}, "data": {"name": "a.b"}}
    assert list(strange_names(config)) == [
        ("optimizer.name", "evil.Optimizer"), ("lr_schedule.name", "evil.Schedule")
    ]  # fmt: skip
    assert list(strange_names(known)) == []


def test_no_module_of_a_stranger_is_imported(run, tmp_path, monkeypatch, capsys):
    """A solver outside growconv is named by its path; its module may lie in the working directory."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for values in ({"method": "evil.Method"}, {"method": "tiny", "where": {"_target_": "evil.Where"}}):
        store(run, "growth", **values)
        assert main([f"resume={run}"]) == 1
        assert "line" in capsys.readouterr().err
    assert not (tmp_path / "pwned").exists()


def test_the_users_word_is_enough(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "goodmodels.py").write_text(
        "from torch import nn\n"
        "def net(in_channels, classes):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    store(run, "model", _target_="goodmodels.net")
    assert main([f"resume={run}"]) == 1
    assert main([f"resume={run}", "model._target_=goodmodels.net"]) == 0
    (run / "summary.json").unlink()
    assert main([f"resume={run}", "trust=true"]) == 0
    (run / "summary.json").unlink()
    assert main([f"resume={run}", "model._target_=othermodels.net"]) == 1
    assert main([f"resume={run}", "trust=false"]) == 1


def test_a_stored_word_does_not_count(run, tmp_path, capsys):
    store(run, "model", _target_="os.system", args={"command": f"touch {tmp_path / 'pwned'}"})
    with (run / "config.yaml").open("a") as stream:
        stream.write("trust: true\n")
    assert main([f"resume={run}"]) == 1
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["resnet20", "small_cnn", "ConvPair"])
def test_growconv_s_own_need_no_word(name):
    assert is_known(f"growconv.training.models.{name}")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("torch.nn.Sequential", True),
        ("torch.optim.AdamW", True),
        ("torch.optim.lr_scheduler.StepLR", True),
        ("growconv.growth.when.Plateau", True),
        ("growconv.solvers.tiny.Tiny", True),
        ("growconv.training.libraries.timm", True),
        ("growconv.training.libraries.load_weights", False),
        ("torch.nn.Nothing", False),
        ("torch.nn.init.zeros_", False),
        ("torch.nn.functional.relu", False),
        ("torch.load", False),
        ("torch.hub.load", False),
        ("torch.nn.modules.linear.Linear", False),
        ("os.system", False),
        ("growconv.training.rundir.write_atomically", False),
        ("growconv.training.experiment.run", False),
        ("growconv.training.experiment.subprocess.run", False),
        ("growconv.training.models.nn", False),
        ("growconv.training.models.scaled", True),  # a pure function of numbers
        ("growconv.reporting.report.main", False),
        ("growconv.cli.main", False),
        ("growconv_evil.Model", False),
        ("growconv..os.system", False),
        ("builtins.eval", False),
        ("", False),
    ],
)
def test_what_is_known(name, known):
    assert is_known(name) is known


def test_every_shipped_config_names_only_what_is_known():
    for choice in (["model=unet", "data=synthetic"], ["model=mobilenet_v2"], ["experiment=tiny_resnet18_cifar100"]):
        assert list(strange_names(plain(compose(choice)))) == []


def test_a_config_path_is_looked_into_before_hydra_acts(run, tmp_path, capsys):
    """The command that a report shows reads a stored config through Hydra itself."""
    for text in (
        f"hydra:\n  callbacks:\n    x:\n      _target_: os.system\n      command: touch {tmp_path / 'pwned'}\n",
        "defaults:\n  - evil\n",
        "data:\n  root: ${oc.env:HOME}\n",
        "model:\n  _target_: os.system\n",
    ):
        (run / "config.yaml").write_text(text)
        for spelling in (["--config-path", str(run)], [f"--config-path={run}"], ["-cp", str(run)]):
            assert main([*spelling, "--config-name", "config", f"hydra.run.dir={tmp_path / 'out'}"]) == 1
            assert "config.yaml, line" in capsys.readouterr().err
    assert not (tmp_path / "pwned").exists()


def test_the_command_of_a_report_runs_again(run, tmp_path, capsys):
    store(run)
    command = ["--config-path", str(run), "--config-name", "config", f"hydra.run.dir={tmp_path / 'again'}"]
    assert main(command) == 0
    assert (tmp_path / "again" / "summary.json").is_file()


@pytest.fixture
def server():
    heard = []
    listening = socket.create_server(("127.0.0.1", 0))

    def listen():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                connection.settimeout(2)
                with contextlib.suppress(OSError):
                    heard.append(connection.recv(65536))
                    connection.sendall(b"HTTP/1.1 404 no\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                connection.close()

    threading.Thread(target=listen, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", heard
    listening.close()


def test_no_key_leaves_for_a_server_of_a_stored_config(run, server, monkeypatch, capsys):
    address, heard = server
    monkeypatch.setenv("WANDB_API_KEY", "b" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    store(run, "logger", wandb=True, mode="online", server=address)
    assert main([f"resume={run}"]) == 1
    said = capsys.readouterr().err
    assert re.search(r"config\.yaml, line \d+: logger\.server", said)
    assert address in said
    keys = [re.search(rb"(?i)authorization: basic (\S+)", text) for text in heard]
    assert [base64.b64decode(found.group(1)) for found in keys if found] == heard == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "logger.mode"),
        (["logger.mode=online"], "wandb"),
        (["logger.server=http://127.0.0.1:9"], "logger.mode"),
        (["logger.mode=disabled"], None),
        (["logger=none"], None),
    ],
)
def test_online_needs_a_word_too(arguments, word, run, capsys):
    (run / "wandb").mkdir()
    (run / "wandb" / "settings").write_text("[default]\nbase_url = http://127.0.0.1:9\n")
    store(run, "logger", wandb=True, mode="online", server=None)
    assert main([f"resume={run}", *arguments]) == (0 if word is None else 1)
    assert word is None or word in capsys.readouterr().err


def test_compare_and_report_build_nothing(run, tmp_path, capsys):
    store(run, "model", _target_="os.system", args={"command": f"touch {tmp_path / 'pwned'}"})
    figures = {"step": 1, "epoch": 1, "train_loss": 1.0, "val_accuracy": 0.5, "seconds": 1.0, "train_flops": 9.0}
    (run / "metrics.jsonl").write_text(json.dumps(figures) + "\n")
    (run / "summary.json").write_text(json.dumps({"seed": 0, "test_accuracy": 0.5, "parameters": 10, "seconds": 1.0}))
    assert main(["compare", str(run), "--output", str(tmp_path / "out")]) == 0
    assert main(["report", str(run)]) == 0
    assert not (tmp_path / "pwned").exists()


def test_a_place_in_a_broken_file_is_its_key(tmp_path):
    assert place(tmp_path / "none.yaml", "model._target_").endswith("none.yaml: model._target_")
    (tmp_path / "a.yaml").write_text("model: [1, 2]\n")
    assert place(tmp_path / "a.yaml", "model.7.x").endswith("a.yaml: model.7.x")


def test_a_method_of_a_stranger_is_not_imported_to_grow_once(run, tmp_path, monkeypatch, capsys):
    """`growconv grow` reads the method from the config inside the checkpoint."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*QUICK, "baselines=[]", f"hydra.run.dir={run}"]) == 0
    path = run / "checkpoint" / "last.safetensors"
    forge(path, lambda state: state["config"]["growth"].update(method="evil.Method"))
    assert main(["grow", str(run), "--factor", "1.5"]) == 1
    said = capsys.readouterr().err
    assert "evil.Method" in said
    assert "--trust" in said
    assert not (tmp_path / "pwned").exists()


def test_options_of_another_library_s_model_name_no_files_and_no_hubs(run, capsys):
    """timm unpickles what checkpoint_path names; transformers loads code of the hub that attn_implementation names."""
    stored = {"_target_": "growconv.training.libraries.timm", "name": "resnet18", "weights": None}
    assert list(strange_names({"model": stored | {"options": {"drop_rate": 0.1, "global_pool": None}}})) == []
    for options in ({"checkpoint_path": "evil.pth"}, {"pretrained": True}, {"config": {"attn_implementation": "a/b"}}):
        assert len(list(strange_names({"model": stored | {"options": options}}))) == 1
    store(run, "model", **stored, options={"checkpoint_path": "evil.pth"})
    assert main([f"resume={run}"]) == 1
    said = capsys.readouterr().err
    assert "model.options.checkpoint_path" in said
    assert "evil.pth" in said


@pytest.mark.parametrize("values", [{"wandb": 1}, {"wandb": "on"}, {"mode": "shared"}, {"mode": None}, {"mode": 1}])
def test_no_host_by_an_odd_spelling(values, run, server, tmp_path, monkeypatch, capsys):
    """What wandb would take for yes, or for online, is one here as well."""
    address, heard = server
    monkeypatch.setenv("WANDB_API_KEY", "b" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    store(run, "logger", **({"wandb": True, "mode": "online", "server": address} | values))
    assert main([f"resume={run}"]) == 1
    assert "logger." in capsys.readouterr().err
    command = ["--config-path", str(run), "--config-name", "config", f"hydra.run.dir={tmp_path / 'again'}"]
    assert main(command) == 1
    assert "logger." in capsys.readouterr().err
    assert heard == []


ODD = {
    "trainer.epochs": ("many", [1], {}, 0),
    "trainer.flops": ("many",),
    "trainer.batch_size": (0, 1.5),
    "trainer.precision": ("evil",),
    "trainer.progress": ("evil",),
    "trainer.ema": ("x", 1.0),
    "seed": ([1], "x"),
    "data.size": ([[1]], [[0.5, "x"]]),
    "data.stranger": (1,),
    "model._target_": (None, [1]),
    "model.args": ([1], {"plan": "${oc.env:HOME}"}),
    "model.width": (float("nan"), "x", -1),
    "model.widths": ({"a": "x"},),
    "optimizer": ({"name": "evil"}, [1]),
    "optimizer.lr": ("x", float("inf")),
    "lr_schedule.name": ("evil",),
    "growth.stop": ("x",),
    "growth.depth.at": (["x"],),
    "baselines": (["../../x"],),
    "logger": ([1], None),
    "stranger": (1,),
}


@pytest.mark.parametrize("key", ODD)
def test_options_that_do_not_fit_are_refused(key, run, finished, tmp_path, capsys):
    """In the config of a directory, and in the one inside a checkpoint; before anything is read or written."""
    *path, last = key.split(".")
    for value in ODD[key]:
        config = store(run)
        part = config
        for name in path:
            part = part[name]
        part[last] = value
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        assert main([f"resume={run}"]) == 1
        said = capsys.readouterr().err
        assert "config.yaml: the run's config is incomplete or damaged" in said
        assert (path or [last])[0] in said
        assert sorted(os.listdir(run)) == ["config.yaml"]
        path_of_file = shutil.copy(finished / "checkpoint" / "last.safetensors", tmp_path)
        forge(path_of_file, lambda state, config=config: state.update(config=json.loads(json.dumps(config))))
        with pytest.raises(CheckpointError, match=r"last\.safetensors: the run's config is incomplete or damaged"):
            growconv.load_run(path_of_file)


def test_a_model_far_larger_than_its_file_is_refused(finished, tmp_path):
    """Before it takes memory: by its width, by a layer, by the size of its images."""
    for number, change in enumerate(
        (
            lambda state: state["config"]["model"].update(width=2e4),
            lambda state: state["config"]["model"].update(
                _target_="torch.nn.Linear", args={"in_features": 10**6, "out_features": 10**6}
            ),
            lambda state: state.update(shape=[1, 10**5, 10]),
        )
    ):
        path = shutil.copy(finished / "checkpoint" / "last.safetensors", tmp_path / f"{number}.safetensors")
        forge(path, change)
        with pytest.raises(CheckpointError, match=r"far larger than what was saved|not written by a run"):
            growconv.load_run(path)


def test_links_laid_into_a_run_are_not_followed(finished, tmp_path, capsys):
    """Files that get their name when they are whole are begun beside it, where a stranger may have laid something."""
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "summary.json").unlink()
    (tmp_path / "mine").write_text("precious")
    names = ["config.yaml", "summary.json", "metrics.jsonl", "growth.jsonl", "metrics.csv", "report.html"]
    names += [f"checkpoint/{name}.safetensors" for name in ("last", "previous", "best")]
    for path in (run / name for name in [*names, "checkpoint/.last.safetensors.fresh"]):
        path.with_name(f".{path.name}.{os.getpid()}.writing").symlink_to(tmp_path / "mine")
        if path.name in ("report.html", ".last.safetensors.fresh", "metrics.csv"):
            path.symlink_to(tmp_path / "mine")
    assert main([f"resume={run}", "trainer.epochs=2", "logger=csv"]) == 0
    assert main(["report", str(run)]) == 0
    assert (tmp_path / "mine").read_text() == "precious"
    assert not (run / "report.html").is_symlink()
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(tmp_path / "mine")
    assert main([f"resume={run}", "trainer.epochs=3"]) == 1
    assert "symbolic links" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "precious"


def test_no_control_character_reaches_the_terminal(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "r\x1b]0;title\x07un")
    (run / "summary.json").unlink()
    assert main([f"resume={run}", "trainer.progress=lines", "trainer.epochs=2"]) == 0
    assert main(["report", str(run)]) == 0
    assert main(["compare", str(run), "--output", str(tmp_path / "o\x1b[31mut")]) == 0
    for part, values in (("growth", {"method": "tiny\x1b[31m"}), ("data", {"name": "x\x1b[31m"})):
        store(run, part, **values)
        (run / "summary.json").unlink(missing_ok=True)
        assert main([f"resume={run}", "trainer.progress=lines"]) == 1
    out, err = capsys.readouterr()
    assert not set(out + err) & set("\x1b\x07\x9b")


def test_a_warning_about_a_stranger_s_folder_is_tame(tmp_path, capfd):
    from PIL import Image

    for half in ("train", "test"):
        for name in ("a", "b\x1b[31m"):
            (tmp_path / half / name).mkdir(parents=True)
            (tmp_path / half / name / "notes.txt").write_text("x")
            for number in range(8):
                Image.new("L", (8, 8), number).save(tmp_path / half / name / f"{number}.png")
    with pytest.warns(UserWarning, match="are skipped") as told:
        main([*QUICK[2:], "data=images", f"data.root={tmp_path}", "data.channels=1", f"hydra.run.dir={tmp_path / 'r'}"])
    assert any("\x1b" in str(each.message) for each in told)  # as a program gets it
    capfd.readouterr()
    program = "import sys, warnings; from growconv import cli; cli._dispatch = lambda a: warnings.warn(a[0]); "
    assert os.system(f"{sys.executable} -c '{program} sys.exit(cli.main([chr(27)]))'") == 0
    assert "\x1b" not in capfd.readouterr().err


def test_no_pickle_of_hydra_is_read(tmp_path, capsys):
    """Hydra's own flag to start a job again reads one."""

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    (tmp_path / "config.pickle").write_bytes(pickle.dumps(Evil()))
    assert main(["--experimental-rerun", str(tmp_path / "config.pickle")]) == 1
    assert not (tmp_path / "pwned").exists()
