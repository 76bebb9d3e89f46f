"""Channel classes: what lives and dies together, gathered into channel spaces whose positions form runs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from growconv.network.layout import GROUP_OUT, IN, OUT, Key, Run
from growconv.network.trace import Numbers

@dataclass
class Space:
    """Classes of one signature: the same number of entries on the same axes.

    Attributes:
        roots: the number that stands for each class, in the order of the first producer's outputs.
        counts: per axis the entries of one class; producers first, in forward order.
        blocks: the classes come in so many equal stretches, of which a unit takes one class each (channel shuffles,
            convolutions that are widened inside every group).
        neighbours: a unit takes neighbouring classes instead (even and odd channels that go different ways).
        reason: why it cannot grow; None as long as nothing speaks against it.
        tried: numbers of blocks that were found not to fit, and whether of neighbours.
        copied: its channels depend on each other in a way that only copies of all of them leave alone.
    """

    roots: list[int]
    counts: dict[Key, int]
    blocks: int = 1
    neighbours: bool = False
    reason: str | None = None
    tried: set[tuple[int, bool]] = field(default_factory=set)
    copied: bool = False

    @property
    def units(self) -> int:
        """Units now."""
        return len(self.roots) // self.blocks

    @property
    def keys(self) -> list[Key]:
        """The axes that its classes lie on."""
        return list(self.counts)

    @property
    def channels(self) -> int:
        """Channels of a class: what its narrowest producer or consumer has of it, so that whole groups count in full."""
        return min(count for (_, side), count in self.counts.items() if side in (OUT, IN))

    def paths(self, *sides: str) -> tuple[str, ...]:
        """The layers whose axes of these sides the classes lie on, in forward order."""
        return tuple(dict.fromkeys(path for path, side in self.counts if side in sides))


def spaces_of(numbers: Numbers) -> tuple[list[Space], dict[Key, str]]:
    """The spaces that may grow, and for outputs that cannot the reason.

    Args:
        numbers: what was found by sending numbers through the model.
    """
    reasons, order = numbers.reasons(), {path: place for place, path in enumerate(numbers.order)}
    used = numbers.used_outside
    grouped: dict[tuple, list[tuple[int, int]]] = {}
    why: dict[Key, str] = {}
    for root, members in numbers.members().items():
        produced = [key for key in members if key[1] == OUT]
        reason = reasons.get(root)
        outside = next((path for path, _ in members if path in used), None)
        if reason is None and outside is not None:
            reason = f"the weights of {outside} are used outside of the layer ({used[outside]})"
        if reason is None and not produced:
            reason = "it is read from channels that cannot grow"
        if reason is None and not any(side == IN for _, side in members):
            reason = "nothing reads it"
        if reason is not None:
            for key in members:
                if key[1] in (OUT, GROUP_OUT):
                    why.setdefault(key, reason)
            continue
        ordered = sorted(members, key=lambda key: (key[1] != OUT, order.get(key[0], len(order)), key))
        signature = tuple((key, len(members[key])) for key in ordered)
        grouped.setdefault(signature, []).append((min(members[ordered[0]]), root))
    found = [Space([root for _, root in sorted(classes)], dict(signature)) for signature, classes in grouped.items()]
    first = {space.roots[0]: min(grouped[tuple(space.counts.items())])[0] for space in found}
    found.sort(key=lambda space: (order.get(space.keys[0][0], 0), first[space.roots[0]]))
    return found, why


def collapsed(numbers: Numbers) -> bool:
    """Whether several channels of one layer are one class: they depend on each other, or form a group."""
    return any(
        side == OUT and len(positions) > 1
        for members in numbers.members().values()
        for (_, side), positions in members.items()
    )


def mark_copied(strict: Numbers, repeated: Numbers, spaces: Sequence[Space]) -> None:
    """Of spaces found by numbers that are taken to be repeated, those whose channels depend on each other.

    Args:
        strict: numbers that operations over several channels have tied.
        repeated: numbers that they have not.
        spaces: of the second; those that depend on each other across spaces are given a reason.
    """
    roots, owner = strict.roots(), {}
    for number, space in enumerate(spaces):
        for root in space.roots:
            owner[root] = number
    met: dict[int, set[int]] = {}
    classes: dict[int, set[int]] = {}
    for number in range(len(repeated.owners)):
        root = repeated.root(number)
        if root in owner:
            met.setdefault(int(roots[number]), set()).add(owner[root])
            classes.setdefault(int(roots[number]), set()).add(root)
    for strictly, involved in met.items():
        if len(classes[strictly]) < 2:
            continue
        for number in involved:
            space = spaces[number]
            if len(involved) > 1 or len(classes[strictly]) != len(space.roots):
                space.reason = "its channels depend on each other and on others"
            else:
                space.copied, space.blocks = True, len(space.roots)


class Torn(Exception):
    """The entries of a space do not form runs along an axis.

    Attributes:
        space: its number.
    """

    def __init__(self, space: int) -> None:
        super().__init__(space)
        self.space = space


Unit = tuple[int, int, int]
"""Space, unit and block of an entry."""


def runs_of(axis: Sequence[Unit | None], units: Mapping[int, int], entries: Mapping[int, int]) -> tuple[Run, ...]:
    """The runs that an axis is made of.

    Args:
        axis: per entry its space, unit and block.
        units: per space its number of units.
        entries: per space the entries that a class has along this axis.

    Raises:
        Torn: for a space whose entries are in no such order.
    """
    runs: list[Run] = []
    met: Counter[Unit] = Counter()
    start = 0
    while start < len(axis):
        first = axis[start]
        space = None if first is None else first[0]
        end = start
        while end < len(axis) and (None if (each := axis[end]) is None else each[0]) == space:
            end += 1
        if first is None:
            runs.append(Run(None, end - start))
        else:
            stretch = [each for each in axis[start:end] if each is not None]
            run, used = _run(stretch, units[first[0]], entries[first[0]], met)
            runs.append(run)
            end = start + used
        start = end
    return tuple(runs)


def _run(stretch: Sequence[Unit], units: int, entries: int, met: Counter[Unit]) -> tuple[Run, int]:
    """The longest run at the start of a stretch of one space, and its length."""
    space, unit, _ = stretch[0]
    inner = len(stretch)
    if units > 1:
        inner = next((place for place, each in enumerate(stretch) if each[1] != unit), len(stretch))
    whole, left = divmod(len(stretch), units * inner)
    for outer in dict.fromkeys((whole if not left else 0, 1)):
        length = outer * units * inner
        if outer < 1 or length > len(stretch):
            continue
        seen = met.copy()
        slots: dict[tuple[int, int], int] = {}
        fits = True
        for place, each in enumerate(stretch[:length]):
            repetition, rest = divmod(place, units * inner)
            which, neighbour = divmod(rest, inner)
            slot = each[2] * entries + seen[each]
            seen[each] += 1
            fits = fits and each[1] == which and slots.setdefault((repetition, neighbour), slot) == slot
        if fits:
            met.clear()
            met.update(seen)
            return Run(space, outer, inner, tuple(slots[o, i] for o in range(outer) for i in range(inner))), length
    raise Torn(space)
