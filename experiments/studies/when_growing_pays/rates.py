"""The learning rates of the study: for each net the best of a list, on seeds that are never reported."""

import itertools
import statistics
from collections.abc import Iterator, Mapping

from experiments.studies.when_growing_pays.pieces import Piece, run
from experiments.studies.when_growing_pays.record import Record

RATES = (0.05, 0.1, 0.2, 0.4)
TUNING = (100, 101)


def rates(record: Record, settings: Mapping[str, tuple[str, ...]]) -> Iterator[Piece]:
    """Every setting at every rate; the list grows until the best lies within.

    Args:
        record: of the finished runs.
        settings: what is tuned, as overrides by the name of each.
    """
    for seed, name, rate in itertools.product(TUNING, settings, RATES):
        yield _rated(name, settings[name], rate, seed)
    for name, overrides in settings.items():
        while (best := _best(record, name)) in (min(tried := _tried(record, name)), max(tried)):
            for seed in TUNING:
                yield _rated(name, overrides, best * 2 if best == max(tried) else best / 2, seed)


def rate(record: Record, name: str) -> str:
    """The override with the rate that the protocol chooses.

    Raises:
        SystemExit: not all rates were run, or the best lies at an end of the list.
    """
    tried = _tried(record, name)
    if not set(RATES) <= set(tried) or _best(record, name) in (min(tried), max(tried)):
        raise SystemExit(f"{name}: its rate is not chosen yet; run `rates` first")
    return f"optimizer.lr={_best(record, name)}"


def _rated(name: str, overrides: tuple[str, ...], rate: float, seed: int) -> Piece:
    return run("rates", f"{name}/lr_{rate}", seed, *overrides, f"optimizer.lr={rate}")


def _tried(record: Record, name: str) -> dict[float, float]:
    """Mean validation NLL by rate, of the rates that all tuning seeds have run."""
    found = {}
    for variant in record.variants("rates"):
        tuned, _, rate = variant.partition("/lr_")
        results = record.of("rates", variant)
        if tuned == name and set(TUNING) <= set(results):
            found[float(rate)] = statistics.mean(result.val_loss for result in results.values())
    return found


def _best(record: Record, name: str) -> float:
    tried = _tried(record, name)
    return min(tried, key=lambda rate: tried[rate])
