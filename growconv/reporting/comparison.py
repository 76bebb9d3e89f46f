"""Comparison: runs that differ only in their seed as groups, and groups against a baseline by paired differences.

Growing groups are also measured against the frontier: the best fixed network of their training FLOPs.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from growconv.errors import ArgumentValueError, CheckpointError, did_you_mean
from growconv.reporting.records import (
    CONFIG,
    METRICS,
    SUMMARY,
    RunRecord,
    is_below,
    is_number,
    number,
    plain_text,
    read_run,
)

FIGURES = {
    "test_accuracy": "test %",
    "test_loss": "test NLL",
    "best_val_accuracy": "best val. %",
    "parameters": "parameters",
    "train_flops": "train. FLOPs",
    "seconds": "seconds",
    "peak_memory": "bytes",
}
"""Figures of summary.json that are compared, with their headings. FLOPs are 2 × multiply-accumulates."""

_NOT_A_TREATMENT = (
    "seed", "logger", "resume", "report", "baselines", "data.root", "data.download", "trainer.devices",
    "trainer.progress", "trainer.checkpoint_every",
)  # fmt: skip
"""Settings that change no result, or only by chance."""
_CONDITIONS = (
    "data", "model._target_", "model.name", "model.args", "model.norm", "model.activation", "trainer.epochs",
    "trainer.flops",
)  # fmt: skip
"""Settings under which runs are compared: the same for all of them, unless `by` names them."""
SAME_COST = 0.02
"""Training FLOPs that differ by no more than this share count as equal: a run ends between two steps."""
_NOTED_SHARE = 0.05
"""Training FLOPs that differ by more than this share of the baseline's are remarked."""


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    label: str  # method and the settings in which this group differs from others of the same method
    runs: tuple[RunRecord, ...]  # one record a seed, in the order of the seeds

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the runs."""
        return tuple(run.seed for run in self.runs if run.seed is not None)

    def values(self, figure: str) -> np.ndarray:
        """One figure of the summaries, a value a run; accuracies in percent, NaN where a run lacks it."""
        values = np.array([number(run.summary, figure) for run in self.runs])
        return 100 * values if figure.endswith("accuracy") else values

    def mean(self, figure: str) -> float:
        """Mean over the runs that have the figure."""
        values = self.values(figure)
        return math.nan if np.isnan(values).all() else float(np.nanmean(values))

    def std(self, figure: str) -> float:
        """Sample standard deviation (n - 1); NaN for fewer than two runs."""
        values = self.values(figure)
        return math.nan if (~np.isnan(values)).sum() < 2 else float(np.nanstd(values, ddof=1))

    def less(self, other: "Group", figure: str) -> "Difference | None":
        """Paired difference of a figure to that of another group; None without a common seed."""
        theirs = dict(zip(other.seeds, other.values(figure), strict=True))
        own = zip(self.seeds, self.values(figure), strict=True)
        return paired_difference([value - theirs[seed] for seed, value in own if seed in theirs])

    @property
    def growth_share(self) -> float:
        """Mean share of the run's seconds that went into growing."""
        times = [(run.growth_seconds, number(run.summary, "seconds")) for run in self.runs]
        shares = [growing / whole for growing, whole in times if whole > 0 and is_number(growing / whole)]
        return float(np.mean(shares)) if shares else math.nan


@dataclass(frozen=True)
class Difference:
    """Paired difference of two groups over their common seeds."""

    mean: float  # mean of (group - baseline) over the common seeds
    low: float  # lower end of the 95 % interval (Student's t over the pairs); NaN for fewer than two pairs
    high: float  # its upper end
    pairs: int  # number of common seeds


@dataclass(frozen=True)
class Comparison:
    """Everything that `growconv compare` shows."""

    groups: tuple[Group, ...]  # best mean test accuracy first
    baseline: Group  # the group that the others are measured against
    left_out: tuple[tuple[str, str], ...] = ()  # run directory and why it is not in the comparison
    notes: tuple[str, ...] = ()  # what a reader must know about the rest (missing seeds, repeated runs)

    @property
    def fixed(self) -> list[Group]:
        """Groups of networks that do not grow."""
        return [group for group in self.groups if group.runs[0].method == "fixed"]

    @property
    def headings(self) -> dict[str, str]:
        """Names of the figures; a regression has no likelihood."""
        return {**FIGURES, "test_loss": self.loss_name}

    @property
    def loss_name(self) -> str:
        """What the test loss is: mean negative log-likelihood of classes, mean square of a regression."""
        return "test MSE" if self.baseline.runs[0].data == "synthetic" else "test NLL"

    def flops_share(self, group: Group) -> float:
        """Training FLOPs of a group relative to the baseline's; NaN where either is unknown."""
        whole = self.baseline.mean("train_flops")
        return group.mean("train_flops") / whole if whole > 0 else math.nan

    def difference(self, group: Group, figure: str = "test_accuracy") -> Difference | None:
        """Paired difference of a group to the baseline; None for the baseline itself or without a common seed."""
        return None if group is self.baseline else group.less(self.baseline, figure)


