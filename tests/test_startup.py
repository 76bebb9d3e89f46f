"""What is loaded when: names of the package at their first use, torch only for work that needs it."""

import ast
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import growconv

ROOT = Path(__file__).resolve().parents[1]


def loaded_after(code):
    """The modules of a fresh process that ran this code."""
    code += "\nimport sys; sys.stderr.write('\\n' + ' '.join(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return set(answer.stderr.splitlines()[-1].split())


def test_every_name_is_known_to_type_checkers_and_loads():
    tree = ast.parse((ROOT / "growconv" / "__init__.py").read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in typed.body for alias in node.names}
    assert sorted(imported) == sorted(growconv.__all__)
    assert {name: f"growconv.{home}" for name, home in growconv._HOME_OF.items()} == imported
    for name, home in imported.items():
        assert getattr(growconv, name) is getattr(sys.modules[home], name)
    assert set(growconv.__all__) | {"growth", "__version__"} <= set(dir(growconv))
    assert growconv.growth.rewrap.__module__ == "growconv.growth.distributed"


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="'growconv' has no attribute 'find_sights'"):
        growconv.find_sights  # noqa: B018
    with pytest.raises(ImportError, match="find_sights"):
        exec("from growconv import find_sights")


def test_importing_growconv_loads_neither_torch_nor_tensorly():
    assert "torch" not in loaded_after("import growconv; growconv.__version__")
    names = "[getattr(growconv, name) for name in growconv.__all__ if name != 'load_run']"  # which reads a run's config
    loaded = loaded_after(f"import growconv; {names}")
    assert "growconv.solvers.rank" in loaded
    assert not loaded & {"tensorly", "scipy", "matplotlib", "sklearn", "hydra", "lightning_fabric"}


def test_the_version_has_one_source():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "growconv/__init__.py"
    assert importlib.metadata.version("growconv") == growconv.__version__


def test_a_run_loads_no_more_than_it_needs(tmp_path):
    options = "trainer.epochs=1 data.limit=64 growth.times=1 growth.samples=32 growth.batch_size=16 baselines=[]"
    arguments = [*options.split(), "report=false", f"hydra.run.dir={tmp_path / 'run'}"]
    loaded = loaded_after(f"from growconv.cli import main\nif main({arguments}): raise SystemExit(1)")
    assert "growconv.training.loop" in loaded
    heavy = {"torch._dynamo", "torchmetrics", "transformers", "lightning_fabric", "sklearn", "matplotlib", "wandb"}
    assert not loaded & heavy


def test_nothing_compiled_is_loaded_once_training_runs(tmp_path):
    """What Cython has compiled drops a Ctrl-C that comes while it is loaded."""
    options = "growth=none trainer.epochs=2 data.limit=64 baselines=[] report=false"
    arguments = [*options.split(), f"hydra.run.dir={tmp_path / 'run'}"]
    loaded = loaded_after(
        f"""
import sys
from growconv.cli import main
from growconv.training.loop import Trainer

def compiled():
    return {{name for name, each in sys.modules.items() if str(getattr(each, "__file__", "")).endswith(".so")}}

def fit(self):
    before = compiled()
    try:
        return fits(self)
    finally:
        sys.modules |= {{f"late:{{name}}": None for name in compiled() - before}}

fits, Trainer.fit = Trainer.fit, fit
if main({arguments}): raise SystemExit(1)
"""
    )
    assert "growconv.training.loop" in loaded
    assert [name for name in loaded if name.startswith("late:")] == []
