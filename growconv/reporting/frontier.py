"""What a growing run has to beat: the best fixed network of its training FLOPs, and how much of its head start it kept.

A run that grows saves FLOPs while it is small. It pays only where its loss ends below that of *every* fixed network of
the same training FLOPs, not of the one alone that it ends as.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from growconv.reporting.comparison import Comparison, Difference, Group
from growconv.reporting.records import RunRecord, number

SAME_COST = 0.02
"""Training FLOPs that differ by no more than this share count as equal: a run ends between two steps."""


@dataclass(frozen=True)
class Standing:
    """A growing group beside the fixed networks.

    Attributes:
        group: runs that grow.
        best: the fixed network with the lowest mean test loss of those trained for as many FLOPs.
        difference: test loss of the group less that of `best`, paired by seed; None without a common seed.
        head_start: share of the head start that was kept, see `head_start_kept`; NaN where it cannot be told.
    """

    group: Group
    best: Group
    difference: Difference | None
    head_start: float


def standings(comparison: Comparison) -> list[Standing]:
    """Every growing group for whose training FLOPs two or more fixed networks were trained.

    Args:
        comparison: of runs of equal conditions; `--by` may name `trainer.flops` or `trainer.epochs`.
    """
    fixed = [group for group in comparison.groups if group.runs[0].method == "fixed"]
    found = []
    for group in comparison.groups:
        flops = group.mean("train_flops")
        equal = [each for each in fixed if abs(each.mean("train_flops") - flops) <= SAME_COST * flops]
        if group in fixed or len(equal) < 2:
            continue
        best = min(equal, key=lambda each: each.mean("test_loss"))
        found.append(Standing(group, best, group.less(best, "test_loss"), _head_start(group, fixed)))
    return found


def head_start_kept(loss: float, after: float, large: Mapping[float, float], small_loss: float) -> float:
    """How much of the small network's training counted for the large one that it grew into.

    Let L(F) be the large network's loss after a whole run of F training FLOPs. A small network with loss S could spare
    the large one L⁻¹(S) FLOPs; it spared L⁻¹(loss) less those spent after growth.

    Args:
        loss: of the grown network at its end.
        after: training FLOPs that it spent after growth.
        large: L, the large network's mean loss by training FLOPs; interpolated linearly in log F, and where it does not
            fall the lowest so far counts.
        small_loss: S, the small network's after a whole run of the FLOPs that were spent before growth.

    Returns:
        (L⁻¹(loss) − after) ÷ L⁻¹(S): 1 where the large network goes on as if the small one's loss had been its own, 0
        where the small one's training was for nothing; NaN where a loss lies outside of what L covers.
    """
    return (flops_needed(large, loss) - after) / flops_needed(large, small_loss)


def flops_needed(curve: Mapping[float, float], loss: float) -> float:
    """Training FLOPs after which a curve reaches a loss; NaN outside of what it covers."""
    flops = sorted(curve)
    losses = np.minimum.accumulate([curve[each] for each in flops]) if flops else np.empty(0)
    if len(flops) < 2 or not losses[-1] <= loss <= losses[0]:
        return math.nan
    return float(np.exp(np.interp(-loss, -losses, np.log(flops))))


def loss_after(curve: Mapping[float, float], flops: float) -> float:
    """A curve's loss after some training FLOPs, linear in their logarithm; NaN outside of what it covers."""
    known = sorted(curve)
    if not known or not known[0] * (1 - SAME_COST) <= flops <= known[-1] * (1 + SAME_COST):
        return math.nan
    return float(np.interp(math.log(flops), np.log(known), [curve[each] for each in known]))


def fixed_curves(groups: Sequence[Group]) -> dict[str, dict[float, float]]:
    """Mean test loss by training FLOPs of each fixed network, by its layers' shapes."""
    curves: dict[str, dict[float, float]] = defaultdict(dict)
    for group in groups:
        if group.runs[0].method == "fixed":
            curves[network(group.runs[0].summary)][group.mean("train_flops")] = group.mean("test_loss")
    return dict(curves)


def network(shapes: Mapping[str, object]) -> str:
    """What tells one network from another: the shapes of its layers, as summary.json and environment.json have them."""
    return repr(shapes.get("layers"))


def _head_start(group: Group, fixed: Sequence[Group]) -> float:
    """Of runs that grew once; NaN for others, and without fixed runs of the networks that they began and ended as."""
    run = group.runs[0]
    curves = fixed_curves(fixed)
    large, small = curves.get(network(run.summary)), curves.get(network(run.environment))
    before = float(np.mean([_flops_before_growth(each) for each in group.runs]))
    if large is None or small is None or math.isnan(before):
        return math.nan
    after = group.mean("train_flops") - before
    return head_start_kept(group.mean("test_loss"), after, large, loss_after(small, before))


def _flops_before_growth(run: RunRecord) -> float:
    """Training FLOPs that a run spent before it grew; NaN unless it grew at one step, after its first epoch."""
    steps = {number(event, "step") for event in run.events}
    step = steps.pop() if len(steps) == 1 else math.nan
    lines = [line for line in run.metrics if number(line, "step") <= step]
    return step * number(lines[-1], "train_flops") / number(lines[-1], "step") if lines else math.nan
