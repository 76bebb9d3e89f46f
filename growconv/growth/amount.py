"""How many channels a site is offered in one round."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from growconv.errors import ScheduleError
from growconv.growth.decision import Policy, Situation
from growconv.limits import limited
from growconv.network.site import Site

WIDEST = 2.0
"""Times as wide in one step that sped training up most reliably (Mallik et al. 2026, arXiv 2605.13405)."""


class Amount(Policy):
    """Says how many channels to ask the solver for; 0 leaves the site out of the round.

    Attributes:
        maximum: channels that a site may get in one round at most; None: as many as asked for.
    """

    maximum: int | None = None

    @abstractmethod
    def channels(self, site: Site, situation: Situation) -> int | Literal["auto"]:
        """Channels to ask for at this site now."""


@dataclass
class Fixed(Amount):
    """The same number at every site and in every round.

    Attributes:
        count: channels.
    """

    count: int = limited(above=0)

    def channels(self, site: Site, situation: Situation) -> int:
        """The fixed number."""
        return self.count


@dataclass
class Fraction(Amount):
    """A fraction of the width that the site had when the schedule began.

    Attributes:
        fraction: 0.25 adds a quarter of the initial width in each round (GradMax); at least one channel.
    """

    fraction: float | int = limited(0.25, above=0)

    def channels(self, site: Site, situation: Situation) -> int:
        """The fraction, rounded to the nearest whole channel."""
        return max(1, round(self.fraction * situation.initial_widths[site.name]))


@dataclass
class ToWidth(Amount):
    """Equal steps to a target width, which the site reaches in its last round.

    Attributes:
        target: an int is a number of channels, a float a multiple of the initial width.
        rounds: number of visits of the site until then.
    """

    target: int | float = limited(above=0)
    rounds: int = limited(above=0)

    def channels(self, site: Site, situation: Situation) -> int:
        """The missing channels, spread evenly over the remaining visits."""
        missing = target_width(self.target, situation.initial_widths[site.name]) - site.width
        left = max(1, self.rounds - situation.visits.get(site.name, 0))
        return max(0, math.ceil(missing / left))


@dataclass
class Exponential(Amount):
    """C_t = C_{t-1} + ⌊rate · C_{t-1}⌋₂, and the target in the last round (Variance Transfer's width schedule).

    Attributes:
        rate: growth of the width from round to round; 0.2 is 20 %. ⌊·⌋₂ rounds down to an even number, at least 2.
        target: final width, an int in channels or a float as a multiple of the initial width; None: no target.
        rounds: visits after which the target has to be reached; None: whenever the sequence reaches it.
    """

    rate: float | int = limited(0.2, above=0)
    target: int | float | None = limited(None, above=0)
    rounds: int | None = limited(None, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds is not None and self.target is None:
            raise ScheduleError("rounds needs a target", where="Exponential", fix="give the target width too")

    def channels(self, site: Site, situation: Situation) -> int:
        """The next term of the sequence, cut at the target."""
        step = max(2, 2 * math.floor(self.rate * site.width / 2))
        if self.target is None:
            return step
        missing = max(0, target_width(self.target, situation.initial_widths[site.name]) - site.width)
        if self.rounds is not None and situation.visits.get(site.name, 0) + 1 >= self.rounds:
            return missing
        return min(step, missing)


@dataclass
class Auto(Amount):
    """As many as the solver finds worthwhile for the data.

    Attributes:
        maximum: the most in one round; None: no limit.
    """

    maximum: int | None = limited(None, above=0)

    def channels(self, site: Site, situation: Situation) -> Literal["auto"]:
        """Leave it to the solver."""
        return "auto"


def as_amount(amount: "Amount | int | float | str") -> Amount:
    """Read the scheduler's short forms: an int is Fixed, a float Fraction, "auto" is Auto."""
    if isinstance(amount, Amount):
        return amount
    if amount == "auto":
        return Auto()
    if isinstance(amount, int) and not isinstance(amount, bool):
        return Fixed(amount)
    if isinstance(amount, float):
        return Fraction(amount)
    raise ScheduleError(
        "this is not an amount",
        expected='channels (int), a fraction of the initial width (float), "auto" or an Amount such as ToWidth',
        got=amount,
        where="amount",
    )


def target_width(target: int | float, initial: int) -> int:
    """A target in channels: an int as it is, a float times the initial width."""
    return target if isinstance(target, int) else round(target * initial)


def too_wide(site: str, before: int, after: int) -> str | None:
    """What speaks against a step that widens a site more than twofold; None where it does not."""
    if after <= WIDEST * before:
        return None
    times = f"{site}: {before} to {after} channels is {after / before:.3g} times as wide in one step"
    return f"{times}; above {WIDEST:g} growing was no faster than training the wide network from scratch"
