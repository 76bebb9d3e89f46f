"""Widening: which spaces the model's code takes at other widths, and as what.

All spaces are rehearsed together until none fails any more. One that fails is joined to others, has the sizes in
attributes follow, or is taken to fall into units in another way; where none of it helps it is given its reason.
"""

from collections.abc import Iterable, Sequence

from torch import nn

from growconv.network.arrangement import Arrangement, spaces_in
from growconv.network.classes import Space
from growconv.network.joining import Joining
from growconv.network.layout import Layout
from growconv.network.numbers import Attribute, Numbers
from growconv.network.rehearsal import Example, Rehearsal, Verdict

PATIENCE = 60, 4
"""Rehearsals after which spaces that fail are given no further chance, and how many more for each that got its reason:
what the search may cost has an end."""
FEW = 3
"""So many spaces that fail are tried one by one at once; more of them first together without the others."""
MOST_ATTRIBUTES = 8
"""So many attributes that count a space's channels are tried one by one: others have that number by chance."""


class Widening:
    """Finds out which numbers of units a model's spaces can be given.

    Args:
        model: a copy that may be changed.
        examples: how it is run.
        numbers: what sending numbers through it found at its present widths.
        spaces: the spaces; those that fail are given a reason.
    """

    def __init__(self, model: nn.Module, examples: Sequence[Example], numbers: Numbers, spaces: list[Space]) -> None:
        self.spaces = spaces
        self.arrangement = Arrangement(model, numbers, spaces)
        self.rehearsal = Rehearsal(model, examples, self.arrangement)
        self.joining = Joining(self.arrangement, self.rehearsal)
        self._bound_for: set[frozenset[Space] | Space] = set()

    def prove(self) -> Layout:
        """Give every space that cannot be widened its reason; the layout of the others."""
        self.joining.parts(self.arrangement.guess_all())
        while live := self.arrangement.live:
            failed = self._bind_all(live, self.rehearsal.of(live))
            if not failed.reasons:
                break
            parts = [number for number in sorted(failed.reasons) if self.spaces[number] not in self.joining.tried]
            cut = not self.rehearsal.parted().isdisjoint(parts)
            if self.joining.copied(failed.led) or (cut and self.joining.parts(parts)):
                continue
            found = self._alone(failed, live)
            for number, reason in found.items():
                self._change(number, reason, failed, len(found) <= FEW)
        return self.arrangement.relay()

    def presume(self) -> Layout:
        """The layout at the present widths, taken to hold at others."""
        self.arrangement.guess_all()
        return self.arrangement.relay()

    def _change(self, number: int, reason: str, failed: Verdict, few: bool) -> None:
        """Let a space that fails be something else, or give it its reason.

        Args:
            failed: where it failed together with others.
            few: whether it is worth while to try the next guess by itself.
        """
        patient = self._patient and number not in failed.fixed
        if patient and self._bind_one(number):
            return
        if not (patient and self._patient):
            self.arrangement.refuse(number, reason)
            return
        self.arrangement.next_guess(number, reason)
        while few and self.spaces[number].reason is None and self._patient and self.rehearsal.of([number]).reasons:
            self.arrangement.next_guess(number, reason)

    @property
    def _patient(self) -> bool:
        first, each = PATIENCE
        return self.rehearsal.count < first + each * sum(space.reason is not None for space in self.spaces)

    def _alone(self, failed: Verdict, live: Sequence[int]) -> dict[int, str]:
        """Of the spaces that failed together those that fail by themselves too; all of them where none does."""
        if (len(failed.reasons) == 1 and not failed.supposed) or not self._patient:
            return failed.reasons
        if failed.alone:
            return {number: failed.reasons[number] for number in sorted(failed.alone)}
        again = failed
        if failed.supposed or len(failed.reasons) > FEW:
            again = self.rehearsal.of(sorted(failed.reasons))
        if failed.supposed and not again.reasons:  # those around the error are not to blame
            again = Verdict(dict.fromkeys(live, next(iter(failed.reasons.values()))))
        found = {number: again.reasons[number] for number in again.alone}
        for number in sorted(again.reasons.keys() - again.alone):
            if self._patient:
                single = self.rehearsal.of([number])
                failed.fixed |= {number} if single.supposed else set()
                found |= single.reasons
        return found or failed.reasons

    def _bind_all(self, live: Sequence[int], failed: Verdict) -> Verdict:
        """Let all attributes follow the widths, if that gets the spaces which fail further; tried once for the same."""
        arranged, literals = self.arrangement, self.arrangement.numbers.literals
        before, together = arranged.bound, frozenset(self.spaces[number] for number in failed.reasons)
        if together in self._bound_for or not self._counting(failed.reasons):
            return failed
        self._bound_for.add(together)
        still = failed
        while still.reasons and arranged.bound != before | literals.keys():
            arranged.bound = before | literals.keys()
            still = self.rehearsal.of(live)  # which may tell of more of them
        # or the code runs to its end only now, and all that fails then follows channels that are known
        onward = failed.supposed and not still.supposed and still.reasons.keys() == still.led.keys()
        if still.reasons.keys() < failed.reasons.keys() or onward:
            return still
        arranged.bound = before
        failed.fixed &= still.fixed
        return failed

    def _bind_one(self, number: int) -> bool:
        """Let one attribute follow the widths, if a space that fails by itself does so no more then; tried once."""
        arranged, before, space = self.arrangement, self.arrangement.bound, self.spaces[number]
        counting = [] if space in self._bound_for else self._counting([number])
        self._bound_for.add(space)
        for place in counting[:MOST_ATTRIBUTES]:
            arranged.bound = before | {place}
            if not self.rehearsal.of([number]).reasons:
                return True
        arranged.bound = before
        return False

    def _counting(self, numbers: Iterable[int]) -> list[Attribute]:
        """The attributes that do not follow the widths yet and count channels of some spaces."""
        arranged, own = self.arrangement, set(numbers)
        return [
            place
            for place, counted in sorted(arranged.numbers.literals.items(), key=str)
            if place not in arranged.bound and own & spaces_in(arranged.codes_of(counted))
        ]
