"""Which spaces only grow together: halves of a split, both branches of a shuffled unit, streams and what follows them.

Such spaces become one, a unit of which takes some classes of each.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from growconv.network.arrangement import Arrangement, spaces_in
from growconv.network.classes import Space, joined, signature
from growconv.network.layout import OUT, Key, Layout, Run, SizeAttribute
from growconv.network.numbers import Attribute
from growconv.network.rehearsal import Rehearsal

DOUBLINGS = 3
"""So often the outputs of spaces that only grow together are doubled, until they show how many make up a unit."""


@dataclass(frozen=True, eq=False)
class Group:
    """Spaces that may grow together."""

    spaces: list[Space]

    @cached_property
    def unit(self) -> int:
        """How often the producers have as many outputs of theirs as `shares` says."""
        return math.gcd(*self.outputs([len(space.roots) for space in self.spaces]).values())

    @cached_property
    def shares(self) -> dict[Key, int]:
        """Per producer in what proportion it has outputs of theirs."""
        outputs = self.outputs([len(space.roots) for space in self.spaces])
        return {key: count // self.unit for key, count in outputs.items()}

    def outputs(self, classes: Sequence[int]) -> Counter[Key]:
        """Per producer the outputs that so many classes of each space are."""
        found = Counter[Key]()
        for space, count in zip(self.spaces, classes, strict=True):
            found.update({key: count * n for key, n in space.counts.items() if key[1] == OUT})
        return found


class Joining:
    """Makes one space of those that only grow together.

    Attributes:
        tried: spaces of which it was tried whether they grow together with others.
    """

    def __init__(self, arrangement: Arrangement, rehearsal: Rehearsal) -> None:
        self.tried: set[Space] = set()
        self._arranged = arrangement
        self._rehearsal = rehearsal

    def copied(self, led: Mapping[int, int]) -> bool:
        """Join spaces that failed to the ones that their sizes have to follow, where those only grow by copies."""
        spaces, followers = self._arranged.spaces, dict[Space, list[Space]]()
        for number, ahead in sorted(led.items()):
            # the last first, so that along an axis with several of them blocks fall where one ends
            followers.setdefault(spaces[ahead], []).insert(0, spaces[number])
        joint = False
        for ahead, own in followers.items():
            members = [*own, ahead]
            if set(members) <= set(spaces):  # else one of them was joined to others before
                joint |= self._replaced(members, [len(space.roots) for space in members], False)
        return joint

    def parts(self, seeds: Iterable[int]) -> bool:
        """Make one space of those that only grow together: halves of a split, both branches of a shuffled unit.

        Returns whether some were joined.
        """
        groups, joint = self._together([self._arranged.spaces[number] for number in seeds]), False
        for group, (more, rates, complete) in self._rates(groups).items():
            parts = math.gcd(more, *rates)  # as often as the rates can be halved: a unit is that much smaller
            units = [[(rate // parts) << power for rate in rates] for power in range(parts.bit_length())]
            known = [len(space.roots) for space in group.spaces]
            enough = [each for each in units if complete and all(n <= has for n, has in zip(each, known, strict=True))]
            joint |= any(self._replaced(group.spaces, each, last) for each in enough for last in (False, True))
            least = more // parts * min(group.shares.values())
            for space in () if enough else group.spaces:
                space.reason = f"its channels only grow together, in units of {least} or more, and are too few for one"
        return joint

    def _rates(self, groups: Sequence[Group]) -> dict[Group, tuple[int, list[int], bool]]:
        """How many more classes the spaces of each group have, once its producers have so many times more outputs.

        All producers get many more outputs, then twice as many, and so on. What becomes of the classes of each space
        tells how many of them a unit takes, where twice the outputs give twice as many new classes.

        Returns, of the groups where they do, how many times more of its shares each producer has, how many more classes
        each space has then, and whether these are all new outputs: others are of classes such as there are none yet.
        """
        found: dict[Group, tuple[int, list[int], bool]] = {}
        most = [1 << (2 * group.unit - 1).bit_length() - 1 for group in groups]
        once = self._counted(groups, most) if groups else []
        for _ in range(DOUBLINGS):
            waiting = [n for n, group in enumerate(groups) if group not in found and min(once[n]) >= 0]
            if not waiting:
                break
            more = [2 * times if n in waiting else times for n, times in enumerate(most)]
            twice = self._counted(groups, more)
            for n in waiting:
                outputs = {key: most[n] * share for key, share in groups[n].shares.items()}
                complete = groups[n].outputs(once[n]) == outputs
                if twice[n] == [2 * rate for rate in once[n]] and (complete or min(once[n]) > 0):
                    found[groups[n]] = most[n], once[n], complete
            most, once = more, twice
        return found

    def _together(self, seeds: Sequence[Space]) -> list[Group]:
        """Spaces to begin with, each with those of the same producers, and with others to begin with that it meets."""
        groups: list[Group] = []
        for seed in seeds:
            spaces = [] if seed in self.tried else [seed]
            for member in spaces:  # which gets longer
                near = {each: each.counts.keys() & member.counts for each in (*self._arranged.spaces, *seeds)}
                spaces += [
                    each
                    for each, axes in near.items()
                    if each not in spaces and (any(side == OUT for _, side in axes) or (axes and each in seeds))
                ]
            self.tried |= set(spaces)
            groups += [Group(spaces)] if len(spaces) > 1 else []
        return groups

    def _counted(self, groups: Sequence[Group], more: Sequence[int]) -> list[list[int]]:
        """Per group how many more classes its spaces have, once its producers have so many times more of their shares.

        Attributes that count channels of a group follow: those that do so already, or all where the code fails then.
        Below 0: it fails even so.
        """
        arranged = self._arranged
        space, axes = len(arranged.spaces), dict[Key, tuple[Run, ...]]()
        for group, times in zip(groups, more, strict=True):
            for key, share in group.shares.items():
                run = Run(space, 1, times * share, tuple(range(times * share)))
                axes[key] = Run(None, len(arranged.numbers.range_of(key))), run
        telling = self._telling(groups, more)
        for places in (telling.keys() & arranged.bound, telling.keys()):
            attributes = tuple(SizeAttribute(*place, {space: telling[place]}) for place in places)
            layout = Layout(axes, (), arranged.dims, attributes)
            classes = self._rehearsal.classes(layout, [0] * (space + 1), [0] * space + [1])
            if classes is not None:
                arranged.bound = arranged.bound | places
                return [
                    [classes[signature(each.counts, arranged.dims)] - len(each.roots) for each in group.spaces]
                    for group in groups
                ]
        return [[-1]] * len(groups)

    def _telling(self, groups: Sequence[Group], more: Sequence[int]) -> dict[Attribute, int]:
        """The attributes that count channels of one group, and by how much they are then larger."""
        found: dict[Attribute, int] = {}
        for group, times in zip(groups, more, strict=True):
            own = {number for number, space in enumerate(self._arranged.spaces) if space in group.spaces}
            for place, counted in self._arranged.numbers.literals.items():
                larger, left = divmod(times * len(counted), group.unit)
                if not left and spaces_in(self._arranged.codes_of(counted)) <= own:
                    found[place] = larger
        return found

    def _replaced(self, members: Sequence[Space], rates: Sequence[int], last: bool) -> bool:
        """Put one space in the place of several, as `joined` makes it, where its classes form runs."""
        joint = joined(members, rates, last, self._arranged.numbers.order)
        return self._arranged.replaced(members, joint)
