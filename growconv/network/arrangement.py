"""How the classes of every space fall into units, and where these lie: read off the numbers at the model's own widths.

Along an axis every entry has a code: its space, its unit and its block in one number. What codes form runs
(`layout.Run`) can be laid out at any width.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray
from torch import nn

from growconv.network import layers
from growconv.network.classes import Space
from growconv.network.layout import ENTRY, FILL, Key, Layout, Run, SizeAttribute, Torn, owners_of, runs_of
from growconv.network.model import module_at
from growconv.network.numbers import Attribute, Numbers

Codes = NDArray[np.int64]
"""Per entry of an axis its code; -1 for entries that never grow."""
BLOCKS = (1, 2, 3, 4, 8)
"""Numbers of blocks that are tried beside the groups of the convolutions on the way."""
INTERLEAVED = "its channels are interleaved in a way that is not followed"
_UNIT, _SPACE = 1 << 18, 1 << 36


class Arrangement:
    """The spaces of a model, and where their channels lie.

    Args:
        model: it or a copy.
        numbers: what sending numbers through it found.
        spaces: its spaces; those that cannot be laid out are given a reason, those that are joined are replaced.

    Attributes:
        axes: the runs of every axis, of those spaces that were laid out last.
        dims: along which of its dimensions a bare parameter or buffer has its channels.
        bound: the attributes that follow the widths.
        codes: per number its code.
    """

    def __init__(self, model: nn.Module, numbers: Numbers, spaces: list[Space]) -> None:
        self.numbers = numbers
        self.spaces = spaces
        self.dims: dict[str, int] = {}
        self.axes: dict[Key, tuple[Run, ...]] = {}
        self.bound: set[Attribute] = {
            (path, name, index)
            for (path, name, index), counted in numbers.literals.items()
            if layers.tells_its_entries(module_at(model, path), name) and len(np.unique(numbers.roots()[counted])) > 1
        }
        self._groups = {
            path: layers.groups_of(module)
            for path, module in model.named_modules()
            if layers.is_weighted(module) and layers.groups_of(module) > 1 and not layers.in_whole_groups(module)
        }
        self._laid_out: dict[tuple[int, ...], tuple[dict[Key, tuple[Run, ...]], set[int]]] = {}
        self._first: dict[Space, str | None] = {}  # why it cannot grow as it was taken to at first
        self._tried: dict[Space, set[tuple[int, bool]]] = {}  # blocks that do not fit, and whether of neighbours
        self._recount()

    @property
    def live(self) -> list[int]:
        """The spaces that nothing speaks against."""
        return [number for number, space in enumerate(self.spaces) if space.reason is None]

    @property
    def units(self) -> list[int]:
        """The units of every space now."""
        return [space.units for space in self.spaces]

    # ------------------------------------------------------------------------------------------ codes

    def _recount(self) -> None:
        """Per number its code; -1 for numbers of no space."""
        self._laid_out.clear()
        by_root = np.full(self.numbers.count, -1, dtype=np.int64)
        for number, space in enumerate(self.spaces):
            unit, block = np.divmod(np.arange(len(space.roots)), space.blocks if space.neighbours else space.units)
            if not space.neighbours:
                unit, block = block, unit
            by_root[space.roots] = number * _SPACE + unit * _UNIT + block
        self.codes = np.append(by_root[self.numbers.roots()], -1)

    def codes_of(self, numbers: Sequence[int], live: Iterable[int] | None = None) -> Codes:
        """The codes of some numbers; -1 for those of spaces that are not live."""
        return self._alive(self.codes[np.asarray(numbers, dtype=np.int64)], live)

    def _alive(self, codes: Codes, live: Iterable[int] | None) -> Codes:
        if live is None:
            return codes
        alive = np.zeros(len(self.spaces) + 1, dtype=bool)
        alive[list(live)] = True
        return np.where(alive[codes // _SPACE], codes, -1)  # -1 is the last

    def _axis(self, key: Key) -> Codes:
        """The codes along an axis at the present widths."""
        if key in self.numbers.columns:
            return self.codes[self.numbers.columns[key]]
        numbers = self.numbers.range_of(key)
        found = self.codes[numbers.start : numbers.stop]
        if key[1] == ENTRY and key[0] in self.dims:
            shape, dim = self.numbers.shapes[key[0]], self.dims[key[0]]
            found = np.moveaxis(found.reshape(shape), dim, 0).reshape(shape[dim], -1).max(1)
        return found

    def expected(self, key: Key, runs: Sequence[Run], units: Sequence[int]) -> Codes:
        """The codes along an axis with these runs, at other numbers of units."""
        parts = [np.empty(0, dtype=np.int64)]
        for run in runs:
            if run.space is None:
                parts.append(np.full(run.outer, -1, dtype=np.int64))
                continue
            space = self.spaces[run.space]
            if space.blocks == 1 and run.slots == (0,):  # one after the other, as mostly
                parts.append(run.space * _SPACE + np.arange(units[run.space]) * _UNIT)
                continue
            blocks = np.append(space.on(key), space.blocks)  # the last is none: what was read off has more
            place = np.reshape(run.slots, (run.outer, 1, run.inner)) // max(1, space.counts.get(key, 1))
            unit = np.arange(units[run.space])[:, None] * _UNIT
            parts.append((run.space * _SPACE + unit + blocks[np.minimum(place, len(blocks) - 1)]).ravel())
        return np.concatenate(parts)

    # ------------------------------------------------------------------------------------------ runs

    def parse(self, codes: Codes, key: Key, units: Sequence[int]) -> tuple[Run, ...]:
        """The runs that codes along an axis form; Torn for a space whose form none."""
        axis = np.stack([codes // _SPACE, units_of(codes), codes % _UNIT], axis=1)
        involved = spaces_in(codes)
        for number in involved:
            if self.spaces[number].lies:
                own = axis[:, 0] == number
                axis[own, 2] = np.searchsorted(self.spaces[number].on(key), axis[own, 2])
        entries = {number: self.spaces[number].counts.get(key, 0) for number in involved}
        return runs_of(np.where(codes[:, None] < 0, -1, axis), units, entries)

    def _runs(self, key: Key, live: Sequence[int]) -> tuple[tuple[Run, ...], set[int]]:
        """The runs of an axis at the present widths, and the spaces that form none, or not in whole groups."""
        units, torn = self.units, set[int]()
        while True:
            try:
                runs = self.parse(self._alive(self._axis(key), set(live) - torn), key, units)
                break
            except Torn as error:
                torn.add(error.space)
        groups = self._groups.get(key[0], 1)
        for number in live if groups > 1 else ():  # every group keeps its channels and gets as many new ones
            more = owners_of(runs, [*units[:number], units[number] + 1, *units[number + 1 :]])
            old = (more[:, 0] != number) | (more[:, 1] < units[number])
            before, after = (np.arange(count) * groups // count for count in (np.count_nonzero(old), len(more)))
            if len(more) % groups or (after[old] != before).any():
                torn.add(number)
        return runs, torn

    def lay_out(self, live: Sequence[int]) -> set[int]:
        """Read off the runs of every axis at the present widths; the spaces that form none."""
        if tuple(live) not in self._laid_out:
            axes, torn, owners = dict[Key, tuple[Run, ...]](), set[int](), dict[Key, list[int]]()
            for number in live:
                for key in self.spaces[number].counts:
                    owners.setdefault(key, []).append(number)
            for key, own in owners.items():
                axes[key], left = self._runs(key, own)
                torn |= left
            self._laid_out[tuple(live)] = axes, torn
        axes, torn = self._laid_out[tuple(live)]
        self.axes = dict(axes)
        return torn

    def relay(self) -> Layout:
        """The layout of all spaces that have no reason against them now."""
        live, read_off = self.live, dict(self.axes)
        self.lay_out(live)
        single = {number for number in live if self.spaces[number].units == 1}
        for key, runs in read_off.items():  # what a space of one unit does not tell by itself
            own = {run.space for run in runs}
            if single & own and own == {run.space for run in self.axes.get(key, ())}:
                self.axes[key] = runs
        return replace(self.layout(), axes={key: runs for key, runs in self.axes.items() if key[1] != FILL})

    def layout(self) -> Layout:
        """Where the channels of the spaces that were laid out last lie."""
        channels = tuple(space.channels for space in self.spaces)
        return Layout(dict(self.axes), channels, dict(self.dims), tuple(self._attributes()))

    def _attributes(self) -> Iterator[SizeAttribute]:
        for path, name, index in sorted(self.bound, key=str):
            classes = self.codes_of(self.numbers.literals[path, name, index])
            rates: dict[int, int] = {}
            for number in spaces_in(classes):
                rate, left = divmod(int((classes // _SPACE == number).sum()), self.spaces[number].units)
                if not left and self.spaces[number].reason is None:
                    rates[number] = rate
            if rates:
                yield SizeAttribute(path, name, index, rates)

    # ------------------------------------------------------------------------------------------ units

    def _bare_axes(self) -> None:
        """Find along which of its dimensions a bare parameter has its channels."""
        for path, shape in self.numbers.shapes.items():
            numbers = self.numbers.range_of((path, ENTRY))
            grid = self.codes[numbers.start : numbers.stop].reshape(shape)
            involved = [self.spaces[number] for number in spaces_in(grid)]
            if not involved:
                continue
            # entries of no space are those that nothing reads, as rows of an embedding
            varying = [d for d in range(grid.ndim) if bool(((grid != grid.max(d, keepdims=True)) & (grid >= 0)).any())]
            if len(varying) > 1:
                for space in involved:
                    space.reason = f"entries of {path} belong to different channels along several of its axes"
                continue
            dim = varying[0] if varying else int(np.argmax(shape))
            self.dims[path] = dim
            along = np.moveaxis(grid, dim, 0).reshape(shape[dim], -1).max(1)
            for number in spaces_in(grid):
                space = self.spaces[number]
                space.counts[path, ENTRY] = int((along // _SPACE == number).sum()) // len(space.roots)

    def _fits(self, number: int) -> bool:
        """Whether the entries of a space form runs at the present widths, in whole groups."""
        return not any(self._runs(key, [number])[1] for key in self.spaces[number].counts)

    def guess_all(self) -> list[int]:
        """Into how many blocks the classes of each space fall at the present widths; the spaces that fall into none."""
        self._bare_axes()
        torn = sorted(self.lay_out(self.live))
        for number in torn:
            counts = self.spaces[number].counts if len(self.spaces[number].roots) == 1 else {}
            parting = next((path for (path, _), count in counts.items() if count > 1 and path in self._groups), None)
            text = f"its channels depend on each other, and the groups of {parting} part them"
            self.next_guess(number, INTERLEAVED if parting is None else text)
            if self.spaces[number].reason is None:
                self._first.pop(self.spaces[number])  # where it may fail yet, that is the reason
        return [number for number in torn if self.spaces[number].reason is not None]

    def next_guess(self, number: int, reason: str) -> None:
        """Another number of blocks for a space that fails; the reason for which it failed first, if there is none."""
        space = self.spaces[number]
        tried = self._tried.setdefault(space, set())
        self._first.setdefault(space, reason)
        tried.add((space.blocks, space.neighbours))
        if space.copied:
            space.reason = f"its channels depend on each other, and do not come twice either: {reason}"
            return
        groups = [self._groups[path] for path, _ in space.counts if path in self._groups]
        shuffled = [first * second for first in groups for second in groups]  # one of each group in each group
        guesses = dict.fromkeys((*groups, *BLOCKS, *shuffled))
        for blocks, neighbours in product(guesses, (False, True)):
            whole = blocks in (1, len(space.roots)) and neighbours
            if (blocks, neighbours) in tried or len(space.roots) % blocks or whole:
                continue
            space.blocks, space.neighbours = blocks, neighbours
            self._recount()
            if self._fits(number):
                return
            tried.add((blocks, neighbours))
        self.refuse(number, reason)

    def refuse(self, number: int, reason: str) -> None:
        """Give a space the reason for which it failed first; this one where it had not."""
        self.spaces[number].reason = self._first.get(self.spaces[number], reason)

    def replaced(self, members: Sequence[Space], joint: Space) -> bool:
        """Put one space in the place of several, where its classes form runs."""
        before = list(self.spaces)
        place = next(number for number, space in enumerate(before) if space in members)
        self.spaces[:] = [space for space in before if space not in members]
        self.spaces.insert(place, joint)
        self._recount()
        if self._fits(place):
            return True
        self.spaces[:] = before
        self._recount()
        return False


def spaces_in(codes: Codes) -> set[int]:
    """All spaces of some codes."""
    return set(np.unique(codes[codes >= 0] // _SPACE).tolist())


def spaces_of(codes: Codes) -> Codes:
    """The space of each code."""
    return codes // _SPACE


def units_of(codes: Codes) -> Codes:
    """The unit of each code."""
    return codes % _SPACE // _UNIT