@dataclass(frozen=True)
class Standing:
    """A growing group beside the fixed networks."""

    group: Group  # runs that grow
    best: Group  # the fixed network with the lowest mean test loss of those trained for as many FLOPs
    # test loss of the group less that of `best`, paired by seed; None without a common seed
    difference: Difference | None
    head_start: float  # share of the head start that was kept, see `head_start_kept`; NaN where it cannot be told


def paired_difference(differences: Sequence[float]) -> Difference | None:
    """Mean of paired differences with the 95 % interval of Student's t; None where all of them are NaN."""
    values = np.array([value for value in differences if not math.isnan(value)])
    if not values.size:
        return None
    mean = float(values.mean())
    if values.size < 2:
        return Difference(mean, math.nan, math.nan, 1)
    from scipy import stats

    half = float(stats.t.ppf(0.975, values.size - 1) * values.std(ddof=1) / math.sqrt(values.size))
    return Difference(mean, mean - half, mean + half, int(values.size))


def compare(
    paths: Iterable[str | Path],
    baseline: str | None = None,
    by: Sequence[str] | None = None,
    label: Callable[[RunRecord], str] | None = None,
) -> Comparison:
    """Compare runs.

    Args:
        paths: run directories, or folders that hold some at any depth (a sweep).
        baseline: label of the group to measure against, or its beginning; None takes the largest fixed network,
            else `random`, else the group with most parameters.
        by: settings (dotted names) that tell groups apart; None finds those in which runs of one method differ. Runs on
            other data, of another model or of other epochs than most are left out, unless `by` names that setting.
        label: names the group of a run, in place of `by`.

    Returns:
        The comparison of all runs that can be compared.

    Raises:
        CheckpointError: no run is left to compare; the reasons are in the message.
        ArgumentValueError: no group is called `baseline`, or several are; or no run has a setting of `by`.
    """
    records, left_out = _read_all(paths)
    known = {key for record in records for key in record.settings}
    for key in by or ():
        if records and key not in known:
            fix = did_you_mean(key, known) or "config.yaml of a run lists its settings"
            raise ArgumentValueError("no run has this setting", where="--by", got=key, fix=fix)
    records, dropped = _same_conditions(records, _CONDITIONS if label is None else ("data",), by or ())
    left_out += dropped
    if not records:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in left_out) or "no directory"
        fix = "give directories of finished runs"
        raise CheckpointError("no run is left to compare", got=reasons, fix=fix)
    labels = _labels(records, by) if label is None else [label(record) for record in records]
    groups, notes = _group(records, labels)
    groups.sort(key=lambda group: (-group.mean("test_accuracy"), group.label))
    comparison = Comparison(tuple(groups), _choose_baseline(groups, baseline), tuple(left_out))
    return replace(comparison, notes=(*notes, *_missing_seeds(comparison), *_cost_notes(comparison)))


def find_runs(path: Path) -> list[Path]:
    """Run directories at or below a folder, in order of their names: a run's baselines lie inside it."""
    if not path.is_dir():
        return [path]
    found = {file.parent for name in (CONFIG, METRICS, SUMMARY) for file in path.rglob(name)}
    shown = [run for run in found if not any(part.startswith(".") for part in run.relative_to(path).parts)]
    return sorted(shown) or [path]


def _read_all(paths: Iterable[str | Path]) -> tuple[list[RunRecord], list[tuple[str, str]]]:
    records, left_out = [], []
    seen: set[Path] = set()
    for run in (run for path in paths for run in find_runs(Path(path))):
        if run.resolve() in seen:
            continue
        seen.add(run.resolve())
        try:
            record = read_run(run)
            reason = _unusable(record)
        except CheckpointError as error:
            left_out.append((str(run), plain_text(error)))
            continue
        if reason:
            left_out.append((str(run), reason))
        else:
            records.append(record)
    return records, left_out


def _unusable(record: RunRecord) -> str | None:
    if not record.finished:
        epoch = record.metrics[-1]["epoch"] if record.metrics else 0
        return f"unfinished: no {SUMMARY} (last epoch written: {epoch})"
    if not record.metrics:
        return f"{METRICS} is missing or empty"
    if not is_number(record.summary.get("test_accuracy")):
        return f"{SUMMARY} has no test_accuracy"
    if record.seed is None:
        return "its seed is in neither summary.json nor config.yaml"
    return None


def _same_conditions(
    records: list[RunRecord], conditions: Sequence[str], by: Sequence[str]
) -> tuple[list[RunRecord], list[tuple[str, str]]]:
    """The largest set of runs under the same conditions, and the others with what differs; what is missing does not."""
    if not records:
        return [], []
    every = [record.settings for record in records]
    keys = [key for key in dict.fromkeys(chain(*every)) if is_below(key, conditions)]
    keys = [key for key in keys if not is_below(key, _NOT_A_TREATMENT) and (key not in by or key == "data.name")]
    usual = {key: Counter(repr(one[key]) for one in every if key in one).most_common(1)[0][0] for key in keys}
    states = [tuple(repr(one[key]) if key in one else usual[key] for key in keys) for one in every]
    kept, left_out = Counter(states).most_common(1)[0][0], []
    for record, state in zip(records, states, strict=True):
        others = [(key, got, most) for key, got, most in zip(keys, state, kept, strict=True) if got != most]
        if others:
            told = (f"{key} is {plain_text(got, 60)} (most runs: {plain_text(most, 60)})" for key, got, most in others)
            named = ",".join(key for key, *_ in others)
            fix = "" if "data.name" in named else f"; --by {named} compares them"
            left_out.append((str(record.path), f"other conditions: {', '.join(told)}{fix}"))
    return [record for record, state in zip(records, states, strict=True) if state == kept], left_out


