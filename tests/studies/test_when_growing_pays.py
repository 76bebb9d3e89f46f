"""The study when_growing_pays: its runs are what the protocol says, and its tables are right."""

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from scipy import stats

from experiments.studies.when_growing_pays import allocation, pieces, questions, rates, run
from experiments.studies.when_growing_pays.record import Record, Result
from experiments.studies.when_growing_pays.tables import Tables, interval
from growconv.growth.cost import ModelCost
from growconv.network.find import find_sites
from growconv.training.build import make_model, make_policy
from growconv.training.config import compose, plain


def result(question: str, variant: str, seed: int, loss: float) -> Result:
    return Result(question, variant, seed, loss, 0.9, loss, 1000, 1e12, 10.0)


@pytest.fixture
def tuned(tmp_path) -> Record:
    """A record in which 0.1 is the best rate of every net."""
    record = Record(tmp_path / "results.jsonl")
    record.add(
        result("rates", f"{name}/lr_{rate}", seed, 1 + abs(rate - 0.1))
        for name in questions.SETTINGS
        for rate in rates.RATES
        for seed in rates.TUNING
    )
    return record


def commands(piece: pieces.Piece, folder: Path) -> Iterator[tuple[str, ...]]:
    """What a piece calls, with the results between that it reads."""
    for arguments in piece.commands(folder):
        yield arguments
        directory = next((each.removeprefix("hydra.run.dir=") for each in arguments if "hydra.run.dir" in each), None)
        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
            (Path(directory) / "metrics.jsonl").write_text(json.dumps({"val_loss": 1.0}) + "\n")


def option(overrides: list[str], name: str) -> str:
    """The value that overrides give an option; the last one counts."""
    return next(each.partition("=")[2] for each in reversed(overrides) if each.startswith(f"{name}="))


@pytest.mark.slow
@pytest.mark.parametrize("question", questions.QUESTIONS)
def test_every_run_composes_at_the_tuned_rate_with_the_seed_of_its_piece(question, tuned, tmp_path, monkeypatch):
    """Of runs that differ in numbers alone the first one is composed: each takes a fifth of a second."""
    monkeypatch.setattr(allocation, "CELLS", allocation.CELLS[::5])  # each alike: one of each data set
    found, composed = list(questions.QUESTIONS[question](tuned, 3)), set()
    assert len({piece.variant for piece in found}) == len(found)
    for piece in found:
        for arguments in commands(piece, tmp_path / piece.question / piece.variant):
            if arguments[0] == "grow" or arguments[0].startswith("resume="):
                continue
            overrides = [each for each in arguments if "=" in each and each != "experiment=found"]
            assert option(overrides, "seed") == "3"
            assert float(option(overrides, "optimizer.lr")) == 0.1
            assert 0 < float(option(overrides, "trainer.flops")) <= max(questions.BUDGETS) * questions.E
            if arguments[0] == "search":
                overrides.insert(0, "experiment=search")
            kind = frozenset(re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "0", each) for each in overrides if "dir=" not in each)
            if kind in composed:
                continue
            composed.add(kind)
            config = plain(compose(overrides))
            assert config["seed"] == 3
            assert config["optimizer"]["lr"] == 0.1
            assert config["trainer"]["flops"] == float(option(overrides, "trainer.flops"))
            make_policy(config["growth"]["scheduler"].get("learning_rate"), "growth.scheduler.learning_rate")


def test_rates_are_tuned_on_seeds_that_are_never_reported():
    assert not set(rates.TUNING) & {*questions.SEEDS, *allocation.SEEDS}


def test_a_list_of_rates_grows_until_the_best_lies_within(tmp_path):
    record, tried = Record(tmp_path / "results.jsonl"), []
    for piece in rates.rates(record, {"net": ("growth=none",)}):
        rate = float(piece.variant.rpartition("_")[2])
        tried.append(rate)
        record.add([result("rates", piece.variant, piece.seed, abs(rate - 1.0))])
    assert sorted(set(tried)) == [*rates.RATES, 0.8, 1.6]
    assert rates.rate(record, "net") == "optimizer.lr=0.8"


def test_no_rate_is_taken_before_all_were_tried(tmp_path):
    with pytest.raises(SystemExit, match="run `rates` first"):
        rates.rate(Record(tmp_path / "results.jsonl"), "width_1.0")


