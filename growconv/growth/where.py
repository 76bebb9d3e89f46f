"""Where to grow: which sites are considered, and which of their proposals are used.

Sites are compared by what their channels alone take off a held-out loss, per FLOP that the channels cost. Methods whose
channels change nothing at first are compared by how steeply new weights would lower the loss: the squared norms of the
first gradient on new incoming weights, with outgoing weights of norm 1, σ_k² of N_raw (GradMax, Evci et al. 2022,
equation 9). A method's own gains, captured energies, are shares of ‖v‖² at one layer and say nothing about another
layer. In experiments/studies/when_growing_pays, part (e), the widths that the held-out loss leads to are level with
uniform ones on six pairs of network and data; those of every other criterion are worse on some.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from growconv.errors import ScheduleError
from growconv.growth.decision import Policy, Proposal, Situation
from growconv.limits import limited
from growconv.network.site import Site

Per = Literal["channel", "parameter", "flop"]
By = Literal["gradient", "energy", "decrease"]
Measure = Literal["slopes", "decrease"]
COMPARABLE = frozenset({"energy", "score", "loss"})
Chosen = list[tuple[Proposal, str]]


class Where(Policy):
    """Chooses among sites, before anything is measured and again when the proposals are known."""

    def candidates(self, sites: Sequence[Site], situation: Situation) -> list[Site]:
        """Sites to collect statistics for; all of them unless a policy knows better."""
        return list(sites)

    def measures(self, *, searched: bool, closed_form: bool) -> Measure | None:
        """What of the proposals is measured for it.

        Args:
            searched: batches are held out, and the method's channels change the loss.
            closed_form: every site has closed-form statistics, so that there are slopes.

        Raises:
            ScheduleError: it compares what cannot be measured.
        """
        return None

    @abstractmethod
    def choose(self, proposals: Sequence[Proposal], parameters: float | int, flops: float | int) -> Chosen:
        """The proposals to grow, cut down if need be, in the order in which they are applied.

        Args:
            proposals: one per candidate.
            parameters: parameters that the budget leaves, inf without one.
            flops: FLOPs per sample that the budget leaves, inf without one.

        Returns:
            Each taken proposal with the reason why, empty where all are.
        """


@dataclass
class All(Where):
    """Every site in every round."""

    def choose(self, proposals: Sequence[Proposal], parameters: float | int, flops: float | int) -> Chosen:
        """All of them, in forward order."""
        return [(proposal, "") for proposal in proposals]


@dataclass
class RoundRobin(Where):
    """The sites in turn.

    Attributes:
        count: sites in one round.
    """

    count: int = limited(1, above=0)

    def candidates(self, sites: Sequence[Site], situation: Situation) -> list[Site]:
        """The least visited sites, in forward order; only these are measured."""
        least = sorted(range(len(sites)), key=lambda index: (situation.visits.get(sites[index].name, 0), index))
        return [sites[index] for index in sorted(least[: self.count])]

    def choose(self, proposals: Sequence[Proposal], parameters: float | int, flops: float | int) -> Chosen:
        """All sites that were measured."""
        return [(proposal, "its turn") for proposal in proposals]


@dataclass
class _Comparing(Where):
    """Compares proposals of several sites.

    Attributes:
        per: see `Greedy`.
        by: see `Greedy`.
    """

    per: Per | str = limited("flop", choices=("channel", "parameter", "flop"))
    by: By | str | None = limited(None, choices=("gradient", "energy", "decrease"))
    compares: ClassVar[frozenset[str]] = COMPARABLE

    def measures(self, *, searched: bool, closed_form: bool) -> Measure | None:
        """What `by` says; the decrease before the slopes where it says nothing."""
        if self.by == "decrease" and not searched:
            raise ScheduleError(
                "by=decrease compares what new channels take off the held-out loss",
                expected='amplitude="line_search", which holds batches out, and a method such as tiny',
                where="where",
                fix="choose another method or amplitude, or by=gradient",
            )
        if self.by == "decrease" or (self.by is None and searched):
            return "decrease"
        return "slopes" if self.by != "energy" and closed_form else None

    def values(self, proposals: Sequence[Proposal]) -> tuple[list[list[float]], str]:
        """What each channel of each proposal is worth, not counting its cost, and how that is called."""
        if self.by in (None, "decrease") and all(proposal.decrease is not None for proposal in proposals):
            return [_shared(proposal) for proposal in proposals], "decrease"
        slopes = [proposal.slopes.tolist() for proposal in proposals if proposal.slopes is not None]
        if self.by != "energy" and len(slopes) == len(proposals):
            return slopes, "gradient"
        for proposal in proposals:
            if self.by == "gradient" or proposal.gradient_energy is None:
                raise ScheduleError(
                    f"{type(self).__name__} compares {'gradients' if self.by == 'gradient' else 'gains'}, and method "
                    f"{proposal.growth.method!r} has none here",
                    where=proposal.site.name,
                    fix="use where=all or where=round_robin, or by=energy and a method with gains such as tiny",
                )
        return [proposal.growth.gains.tolist() for proposal in proposals], "energy"

    def cost(self, proposal: Proposal) -> float:
        """What one channel costs."""
        costs = {"channel": 1.0, "parameter": proposal.parameters_per_channel, "flop": proposal.flops_per_channel}
        return max(costs[self.per], 1e-300)


@dataclass
class Best(_Comparing):
    """The sites whose proposals promise the most.

    Attributes:
        per: see `Greedy`.
        by: see `Greedy`.
        count: sites in one round.
    """

    count: int = limited(1, above=0)

    def choose(self, proposals: Sequence[Proposal], parameters: float | int, flops: float | int) -> Chosen:
        """The best ones; equal values go to the earlier site."""
        values, name = self.values(proposals)
        worth = [sum(each) / (len(each) * self.cost(p)) for p, each in zip(proposals, values, strict=True)]
        ranked = sorted(range(len(proposals)), key=lambda index: -worth[index])[: self.count]
        return [
            (proposals[i], f"{name} per {self.per} {worth[i]:.3g}, among the best {self.count} of {len(proposals)}")
            for i in sorted(ranked)
        ]


@dataclass
class Greedy(_Comparing):
    """The best channels of all sites together, one after the other, until an allowance is used up.

    Channels of one site are taken from the most valuable down, in whole multiples of the site's granularity. A channel
    that no longer fits ends its site's turn; cheaper channels elsewhere may still fit.

    Attributes:
        per: what the value of a channel is divided by: its cost in FLOPs ("flop") or parameters ("parameter"), or
            nothing ("channel").
        by: "gradient": the first gradient on new weights; sites without closed-form statistics have none. "energy": the
            method's own gains, captured energies of tiny, exact and functional, first-order gains of others.
            "decrease": how much the site's channels alone lower the held-out loss at the amplitude that is best for
            them, divided among them by their gains; this takes several losses for each site. None: the decrease if
            the amplitude is searched and the method's channels change the loss, else the gradient if every site has it,
            else the energy.
        channels: channels to add in one round; None: no limit.
        share: the same limit, as a share of the channels that all sites together have now; None: no limit.
        parameters: parameters to add in one round; None: what the schedule's budget leaves.
        flops: FLOPs (forward, one sample) to add in one round; None: what the schedule's budget leaves.
        rounds: spread what the schedule's budget leaves evenly over this many rounds; None: the first takes all it can.
    """

    channels: int | None = limited(None, above=0)
    share: float | int | None = limited(None, above=0)
    parameters: float | int | None = limited(None, above=0)
    flops: float | int | None = limited(None, above=0)
    rounds: int | None = limited(None, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._share = 1.0

    def candidates(self, sites: Sequence[Site], situation: Situation) -> list[Site]:
        """All sites; the round's share of the budget follows from the number of rounds left."""
        self._share = 1 / max(1, self.rounds - situation.rounds) if self.rounds is not None else 1.0
        return list(sites)

    def choose(self, proposals: Sequence[Proposal], parameters: float | int, flops: float | int) -> Chosen:
        """Fill the allowance from the most worthwhile block of channels down."""
        values, measure = self.values(proposals)
        left = {"channels": math.inf, "parameters": parameters * self._share, "flops": flops * self._share}
        if self.share is not None:
            left["channels"] = int(self.share * sum(proposal.site.width for proposal in proposals))
        for name in left:
            limit = getattr(self, name)
            left[name] = left[name] if limit is None else min(left[name], limit)
        blocks = []
        for order, (proposal, value) in enumerate(zip(proposals, values, strict=True)):
            size = proposal.site.granularity
            for start in range(0, len(value), size):
                blocks.append((-sum(value[start : start + size]) / (size * self.cost(proposal)), order, start, size))
        taken = dict.fromkeys(range(len(proposals)), 0)
        for _, order, start, size in sorted(blocks):
            proposal = proposals[order]
            price = {
                "channels": size,
                "parameters": size * proposal.parameters_per_channel,
                "flops": size * proposal.flops_per_channel,
            }
            if taken[order] == start and all(price[of] <= left[of] for of in left):
                taken[order] += size
                left = {of: left[of] - price[of] for of in left}
        answer = []
        for order, proposal in enumerate(proposals):
            offered, count = proposal.growth.channels, min(taken[order], proposal.growth.channels)
            if count == offered:
                answer.append((proposal, f"all {offered} channels are worth their {self.per}, by {measure}"))
            elif count:
                reason = f"{count} of {offered} channels rank high enough, {measure} per {self.per}"
                answer.append((replace(proposal, growth=proposal.growth.subset(range(count), reason)), reason))
        return answer


