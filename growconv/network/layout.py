"""Where the channels of each site lie along every axis of a model, at any width.

An axis of a layer (its outputs, its inputs, or the entries of a norm or bare parameter) is a sequence of runs. A run
belongs to one channel space and repeats all of its units `outer` times, with `inner` neighbouring entries each time::

    a convolution's outputs            outer 1, inner 1
    the inputs of Flatten -> Linear    outer 1, inner H·W     (channels, then locations)
    the same after permute to NHWC     outer H·W, inner 1
    the outputs in front of a GLU      outer 2, inner 1       (values, then gates)
    the outputs before PixelShuffle    outer 1, inner r²
    behind a shuffle of g groups       outer 1, inner g       (and outer g in front of it)

So a layout holds no sizes: the number of units of a space follows from the sizes that the modules have now, and the
positions of old and new channels from that. It is plain data; it can be copied, pickled, and asked about any model with
the same names.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from growconv.errors import SiteError

Key = tuple[str, str]
"""Module path (parameter path for a bare parameter or buffer) and side, one of the five below."""

OUT, IN = "out", "in"
"""The outputs and the inputs of a weighted layer: it produces or consumes channels."""
ENTRY = "entry"
"""The entries of a norm layer, a PReLU, or a bare parameter or buffer."""
FILL = "fill"
"""Entries that come from no layer, as zeros that pad the channels; a size in the model's code tells how many."""
GROUP_IN, GROUP_OUT = "group in", "group out"
"""Both axes of a grouped or depthwise convolution whose groups are channels of one space: whole groups come and go."""


class Sizes:
    """The length of every axis now, and what follows from it; each is asked for once, so make another after a change.

    Args:
        length: the length of an axis.
    """

    def __init__(self, length: Callable[[Key], int]) -> None:
        self._length = length
        self._lengths: dict[Key, int] = {}
        self.units: dict[int, int] = {}
        self.along: dict[Key, dict[int, int]] = {}
        self.starts: dict[Key, list[int]] = {}

    def __call__(self, key: Key) -> int:
        """The length of an axis."""
        if key not in self._lengths:
            self._lengths[key] = self._length(key)
        return self._lengths[key]


@dataclass(frozen=True)
class Run:
    """A stretch of an axis.

    Attributes:
        space: which channel space its entries belong to; None for entries that never grow.
        outer: how often the units are repeated; the number of entries where `space` is None.
        inner: neighbouring entries of one unit in each repetition.
        slots: per repetition and neighbour, in the order of the axis, the place of that entry among all entries that
            one unit has along this axis, channel by channel.
    """

    space: int | None
    outer: int
    inner: int = 1
    slots: tuple[int, ...] = (0,)

    def length(self, units: Sequence[int] | Mapping[int, int]) -> int:
        """Entries at a number of units of each space."""
        return self.outer if self.space is None else self.outer * units[self.space] * self.inner


@dataclass(frozen=True)
class Place:
    """Where new units come along an axis.

    Attributes:
        position: the old entry before which they come.
        entries: which entries of the new channels come here, in order: indices into all new entries along the axis,
            channel by channel.
    """

    position: int
    entries: tuple[int, ...]


@dataclass(frozen=True)
class SizeAttribute:
    """A number that a module's own code keeps in an attribute and that has to follow the widths.

    Attributes:
        path: module path.
        name: of the attribute, an int or a list or tuple of them.
        index: which entry of a list or tuple; None for an int.
        rates: per space, by how much it grows with each unit.
    """

    path: str
    name: str
    index: int | None
    rates: Mapping[int, int]

    def enlarged(self, value: int | Sequence[int], more: int) -> int | Sequence[int]:
        """What the attribute holds, with so much more at its place."""
        if isinstance(value, int):
            return value + more
        changed = [size + more * (place == self.index) for place, size in enumerate(value)]
        return type(value)(changed)  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True)
