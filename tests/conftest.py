"""What all tests share."""

import gc
import os
import random

import pytest

os.environ.setdefault("WANDB_MODE", "disabled")


def pytest_sessionstart(session):
    """Prepare the processes that run tests; the one that hands them out to others need not wait for torch."""
    if session.config.pluginmanager.has_plugin("dsession"):
        return
    import torch
    from hypothesis import settings

    torch.set_num_threads(1)
    settings.register_profile("growconv", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("growconv")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What imports and collection make stays: the garbage collector need not walk through it, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Every test draws the same numbers, whatever ran before it in its process."""
    import numpy as np
    import torch

    for seed in (random.seed, np.random.seed, torch.default_generator.manual_seed):
        seed(0)


@pytest.fixture(autouse=True)
def _no_determinism_left_behind():
    """Lightning's trainers set a switch of the whole process, under which some operations refuse to run."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    yield
    if torch.are_deterministic_algorithms_enabled() != before:
        torch.use_deterministic_algorithms(before)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder that the test works in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