@dataclass
class RankTrigger(Where):
    """NORTH*'s trigger (Maile et al. 2022, section 3.1): add ⌊C·(φ − γ·φ*)⌋ of the channels proposed for a site.

    φ is the share of directions that the responses of the C old channels use behind the activation, φ* the largest
    share that this site has ever had. `amount` limits how many channels a site can get at once.

    Attributes:
        gamma: γ, between 0 and 1.
    """

    gamma: float | int = limited(0.9, above=0, most=1)
    compares: ClassVar[frozenset[str]] = frozenset({"rank"})
    names: list[str] = field(default_factory=list, init=False)
    largest: list[float] = field(default_factory=list, init=False)

    def choose(self, proposals: Sequence[Proposal], parameters: float | int, flops: float | int) -> Chosen:
        """As many channels of each site as its rank calls for, in whole units."""
        known, answer = dict(zip(self.names, self.largest, strict=True)), []
        for proposal in proposals:
            site, growth = proposal.site, proposal.growth
            rank = growth.measured["rank"]
            best = max(known.get(site.name, 0.0), rank)
            wanted = math.floor(site.width * (rank - self.gamma * known.get(site.name, rank)) + 1e-9)
            known[site.name] = best
            count = min(wanted, growth.channels) // site.granularity * site.granularity
            reason = f"{rank:.1%} of the directions in use, {best:.1%} at most so far: room for {wanted} channels"
            if count > 0:
                cut = growth if count == growth.channels else growth.subset(range(count), reason)
                answer.append((replace(proposal, growth=cut), reason))
        self.names, self.largest = list(known), list(known.values())
        return answer


def _shared(proposal: Proposal) -> list[float]:
    """A proposal's measured decrease, shared out among its channels by their gains, evenly where there are none."""
    gains = proposal.growth.gains.clamp_min(0)
    total, whole = float(gains.sum()), proposal.decrease or 0.0
    return (gains * (whole / total)).tolist() if total > 0 else [whole / len(gains)] * len(gains)


def as_where(where: "Where | str") -> Where:
    """Read the scheduler's short forms "all", "best" and "round_robin"."""
    forms = {"all": All, "best": Best, "round_robin": RoundRobin}
    if isinstance(where, Where):
        return where
    if isinstance(where, str) and where in forms:
        return forms[where]()
    raise ScheduleError(
        "there is no such policy for where to grow",
        expected=f"{', '.join(forms)} or a Where such as Greedy",
        got=where,
        where="where",
    )