class Layout:
    """The runs of every axis of a model that channels lie on.

    Attributes:
        axes: per axis its runs.
        channels: per space how many channels a unit has; new channels come in multiples of it.
        dims: per bare parameter or buffer on an axis, which of its dimensions that is.
        attributes: sizes that the code of modules keeps beside their tensors.
    """

    axes: Mapping[Key, tuple[Run, ...]]
    channels: tuple[int, ...]
    dims: Mapping[str, int]
    attributes: tuple[SizeAttribute, ...] = ()

    @cached_property
    def _own(self) -> dict[Key, dict[int, list[int]]]:
        """Per axis the runs of each space on it, by number."""
        found: dict[Key, dict[int, list[int]]] = {}
        for key, runs in self.axes.items():
            own = found.setdefault(key, {})
            for number, run in enumerate(runs):
                if run.space is not None:
                    own.setdefault(run.space, []).append(number)
        return found

    @cached_property
    def _rates(self) -> dict[Key, dict[int, int]]:
        """Per axis the entries of one unit of each space on it."""
        return {
            key: {
                space: sum(self.axes[key][n].outer * self.axes[key][n].inner for n in runs)
                for space, runs in own.items()
            }
            for key, own in self._own.items()
        }

    @cached_property
    def _index(self) -> dict[int, list[Key]]:
        """Per space the axes that its channels lie on."""
        found: dict[int, list[Key]] = {}
        for key, rates in self._rates.items():
            for space in rates:
                found.setdefault(space, []).append(key)
        return found

    @cached_property
    def _telling(self) -> dict[int, Key]:
        """Per space the axis that tells its units once those of its other spaces are known; most have none."""
        told: dict[int, Key] = {}
        changed = True
        while changed:
            changed = False
            for key, rates in self._rates.items():
                unknown = rates.keys() - told.keys()
                if len(unknown) == 1:
                    told[unknown.pop()] = key
                    changed = True
        return told

    def keys(self, space: int) -> list[Key]:
        """The axes that a space's channels lie on."""
        return list(self._index.get(space, ()))

    def per_unit(self, key: Key, space: int) -> int:
        """Entries of one unit along an axis."""
        return self._rates[key].get(space, 0)

    def length(self, key: Key, units: Mapping[int, int]) -> int:
        """Entries along an axis at a number of units of each space on it."""
        total = 0
        for run in self.axes[key]:
            total += run.length(units)
        return total

    def ratio(self, key: Key, space: int) -> Fraction:
        """Entries of one channel along an axis."""
        return Fraction(self.per_unit(key, space), self.channels[space])

    def units(self, space: int, sizes: Sizes) -> int:
        """How many units a space has, at these lengths of the axes.

        Raises:
            SiteError: no axis tells it, or axes contradict each other.
        """
        if space not in sizes.units:
            sizes.units[space] = self._alone(space, sizes) if space in self._telling else self._together(space, sizes)
        return sizes.units[space]

    def units_along(self, key: Key, sizes: Sizes) -> dict[int, int]:
        """How many units every space on an axis has now; none for an axis that no channels lie on."""
        if key not in sizes.along:
            sizes.along[key] = {space: self.units(space, sizes) for space in self._rates.get(key, ())}
        return sizes.along[key]

    def length_now(self, key: Key, sizes: Sizes) -> int:
        """Entries along an axis at the number of units that every space on it has now."""
        return self._starts(key, sizes)[-1]

    def _starts(self, key: Key, sizes: Sizes) -> list[int]:
        """Where every run of an axis starts now, and where the last one ends."""
        if key not in sizes.starts:
            now = self.units_along(key, sizes)
            sizes.starts[key] = list(accumulate((run.length(now) for run in self.axes[key]), initial=0))
        return sizes.starts[key]

    def _alone(self, space: int, sizes: Sizes) -> int:
        """The units of a space that one axis tells."""
        key, others = self._telling[space], {space: 0}
        for other in self._rates[key]:
            if other != space:
                others[other] = self.units(other, sizes)
        rest = sizes(key) - self.length(key, others)
        units, left = divmod(rest, self.per_unit(key, space))
        if left or units < 0:
            raise SiteError(
                "this axis does not hold whole channels any more",
                where=f"{key[0]} ({key[1]})",
                got=f"{sizes(key)} entries",
                fix="find the sites again: growconv.find_sites(model, example_input)",
            )
        return units

    def _together(self, space: int, sizes: Sizes) -> int:
        """The units of a space of which every axis has others too: a combination of the lengths of several axes."""
        spaces: list[int] = [space]
        keys: dict[Key, None] = {}
        for each in spaces:  # which gets longer
            for key in self._index.get(each, ()):
                keys[key] = None
                spaces += self._rates[key].keys() - set(spaces)
        rates = np.array([[self.per_unit(key, each) for each in spaces] for key in keys], dtype=np.float64)
        wanted = np.eye(1, len(spaces))[0]
        shares = np.linalg.lstsq(rates.T, wanted, rcond=None)[0]
        fixed = [self.length(key, dict.fromkeys(spaces, 0)) for key in keys]
        found = sum(share * (sizes(key) - own) for key, share, own in zip(keys, shares.tolist(), fixed, strict=True))
        if np.abs(shares @ rates - wanted).max() > 1e-6 or abs(found - round(found)) > 1e-6:
            paths = ", ".join(key[0] for key in self.keys(space))
            raise SiteError("no layer tells the number of these channels", got=paths)
        return round(found)

    def places(self, key: Key, units: Mapping[int, int], sizes: Sizes) -> list[Place]:
        """Where new units of spaces come along an axis: after the old ones of each, in every run.

        Args:
            units: how many more units each of the spaces gets; the entries of their new channels are counted in this
                order.
            sizes: the length of every axis now.
        """
        found, now, starts, before = (
            list[tuple[int, Place]](),
            self.units_along(key, sizes),
            self._starts(key, sizes),
            0,
        )
        for space, more in units.items():
            per_unit = self.per_unit(key, space)
            for number in self._own[key].get(space, ()):
                run = self.axes[key][number]
                for outer in range(run.outer):
                    slots = run.slots[outer * run.inner : (outer + 1) * run.inner]
                    position = starts[number] + (outer + 1) * now[space] * run.inner
                    entries = tuple(before + unit * per_unit + slot for unit in range(more) for slot in slots)
                    found.append((number, Place(position, entries)))
            before += more * per_unit
        return [place for _, place in sorted(found, key=itemgetter(0))]

    def entries(self, key: Key, space: int, sizes: Sizes) -> list[int]:
        """The positions of a space's entries along an axis now, channel by channel."""
        now, starts, slots, rows = self.units(space, sizes), self._starts(key, sizes), list[int](), []
        for number in self._own[key].get(space, ()):
            run = self.axes[key][number]
            at = np.arange(starts[number], starts[number + 1])
            if run.outer == 1 and len(self._own[key][space]) == 1 and run.slots == tuple(range(run.inner)):
                return at.tolist()
            rows.append(at.reshape(run.outer, now, run.inner).swapaxes(0, 1).reshape(now, -1))
            slots += run.slots
        return np.concatenate(rows, 1)[:, np.argsort(slots)].ravel().tolist() if rows else []


