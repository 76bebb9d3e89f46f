"""A comparison and its frontier against hand calculation, and what happens to runs that cannot be compared."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from growconv.errors import ArgumentValueError, CheckpointError
from growconv.reporting import compare as command
from growconv.reporting.comparison import (
    compare,
    flops_needed,
    head_start_kept,
    loss_after,
    paired_difference,
    standings,
)
from growconv.reporting.terminal import magnitude
from growconv.training.commands import CommandParser

SMALL, LARGE = {"conv": [8, 3, 3, 3]}, {"conv": [16, 3, 3, 3]}
LOSSES = {"small": {1e9: 0.50, 2e9: 0.45}, "large": {1e9: 0.60, 2e9: 0.40, 4e9: 0.30}}


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


def test_flops_are_interpolated_in_their_logarithm_and_a_rise_is_not_believed():
    curve = {1e9: 0.6, 2e9: 0.4, 4e9: 0.3}
    assert flops_needed(curve, 0.5) == pytest.approx(2**0.5 * 1e9)
    assert flops_needed(curve, 0.6) == pytest.approx(1e9)
    assert math.isnan(flops_needed(curve, 0.7))
    assert math.isnan(flops_needed(curve, 0.2))
    assert flops_needed({1e9: 0.6, 2e9: 0.7, 4e9: 0.3}, 0.45) == pytest.approx(2**1.5 * 1e9)
    assert loss_after(curve, 2**0.5 * 1e9) == pytest.approx(0.5)
    assert math.isnan(loss_after(curve, 8e9))
    assert math.isnan(loss_after({}, 1.0))


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6, unique=True), st.floats(0, 1))
def test_flops_needed_and_loss_after_are_inverse_to_each_other(losses, share):
    curve = {1e9 * 2**number: loss for number, loss in enumerate(sorted(losses, reverse=True))}
    flops = 1e9 * 2 ** (share * (len(losses) - 1))
    assert loss_after(curve, flops_needed(curve, loss_after(curve, flops))) == pytest.approx(loss_after(curve, flops))


def test_a_head_start_is_kept_whole_or_not_at_all():
    large = {1e9: 0.6, 2e9: 0.4, 4e9: 0.3}
    # The small network's 0.5 is worth 2^0.5 GFLOP of the large one's training.
    assert head_start_kept(0.4, 2e9 - 2**0.5 * 1e9, large, 0.5) == pytest.approx(1.0)
    assert head_start_kept(0.4, 2e9, large, 0.5) == pytest.approx(0.0)
    assert math.isnan(head_start_kept(0.9, 2e9, large, 0.5))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def runs(make_run, tmp_path):
    """Fixed networks of two sizes at several lengths, and one that grew at 1 GFLOP and ended at 2, on two seeds."""
    for seed in (0, 1):
        for (name, by_flops), layers in zip(LOSSES.items(), (SMALL, LARGE), strict=True):
            for flops, loss in by_flops.items():
                settings = {"model__width": name, "trainer__flops": flops}
                run = make_run(f"{name}_{flops:g}/seed{seed}", method="none", growth=False, seed=seed, **settings)
                edit(run / "summary.json", test_loss=loss, train_flops=flops, layers=layers)
        run = make_run(f"grown/seed{seed}", seed=seed, epochs=2, model__width="large", trainer__flops=2e9)
        events = [json.loads(line) | {"step": 50} for line in (run / "growth.jsonl").read_text().splitlines()[:1]]
        (run / "growth.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        edit(run / "summary.json", test_loss=0.42 + 0.04 * seed, train_flops=2e9, layers=LARGE)
        edit(run / "environment.json", layers=SMALL)
    return tmp_path


def test_a_grown_run_is_measured_against_the_best_fixed_network_of_its_flops(runs):
    (standing,) = standings(compare([runs], by=["model.width", "trainer.flops"]))
    assert standing.group.runs[0].method == "tiny"
    assert {run.summary["test_loss"] for run in standing.best.runs} == {0.40}
    assert standing.difference is not None
    assert standing.difference.mean == pytest.approx(0.04)
    # It grew at 1 GFLOP, where the small network has 0.50, worth 2^0.5 GFLOP; its own 0.44 is worth 2^0.8.
    assert standing.head_start == pytest.approx((2**0.8 - 1) / 2**0.5)


def test_fixed_networks_of_other_lengths_are_no_measure(runs):
    for seed in (0, 1):
        edit(runs / f"small_2e+09/seed{seed}/summary.json", train_flops=1.9e9)
    assert standings(compare([runs], by=["model.width", "trainer.flops"])) == []


def test_compare_writes_and_prints_the_frontier(runs, tmp_path, capsys):
    output = tmp_path / "out"
    command.main(
        CommandParser("compare").parse_args([str(runs), "--by", "model.width,trainer.flops", "--output", str(output)])
    )
    assert "head start kept" in capsys.readouterr().out
    assert "| head start kept |" in (output / "comparison.md").read_text()
    assert "best_fixed" in (output / "comparison.csv").read_text()
    assert (output / "frontier.svg").stat().st_size > 0