@pytest.mark.parametrize("cell", allocation.CELLS, ids=lambda cell: cell.name)
def test_widths_by_hand_cost_what_uniform_ones_cost(cell):
    net, pixels = allocation.NETS[cell.net], allocation.IMAGES[cell.images].pixels
    for shape in ([1.0] * len(net.uniform), [float(width**2) for width in net.uniform]):
        assert 0.9 * cell.budget < net.flops(cell.scaled(shape), pixels) <= cell.budget
    assert cell.scaled(net.uniform) == list(net.uniform)


@pytest.mark.parametrize("cell", allocation.CELLS, ids=lambda cell: cell.name)
def test_the_config_of_a_cell_builds_its_network_with_the_free_sites_alone(cell):
    net, pixels = allocation.NETS[cell.net], allocation.IMAGES[cell.images].pixels
    config = plain(compose([*cell.fixed([5] * len(net.uniform))]))
    model = make_model(config, (1, pixels, 10))
    inputs = torch.zeros(2, 1, pixels, pixels)
    assert ModelCost.measure(model, inputs).flops() == net.flops([5] * len(net.uniform), pixels)
    free = [site for site in find_sites(model, inputs) if fnmatch(site.name, net.sites)]
    assert [site.width for site in free] == [5] * len(net.uniform)
    assert config["model"]["hidden_sites"] == [net.sites]


def test_a_piece_is_run_once_recorded_and_left_out_then(tuned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "Record", lambda: Record(tuned.path))
    monkeypatch.setitem(
        run.QUESTIONS,
        "frontier",
        lambda record, seed: [
            pieces.run(
                "frontier",
                "short",
                seed,
                "data=digits",
                "data.limit=100",
                "model=small_cnn",
                "growth=none",
                "trainer.epochs=1",
            )
        ],
    )
    arguments = ["frontier", "--seeds", "0", "--runs", str(tmp_path / "runs")]
    assert run.main(arguments) == 0
    kept = Record(tuned.path).of("frontier", "short")[0]
    summary = json.loads((tmp_path / "runs/frontier/short/seed0/summary.json").read_text())
    assert kept.test_loss == summary["test_loss"]
    assert kept.peak_mib is not None
    assert 50 < kept.peak_mib < 5000
    capsys.readouterr()
    assert run.main(arguments) == 0
    assert "short" not in capsys.readouterr().out


def test_a_failed_command_ends_with_what_it_said(tmp_path):
    piece = pieces.run("frontier", "wrong", 0, "growth=nothing")
    with pytest.raises(SystemExit, match="nothing"):
        run.perform(piece, tmp_path / "wrong", 1)


def test_an_interval_is_students():
    values = [1.0, 2.0, 4.0]
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem(values))
    assert interval(values) == f"{7 / 3:.4f} [{low:.4f}, {high:.4f}] (n=3)"


def test_the_head_start_kept_is_the_protocols(tmp_path):
    record = Record(tmp_path / "results.jsonl")
    large = {1.0: 0.50, 2.0: 0.40, 4.0: 0.30, 8.0: 0.20}
    record.add(result("frontier", f"budget_{budget}/width_1.0", 0, loss) for budget, loss in large.items())
    record.add([result("frontier", "budget_2.0/width_0.5", 0, 0.45)])
    tables = Tables(record)
    # The small net's loss is worth 2^0.5 E: who ends at the large net's loss of 4 E has kept (4 - 2) / 2^0.5 of it,
    # who ends at that of 2 E nothing.
    assert tables.head_start(1.0, {0: result("doubling", "x", 0, 0.30)}) == "141%"
    assert tables.head_start(1.0, {0: result("doubling", "x", 0, 0.40)}) == "0%"
    assert tables.head_start(1.0, {0: result("doubling", "x", 0, 0.60)}) == "outside"


def test_tables_are_written_of_what_there_is(tuned):
    tuned.add(
        result("frontier", f"budget_{budget}/width_{width}", seed, width)
        for budget in questions.BUDGETS
        for width in questions.WIDTHS
        for seed in (0, 1)
    )
    tuned.add([result("doubling", "to_1.0/random", 0, 0.25), result("doubling", "to_1.0/random", 1, 0.75)])
    text = Tables(Record(tuned.path)).text()
    assert "| random | 0.5000 [-2.6766, 3.6766] (n=2) |" in text
    assert "the best, 0.5" in text
