"""Hazard: two processes that grow apart, or that grow otherwise than one would."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "two_processes.py"


@pytest.fixture(scope="module")
def worker():
    """The script of the processes as a module, for the one-process referee."""
    specification = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two real gloo processes found."""
    folder = tmp_path_factory.mktemp("gloo")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), "2", str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [
        {
            **json.loads((folder / f"rank{rank}.json").read_text()),
            **torch.load(folder / f"rank{rank}.pt", weights_only=True),
        }
        for rank in range(2)
    ]


@pytest.mark.slow
def test_statistics_of_two_processes_are_those_of_one(worker, ranks):
    expected = worker.moments(0, 1) | worker.terms(0, 1)
    for number, rank in enumerate(ranks):
        assert rank["statistics"].keys() == expected.keys()
        for name, value in expected.items():
            if number > 0 and name.endswith("kept"):
                continue  # rank 0, which solves, has the samples of all
            scale = float(value.abs().max()) or 1.0
            allowed = 1e-6 if name.startswith("solved") else 1e-10  # the former by conjugate gradients
            torch.testing.assert_close(rank["statistics"][name], value, rtol=0, atol=allowed * scale, msg=name)
    assert float(expected["passes"]) == 1.0
    for name in [name for name in expected if name.endswith("twice")]:
        once = next(value for key, value in expected.items() if key.startswith(name[:-6]) and key.endswith(" N"))
        torch.testing.assert_close(expected[name], once, rtol=0, atol=1e-10 * float(once.abs().max()))
    for name, value in ranks[0]["statistics"].items():
        assert name.endswith("kept") or torch.equal(value, ranks[1]["statistics"][name]), name


@pytest.mark.slow
def test_five_growth_rounds_leave_the_ranks_bitwise_equal(ranks):
    for key in ("hashes", "searched_hashes", "compared_hashes", "final", "events"):
        assert ranks[0][key] == ranks[1][key], key
    assert len(ranks[0]["hashes"]) == 5
    assert len(set(ranks[0]["hashes"])) == 5
    assert len(set(ranks[0]["searched_hashes"])) == 6


@pytest.mark.slow
def test_training_grown_data_parallel_equals_one_process_with_the_same_global_batch(worker, ranks):
    model, scheduler, _ = worker.train(0, 1)
    assert [[e.site, e.step, e.channels] for e in scheduler.history] == [event[:3] for event in ranks[0]["events"]]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ranks[0]["weights"][name], value, rtol=0, atol=1e-5, msg=name)
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])


@pytest.mark.slow
def test_what_goes_wrong_on_one_rank_is_raised_on_both_and_changes_nothing(ranks):
    for rank in ranks:
        first, second, unchanged = rank["failures"]
        assert "different parameters" in first
        assert second
        assert unchanged
