"""When to grow: small policies that can be combined."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

from growconv.errors import ScheduleError
from growconv.growth.decision import Decision, Policy, Proposal, Situation
from growconv.limits import limited

Mark = TypeVar("Mark", int, float)

FALLEN = 0.95
"""Share of the highest learning rate so far below which the rate counts as falling."""


class When(Policy):
    """Says at which steps a growth round is due."""

    @abstractmethod
    def decide(self, situation: Situation) -> Decision:
        """Whether a round is due now; asked at every step that the loop reports."""

    def admits(self, proposal: Proposal) -> Decision:
        """Whether a proposal of the round may grow; only policies that look at gains ever say no."""
        return Decision(True, "every proposal is welcome")


@dataclass
class Every(When):
    """Grow at a fixed interval of steps or epochs.

    Attributes:
        interval: distance between two rounds, in `unit`; the first round comes after `start`.
        unit: "step" counts optimizer steps; "epoch" counts the metric "epoch", the number of finished epochs.
        start: when the first round is due; None: after one interval.
    """

    interval: int = limited(above=0)
    unit: Literal["step", "epoch"] = limited("step", choices=("step", "epoch"))
    start: int | None = limited(None, least=0)

    def decide(self, situation: Situation) -> Decision:
        """Due once per interval, even if the loop does not ask after every step."""
        now, last = situation.step, situation.last_step
        if self.unit == "epoch":
            now, last = situation.metrics.get("epoch"), situation.last_epoch
        if now is None:
            return Decision(False, f"no number of finished epochs reported at step {situation.step}")
        now = int(now)
        start = self.interval if self.start is None else self.start
        if now < start:
            return Decision(False, f"{self.unit} {now} of {start}, the first round")
        if last is not None and last >= start and (now - start) // self.interval <= (last - start) // self.interval:
            due = start + self.interval * ((now - start) // self.interval + 1)
            return Decision(False, f"{self.unit} {now}, the next round comes at {due}")
        return Decision(True, f"{self.unit} {now}: every {self.interval} from {start}")


@dataclass
class AtSteps(When):
    """Grow at a list of steps.

    Attributes:
        steps: optimizer steps, ascending.
    """

    steps: Sequence[int]

    def __post_init__(self) -> None:
        self.steps = _ascending(list(self.steps), -1, "AtSteps.steps", "[500, 1000, 2000]")

    def decide(self, situation: Situation) -> Decision:
        """Due at each step of the list, even if the loop asks a little later."""
        last = -1 if situation.last_step is None else situation.last_step
        passed = [step for step in self.steps if last < step <= situation.step]
        if passed:
            return Decision(True, f"step {situation.step}: {passed[-1]} is in the list")
        ahead = next((step for step in self.steps if step > situation.step), None)
        return Decision(False, f"step {situation.step}, " + (f"the next is {ahead}" if ahead else "the list is done"))


@dataclass
class AtFlops(When):
    """Grow when given numbers of training FLOPs are spent: runs of equal FLOPs grow at equal fractions of them.

    Attributes:
        flops: training FLOPs, ascending, compared with the metric "train_flops"; one round for each.
    """

    flops: Sequence[float | int]

    def __post_init__(self) -> None:
        self.flops = _ascending([float(mark) for mark in self.flops], 0, "AtFlops.flops", "[1e12, 2e12]")

    def decide(self, situation: Situation) -> Decision:
        """Due while fewer rounds were made than marks have been passed."""
        spent = situation.metrics.get("train_flops")
        if spent is None:
            return Decision(False, f"no train_flops reported at step {situation.step}")
        passed = sum(mark <= spent for mark in self.flops)
        if passed > situation.rounds:
            return Decision(True, f"{spent:.3g} FLOPs are spent: {self.flops[situation.rounds]:.3g} is in the list")
        ahead = f"the next is {self.flops[passed]:.3g}" if passed < len(self.flops) else "the list is done"
        return Decision(False, f"{spent:.3g} FLOPs are spent, {ahead}")


@dataclass
class LengtheningStages(When):
    """Grow after stages of increasing length, as in Variance Transfer: T_0, then T_t = T_{t-1} + ⌊rate · T_{t-1}⌋.

    Attributes:
        first: T_0, length of the first stage in optimizer steps.
        rate: growth of the length from stage to stage; 0.2 is 20 %.
    """

    first: int = limited(above=0)
    rate: float | int = limited(0.2, least=0)

    def decide(self, situation: Situation) -> Decision:
        """Due when the stage that began with the last round is over."""
        length, end = self.first, self.first
        last = -1 if situation.last_step is None else situation.last_step
        while end <= last:
            length += math.floor(self.rate * length)
            end += length
        return Decision(situation.step >= end, f"step {situation.step}, the stage of {length} steps ends at {end}")


@dataclass
class Plateau(When):
    """Grow when a metric has stopped improving.

    Attributes:
        metric: name of the reported number.
        patience: reports without improvement before growth is due.
        min_delta: improvement that counts, as a fraction of the best value so far.
        mode: "min" if smaller is better, "max" if larger is.
        cooldown: steps after a round in which reports are not counted, so that the new channels can settle.
    """

    metric: str = "val_loss"
    patience: int = limited(3, above=0)
    min_delta: float | int = limited(1e-3, least=0, below=1)
    mode: Literal["min", "max"] = limited("min", choices=("min", "max"))
    cooldown: int = limited(0, least=0)
    personal: ClassVar[bool] = True
    best: float | int | None = field(default=None, init=False)
    waited: int = field(default=0, init=False)
    seen_step: int = field(default=-1, init=False)
    seen_round: int = field(default=0, init=False)

    def decide(self, situation: Situation) -> Decision:
        """Count the report, once per step, and say whether patience has run out."""
        if situation.rounds != self.seen_round:
            self.best, self.waited, self.seen_round = None, 0, situation.rounds
        value = situation.metrics.get(self.metric)
        cooling = situation.last_step is not None and situation.step < situation.last_step + self.cooldown
        if value is not None and situation.step > self.seen_step and not cooling:
            self.seen_step = situation.step
            if self._improves(float(value)):
                self.best, self.waited = float(value), 0
            else:
                self.waited += 1
        if cooling:
            return Decision(False, f"cooling down until step {situation.last_step + self.cooldown}")  # pyright: ignore[reportOptionalOperand]
        if self.best is None and self.waited == 0:
            return Decision(False, f"no {self.metric} reported yet")
        best = "no finite value" if self.best is None else f"the best is {self.best:.4g}"
        reason = f"{self.metric}: {best}, {self.waited} of {self.patience} reports without improvement"
        return Decision(self.waited >= self.patience, reason)

    def _improves(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        margin = self.min_delta * abs(self.best)
        return value < self.best - margin if self.mode == "min" else value > self.best + margin


@dataclass
class GainAbove(When):
    """Measure at a fixed interval of steps, and grow only sites whose proposal captures enough.

    Attributes:
        threshold: smallest gain of a site's new channels: the share of ‖v‖²/n that they must capture; for senn the
            paper's τ, which Δη′/η must reach (η is the score of the consumer's old weights; τ may be above 1).
        least: absolute threshold: for senn the paper's α on Δη′, for others on the captured energy.
        every: steps between two measurements.
    """

    threshold: float | int = limited(above=0)
    every: int = limited(above=0)
    least: float | int = limited(0.0, least=0)
    compares: ClassVar[frozenset[str]] = frozenset({"energy", "score"})

    def decide(self, situation: Situation) -> Decision:
        """Due whenever a measurement is due."""
        return Every(self.every).decide(situation)

    def admits(self, proposal: Proposal) -> Decision:
        """Whether the gain reaches both thresholds."""
        gain, whole = proposal.relative_gain, "η" if "score" in proposal.growth.measured else "‖v‖²"
        reason = f"gains {gain:.3g} of {whole}, the threshold is {self.threshold:.3g}"
        if proposal.gain < self.least:
            return Decision(False, f"gains {proposal.gain:.3g}, the least is {self.least:.3g}")
        return Decision(gain >= self.threshold, reason)


@dataclass
class _Combined(When):
    policies: Sequence[When]
    _joined: ClassVar[Callable[[Iterable[Decision]], bool]] = all

    def __post_init__(self) -> None:
        self.policies = list(self.policies)
        if not self.policies or not all(isinstance(policy, When) for policy in self.policies):
            raise ScheduleError(
                "a combination takes policies of growconv.growth that decide when to grow",
                got=self.policies,
                where=type(self).__name__,
            )

    @property
    def personal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a member is."""
        return any(policy.personal for policy in self.policies)

    @property
    def compares(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What every member that looks at gains can compare."""
        units = [policy.compares for policy in self.policies if policy.compares]
        return frozenset.intersection(*units) if units else frozenset()

    def decide(self, situation: Situation) -> Decision:
        """Ask every member, so that each one counts its reports."""
        answers = [policy.decide(situation) for policy in self.policies]
        return Decision(type(self)._joined(answers), "; ".join(str(answer) for answer in answers))

    def admits(self, proposal: Proposal) -> Decision:
        """Every member has to admit the proposal."""
        answers = [policy.admits(proposal) for policy in self.policies]
        return next((answer for answer in answers if not answer), answers[0])


@dataclass
class AllOf(_Combined):
    """Grow when every member agrees, for example at a plateau but at most every 500 steps.

    Attributes:
        policies: the members.
    """


@dataclass
class AnyOf(_Combined):
    """Grow when at least one member says so.

    Attributes:
        policies: the members.
    """

    _joined = any


def too_late(growth: float, decay: float) -> str | None:
    """What speaks against a last growth, at a share of the run, when the learning rate falls already; or None."""
    if growth < decay:
        return None
    return (
        f"the last growth comes at {growth:.0%} of the run, and the learning rate falls from {decay:.0%} on: new "
        "channels learn best in a long stretch of constant rate; grow earlier, or let the rate fall later "
        "(lr_schedule=trapezoid)"
    )


def fallen(rate: float, top: float) -> str | None:
    """What speaks against growing at a learning rate that has fallen from its highest so far; None where it has not."""
    if rate >= FALLEN * top:
        return None
    return (
        f"the learning rate has fallen to {rate / top:.0%} of its top before this growth: new channels learn best in a "
        "long stretch of constant rate; grow earlier, or let the rate fall later"
    )


def _ascending(marks: list[Mark], above: int, where: str, example: str) -> list[Mark]:
    if not marks or not marks[0] > above or marks != sorted(set(marks)):
        raise ScheduleError(
            "a list of times must be ascending and not empty", expected=f"for example {example}", got=marks, where=where
        )
    return marks
