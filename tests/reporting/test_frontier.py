"""The frontier of fixed networks and the head start kept, against figures worked out by hand."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growconv.reporting import compare as command
from growconv.reporting.comparison import compare
from growconv.reporting.frontier import flops_needed, head_start_kept, loss_after, standings
from growconv.training.commands import CommandParser

SMALL, LARGE = {"conv": [8, 3, 3, 3]}, {"conv": [16, 3, 3, 3]}
LOSSES = {"small": {1e9: 0.50, 2e9: 0.45}, "large": {1e9: 0.60, 2e9: 0.40, 4e9: 0.30}}


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
