"""Rehearsal: spaces are proved before they are handed out as sites.

The code takes other widths: on a copy whose layers only pretend to compute, all producers get a few more units, and the
numbers are sent again. Where the new ones arrive says where every consumer, norm and parameter is widened; old ones
must arrive where they did.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray
from torch import nn

from growconv.network import layers
from growconv.network.classes import Space, Torn, joined, runs_of
from growconv.network.failures import Failure, LookFailed, Ran
from growconv.network.layout import ENTRY, FILL, GROUP_OUT, OUT, Key, Layout, Run, SizeAttribute, owners_of
from growconv.network.model import Arguments, module_at, same_chance
from growconv.network.numbers import Attribute, Numbers
from growconv.network.pretender import pretending
from growconv.network.trace import look

MORE_UNITS = (1, 2, 3)
"""Units that neighbouring spaces get in a rehearsal: different ones, so that spaces that only grow together show."""
BLOCKS = (1, 2, 3, 4, 8)
"""Numbers of blocks that are tried beside the groups of the convolutions on the way."""
PATIENCE = 60, 4
"""Rehearsals after which spaces that fail are given no further chance, and how many more for each that got its reason:
what the search may cost has an end."""
DOUBLINGS = 3
"""So often the outputs of spaces that only grow together are doubled, until they show how many make up a unit."""
FEW = 3
"""So many spaces that fail are tried one by one at once; more of them first together without the others."""
Codes = NDArray[np.int64]
"""Per entry of an axis its space, unit and block in one number; -1 for entries that never grow."""
INTERLEAVED = "its channels are interleaved in a way that is not followed"
Signature = frozenset[tuple[Key, int]]
"""The axes that a class lies on, with its entries on each."""
_UNIT, _SPACE = 1 << 18, 1 << 36


@dataclass(eq=False)
class Example:
    """One way in which the model is run: its arguments and its mode, and what ran when numbers were sent through it."""

    arguments: Arguments
    training: bool
    trail: list[Ran] = field(default_factory=list)


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


@dataclass
class Verdict:
    """What a rehearsal of some spaces gave.

    Attributes:
        reasons: the spaces that failed, and why.
        alone: those of them that would fail without the others too.
        fixed: those of them on which an operation failed that takes one width only.
        stuck: those of them that are fixed whatever attributes say.
        led: those of them that failed since sizes had followed another space that grows by copies, and which.
        supposed: whether they were only near an error of the code itself, and others may be to blame.
    """

    reasons: dict[int, str] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)
    fixed: set[int] = field(default_factory=set)
    stuck: set[int] = field(default_factory=set)
    led: dict[int, int] = field(default_factory=dict)
    supposed: bool = False


class Widening:
    """Which numbers of units a model's spaces can be given, found out on a copy that only pretends to compute.

    Args:
        model: a copy that may be changed.
        examples: how it is run.
        numbers: what sending numbers through it found at its present widths.
        spaces: the spaces; those that fail are given a reason.
    """

    def __init__(self, model: nn.Module, examples: Sequence[Example], numbers: Numbers, spaces: list[Space]) -> None:
        self.examples = examples
        self.numbers = numbers
        self.spaces = spaces
        self.model = model
        self.dims: dict[str, int] = {}
        self.axes: dict[Key, tuple[Run, ...]] = {}
        self.bound: set[Attribute] = {
            (path, name, index)
            for (path, name, index), counted in numbers.literals.items()
            if layers.tells_its_entries(module_at(model, path), name) and len(np.unique(numbers.roots()[counted])) > 1
        }
        self._bound_for = set[tuple[frozenset[int], bool]]()
        self._rehearsals = 0
        self._shapes: layers.Shapes = {}
        self._laid_out: dict[tuple[int, ...], tuple[dict[Key, tuple[Run, ...]], set[int]]] = {}
        self._groups = {
            path: layers.groups_of(module)
            for path, module in model.named_modules()
            if layers.is_weighted(module) and layers.groups_of(module) > 1 and not layers.in_whole_groups(module)
        }
        self._recount()

    # ------------------------------------------------------------------------------------------ the whole

    def prove(self) -> Layout:
        """Give every space that cannot be widened its reason; the layout of the others."""
        self._join(self._guess_all())
        while live := [number for number, space in enumerate(self.spaces) if space.reason is None]:
            failed = self._bind(live, self._attempt(live))
            if not failed.reasons:
                break
            parts = [number for number in sorted(failed.reasons) if not self.spaces[number].alone]
            cut = not self._cut().isdisjoint(parts)
            if self._join_copied(failed.led) or (cut and self._join(parts)):
                continue
            found = self._alone(failed, live)
            for number, reason in found.items():
                self._change(number, reason, failed, len(found) <= FEW)
        return self.relay()

    def _change(self, number: int, reason: str, failed: Verdict, few: bool) -> None:
        """Let a space that fails be something else, or give it its reason.

        Args:
            failed: where it failed together with others.
            few: whether it is worth while to try the next guess by itself.
        """
        space, patient = self.spaces[number], self._patient
        tells = patient and number not in failed.stuck
        if tells and not self._bind([number], Verdict({number: reason}), one=True).reasons:
            return
        if number in failed.fixed or not patient:
            space.reason = space.first or reason
            return
        self._next_guess(number, reason)
        while few and space.reason is None and self._patient and self._attempt([number]).reasons:
            self._next_guess(number, reason)

    def presume(self) -> Layout:
        """The layout at the present widths, taken to hold at others."""
        self._guess_all()
        return self.relay()

    def _guess_all(self) -> list[int]:
        """Into how many blocks the classes of each space fall at the present widths; the spaces that fall into none."""
        self._bare_axes()
        torn = sorted(self._lay_out([n for n, space in enumerate(self.spaces) if space.reason is None]))
        for number in torn:
            counts = self.spaces[number].counts if len(self.spaces[number].roots) == 1 else {}
            parting = next((path for (path, _), count in counts.items() if count > 1 and path in self._groups), None)
            text = f"its channels depend on each other, and the groups of {parting} part them"
            self._next_guess(number, INTERLEAVED if parting is None else text)
            if self.spaces[number].reason is None:
                self.spaces[number].first = None  # where it may fail yet, that is the reason
        return [number for number in torn if self.spaces[number].reason is not None]

    def relay(self) -> Layout:
        """The layout of all spaces that have no reason against them now."""
        live = [number for number, space in enumerate(self.spaces) if space.reason is None]
        read_off = dict(self.axes)
        self._lay_out(live)
        single = {number for number in live if self.spaces[number].units == 1}
        for key, runs in read_off.items():  # what a space of one unit does not tell by itself
            own = {run.space for run in runs}
            if single & own and own == {run.space for run in self.axes.get(key, ())}:
                self.axes[key] = runs
        return replace(self.layout(), axes={key: runs for key, runs in self.axes.items() if key[1] != FILL})

    @property
    def _patient(self) -> bool:
        first, each = PATIENCE
        return self._rehearsals < first + each * sum(space.reason is not None for space in self.spaces)

    def _alone(self, failed: Verdict, live: Sequence[int]) -> dict[int, str]:
        """Of the spaces that failed together those that fail by themselves too; all of them where none does."""
        if (len(failed.reasons) == 1 and not failed.supposed) or not self._patient:
            return failed.reasons
        if failed.alone:
            return {number: failed.reasons[number] for number in sorted(failed.alone)}
        doubtful = [number for number in sorted(failed.reasons) if not self.spaces[number].cleared]
        if failed.supposed or not 0 < len(doubtful) <= FEW:
            again = self._attempt(doubtful or sorted(failed.reasons))
        else:
            again = Verdict({number: failed.reasons[number] for number in doubtful})
        if failed.supposed and not again.reasons:  # those around the error are not to blame
            again = Verdict(dict.fromkeys(live, next(iter(failed.reasons.values()))))
        found = {number: again.reasons[number] for number in again.alone}
        for number in sorted(again.reasons.keys() - again.alone):
            if self._patient:
                single = self._attempt([number])
                self.spaces[number].cleared = not single.reasons
                failed.fixed |= {number} if single.supposed else set()
                found |= single.reasons
        return found or failed.reasons

    def layout(self) -> Layout:
        """Where the channels of all spaces without a reason lie."""
        channels = tuple(space.channels for space in self.spaces)
        return Layout(dict(self.axes), channels, dict(self.dims), tuple(self._attributes()))

    @property
    def _units(self) -> list[int]:
        """The units of every space now."""
        return [space.units for space in self.spaces]

    def _attempt(self, live: Sequence[int]) -> Verdict:
        """One rehearsal of some spaces."""
        self._lay_out(live)
        more = {number: MORE_UNITS[place % len(MORE_UNITS)] for place, number in enumerate(live)}
        if len(live) == 1:
            more = {live[0]: 2}
        for number in self._cut() & set(live):  # a part, such as a quarter, is another only once there are many more
            units = self.spaces[number].units
            more[number] += units if units > more[number] else 0
        return self._rehearse(live, more)

    def _rehearse(self, live: Sequence[int], more: Mapping[int, int]) -> Verdict:
        """Send the numbers through the pretending model at more units of some spaces; of a single one till it fails."""
        self._rehearsals += 1
        units = [now + more.get(number, 0) for number, now in enumerate(self._units)]
        layout, found = self.layout(), Numbers()
        try:
            with pretending(self.model, layout, self._units, units, self._shapes):
                self._look(found, on=len(live) > 1)
        except LookFailed as failed:
            if failed.stopped is not None:  # sizes that code of its kind may have compared tell numbers of channels
                kind = type(module_at(self.model, failed.stopped))
                for place, counted in self.numbers.compared.items():
                    if type(module_at(self.model, place[0])) is kind:
                        self.numbers.literals.setdefault(place, counted)
            return self._blamed(failed.failures, found, layout, units, live)
        return Verdict(self._compare(found, layout, units, live))

    def _look(self, found: Numbers, on: bool = False) -> None:
        """Send numbers through the pretending model, in every way; `on` tells whether to go on where the code fails."""
        for example in self.examples:
            self.model.train(example.training)
            same_chance()
            look(self.model, example.arguments, found, True, example.trail if on else ())

    def _blamed(
        self, failures: Sequence[Failure], found: Numbers, layout: Layout, units: Sequence[int], live: Sequence[int]
    ) -> Verdict:
        """The spaces that failing operations met, with the error; all where none is known to have met any."""
        verdict, roots, now = Verdict(), found.roots(), self._units
        low, high = self._by_class(found, {key: self._expected(layout, key, units) for key in layout.axes})
        for each in failures:
            line = (str(each.error).splitlines() or [""])[0][:160]
            text = f"the code fails at another width: {type(each.error).__name__}: {line}"
            text += f" (in {each.where})" if each.where else ""
            spaces, near = (
                _of_spaces(roots[list(numbers)], low, high) & set(live) for numbers in (each.numbers, each.near)
            )
            # sizes that followed other channels than those which it met
            ahead = {n for n in live if (units[n] - now[n]) * self.spaces[n].blocks in each.more} - spaces
            for number in spaces:
                size = len(self.spaces[number].roots)
                alike = [n for n in ahead if self.spaces[n].copied and len(self.spaces[n].roots) == size]
                if len(alike) == 1:
                    verdict.led[number] = alike[0]
            supposed = each.supposed or not (spaces or ahead)  # it may have followed the sizes of what is near
            spaces = spaces or ahead or near
            verdict.supposed |= supposed and bool(spaces)
            verdict.reasons |= dict.fromkeys(spaces - verdict.reasons.keys(), text)
            fixed = spaces if each.fixed and (each.supposed or not supposed) else set()
            verdict.alone |= spaces if len(spaces) == 1 and not supposed else fixed
            verdict.fixed |= fixed
            if not verdict.reasons:
                return Verdict(dict.fromkeys(live, text))
        return verdict

    def _cut(self) -> set[int]:
        """The spaces of which slices or splits take a part."""
        cut = np.asarray([number for part in self.numbers.cuts for number in part], dtype=np.int64)
        return _spaces(self._codes[cut]) if len(cut) else set()

    # ------------------------------------------------------------------------------------------ runs

    def _recount(self) -> None:
        """Per number its code; -1 for numbers of no space."""
        self._laid_out.clear()
        by_root = np.full(self.numbers.count, -1, dtype=np.int64)
        for number, space in enumerate(self.spaces):
            unit, block = np.divmod(np.arange(len(space.roots)), space.blocks if space.neighbours else space.units)
            if not space.neighbours:
                unit, block = block, unit
            by_root[space.roots] = number * _SPACE + unit * _UNIT + block
        self._codes = np.append(by_root[self.numbers.roots()], -1)

    def _axis(self, key: Key) -> Codes:
        """The codes along an axis at the present widths."""
        if key in self.numbers.columns:
            return self._codes[self.numbers.columns[key]]
        numbers = self.numbers.range_of(key)
        found = self._codes[numbers.start : numbers.stop]
        if key[1] == ENTRY and key[0] in self.dims:
            shape, dim = self.numbers.shapes[key[0]], self.dims[key[0]]
            found = np.moveaxis(found.reshape(shape), dim, 0).reshape(shape[dim], -1).max(1)
        return found

    def _alive(self, codes: Codes, live: Iterable[int]) -> Codes:
        """Codes of live spaces, -1 for the others."""
        alive = np.zeros(len(self.spaces) + 1, dtype=bool)
        alive[list(live)] = True
        return np.where(alive[codes // _SPACE], codes, -1)  # -1 is the last

    def _bare_axes(self) -> None:
        """Along which of its dimensions a bare parameter has its channels."""
        for path, shape in self.numbers.shapes.items():
            numbers = self.numbers.range_of((path, ENTRY))
            grid = self._codes[numbers.start : numbers.stop].reshape(shape)
            involved = [self.spaces[number] for number in _spaces(grid)]
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
            for number in _spaces(grid):
                space = self.spaces[number]
                space.counts[path, ENTRY] = int((along // _SPACE == number).sum()) // len(space.roots)

    def _fits(self, number: int) -> bool:
        """Whether the entries of a space form runs at the present widths, in whole groups."""
        return not any(self._runs(key, [number])[1] for key in self.spaces[number].counts)

    def _parse(self, codes: Codes, key: Key, units: Sequence[int] | Mapping[int, int]) -> tuple[Run, ...]:
        axis = np.stack([codes // _SPACE, codes % _SPACE // _UNIT, codes % _UNIT], axis=1)
        involved = _spaces(codes)
        for number in involved:
            if self.spaces[number].lies:
                own = axis[:, 0] == number
                axis[own, 2] = np.searchsorted(self.spaces[number].on(key), axis[own, 2])
        entries = {number: self.spaces[number].counts.get(key, 0) for number in involved}
        return runs_of(np.where(codes[:, None] < 0, -1, axis), units, entries)

    def _runs(self, key: Key, live: Sequence[int]) -> tuple[tuple[Run, ...], set[int]]:
        """The runs of an axis at the present widths, and the spaces that form none, or not in whole groups."""
        units, torn = self._units, set[int]()
        while True:
            try:
                runs = self._parse(self._alive(self._axis(key), set(live) - torn), key, units)
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

    def _lay_out(self, live: Sequence[int]) -> set[int]:
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

    def _next_guess(self, number: int, reason: str) -> None:
        """Another number of blocks for a space, or the reason why there is none."""
        space = self.spaces[number]
        space.first = space.first or reason
        space.tried.add((space.blocks, space.neighbours))
        if space.copied:
            space.reason = f"its channels depend on each other, and do not come twice either: {reason}"
            return
        groups = [self._groups[path] for path, _ in space.counts if path in self._groups]
        shuffled = [first * second for first in groups for second in groups]  # one of each group in each group
        guesses = dict.fromkeys((*groups, *BLOCKS, *shuffled))
        for blocks, neighbours in product(guesses, (False, True)):
            whole = blocks in (1, len(space.roots)) and neighbours
            if (blocks, neighbours) in space.tried or len(space.roots) % blocks or whole:
                continue
            space.blocks, space.neighbours, space.cleared = blocks, neighbours, False
            self._recount()
            if self._fits(number):
                return
            space.tried.add((blocks, neighbours))
        space.reason = space.first

    # ------------------------------------------------------------------------------------------ what grows together

    def _join_copied(self, led: Mapping[int, int]) -> bool:
        """Join spaces that failed to the ones that their sizes have to follow, where those only grow by copies."""
        groups: dict[int, list[int]] = {}
        for number in sorted(led):
            groups.setdefault(led[number], []).append(number)
        # the last first, so that along an axis with several of them blocks fall where one ends
        members = [[self.spaces[each] for each in (*own[::-1], ahead)] for ahead, own in groups.items()]
        joint = False
        for each in members:
            if set(each) <= set(self.spaces):  # else one of them was joined to others before
                joint |= self._replaced(each, [len(space.roots) for space in each], False)
        return joint

    def _join(self, seeds: Iterable[int]) -> bool:
        """Make one space of those that only grow together: halves of a split, both branches of a shuffled unit.

        Returns whether some were joined.
        """
        groups, joint = self._together([self.spaces[number] for number in seeds]), False
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
        known = set[Space]()
        for seed in seeds:
            spaces = [] if seed in known else [seed]
            for member in spaces:  # which gets longer
                near = [
                    each for each in self.spaces if any(key[1] == OUT for key in each.counts.keys() & member.counts)
                ]
                near += [each for each in seeds if each.counts.keys() & member.counts]
                spaces += dict.fromkeys(each for each in near if each not in spaces)
            for space in spaces:
                space.alone = True
            known |= set(spaces)
            groups += [Group(spaces)] if len(spaces) > 1 else []
        return groups

    def _counted(self, groups: Sequence[Group], more: Sequence[int]) -> list[list[int]]:
        """Per group how many more classes its spaces have, once its producers have so many times more of their shares.

        Attributes that count channels of a group follow: those that do so already, or all where the code fails then.
        Below 0: it fails even so.
        """
        space, axes = len(self.spaces), dict[Key, tuple[Run, ...]]()
        for group, times in zip(groups, more, strict=True):
            for key, share in group.shares.items():
                run = Run(space, 1, times * share, tuple(range(times * share)))
                axes[key] = Run(None, len(self.numbers.range_of(key))), run
        telling = self._telling(groups, more)
        for places in (telling.keys() & self.bound, telling.keys()):
            attributes = tuple(SizeAttribute(*place, {space: telling[place]}) for place in places)
            layout, found = Layout(axes, (), self.dims, attributes), Numbers()
            try:
                with pretending(self.model, layout, [0] * (space + 1), [0] * space + [1], self._shapes):
                    self._look(found)
            except LookFailed:
                continue
            self.bound = self.bound | places
            classes = Counter(
                frozenset((key, count) for key, count, _ in axes if key[0] not in self.dims)
                for axes in found.signatures().values()
            )
            return [[classes[self._signature(each)] - len(each.roots) for each in group.spaces] for group in groups]
        return [[-1]] * len(groups)

    def _telling(self, groups: Sequence[Group], more: Sequence[int]) -> dict[Attribute, int]:
        """The attributes that count channels of one group, and by how much they are then larger."""
        found: dict[Attribute, int] = {}
        for group, times in zip(groups, more, strict=True):
            own = {number for number, space in enumerate(self.spaces) if space in group.spaces}
            for place, counted in self.numbers.literals.items():
                larger, left = divmod(times * len(counted), group.unit)
                if not left and _spaces(self._codes[np.asarray(counted, dtype=np.int64)]) <= own:
                    found[place] = larger
        return found

    def _signature(self, space: Space) -> Signature:
        return frozenset(each for each in space.counts.items() if each[0][0] not in self.dims)

    def _replaced(self, members: Sequence[Space], rates: Sequence[int], last: bool) -> bool:
        """Put one space in the place of several, as `joined` makes it, where its classes form runs."""
        joint, before = joined(members, rates, last, self.numbers.order), list(self.spaces)
        joint.copied = any(member.copied for member in members)
        place = next(number for number, space in enumerate(before) if space in members)
        self.spaces[:] = [space for space in before if space not in members]
        self.spaces.insert(place, joint)
        self._recount()
        if self._fits(place):
            return True
        self.spaces[:] = before
        self._recount()
        return False

    # ------------------------------------------------------------------------------------------ sizes in attributes

    def _attributes(self) -> Iterator[SizeAttribute]:
        for path, name, index in sorted(self.bound, key=str):
            counted = self.numbers.literals[path, name, index]
            classes = self._codes[np.asarray(counted, dtype=np.int64)]
            rates: dict[int, int] = {}
            for number in _spaces(classes):
                rate, left = divmod(int((classes // _SPACE == number).sum()), self.spaces[number].units)
                if not left and self.spaces[number].reason is None:
                    rates[number] = rate
            if rates:
                yield SizeAttribute(path, name, index, rates)

    def _bind(self, live: Sequence[int], failed: Verdict, one: bool = False) -> Verdict:
        """Let all attributes follow the widths, or one, if that gets spaces which fail further; tried once each."""
        before, together = self.bound, frozenset(failed.reasons)
        if (together, one) in self._bound_for:
            return failed
        self._bound_for.add((together, one))
        counting = [
            place
            for place, counted in sorted(self.numbers.literals.items(), key=str)
            if place not in before and together & _spaces(self._codes[np.asarray(counted, dtype=np.int64)])
        ]
        still = failed
        while counting and still.reasons and not one and self.bound != before | self.numbers.literals.keys():
            self.bound = before | self.numbers.literals.keys()
            still = self._attempt(live)  # which may tell of more of them
        # or the code runs to its end only now, and all that fails then follows channels that are known
        onward = failed.supposed and not still.supposed and still.reasons.keys() == still.led.keys()
        if still.reasons.keys() < together or onward:
            return still
        for place in counting[:8] if one else ():  # others have the number of the channels by chance
            self.bound = before | {place}
            if not self._attempt(live).reasons:
                return Verdict()
        self.bound = before
        failed.stuck = set() if still is failed else still.fixed
        return failed

    # ------------------------------------------------------------------------------------------ the widened model

    def _by_class(self, found: Numbers, known: Mapping[Key, Codes]) -> tuple[Codes, Codes]:
        """Per class of the widened model, by its root, the lowest and the highest code of its entries; -2: none."""
        roots = found.roots()
        low, high = np.full(len(roots) + 1, np.iinfo(np.int64).max), np.full(len(roots) + 1, -2, dtype=np.int64)
        for key, codes in known.items():
            if key[1] in (OUT, FILL):
                numbers = found.range_of(key)
                own = roots[numbers.start : numbers.stop][: len(codes)]
                np.minimum.at(low, own, codes[: len(own)])
                np.maximum.at(high, own, codes[: len(own)])
        return low, high

    def _compare(self, found: Numbers, layout: Layout, units: Sequence[int], live: Sequence[int]) -> dict[int, str]:
        """Hold the widened model's numbers against the layout."""
        roots, known = found.roots(), {key: self._expected(layout, key, units) for key in layout.axes}
        low, high = self._by_class(found, known)
        culprits: dict[int, str] = {}
        for key, codes in known.items():
            if key[1] in (OUT, FILL) and len(found.range_of(key)) != len(codes):
                culprits |= dict.fromkeys(_spaces(codes), f"a literal size in the code of {key[0].split(' #')[0]}")
        apart = np.flatnonzero((high >= 0) & (low != high))
        for first, last in set(zip(low[apart].tolist(), high[apart].tolist(), strict=True)):
            own = {each // _SPACE for each in (first, last) if each >= 0}
            text = "its channels are tied to others once there are more"
            if len(own) == 1:
                single = self.spaces[min(own)].units == 1
                text = "its channels depend on each other" if single else "a literal size in the code ties new channels"
            culprits |= dict.fromkeys(own, text)
        if culprits:
            return culprits
        for root, reason in found.reasons().items():
            if high[root] >= 0:
                number, unit = int(high[root]) // _SPACE, int(high[root]) % _SPACE // _UNIT
                if unit >= self.spaces[number].units:
                    culprits.setdefault(number, reason)
        high[-1] = -1
        culprits |= self._cut_otherwise(found, np.maximum(high[np.append(roots, -1)], -1), live)
        for key, expected in known.items():
            if key[1] in (OUT, FILL) or (key[1] == ENTRY and key[0] in self.dims):
                continue
            if key[1] == GROUP_OUT:
                numbers = found.range_of(key)
                actual = high[roots[numbers.start : numbers.stop]]
            else:
                columns = found.columns.get(key, np.empty(0, dtype=np.int64))
                actual = high[np.where(columns >= 0, roots[columns], -1)]
            actual = np.maximum(actual, -1)
            if not np.array_equal(actual, expected):
                culprits |= self._arrivals(key, actual, expected, units)
        return {number: reason for number, reason in culprits.items() if number in live}

    def _cut_otherwise(self, found: Numbers, codes: Codes, live: Sequence[int]) -> dict[int, str]:
        """The spaces of which a slice or split takes other old channels than before."""
        culprits: dict[int, str] = {}
        if len(found.cuts) != len(self.numbers.cuts):
            return culprits
        old_units = np.array(self._units)
        for old, new in zip(self.numbers.cuts, found.cuts, strict=True):
            before = self._alive(self._codes[np.asarray(old, dtype=np.int64)], live)
            after = codes[np.asarray(new, dtype=np.int64)]
            before, after = before[before >= 0], after[after >= 0]
            after = after[after % _SPACE // _UNIT < old_units[after // _SPACE]]
            if not np.array_equal(before, after):
                text = "a slice or split in the code takes other channels once there are more"
                culprits |= dict.fromkeys(_spaces(np.setxor1d(before, after)) or _spaces(before), text)
        return culprits

    def _expected(self, layout: Layout, key: Key, units: Sequence[int]) -> Codes:
        """Space, unit and block of every entry of an axis as the layout has it."""
        parts = [np.empty(0, dtype=np.int64)]
        for run in layout.axes[key]:
            if run.space is None:
                parts.append(np.full(run.outer, -1, dtype=np.int64))
                continue
            space = self.spaces[run.space]
            entries = max(1, space.counts.get(key, 1))
            unit = np.arange(units[run.space])[:, None] * _UNIT
            if space.blocks == 1 and not space.lies and max(run.slots) < entries:
                parts.append(np.tile(run.space * _SPACE + unit, (run.outer, run.inner)).ravel())
                continue
            place = np.reshape(run.slots, (run.outer, 1, run.inner)) // entries
            blocks = np.append(space.on(key), space.blocks)  # the last is none: what was read off has more
            parts.append((run.space * _SPACE + unit + blocks[np.minimum(place, len(blocks) - 1)]).ravel())
        return np.concatenate(parts)

    def _arrivals(self, key: Key, actual: Codes, expected: Codes, units: Sequence[int]) -> dict[int, str]:
        """Read off where channels arrive, for spaces of one unit, which do not tell it before; else who is to blame."""
        involved = _spaces(actual) | _spaces(expected)
        if any(self.spaces[number].units == 1 for number in involved):
            try:
                runs = self._parse(actual, key, units)
            except Torn:
                runs = None
            now = self._units
            if runs is not None and np.array_equal(owners_of(runs, now)[:, 0], owners_of(self.axes[key], now)[:, 0]):
                self.axes[key] = runs
                return {}
            if (actual < 0).all():  # what is made of all channels, as their mean, is of none
                return dict.fromkeys(involved, "its channels depend on each other")
        if len(actual) < len(expected):
            return dict.fromkeys(involved, f"a literal size in the code: new channels do not arrive at {key[0]}")
        return dict.fromkeys(
            involved, f"a literal size in the code: channels arrive elsewhere at {key[0]} once there are more"
        )


def _of_spaces(roots: Codes, low: Codes, high: Codes) -> set[int]:
    """The spaces of some classes of the widened model, given the lowest and highest code of each."""
    roots = roots[high[roots] >= 0]
    return _spaces(np.append(low[roots], high[roots]))


def _spaces(codes: Codes) -> set[int]:
    """The spaces of some codes or classes."""
    return set(np.unique(codes[codes >= 0] // _SPACE).tolist())