def owners_of(runs: Sequence[Run], units: Sequence[int] | Mapping[int, int]) -> NDArray[np.int64]:
    """Per entry of an axis with these runs its space, unit and slot (entries, 3); space -1 for what never grows.

    Args:
        units: per space its number of units.
    """
    parts = [np.empty((0, 3), dtype=np.int64)]
    for run in runs:
        if run.space is None:
            parts.append(np.full((run.outer, 3), -1, dtype=np.int64))
            continue
        have = units[run.space]
        part = np.empty((run.outer, have, run.inner, 3), dtype=np.int64)
        part[..., 0] = run.space
        part[..., 1] = np.arange(have)[:, None]
        part[..., 2] = np.reshape(run.slots, (run.outer, 1, run.inner))
        parts.append(part.reshape(-1, 3))
    return np.concatenate(parts)


class Torn(Exception):
    """The entries of a space do not form runs along an axis.

    Attributes:
        space: its number.
    """

    def __init__(self, space: int) -> None:
        super().__init__(space)
        self.space = space


def runs_of(
    axis: NDArray[np.int64], units: Sequence[int] | Mapping[int, int], entries: Sequence[int] | Mapping[int, int]
) -> tuple[Run, ...]:
    """The runs that an axis is made of.

    Args:
        axis: per entry its space, unit and block (n, 3); space -1 for entries that never grow.
        units: per space its number of units.
        entries: per space the entries that a class has along this axis.

    Raises:
        Torn: for a space whose entries are in no such order.
    """
    edges = [0, *(np.flatnonzero(np.diff(axis[:, 0])) + 1).tolist(), len(axis)]
    runs: list[Run] = []
    met: dict[tuple[int, int], int] = defaultdict(int)
    for start, end in pairwise(edges):
        while start < end:
            space = int(axis[start, 0])
            if space < 0:
                runs.append(Run(None, end - start))
                break
            run = _run(axis[start:end], units[space], entries[space], met)
            runs.append(run)
            start += run.length(units)
    return tuple(runs)


def _run(stretch: NDArray[np.int64], units: int, entries: int, met: dict[tuple[int, int], int]) -> Run:
    """The longest run at the start of a stretch of one space; what a block has had before is in `met`."""
    space, unit = int(stretch[0, 0]), stretch[:, 1]
    if units == len(stretch) and entries == 1 and not stretch[:, 2].any() and (unit == np.arange(units)).all():
        met[space, 0] += 1  # one after the other, as mostly
        return Run(space, 1, 1, (met[space, 0] - 1,))
    # a space of one unit tells no repetitions: each goes on as long as the blocks do not fall
    others = np.flatnonzero(unit != unit[0] if units > 1 else np.diff(stretch[:, 2], prepend=stretch[0, 2]) < 0)
    inner = int(others[0]) if len(others) else len(stretch)
    whole, left = divmod(len(stretch), units * inner)
    for outer in dict.fromkeys((0 if left else whole, 1)):
        length = outer * units * inner
        if outer < 1 or length > len(stretch):
            continue
        grid = stretch[:length].reshape(outer, units, inner, 3)
        if not (grid[..., 1] == np.arange(units)[:, None]).all() or (grid[..., 2] != grid[:, :1, :, 2]).any():
            continue
        slots = []
        for block in grid[:, 0, :, 2].reshape(-1).tolist():
            slots.append(block * entries + met[space, block])
            met[space, block] += 1
        return Run(space, outer, inner, tuple(slots))
    raise Torn(space)
