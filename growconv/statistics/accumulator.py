"""Accumulators: sums over batches for one consumer, whatever the image sizes, by the path chosen for each statistic."""

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from growconv.errors import StatisticsError
from growconv.statistics.constants import with_constants
from growconv.statistics.dense import dense_sums
from growconv.statistics.flops import count_once
from growconv.statistics.offset_path import OffsetPath, axis_problems
from growconv.statistics.problem import PairProblem, folded, thinned
from growconv.statistics.sums import Totals
from growconv.statistics.unfolded import add_unfolded_sums

UNFOLD = 20.0
"""Price of one entry of an unfolded patch, written and read."""
COMBINATIONS = 20_000
"""Combinations of taps per axis beyond which describing them costs more than it saves."""
FEW = 2e7
"""Multiply-adds of a batch up to which all is unfolded: there the fixed costs of the other path are more than it saves
(4 channels on 12×12, collecting from 4 batches:
9 ms in place of 11 to 15 at 8 samples each, 13 in place of 13 to 17 at 32)."""


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
    costs = {name: unfold_cost(problem, name) * samples for name in sorted(statistics)}
    if sum(costs.values()) < FEW:
        return {name: Choice("unfold", f"{cost:.2g} multiply-adds a batch, few") for name, cost in costs.items()}
    choices = {}
    for name, unfold in costs.items():
        reason = "the gradient of the consumer's weight" if name == "M" else _obstacle(problem, name, COMBINATIONS)
        if reason:
            choices[name] = Choice("unfold", reason)
            continue
        offset = OffsetPath(problem, (name,), 1).cost(samples)
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
        "N_raw": a * b * c * outputs + 3 * patches,
        "P": a * b * d * outputs + patches + own,
        "S2": 0.75 * d * d * outputs + own,
        "M": 1.0 * d * c * outputs,
    }[name]


def _obstacle(problem: PairProblem, name: str, most: float | int = math.inf) -> str | None:
    """Why the offset path cannot compute a statistic, or not with so many combinations of taps at most; else None."""
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
    for axis in axis_problems(problem):
        t, b = axis.first.taps, axis.second.taps
        count = {"S_full": (t * b) ** 2, "P": t * b * b, "N_raw": t * b}.get(name, max(t, b) ** 2)
        if count > most:
            return f"{count} combinations of taps on one axis"
    return None


QUANTITIES: dict[str, frozenset[str]] = {
    "S": frozenset({"S"}),
    "N": frozenset({"N_raw", "M", "S2", "P"}),
    "N_raw": frozenset({"N_raw"}),
    "M": frozenset({"M"}),
    "S2": frozenset({"S2"}),
    "P": frozenset({"P"}),
    "update": frozenset({"M", "S2"}),
    "S_full": frozenset({"S_full"}),
    "patch": frozenset({"patch_gram"}),
    "samples": frozenset(),
}
"""What a solver may read, and the sums that it takes."""
PATHS = ("auto", "dense", "unfold", "offset")
SCRATCH_BYTES = 256 * 2**20

SECOND_MOMENTS = frozenset({"S", "S_full", "S2", "patch_gram", "patch_mean"})
"""What settles long before the correlations with v do, and may be taken from fewer samples."""
OF_CONSUMER = frozenset({"M", "S2"})
"""What knows nothing of a producer."""
OF_PRODUCERS = frozenset({"S", "S_full"})
"""What knows nothing of a consumer but its kernel and its grid."""
OF_GRADIENT = frozenset({"N_raw", "M"})
"""What v is correlated with."""
TENSOR_STATISTICS = frozenset({"S", "S_full", "N_raw", "M", "S2", "P", "patch_gram"})
"""What is summed; patch_mean comes with patch_gram."""


