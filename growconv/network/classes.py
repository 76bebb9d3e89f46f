"""Channel classes: what lives and dies together, gathered into channel spaces."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from growconv.network.layout import GROUP_OUT, IN, OUT, Key
from growconv.network.numbers import Axes, Numbers

UNREAD = "no layer reads it"
Signature = frozenset[tuple[Key, int]]
"""The axes that a class lies on, with its entries on each; bare parameters and buffers left out."""


@dataclass(eq=False)
class Space:
    """Classes of one signature: the same number of entries on the same axes.

    Attributes:
        roots: the number that stands for each class, in the order of the first producer's outputs.
        counts: per axis the entries of one class; producers first, in forward order.
        blocks: the classes come in so many equal stretches, of which a unit takes one class each (channel shuffles,
            convolutions that are widened inside every group).
        neighbours: a unit takes neighbouring classes instead (even and odd channels that go different ways).
        reason: why it cannot grow; None as long as nothing speaks against it.
        copied: its channels depend on each other in a way that only copies of all of them leave alone.
        lies: of a space made of several, per axis the block of every entry of a unit, ascending; `counts` is 1 there.
    """

    roots: list[int]
    counts: dict[Key, int]
    blocks: int = 1
    neighbours: bool = False
    reason: str | None = None
    copied: bool = False
    lies: dict[Key, list[int]] = field(default_factory=dict)

    @property
    def units(self) -> int:
        """Units now."""
        return len(self.roots) // self.blocks

    @property
    def channels(self) -> int:
        """Channels of a unit: what its narrowest producer or consumer has of it, so that groups count in full."""
        return min(count * len(self.on(key)) for key, count in self.counts.items() if key[1] in (OUT, IN))

    def on(self, key: Key) -> NDArray[np.int64]:
        """The blocks whose classes lie on an axis, one for each `counts` entries of a unit."""
        return np.asarray(self.lies.get(key, range(self.blocks)), dtype=np.int64)

    def paths(self, *sides: str) -> tuple[str, ...]:
        """The layers whose axes of these sides the classes lie on, in forward order."""
        return tuple(dict.fromkeys(path for path, side in self.counts if side in sides))


def signature(counts: Mapping[Key, int], bare: Container[str]) -> Signature:
    """The signature of a class with so many entries on each axis; `bare` are the paths that are left out."""
    return frozenset(each for each in counts.items() if each[0][0] not in bare)


def spaces_of(numbers: Numbers) -> tuple[list[Space], dict[Key, str]]:
    """The spaces that may grow, and for outputs that cannot the reason.

    Args:
        numbers: what was found by sending numbers through the model.
    """
    reasons, order = numbers.reasons(), {path: place for place, path in enumerate(numbers.order)}
    used, roots = numbers.used_outside, numbers.roots()
    across = {int(roots[number]): path for number, path in numbers.across.items() if number >= 0}
    found, refused = list[tuple[int, int, Axes, Space]](), list[tuple[int, Axes, str]]()
    for axes, classes in numbers.signatures().items():
        against, ordered = _against(axes, used), tuple(sorted(axes, key=lambda axis: _place(axis[0], order)))
        free = {root for root in classes.tolist() if against is None and root not in reasons}
        if len(free) < len(classes):
            first = next(root for root in classes.tolist() if root not in free)
            reason = reasons.get(first, against)
            if reason == UNREAD and first in across:
                reason = f"{across[first]} reads it along another axis, and no other layer does"
            refused.append((first, axes, str(reason)))
        if free:
            producer = ordered[0][0]
            own = numbers.range_of(producer)
            along = roots[own.start : own.stop].tolist()
            members = [root for root in dict.fromkeys(along) if root in free]
            place = order.get(producer[0], 0), along.index(members[0])
            found.append((*place, ordered, Space(members, dict(ordered))))
    why: dict[Key, str] = {}
    for _, axes, reason in sorted(refused):
        why = {key: reason for key, _ in axes if key[1] in (OUT, GROUP_OUT)} | why
    return [space for *_, space in sorted(found)], why


def _against(axes: Axes, used: Mapping[str, str]) -> str | None:
    """Why classes on such axes cannot grow, whatever their entries meet; None where nothing speaks against them."""
    outside = next((key[0] for key, _ in axes if key[0] in used), None)
    if outside is not None:
        return f"the weights of {outside} are used outside of the layer ({used[outside]})"
    sides = {key[1] for key, _ in axes}
    if OUT not in sides:
        return "it is read from channels that cannot grow"
    return None if IN in sides else UNREAD


def _place(key: Key, order: Mapping[str, int]) -> tuple[bool, int, Key]:
    """Producers come first, then all in forward order."""
    return key[1] != OUT, order.get(key[0], len(order)), key


def joined(members: Sequence[Space], rates: Sequence[int], last: bool, order: Sequence[str]) -> Space:
    """One space of several that only grow together.

    Args:
        members: spaces whose classes are blocks of none yet.
        rates: how many neighbouring classes of each member a unit takes.
        last: whether the classes that are too many for whole units, and never grow, are the last; else the first.
        order: paths of the layers in forward order.
    """
    units = min(len(member.roots) // rate for member, rate in zip(members, rates, strict=True) if rate)
    lies: dict[Key, list[int]] = {}
    columns: list[list[int]] = []
    for member, rate in zip(members, rates, strict=True):
        start = 0 if last else len(member.roots) - units * rate
        for key, count in member.counts.items() if rate else ():
            blocks = range(len(columns), len(columns) + rate)
            lies.setdefault(key, []).extend(block for block in blocks for _ in range(count))
        columns += [member.roots[start + block : start + units * rate : rate] for block in range(rate)]
    keys = sorted(lies, key=lambda key: _place(key, {path: place for place, path in enumerate(order)}))
    roots = [root for unit in zip(*columns, strict=True) for root in unit]
    copied = any(member.copied for member in members)
    return Space(roots, dict.fromkeys(keys, 1), len(columns), neighbours=True, copied=copied, lies=lies)


def mark_copied(numbers: Numbers, spaces: Sequence[Space]) -> None:
    """Mark spaces whose channels are tied loosely; those that depend on each other across spaces get a reason."""
    owner = {root: number for number, space in enumerate(spaces) for root in space.roots}
    classes: dict[int, list[int]] = {}
    for root, lowest in zip(owner, numbers.loose_roots()[list(owner)].tolist(), strict=True):
        classes.setdefault(lowest, []).append(root)
    for together in classes.values():
        involved = {owner[root] for root in together}
        for number in involved if len(together) > 1 else ():
            space = spaces[number]
            if len(involved) > 1 or len(together) != len(space.roots):
                space.reason = "its channels depend on each other and on others"
            else:
                space.copied, space.blocks = True, len(space.roots)
