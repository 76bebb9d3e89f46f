"""Which path computes which statistic: a cost model in multiply-adds, and what a user has forced."""

import math
from dataclasses import dataclass

from growconv.errors import StatisticsError
from growconv.statistics.offset_path import OffsetPath, axis_problems
from growconv.statistics.offsets import MAPS
from growconv.statistics.problem import PairProblem

UNFOLD = 20.0
"""Price of one entry of an unfolded patch, written and read."""
COMBINATIONS = 20_000
"""Combinations of taps per axis beyond which describing them costs more than it saves."""


@dataclass(frozen=True)
class Choice:
    """The path of one statistic.

    Attributes:
        path: "offset", "unfold" or "dense".
        reason: one line: estimated cost of both paths in multiply-adds for a batch, or why there was no choice.
    """

    path: str
    reason: str


def choose_paths(
    problem: PairProblem, statistics: frozenset[str], path: str, samples: int, where: str
) -> dict[str, Choice]:
    """Choose a path for each statistic.

    Args:
        problem: the pair.
        statistics: what is to be summed.
        path: "auto", or the path that the user forces.
        samples: size of a batch.
        where: name of the site, for messages.

    Raises:
        StatisticsError: where the offset path is forced on a pair that it cannot serve.
    """
    if path in ("dense", "unfold"):
        return {name: Choice(path, "as asked") for name in statistics}
    if path == "offset":
        obstacle = next((reason for name in sorted(statistics) if (reason := _obstacle(problem, name))), None)
        if obstacle:
            raise StatisticsError(
                "the offset path cannot serve this pair", where=where, got=obstacle, fix="collect with path='auto'"
            )
        return {name: Choice("offset", "as asked") for name in statistics}
    choices = {}
    for name in sorted(statistics):
        reason = (
            "the gradient of the consumer's weight"
            if name == "M"
            else _obstacle(problem, name) or _too_many_combinations(problem, name)
        )
        if reason:
            choices[name] = Choice("unfold", reason)
            continue
        candidate = OffsetPath(problem, (name,), 1)
        offset = candidate.cost(candidate.correlations[MAPS[name]], samples)
        unfold = unfold_cost(problem, name) * samples
        best = "offset" if offset < unfold else "unfold"
        choices[name] = Choice(best, f"offset {offset:.2g}, unfold {unfold:.2g} multiply-adds a batch")
    return choices


def unfold_cost(problem: PairProblem, name: str) -> float:
    """Multiply-adds of a statistic for one sample by the unfold path."""
    a, d, c = problem.patch_entries, problem.consumer_entries, problem.channels[2]
    b = problem.second.taps
    hidden, outputs = math.prod(problem.hidden_size), math.prod(problem.output_size)
    patches, own = UNFOLD * a * hidden, UNFOLD * d * outputs
    return {
        "S": 0.75 * a * a * hidden + patches,
        "patch_gram": 0.75 * a * a * math.prod(problem.first_output_size) + patches,
        "S_full": 0.75 * (a * b) ** 2 * outputs + UNFOLD * a * b * outputs,
        "N_raw": a * b * c * outputs + patches,
        "P": a * b * d * outputs + patches + own,
        "S2": 0.75 * d * d * outputs + own,
        "M": 1.0 * d * c * outputs,
    }[name]


def _obstacle(problem: PairProblem, name: str) -> str | None:
    """Why the offset path cannot compute a statistic; None where it can."""
    roles = {"first": problem.first, "second": problem.second}
    if name in ("S2", "M"):
        del roles["first"]
    elif name == "patch_gram":
        del roles["second"]
    elif not problem.local:
        return "the grid changes between producer and consumer"
    for role, geometry in roles.items():
        if geometry.padding_mode != "zeros":
            return f"the {role} layer has {geometry.padding_mode} padding"
    return None


def _too_many_combinations(problem: PairProblem, name: str) -> str | None:
    for axis in axis_problems(problem):
        t, b = axis.first.taps, axis.second.taps
        count = {"S_full": (t * b) ** 2, "P": t * b * b, "N_raw": t * b}.get(name, max(t, b) ** 2)
        if count > COMBINATIONS:
            return f"{count} combinations of taps on one axis"
    return None