@dataclass
class ConsumerSums:
    """Sums over the samples of one consumer.

    Attributes:
        where: name of site and consumer, for messages.
        quantities: which of TENSOR_STATISTICS to sum.
        path: "auto", "dense", "unfold" or "offset".
        scratch_bytes: bound on temporary memory.
        samples: how many samples were summed.
        moment_samples: how many of them for each second moment.
    """

    where: str
    quantities: frozenset[str]
    path: str
    scratch_bytes: int
    samples: int = 0
    moment_samples: Counter[str] = field(default_factory=Counter)
    energy: float = 0.0
    closed: Totals = field(default_factory=Totals)
    choices: dict[str, Choice] = field(default_factory=dict)
    _open: "dict[frozenset[str], _SizedSums]" = field(default_factory=dict)
    _problem: PairProblem | None = None

    def add(
        self,
        problem: PairProblem,
        x: Tensor,
        h: Tensor,
        v: Tensor,
        samples: int,
        left_out: frozenset[str] = frozenset(),
        M: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            problem: shapes and geometry of this batch.
            x: input of the producer (n, C0, *size).
            h: input of the consumer (n, C1, *grid).
            v: desired change of the consumer's output (n, C2, *out).
            samples: how many new samples these are; 0 for a further call on the same ones.
            left_out: second moments that are not summed of it.
            M: this batch's M, where it is known already.
        """
        self.add_only(self.quantities - left_out, problem, x, h, v, M)
        self.count(v, samples)
        self.moment_samples.update(dict.fromkeys(SECOND_MOMENTS - left_out, samples))

    def add_only(
        self, names: frozenset[str], problem: PairProblem, x: Tensor, h: Tensor, v: Tensor, M: Tensor | None = None
    ) -> None:
        """Add to some sums what a batch, whose samples are counted already, has for them.

        Args:
            names: of TENSOR_STATISTICS.
            problem: as `add`, and the maps likewise.
            x: input of the producer.
            h: input of the consumer.
            v: desired change of the consumer's output.
            M: this batch's M, where it is known already.
        """
        if not names:
            return
        if self._problem != problem:
            self.close()
            self._problem = problem
        for part, (shape, inputs) in self._parts(names, problem, (x, h, v)).items():
            if part not in self._open:
                self._open[part] = _SizedSums(self, shape, part, x.shape[0])
                self.choices |= self._open[part].choices
            self._open[part].add(*inputs, M if "M" in part else None)

    def _parts(
        self, names: frozenset[str], problem: PairProblem, maps: tuple[Tensor, Tensor, Tensor]
    ) -> dict[frozenset[str], tuple[PairProblem, tuple[Tensor, Tensor, Tensor]]]:
        """The statistics by the problem that they are computed on: what lies in between joins the producer, if it can.

        So does the stride of a consumer of one tap. The dense path, being the reference, does without; so do the
        producer's own patches, which come before.
        """
        x, h, v = maps
        local, x = folded(problem, x)
        simpler, (x, h) = thinned(local, x, h)
        if self.path == "dense" or simpler is problem:
            return {names: (problem, maps)}
        patches = names & {"patch_gram"}
        parts = {patches: (problem, maps), names - patches: (simpler, (x, h, v))}
        return {part: entry for part, entry in parts.items() if part}

    def count(self, v: Tensor, samples: int) -> None:
        """Add a batch's energy and number of samples only.

        Args:
            v: desired change of the consumer's output.
            samples: see `add`.
        """
        self.energy += float(torch.linalg.vector_norm(v.flatten(1), dim=1).double().square().sum())
        self.samples += samples

    def describe(self) -> list[str]:
        """How each statistic is computed, a line each."""
        if not self.quantities:
            return ["samples only"]
        if not self.choices:
            return [f"{', '.join(sorted(self.quantities))}: no batch seen yet"]
        return [f"{name} by {choice.path} ({choice.reason})" for name, choice in sorted(self.choices.items())]

    def close(self) -> None:
        """Bring what was summed at the current image size into its final form."""
        for part in self._open.values():
            self.closed.absorb(part.finish())
        self._open = {}

    def averages(self) -> dict[str, Tensor]:
        """Averages over the samples.

        Raises:
            StatisticsError: when there were none.
        """
        if self.samples < 1:
            raise StatisticsError(
                "the statistics have zero samples",
                where=self.where,
                expected="at least one batch with a backward pass that reaches this layer",
                fix="call loss.backward() inside the collector, with a loss that depends on this layer",
            )
        totals: dict[str, Tensor] = dict(self.closed)
        for part in self._open.values():
            found = part.finish()
            totals |= {name: value + totals[name] if name in totals else value for name, value in found.items()}
        return {
            name: value / (self.moment_samples[name] if name in SECOND_MOMENTS else self.samples)
            for name, value in totals.items()
        }


class _SizedSums:
    """Sums at one image size, each statistic by its own path."""

    def __init__(self, consumer: ConsumerSums, problem: PairProblem, statistics: frozenset[str], samples: int) -> None:
        self.problem = problem
        self.scratch_bytes = consumer.scratch_bytes
        if 8 * problem.full_entries > consumer.scratch_bytes:
            statistics -= {"S_full"}
        self.choices = choose_paths(problem, statistics, consumer.path, samples, consumer.where)
        self.offset = OffsetPath(problem, self._by("offset"), consumer.scratch_bytes) if self._by("offset") else None
        self.correlations = Totals()
        self.dense = Totals()
        self.unfolded = Totals()
        self.maps = Totals()
        self.rows = 0
        self.flops: dict[Hashable, int] = {}  # by the size of a batch and what was known of it

    def _by(self, path: str) -> frozenset[str]:
        return frozenset(name for name, choice in self.choices.items() if choice.path == path)

    def add(self, x: Tensor, h: Tensor, v: Tensor, M: Tensor | None) -> None:
        count_once(self.flops, (len(x), x.dtype, M is None), partial(self._add, x, h, v, M))

    def _add(self, x: Tensor, h: Tensor, v: Tensor, M: Tensor | None) -> None:
        self.rows += len(x)
        dense, unfold = self._by("dense"), self._by("unfold")
        if dense:
            names = dense | ({"patch_mean"} if "patch_gram" in dense else frozenset())
            for name, value in dense_sums(self.problem, names, x, h, v).items():
                self.dense.add(name, value)
            return
        for name, tensor in (("x", x), ("h", h), ("v", v)):
            self.maps.add(name, tensor.sum(dim=0))
        if M is not None and "M" in unfold:
            unfold -= {"M"}
            self.unfolded.add("M", M)
        if unfold:
            add_unfolded_sums(self.unfolded, self.problem, unfold, x, h, v, self.scratch_bytes)
        if self.offset is not None:
            self.offset.add(self.correlations, x, h, v)

    def finish(self) -> Totals:
        sums: dict[str, Tensor] = dict(self.dense)
        if not sums:
            sums = dict(self.unfolded)
            if self.offset is not None:
                sums |= self.offset.expand(self.correlations)
            sums = with_constants(self.problem, sums, self.maps, self.rows)
        locations = math.prod(self.problem.first_output_size)
        averaged = {k: value / locations if k in ("patch_mean", "patch_gram") else value for k, value in sums.items()}
        return Totals(self.problem.on_site(averaged))
