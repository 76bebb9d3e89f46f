"""When to stop growing: budgets, a target, or nothing left to gain."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from growconv.errors import ScheduleError
from growconv.growth.decision import Decision, Policy, Proposal, Situation
from growconv.limits import limited


class Stop(Policy):
    """Says when no growth round is due any more."""

    @abstractmethod
    def decide(self, situation: Situation) -> Decision:
        """Whether growing is over; asked at every step that the loop reports."""

    def observe(self, proposals: Sequence[Proposal]) -> None:
        """Look at the proposals of a round, before any is chosen."""

    def room(self, situation: Situation) -> tuple[float | int, float | int]:
        """Parameters and FLOPs per sample that may still be added; inf where there is no limit."""
        return math.inf, math.inf


@dataclass
class Budget(Stop):
    """The most that the model may cost; a round that would exceed it is cut to what fits.

    Attributes:
        parameters: parameters of the whole model.
        flops: FLOPs (2 × MACs) of one sample's forward pass.
        seconds: wall-clock seconds of the run, counted from the schedule's construction, resumed parts included.

    Example:
        >>> scheduler = growconv.GrowthScheduler(model, None, sites, every=1, budget=growconv.Budget(parameters=20_000))
    """

    parameters: float | int | None = limited(None, above=0)
    flops: float | int | None = limited(None, above=0)
    seconds: float | int | None = limited(None, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parameters is None and self.flops is None and self.seconds is None:
            raise ScheduleError("a budget needs a limit", where="Budget", fix="give parameters, flops or seconds")

    @property
    def personal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Only the clock differs between processes."""
        return self.seconds is not None

    def decide(self, situation: Situation) -> Decision:
        """Whether one of the limits is reached."""
        for name in ("parameters", "flops", "seconds"):
            limit = getattr(self, name)
            value = None if limit is None else getattr(situation, name)
            if value is not None and value >= limit:
                return Decision(True, f"budget reached: {value:.6g} of {limit:.6g} {name}")
        return Decision(False, "the budget has room")

    def room(self, situation: Situation) -> tuple[float | int, float | int]:
        """What the limits leave."""
        parameters = math.inf if self.parameters is None else max(0, self.parameters - situation.parameters)
        flops = math.inf if self.flops is None else max(0, self.flops - (situation.flops or 0))
        return parameters, flops


@dataclass
class TargetAccuracy(Stop):
    """Stop for good once a metric has reached a value.

    Attributes:
        value: the target, in the metric's own unit.
        metric: name of the reported number, larger is better.
    """

    value: float | int
    metric: str = "val_accuracy"
    personal: ClassVar[bool] = True
    reached: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ScheduleError("a target has to be a finite number", got=self.value, where="TargetAccuracy.value")

    def decide(self, situation: Situation) -> Decision:
        """Whether the target has ever been reached."""
        value = situation.metrics.get(self.metric)
        self.reached = self.reached or (value is not None and value >= self.value)
        return Decision(
            self.reached, f"target {self.value:g} for {self.metric}{'' if self.reached else ' not'} reached"
        )


@dataclass
class NoGain(Stop):
    """Stop for good when the best proposal has captured too little for some rounds.

    Attributes:
        threshold: share of ‖v‖²/n below which a round counts as gaining nothing.
        patience: number of such rounds in a row.
    """

    threshold: float | int = limited(1e-3, above=0)
    patience: int = limited(2, above=0)
    compares: ClassVar[frozenset[str]] = frozenset({"energy", "score"})
    poor_rounds: int = field(default=0, init=False)

    def observe(self, proposals: Sequence[Proposal]) -> None:
        """Count the round if no proposal reaches the threshold."""
        if self.poor_rounds < self.patience and proposals:
            best = max(proposal.relative_gain for proposal in proposals)
            self.poor_rounds = self.poor_rounds + 1 if best < self.threshold else 0

    def decide(self, situation: Situation) -> Decision:
        """Whether enough rounds in a row gained nothing."""
        return Decision(
            self.poor_rounds >= self.patience,
            f"{self.poor_rounds} of {self.patience} rounds captured less than {self.threshold:.3g} of ‖v‖²",
        )
