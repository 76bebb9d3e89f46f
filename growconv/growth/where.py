"""Where to grow: which sites are looked at, and which of their proposals are taken."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from growconv.errors import ScheduleError
from growconv.growth.decision import Policy, Proposal, Situation
from growconv.growth.when import require_positive
from growconv.network.site import Site

Per = Literal["gain", "parameter", "flop"]
Chosen = list[tuple[Proposal, str]]


class Where(Policy):
    """Chooses among sites, before anything is measured and again when the proposals are known."""

    def candidates(self, sites: Sequence[Site], situation: Situation) -> list[Site]:
        """Sites to collect statistics for; all of them unless a policy knows better."""
        return list(sites)

    @abstractmethod
    def choose(self, proposals: Sequence[Proposal], parameters: float | int, flops: float | int) -> Chosen:
        """The proposals to grow, cut down if need be, in the order in which they are applied.

        Args:
            proposals: one per candidate.
            parameters: parameters that the budget leaves, inf without one.
            flops: FLOPs per sample that the budget leaves, inf without one.

        Returns:
            Each taken proposal with the reason why.
        """


@dataclass
class All(Where):
    """Every site in every round."""

    def choose(self, proposals: Sequence[Proposal], parameters: float | int, flops: float | int) -> Chosen:
        """All of them, in forward order."""
        return [(proposal, "every site grows") for proposal in proposals]


@dataclass
class RoundRobin(Where):
    """The sites in turn.

    Attributes:
        count: sites in one round.
    """

    count: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "count", self.count)

    def candidates(self, sites: Sequence[Site], situation: Situation) -> list[Site]:
        """The sites that were visited least, in forward order; only they are measured."""
        least = sorted(range(len(sites)), key=lambda index: (situation.visits.get(sites[index].name, 0), index))
        return [sites[index] for index in sorted(least[: self.count])]

    def choose(self, proposals: Sequence[Proposal], parameters: float | int, flops: float | int) -> Chosen:
        """All that were measured."""
        return [(proposal, "its turn") for proposal in proposals]


@dataclass
class Best(Where):
    """The sites whose proposals promise most.

    Attributes:
        per: "gain" compares captured energy, "parameter" and "flop" divide it by what the channels would cost.
        count: sites in one round.
    """

    per: Per = "gain"
    count: int = 1
    compares_gains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive(self, "count", self.count)
        _require_per(self, self.per)

    def choose(self, proposals: Sequence[Proposal], parameters: float | int, flops: float | int) -> Chosen:
        """The best ones; equal values go to the earlier site."""
        _require_gains(proposals, "Best")
        value = {id(p): p.gain / (p.growth.channels * _cost(p, self.per)) for p in proposals}
        ranked = sorted(proposals, key=lambda proposal: -value[id(proposal)])[: self.count]
        chosen = [proposal for proposal in proposals if any(proposal is best for best in ranked)]
        label = "gain per channel" if self.per == "gain" else f"gain per {self.per}"
        return [(p, f"{label} {value[id(p)]:.3g}, among the best {self.count} of {len(proposals)}") for p in chosen]


@dataclass
class Greedy(Where):
    """The best channels of all sites together, one after the other, until an allowance is used up.

    Channels of one site are taken from the largest gain down, in whole multiples of the site's granularity. A channel
    that no longer fits ends its site's turn; cheaper channels elsewhere may still fit.

    Attributes:
        per: "gain" ranks channels by captured energy, "parameter" and "flop" by captured energy per cost.
        channels: channels to add in one round; None: no limit.
        parameters: parameters to add in one round; None: what the schedule's budget leaves.
        flops: FLOPs (forward, one sample) to add in one round; None: what the schedule's budget leaves.
    """

    per: Per = "gain"
    channels: int | None = None
    parameters: int | None = None
    flops: int | None = None
    compares_gains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_per(self, self.per)
        for name in ("channels", "parameters", "flops"):
            if getattr(self, name) is not None:
                require_positive(self, name, getattr(self, name))

    def choose(self, proposals: Sequence[Proposal], parameters: float | int, flops: float | int) -> Chosen:
        """Fill the allowance from the most worthwhile block of channels down."""
        _require_gains(proposals, "Greedy")
        left = {
            "channels": math.inf if self.channels is None else self.channels,
            "parameters": min(parameters, math.inf if self.parameters is None else self.parameters),
            "flops": min(flops, math.inf if self.flops is None else self.flops),
        }
        blocks = []
        for order, proposal in enumerate(proposals):
            gains, size = proposal.growth.gains.tolist(), proposal.site.granularity
            for start in range(0, len(gains), size):
                worth = sum(gains[start : start + size]) / (size * _cost(proposal, self.per))
                blocks.append((-worth, order, start, size))
        taken = dict.fromkeys(range(len(proposals)), 0)
        for _, order, start, size in sorted(blocks):
            proposal = proposals[order]
            price = {
                "channels": size,
                "parameters": size * proposal.parameters_per_channel,
                "flops": size * proposal.flops_per_channel,
            }
            if taken[order] == start and all(price[name] <= left[name] for name in left):
                taken[order] += size
                left = {name: left[name] - price[name] for name in left}
        answer = []
        for order, proposal in enumerate(proposals):
            offered, count = proposal.growth.channels, min(taken[order], proposal.growth.channels)
            if count == offered:
                answer.append((proposal, f"all {offered} channels are worth their {self.per}"))
            elif count:
                reason = f"{count} of {offered} channels rank high enough by {self.per}"
                answer.append((replace(proposal, growth=proposal.growth.subset(range(count), reason)), reason))
        return answer


def as_where(where: "Where | str") -> Where:
    """Read the scheduler's short forms "all", "best" and "round_robin".

    Raises:
        ScheduleError: none of these.
    """
    forms = {"all": All, "best": Best, "round_robin": RoundRobin}
    if isinstance(where, Where):
        return where
    if isinstance(where, str) and where in forms:
        return forms[where]()
    raise ScheduleError(
        "unknown policy for where to grow",
        expected=f"{', '.join(forms)} or a Where such as Greedy",
        got=where,
        where="where",
    )


def _cost(proposal: Proposal, per: str) -> float:
    costs = {"gain": 1.0, "parameter": proposal.parameters_per_channel, "flop": proposal.flops_per_channel}
    return max(costs[per], 1e-300)


def _require_per(policy: object, per: str) -> None:
    if per not in ("gain", "parameter", "flop"):
        raise ScheduleError(
            "unknown yardstick", expected="gain, parameter or flop", got=per, where=f"{type(policy).__name__}.per"
        )


def _require_gains(proposals: Sequence[Proposal], policy: str) -> None:
    for proposal in proposals:
        if proposal.gradient_energy is None:
            raise ScheduleError(
                f"{policy} compares gains, and method {proposal.growth.method!r} has none",
                where=proposal.site.name,
                fix="use where=all or where=round_robin, or a method with gains such as tiny",
            )
