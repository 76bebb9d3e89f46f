"""What is said of options before anything runs: limits beside the defaults, and what was probably meant."""

import pytest

from growconv.errors import ConfigError
from growconv.training.checks import variants
from growconv.training.config import compose, plain


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
