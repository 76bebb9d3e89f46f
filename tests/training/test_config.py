"""The schema under conf/: everything composes; what does not fit is named, with what was meant; configs compare."""

from dataclasses import fields
from itertools import product
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from growconv.cli import run_name
from growconv.errors import ConfigError
from growconv.solvers.base import SOLVERS
from growconv.training import options
from growconv.training.config import call_target, compose, conf_dir, differences, locate, plain, variants
from tests.methods import METHODS

LIBRARIES = ("timm", "torchvision", "transformers", "pytorchcv")
GROUPS = ("data", "model", "growth", "optimizer", "lr_schedule", "trainer", "logger", "experiment")
CHOICES = [
    (group, path.stem)
    for group in GROUPS
    for path in sorted((Path(__file__).parents[2] / "conf" / group).glob("*.yaml"))
]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_file_of_every_group_composes(group, name):
    needed = {"images": ["data.root=/nowhere"]} | {key: ["model.name=resnet"] for key in LIBRARIES}
    named = {"optimizer": ["optimizer.name=NAdam", "optimizer.lr=1e-3"], "lr_schedule": ["lr_schedule.name=StepLR"]}
    overrides = [f"{group}={name}", *needed.get(name, named.get(group, []) if name == "torch" else [])]
    config = plain(compose(overrides))
    assert config["trainer"]["epochs"] >= 1
    if group == "growth":
        assert config["growth"]["method"] == name


def test_every_solver_of_channels_has_a_file_with_its_hyperparameters():
    """growth.solver in YAML mirrors the solver's dataclass, names and defaults."""
    files = {name for group, name in CHOICES if group == "growth"} - {"none"}
    assert files == set(METHODS)
    for name in files:
        written = plain(compose([f"growth={name}"]))["growth"]["solver"]
        default = SOLVERS[name]()
        SOLVERS[name](**written)
        values = {entry.name: getattr(default, entry.name) for entry in fields(default) if entry.init}
        assert written == {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("trainer.epoch=3", "trainer.epoch"),
        ("trainer.epochs=many", "trainer.epochs"),
        ("growth.amplitud=1", "growth.amplitud"),
        ("model=resnet21", "resnet20"),
        ("data.hidden=3", "data.hidden"),
        ("optimizer.momentum=0.9", "optimizer.momentum"),
        ("data.limit=2.5", "data.limit"),
    ],
)
def test_typos_and_wrong_types_are_named(override, word):
    with pytest.raises(ConfigError) as caught:
        compose([override])
    assert word in str(caught.value)


def test_added_options_that_nothing_reads_are_refused():
    with pytest.raises(ConfigError, match=r"model\.depth"):
        plain(compose(["+model.depth=3"]))
    with pytest.raises(ConfigError, match="colour"):
        plain(compose(["+colour=red"]))
    assert plain(compose(["+model.args.levels=2"]))["model"]["args"] == {"levels": 2}


@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_dir() / "data").glob("*.yaml")))
def test_a_choice_of_data_changes_nothing_of_how_it_is_trained(name):
    root = ["data.root=/nowhere"] if name == "images" else []
    chosen, default = plain(compose([f"data={name}", *root])), plain(compose([]))
    assert chosen.pop("data")["name"] == name
    default.pop("data")
    if name == "synthetic":  # the student of its teacher: no classifier fits its targets
        assert chosen.pop("model")["_target_"].endswith("ConvPair")
        default.pop("model")
    assert chosen == default


@pytest.mark.parametrize(
    "launcher", ["cores", "slurm", "slurm_gpu", "joblib", "submitit_slurm", "submitit_local", "basic"]
)
def test_launchers_compose(launcher):
    compose([f"hydra/launcher={launcher}"])


def test_differences_name_both_values_and_skip_what_may_change():
    stored = plain(compose([]))
    wanted = plain(compose(["optimizer.lr=0.5", "growth=random", "trainer.progress=none", "logger=wandb"]))
    lines = differences(stored, wanted)
    assert "optimizer.lr: 0.002 -> 0.5" in lines
    assert "growth.method: 'tiny' -> 'random'" in lines
    assert not [line for line in lines if line.startswith(("trainer.progress", "logger"))]
    assert differences(stored, stored) == []


