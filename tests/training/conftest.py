"""One finished run that several tests read, and a copy of it to change."""

import shutil

import pytest

from growconv.cli import main
from tests.growth.conftest import chain, sites_of  # noqa: F401 (fixtures)
from tests.training.finished import QUICK


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main([*QUICK, "trainer.epochs=2", "baselines=[small]", f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.fixture
def mine(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")
