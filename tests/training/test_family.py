"""Several sizes from one trunk."""

import json
from pathlib import Path
from typing import Any

import pytest

from growconv.cli import main
from growconv.errors import ConfigError
from growconv.training.config import compose, plain
from growconv.training.family import stages
from growconv.training.rundir import RunDirectory

QUICK = ["data.limit=160", "growth.samples=96", "growth.batch_size=48", "trainer.progress=none"]


FAMILY = [
    *QUICK, "growth=net2net", "growth.times=2", "growth.begin=0.2", "growth.end=0.5", "lr_schedule=trapezoid",
    "lr_schedule.decay=0.25", "trainer.flops=1.2e9",
]  # fmt: skip


def figures(folder: Path) -> dict[str, Any]:
    timed = {"seconds", "growth_seconds", "peak_memory", "best_val_accuracy", "epochs"}
    return {name: value for name, value in RunDirectory(folder).summary().items() if name not in timed}


def test_a_member_is_the_run_of_its_own_length_and_decay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["family", *FAMILY, f"hydra.run.dir={tmp_path / 'family'}"]) == 0
    said = capsys.readouterr().out
    members = [figures(tmp_path / "family" / f"member_{number}") for number in range(3)]
    sizes = [member["parameters"] for member in members]
    assert sizes == sorted(set(sizes))
    assert [member["growth_events"] > 0 for member in members] == [False, True, True]
    for member, length in zip(members, (0.2 / 0.75, 0.5 / 0.75, 1.0), strict=True):
        assert 0.9 * length * 1.2e9 < member["train_flops"] <= length * 1.2e9
    lines = [json.loads(line) for line in (tmp_path / "family/member_1/metrics.jsonl").read_text().splitlines()]
    trunk = [json.loads(line) for line in (tmp_path / "family/trunk_1/metrics.jsonl").read_text().splitlines()]
    assert lines[: len(trunk)] == trunk
    rates = [line["learning_rate"] for line in lines]
    assert set(rates[: len(trunk)]) == {rates[0]}
    assert rates[-1] < 0.5 * rates[0]
    assert "one by one" in said
    assert main(["family", *FAMILY, f"hydra.run.dir={tmp_path / 'family'}"]) == 0  # nothing is left to do
    assert [figures(tmp_path / "family" / f"member_{number}") for number in range(3)] == members


def test_ctrl_c_prints_the_command_that_goes_on_with_the_family(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("growconv.training.family.run", stop)
    assert main(["family", *FAMILY, "hydra.run.dir=mine"]) == 130
    said = capsys.readouterr().err.split("go on with:\n  ")[1]
    assert said.startswith(f"growconv family {' '.join(FAMILY)} hydra.run.dir=")
    assert said.rstrip().endswith("/mine")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["growth=none"], "growth spread"),
        (["growth.every=10"], "growth spread"),
        (["trainer.flops=null"], "trunk with a constant learning rate"),
        (["lr_schedule=cosine"], "trunk with a constant learning rate"),
        (["growth.end=0.8"], "already falls"),
    ],
)
def test_what_is_no_family_is_refused(changes: list[str], words: str) -> None:
    groups = {change.split("=")[0] for change in changes}
    kept = [text for text in FAMILY if text.split("=")[0] not in groups]
    with pytest.raises(ConfigError, match=words):
        stages(plain(compose([*kept, *changes])))