def _group(records: Sequence[RunRecord], labels: Sequence[str]) -> tuple[list[Group], list[str]]:
    """Runs by label; of several runs with one label and seed the last in the order given counts."""
    labelled: dict[str, dict[int, RunRecord]] = defaultdict(dict)
    notes = []
    for run, name in zip(records, labels, strict=True):
        seed = run.seed or 0  # every run here has one
        if seed in labelled[name]:
            notes.append(f"{name}: seed {seed} ran more than once; {run.path} counts")
        labelled[name][seed] = run
    groups = [Group(name, tuple(runs[seed] for seed in sorted(runs))) for name, runs in labelled.items()]
    return groups, notes


def _labels(records: Sequence[RunRecord], by: Sequence[str] | None) -> list[str]:
    """Method of each run, and the settings that tell it from others of its method (those of `by`, if given)."""
    families: dict[str, list[dict[str, object]]] = defaultdict(list)
    for record in records:
        families[record.method].append(record.settings)
    keys = {method: _differing(family) if by is None else list(by) for method, family in families.items()}
    labels = []
    for record in records:
        method, settings = record.method, record.settings
        told = (f"{_short(key, keys[method])}={settings.get(key)}" for key in keys[method])
        labels.append(plain_text(", ".join(map(plain_text, (method, *told)))))
    return labels


def _differing(family: Sequence[dict[str, object]]) -> list[str]:
    """Settings in which runs differ, without those that are no treatment (seed, folders, logging)."""
    keys = [key for key in dict.fromkeys(chain(*family)) if not is_below(key, _NOT_A_TREATMENT)]
    return [key for key in keys if len({repr(settings.get(key)) for settings in family}) > 1]


def _short(key: str, keys: Sequence[str]) -> str:
    last = key.rsplit(".", 1)[-1]
    return last if sum(other.rsplit(".", 1)[-1] == last for other in keys) == 1 else key


def _choose_baseline(groups: list[Group], name: str | None) -> Group:
    if name is None:
        usual = [[group for group in groups if group.runs[0].method == method] for method in ("fixed", "random")]
        among = next(filter(None, usual), groups)
        return max(among, key=lambda group: (np.nan_to_num(group.mean("parameters")), group.mean("test_accuracy")))
    exact = [group for group in groups if group.label == name]
    found = exact or [group for group in groups if group.label.startswith(name)]
    if len(found) != 1:
        raise ArgumentValueError(
            "no group has this label" if not found else "several groups start with this label",
            where="--baseline",
            expected="; ".join(group.label for group in found or groups),
            got=name,
        )
    return found[0]


def _missing_seeds(comparison: Comparison) -> list[str]:
    notes, baseline = [], comparison.baseline
    every = sorted({seed for group in comparison.groups for seed in group.seeds})
    for group in comparison.groups:
        missing = [str(seed) for seed in every if seed not in group.seeds]
        if missing:
            notes.append(f"{group.label}: no run with seed {', '.join(missing)}")
        common = set(group.seeds) & set(baseline.seeds)
        if group is not baseline and len(common) < 2:
            lack = (
                "one seed in common with {}, so no interval"
                if common
                else "no seed in common with {}, so no difference"
            )
            notes.append(f"{group.label}: {lack.format(baseline.label)}")
    return notes


def _cost_notes(comparison: Comparison) -> list[str]:
    """Groups whose training FLOPs are not the baseline's: equal epochs are not equal cost."""
    shares = {group.label: comparison.flops_share(group) for group in comparison.groups}
    other = sorted((share, label) for label, share in shares.items() if abs(share - 1) > _NOTED_SHARE)
    if not other:
        return []
    told = " to ".join(f"{100 * share:.0f} % ({label})" for share, label in dict.fromkeys((other[0], other[-1])))
    return [f"the costs differ: training FLOPs are {told} of those of {comparison.baseline.label}"]


def standings(comparison: Comparison) -> list[Standing]:
    """What growing runs have to beat: every group for whose training FLOPs two or more fixed networks were trained.

    A run that grows saves FLOPs while it is small. It pays only where its loss ends below that of *every* fixed network
    of the same training FLOPs, not of the one alone that it ends as.
    """
    fixed, found = comparison.fixed, []
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


def fixed_curves(fixed: Sequence[Group]) -> dict[str, dict[float, float]]:
    """Mean test loss by training FLOPs of each fixed network, by its layers' shapes."""
    curves: dict[str, dict[float, float]] = defaultdict(dict)
    for group in fixed:
        curves[network(group.runs[0].summary)][group.mean("train_flops")] = group.mean("test_loss")
    return curves


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
