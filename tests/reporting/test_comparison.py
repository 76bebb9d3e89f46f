"""Figures of a comparison against hand calculation, and what happens to runs that cannot be compared."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from growconv.errors import ArgumentValueError, CheckpointError
from growconv.reporting import compare as command
from growconv.reporting.comparison import compare, paired_difference
from growconv.reporting.style import magnitude


def test_means_spreads_and_paired_differences_equal_numpy_and_scipy(make_run):
    accuracies = {"tiny": [0.91, 0.93, 0.90, 0.95], "random": [0.90, 0.90, 0.91, 0.92]}
    runs = [
        make_run(f"{method}{seed}", method=method, seed=seed, accuracy=value)
        for method, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    result = compare(runs, baseline="random")
    tiny = result.groups[0]
    assert [group.label for group in result.groups] == ["tiny", "random"]
    assert tiny.mean("test_accuracy") == pytest.approx(100 * np.mean(accuracies["tiny"]))
    assert tiny.std("test_accuracy") == pytest.approx(100 * np.std(accuracies["tiny"], ddof=1))
    difference = result.difference(tiny)
    pairs = 100 * (np.array(accuracies["tiny"]) - np.array(accuracies["random"]))
    interval = stats.ttest_1samp(pairs, 0).confidence_interval(0.95)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((pairs.mean(), *interval))
    assert difference.pairs == 4
    assert result.difference(result.baseline) is None
    assert not result.left_out


def test_pairs_are_matched_by_seed_and_not_by_position(make_run):
    for seed, value in {0: 0.80, 1: 0.90, 2: 0.85}.items():
        make_run(f"a/{seed}", method="tiny", seed=seed, accuracy=value + 0.01)
    for seed, value in {2: 0.85, 0: 0.80}.items():
        make_run(f"b/{seed}", method="random", seed=seed, accuracy=value)
    result = compare([make_run("a/0", method="tiny", seed=0, accuracy=0.81).parent.parent], baseline="random")
    difference = result.difference(result.groups[0])
    assert difference.pairs == 2
    assert difference.mean == pytest.approx(1.0)
    assert any("random: no run with seed 1" in note for note in result.notes)


def test_runs_of_one_method_with_other_settings_are_other_groups(make_run, tmp_path):
    for seed in (0, 1):
        make_run(f"small{seed}", method="none", seed=seed, growth=False, parameters=100, model__width=0.25)
        make_run(f"large{seed}", method="none", seed=seed, growth=False, parameters=900, model__width=1.0)
        make_run(f"tiny{seed}", method="tiny", seed=seed, parameters=800, model__width=0.25)
    result = compare([tmp_path])
    assert {group.label for group in result.groups} == {"fixed, width=0.25", "fixed, width=1.0", "tiny"}
    assert result.baseline.label == "fixed, width=1.0"
    by = compare([tmp_path], by=["model.width"], baseline="fixed, width=1.0")
    assert {group.label for group in by.groups} == {"fixed, width=0.25", "fixed, width=1.0", "tiny, width=0.25"}


def test_what_cannot_be_compared_is_named_and_the_rest_is_compared(make_run, tmp_path):
    good = [make_run(f"good{seed}", seed=seed) for seed in range(2)]
    unfinished = make_run("unfinished", seed=2)
    (unfinished / "summary.json").unlink()
    empty = make_run("empty", seed=3)
    (empty / "metrics.jsonl").write_text("")
    damaged = make_run("damaged", seed=4)
    text = (damaged / "metrics.jsonl").read_text()
    (damaged / "metrics.jsonl").write_text(text[: len(text) // 2])
    binary = make_run("binary", seed=5)
    (binary / "metrics.jsonl").write_bytes(b"\xff\xfe\x00garbage")
    other = make_run("other", seed=6, data="cifar10")
    seedless = make_run("seedless", seed=7)
    for name in ("summary.json", "config.yaml"):
        (seedless / name).write_text((seedless / name).read_text().replace("seed", "sead"))
    runs = [*good, unfinished, empty, damaged, binary, other, seedless, tmp_path / "nowhere"]
    result = compare(runs)
    assert [run.path.name for group in result.groups for run in group.runs] == ["good0", "good1"]
    reasons = {path.rsplit("/", 1)[-1]: reason for path, reason in result.left_out}
    assert "unfinished" in reasons["unfinished"]
    assert "last epoch written: 8" in reasons["unfinished"]
    assert "empty" in reasons["empty"]
    assert "metrics.jsonl" in reasons["damaged"]
    assert "line 5" in reasons["damaged"]
    assert "not UTF-8" in reasons["binary"]
    assert "data.name is 'cifar10' (most runs: 'digits')" in reasons["other"]
    assert "seed" in reasons["seedless"]
    assert "no such run directory" in reasons["nowhere"]
    assert all(str(path) in command.to_markdown(result) for path, _ in result.left_out)


@pytest.mark.parametrize(
    ("setting", "key"),
    [("trainer__epochs", "trainer.epochs"), ("model___target_", "model._target_"), ("data__limit", "data.limit")],
)
def test_runs_under_other_conditions_are_left_out_unless_named(setting, key, make_run, tmp_path):
    """But for how often a run saves, and for a setting that older runs do not have."""
    for seed in range(3):
        make_run(f"tiny{seed}", seed=seed, **{setting: 20}, trainer__checkpoint_every=seed)
    make_run("random0", method="random", **{setting: 20})
    make_run("old", method="net2net")
    make_run("other", method="gradmax", **{setting: 11})
    result = compare([tmp_path])
    assert {group.label for group in result.groups} == {"tiny", "random", "net2net"}
    (reason,) = [reason for path, reason in result.left_out if path.endswith("other")]
    assert f"{key} is 11 (most runs: 20)" in reason
    assert f"--by {key} compares them" in reason
    named = compare([tmp_path], by=[key])
    assert f"gradmax, {key.rpartition('.')[-1]}=11" in {group.label for group in named.groups}
    assert not named.left_out


def test_a_misspelt_setting_is_an_error_with_what_was_meant(make_run):
    with pytest.raises(ArgumentValueError, match=r"did you mean growth\.method"):
        compare([make_run("run")], by=["growth.methd"])


def test_training_flops_that_differ_are_remarked(make_run, tmp_path):
    for seed in (0, 1):
        make_run(f"tiny{seed}", seed=seed, epochs=4)
        make_run(f"fixed{seed}", method="none", seed=seed, epochs=8, growth=False)
    (note,) = [note for note in compare([tmp_path]).notes if "FLOPs" in note]
    assert "50 % (tiny) of those of fixed" in note
    assert compare([tmp_path], baseline="fixed").flops_share(compare([tmp_path]).groups[0]) > 0


def test_a_seed_that_ran_twice_counts_once_and_is_told(make_run):
    first, second = make_run("one", seed=0, accuracy=0.5), make_run("two", seed=0, accuracy=0.7)
    result = compare([first, second, first])
    assert result.groups[0].values("test_accuracy") == pytest.approx([70.0])
    assert any("more than once" in note and "two" in note for note in result.notes)


def test_baselines_inside_a_run_are_found_and_hidden_folders_are_not(make_run):
    run = make_run("run")
    make_run("run/fixed_large", method="none", growth=False)
    make_run("run/.hydra")
    result = compare([run], baseline="fixed")
    assert [group.label for group in result.groups] == ["fixed", "tiny"]
    assert not result.left_out


def test_nothing_to_compare_and_unknown_baselines_are_errors_with_the_choices(make_run, tmp_path):
    (tmp_path / "void").mkdir()
    with pytest.raises(CheckpointError, match="no run is left to compare") as raised:
        compare([tmp_path / "void"])
    assert "not a run directory" in str(raised.value)
    run = make_run("one")
    with pytest.raises(ArgumentValueError, match="tiny"):
        compare([run], baseline="gradmax")


def test_one_pair_has_no_interval_and_none_has_no_difference():
    single = paired_difference([1.5, math.nan])
    assert single.mean == 1.5
    assert math.isnan(single.low)
    assert paired_difference([math.nan]) is None


def test_figures_that_are_no_numbers_count_as_missing(make_run, tmp_path):
    run = make_run("odd")
    summary = json.loads((run / "summary.json").read_text()) | {"seconds": None, "train_flops": float("nan")}
    (run / "summary.json").write_text(json.dumps(summary))
    rows = command.table_rows(compare([run]))
    assert rows[1][6:9] == ["–", "–", "–"]


@pytest.mark.parametrize(
    ("value", "text"), [(12_345, "12.3 k"), (2.5e12, "2.5 T"), (0.5, "0.5"), (2e-4, "2e-4"), (0, "0")]
)
def test_large_numbers_are_short(value, text):
    assert magnitude(value) == text
