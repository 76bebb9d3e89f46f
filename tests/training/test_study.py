"""The runner of studies: all variants and seeds, once each; what fails is told and the rest is kept."""

import json
import statistics
from pathlib import Path

import pytest
import yaml

from growconv.cli import main
from growconv.errors import ConfigError
from growconv.training import study

ROOT = Path(__file__).resolve().parents[2]


def write(folder, **changes):
    """A study of seconds."""
    entries = {
        "name": "small",
        "base": ["data=digits", "data.limit=200", "growth.times=1", "growth.samples=64", "growth.batch_size=16"],
        "epochs": 2,
        "seeds": [0, 1],
        "baseline": "fixed_large",
        "equal_flops": ["fixed_large"],
        "variants": {"fixed_large": ["growth=none"], "random": ["growth=random"]},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(entries | changes))
    return path


@pytest.mark.slow
def test_a_study_runs_once_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    path = write(tmp_path, seeds=[0])
    arguments = [str(path), "--processes", "2", "--runs", str(tmp_path / "runs")]
    assert main(["study", *arguments]) == 0
    results = (tmp_path / "RESULTS.md").read_text()
    assert "## Equal epochs" in results
    assert "## Equal training FLOPs" in results
    assert "| random | 1 |" in results
    for part in ("equal_epochs", "equal_flops"):
        assert (tmp_path / part / "comparison.png").exists()
        assert (tmp_path / part / "runs.csv").exists()
    summaries = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("summary.json")}
    assert len(summaries) == 3
    gone = tmp_path / "runs" / "small" / "equal_epochs" / "random" / "seed0" / "summary.json"
    content = gone.read_text()
    gone.unlink()
    capsys.readouterr()
    monkeypatch.setattr("growconv.reporting.compare.save_figure", lambda *_: None)  # as they were
    assert main(["study", *arguments[:1], *arguments[3:]]) == 0  # one process
    assert "2 runs, 1 done already" in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in summaries if f != gone} == {
        f: t for f, t in summaries.items() if f != gone
    }
    grown, fixed = (
        [json.loads(file.read_text())["train_flops"] for file in (tmp_path / "runs" / "small" / part).glob(pattern)]
        for part, pattern in (("equal_epochs", "random/*/summary.json"), ("equal_flops", "*/*/summary.json"))
    )
    assert all(0 < flops <= statistics.median(grown) for flops in fixed)
    again, before = yaml.safe_load(gone.read_text()), yaml.safe_load(content)
    assert again["test_accuracy"] == before["test_accuracy"]


def test_every_variant_runs_with_every_seed(tmp_path):
    jobs = study.first_part(study.Study.read(write(tmp_path, seeds=[0, 3])), tmp_path)
    ran = {
        str(path.relative_to(tmp_path)): [text for text in told if text.startswith("seed=")]
        for path, told in jobs.items()
    }
    assert ran == {
        f"equal_epochs/{variant}/seed{seed}": [f"seed={seed}"]
        for variant in ("fixed_large", "random")
        for seed in (0, 3)
    }


@pytest.mark.slow
def test_what_fails_is_told_and_the_rest_is_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("growconv.reporting.compare.save_figure", lambda *_: None)
    variants = {"fixed_large": ["growth=none"], "broken": ["growth=none", "model.norm=nothing"]}
    path = write(tmp_path, variants=variants, seeds=[0], epochs=1, equal_flops=[])
    assert main(["study", str(path), "--runs", str(tmp_path / "runs")]) == 1
    printed = capsys.readouterr().out
    assert "broken/seed0: FAILED" in printed
    assert "model.norm" in printed
    assert "| fixed_large | 1 |" in (tmp_path / "RESULTS.md").read_text()


def test_references_in_overrides_are_left_to_the_run(tmp_path):
    given = ["growth=none", "optimizer.weight_decay=${optimizer.lr}"]
    read = study.Study.read(write(tmp_path, variants={"fixed_large": given}))
    assert read.variants == {"fixed_large": given}


def test_fixed_variants_run_again_for_the_median_flops_of_growing_ones(tmp_path):
    path = write(tmp_path, epochs=10, equal_flops=["fixed_large", "fixed_small"])
    with pytest.raises(ConfigError, match="fixed_large, random"):
        study.Study.read(path)
    variants = {name: ["growth=none"] for name in ("fixed_small", "fixed_large")} | {
        "a": ["growth=tiny"],
        "b": ["growth=senn"],
    }
    small = study.Study.read(write(tmp_path, epochs=10, equal_flops=["fixed_large", "fixed_small"], variants=variants))
    for name, flops in {"fixed_small": 10, "fixed_large": 100, "a": 40, "b": 60}.items():
        folder = tmp_path / "runs" / "equal_epochs" / name / "seed0"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(f'{{"train_flops": {flops}}}')
    jobs = study.second_part(small, tmp_path / "runs")
    assert [path.parent.name for path in jobs] == ["fixed_large"] * 2 + ["fixed_small"] * 2
    assert all("trainer.flops=50.0" in overrides for overrides in jobs.values())


@pytest.mark.parametrize("name", ["digits_quick/study.yaml", "fashion_mnist/study.yaml", "fashion_mnist/levers.yaml"])
def test_every_run_of_the_committed_studies_composes(name, monkeypatch):
    """Reading a study composes each variant; what a run adds to it is its seed and its number of epochs."""
    from growconv.solvers import get_solver
    from growconv.training.build import make_policy
    from growconv.training.config import compose, plain

    configs = []
    monkeypatch.setattr(study.settings, "plain", lambda config: configs.append(plain(config)))
    committed = study.Study.read(ROOT / "experiments" / "studies" / name)
    monkeypatch.undo()
    assert len(configs) == len(committed.variants)
    for config in configs:
        if config["growth"]["method"] != "none":
            get_solver(config["growth"]["method"], **config["growth"]["solver"])
        make_policy(config["growth"]["amount"], "growth.amount")
    jobs = study.first_part(committed, Path("runs"))
    assert len(jobs) == len(committed.variants) * len(committed.seeds)
    config = plain(compose(next(iter(jobs.values()))))
    assert config == configs[0] | {
        "seed": committed.seeds[0],
        "trainer": {**config["trainer"], "epochs": committed.epochs},
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variant": {}}, "did you mean variants?"),
        ({"epochs": "many"}, "study.yaml: epochs"),
        ({"seeds": []}, "study.yaml: seeds"),
        ({"variants": {"fixed_large": "growth=none"}}, "study.yaml: variants"),
        ({"variants": {"fixed_large": ["growth=none", "model.width=-1"]}}, "variant fixed_large: model.width"),
        ({"baseline": "fixed_lrage"}, "did you mean fixed_large?"),
        ({"name": "a/b"}, "study.yaml: name"),
    ],
)
def test_a_wrong_study_is_one_message_before_anything_runs(changes, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", str(write(tmp_path, **changes))]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["study.yaml", "--only", "randm"], "did you mean random?"),
        (["study.yaml", "--seeds", "a"], "--seeds"),
        (["study.yaml", "--proceses", "2"], "did you mean --processes?"),
        (["study.yaml", "--processes", "0"], "1 or more"),
    ],
)
def test_a_mistake_in_the_command_is_one_message(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    assert main(["study", *arguments]) == 1
    assert words in capsys.readouterr().err