def test_targets():
    class Model:
        def __init__(self, classes, depth=1):
            self.classes, self.depth = classes, depth

    built = call_target(Model, {"depth": 3}, "model.args", {"classes": 10, "width": 0.5})
    assert (built.classes, built.depth) == (10, 3)
    with pytest.raises(ConfigError, match="did you mean 'depth'"):
        call_target(Model, {"dept": 3}, "model.args", {"classes": 10})
    with pytest.raises(ConfigError, match="classes"):
        call_target(Model, {}, "model.args")
    assert locate("torch.nn.Linear", "x").__name__ == "Linear"
    for wrong in ("torch.nn.Lineal", "nonsense", "no.such.module", "torch.nn", "math.pi"):
        with pytest.raises(ConfigError, match="x: this"):
            locate(wrong, "x")


def test_folders_of_a_sweep_have_possible_names():
    assert run_name("growth=tiny,seed=0") == "growth=tiny,seed=0"
    assert "/" not in run_name("data.root=/a/b,seed=0")
    first, second = run_name("x=" + "y" * 300 + "1"), run_name("x=" + "y" * 300 + "2")
    assert first != second
    assert max(len(first), len(second)) < 130
    assert run_name("") == "defaults"


def test_conf_lies_where_it_is_looked_for():
    assert (conf_dir() / "config.yaml").is_file()
    assert set(options.SCHEMAS) >= {(None, "run_schema"), ("growth", "growth_schema")}
    assert OmegaConf.has_resolver("run_name")
    assert len(list(product(GROUPS))) == len({group for group, _ in CHOICES})


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("grwoth=tiny", "did you mean growth=tiny?"),
        ("grwoth.times=3", "did you mean growth.times=3?"),
        ("trainer.epoch=3", "did you mean trainer.epochs=3?"),
        ("+trainer.epoch=3", "did you mean trainer.epochs"),
        ("epochs=3", "did you mean trainer.epochs=3?"),
        ("growth.parameters=3", "did you mean growth.budget.parameters=3?"),
        ("growth=tinny", "did you mean growth=tiny?"),
        ("growth.solver.shrinkag=0.1", "did you mean growth.solver.shrinkage=0.1?"),
        ("model.args.levels=2", "+model.args.levels=2"),
        ("trainer.progress=nonne", "did you mean trainer.progress=none?"),
        ("hydra/launcher=core", "did you mean hydra/launcher=cores?"),
        ("hydra.run.dirr=x", "did you mean hydra.run.dir=x?"),
        ("seed=1,2", "growconv -m seed=1,2"),
        ("data=images", "set it: data.root=..."),
        ("model.args={a", "quotes inside quotes"),
    ],
)
def test_what_was_probably_meant(override, fix):
    with pytest.raises(ConfigError) as caught:
        plain(compose([override]))
    assert fix in caught.value.fix
    assert "schema" not in str(caught.value)


def test_an_option_that_is_not_there_is_named_beside_one_without_a_value():
    with pytest.raises(ConfigError, match=r"data\.colour: there is no such option"):
        compose(["data=images", "data.colour=1"])


def test_a_whole_number_with_an_exponent_is_told_how_to_be_written():
    with pytest.raises(ConfigError, match=r"write growth\.samples=1000$"):
        plain(compose(["growth.samples=1e3"]))


@pytest.mark.parametrize(
    ("override", "where", "expected"),
    [
        ("trainer.epochs=three", "trainer.epochs", "a whole number"),
        ("trainer.deterministic=perhaps", "trainer.deterministic", "true or false"),
        ("growth.amount=-1", "growth.amount", "auto or a number above 0"),
        ("growth.budget.parameters=-1", "growth.budget.parameters", "1 or more"),
        ("growth.times=null", "growth.times", "1 or more"),
        ("trainer.precision=16", "trainer.precision", "32-true, bf16-mixed, 16-mixed, bf16-true or 64-true"),
    ],
)
def test_a_wrong_value_names_the_option_and_what_it_may_be(override, where, expected):
    with pytest.raises(ConfigError) as caught:
        plain(compose([override]))
    assert caught.value.where == where
    assert str(caught.value.expected) == expected


def test_a_sweep_is_checked_value_by_value():
    sweep = ["growth=tiny,random", "seed=0,1,2", "optimizer.lr=0.1"]
    assert list(variants(sweep)) == [
        ["growth=tiny", "seed=0", "optimizer.lr=0.1"],
        ["growth=random", "seed=0", "optimizer.lr=0.1"],
        ["growth=tiny", "seed=1", "optimizer.lr=0.1"],
        ["growth=tiny", "seed=2", "optimizer.lr=0.1"],
    ]
    assert list(variants(["optimizer.lr=interval(0,1)", "seed=range(2)"])) == [["seed=0"], ["seed=1"]]
    assert list(variants(["x=["])) == [["x=["]]
