"""Rehearsal: the code is run at other widths, on a copy whose layers only pretend to compute.

Spaces get a few more units, and the numbers are sent again. Where the new ones arrive says where every consumer, norm
and parameter is widened; old ones must arrive where they did. What fails says which spaces are to blame.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

from growconv.network import layers
from growconv.network.arrangement import Arrangement, Codes, spaces_in, spaces_of, units_of
from growconv.network.classes import Signature, signature
from growconv.network.failures import Failure, LookFailed, Ran
from growconv.network.layout import ENTRY, FILL, GROUP_OUT, OUT, Key, Layout, Torn, owners_of
from growconv.network.model import Arguments, module_at, same_chance
from growconv.network.numbers import Numbers
from growconv.network.pretender import pretending
from growconv.network.trace import look

MORE_UNITS = (1, 2, 3)
"""Units that neighbouring spaces get in a rehearsal: different ones, so that spaces that only grow together show."""


@dataclass(eq=False)
class Example:
    """One way in which the model is run: its arguments and its mode, and what ran when numbers were sent through it."""

    arguments: Arguments
    training: bool
    trail: list[Ran] = field(default_factory=list)


@dataclass
class Verdict:
    """What a rehearsal of some spaces gave.

    Attributes:
        reasons: the spaces that failed, and why.
        alone: those of them that would fail without the others too.
        fixed: those of them on which an operation failed that takes one width only.
        led: those of them that failed since sizes had followed another space that grows by copies, and which.
        supposed: whether they were only near an error of the code itself, and others may be to blame.
    """

    reasons: dict[int, str] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)
    fixed: set[int] = field(default_factory=set)
    led: dict[int, int] = field(default_factory=dict)
    supposed: bool = False


class Rehearsal:
    """Runs of a model at other widths.

    Args:
        model: a copy that may be changed.
        examples: how it is run.
        arrangement: where its channels lie, which is read off the runs for spaces of one unit.

    Attributes:
        count: how many runs of spaces there have been.
    """

    def __init__(self, model: nn.Module, examples: Sequence[Example], arrangement: Arrangement) -> None:
        self.count = 0
        self._model = model
        self._examples = examples
        self._arranged = arrangement
        self._numbers = arrangement.numbers
        self._shapes: layers.Shapes = {}

    def of(self, live: Sequence[int]) -> Verdict:
        """What becomes of some spaces that all get more units; of a single one till it fails."""
        arranged = self._arranged
        arranged.lay_out(live)
        more = {number: MORE_UNITS[place % len(MORE_UNITS)] for place, number in enumerate(live)}
        if len(live) == 1:
            more = {live[0]: 2}
        for number in self.parted() & set(live):  # a part, such as a quarter, is another only once there are many more
            units = arranged.spaces[number].units
            more[number] += units if units > more[number] else 0
        self.count += 1
        units = [now + more.get(number, 0) for number, now in enumerate(arranged.units)]
        layout, found = arranged.layout(), Numbers()
        try:
            self._look(found, layout, arranged.units, units, on=len(live) > 1)
        except LookFailed as failed:
            if failed.stopped is not None:  # sizes that code of its kind may have compared tell numbers of channels
                kind = type(module_at(self._model, failed.stopped))
                for place, counted in self._numbers.compared.items():
                    if type(module_at(self._model, place[0])) is kind:
                        self._numbers.literals.setdefault(place, counted)
            return self._blamed(failed.failures, found, layout, units, live)
        return Verdict(self._compare(found, layout, units, live))

    def classes(self, layout: Layout, now: Sequence[int], units: Sequence[int]) -> Counter[Signature] | None:
        """How many classes of each signature there are at other widths; None where the code fails."""
        found = Numbers()
        try:
            self._look(found, layout, now, units)
        except LookFailed:
            return None
        counts = Counter[Signature]()
        for axes, classes in found.signatures().items():
            counts[signature(dict(axes), layout.dims)] += len(classes)
        return counts

    def parted(self) -> set[int]:
        """The spaces of which slices or splits take a part."""
        cut = [number for part in self._numbers.cuts for number in part]
        return spaces_in(self._arranged.codes_of(cut)) if cut else set()

    def _look(self, found: Numbers, layout: Layout, now: Sequence[int], units: Sequence[int], on: bool = False) -> None:
        """Send numbers through the pretending model, in every way; `on` tells whether to go on where the code fails."""
        with pretending(self._model, layout, now, units, self._shapes):
            for example in self._examples:
                self._model.train(example.training)
                same_chance()
                look(self._model, example.arguments, found, True, example.trail if on else ())

    def _blamed(
        self, failures: Sequence[Failure], found: Numbers, layout: Layout, units: Sequence[int], live: Sequence[int]
    ) -> Verdict:
        """The spaces that failing operations met, with the error; all where none is known to have met any."""
        arranged, verdict, roots, now = self._arranged, Verdict(), found.roots(), self._arranged.units
        low, high = _by_class(found, self._expected(layout, units))
        for each in failures:
            line = (str(each.error).splitlines() or [""])[0][:160]
            text = f"the code fails at another width: {type(each.error).__name__}: {line}"
            text += f" (in {each.where})" if each.where else ""
            spaces, near = (
                _spaces_of(roots[list(numbers)], low, high) & set(live) for numbers in (each.numbers, each.near)
            )
            # sizes that followed other channels than those which it met
            ahead = {n for n in live if (units[n] - now[n]) * arranged.spaces[n].blocks in each.more} - spaces
            for number in spaces:
                size = len(arranged.spaces[number].roots)
                alike = [n for n in ahead if arranged.spaces[n].copied and len(arranged.spaces[n].roots) == size]
                if len(alike) == 1:
                    verdict.led[number] = alike[0]
            supposed = not (spaces or ahead)  # it may have followed the sizes of what is near
            spaces = spaces or ahead or near
            verdict.supposed |= supposed and bool(spaces)
            verdict.reasons |= dict.fromkeys(spaces - verdict.reasons.keys(), text)
            fixed = spaces if each.fixed and not supposed else set()
            verdict.alone |= spaces if len(spaces) == 1 and not supposed else fixed
            verdict.fixed |= fixed
            if not verdict.reasons:
                return Verdict(dict.fromkeys(live, text))
        return verdict

    # ------------------------------------------------------------------------------------------ what arrives where

    def _expected(self, layout: Layout, units: Sequence[int]) -> dict[Key, Codes]:
        """Per axis the codes that it has as the layout says."""
        return {key: self._arranged.expected(key, runs, units) for key, runs in layout.axes.items()}

    def _compare(self, found: Numbers, layout: Layout, units: Sequence[int], live: Sequence[int]) -> dict[int, str]:
        """Hold the widened model's numbers against the layout."""
        roots, known = found.roots(), self._expected(layout, units)
        low, high = _by_class(found, known)
        culprits: dict[int, str] = {}
        for key, codes in known.items():
            if key[1] in (OUT, FILL) and len(found.range_of(key)) != len(codes):
                culprits |= dict.fromkeys(spaces_in(codes), f"a literal size in the code of {key[0].split(' #')[0]}")
        apart = np.flatnonzero((high >= 0) & (low != high))
        for first, last in set(zip(low[apart].tolist(), high[apart].tolist(), strict=True)):
            own = spaces_in(np.array([first, last]))
            text = "its channels are tied to others once there are more"
            if len(own) == 1:
                single = self._arranged.spaces[min(own)].units == 1
                text = "its channels depend on each other" if single else "a literal size in the code ties new channels"
            culprits |= dict.fromkeys(own, text)
        if culprits:
            return culprits
        new, owners = (high >= 0) & ~self._is_old(high), spaces_of(high)
        for root, reason in found.reasons().items():
            if new[root]:
                culprits.setdefault(int(owners[root]), reason)
        codes = np.append(np.maximum(high[roots], -1), -1)  # per number, and of none
        culprits |= self._cut_otherwise(found, codes, live)
        for key, expected in known.items():
            if key[1] in (OUT, FILL) or (key[1] == ENTRY and key[0] in layout.dims):
                continue
            actual = codes[found.range_of(key) if key[1] == GROUP_OUT else found.columns.get(key, [])]
            if not np.array_equal(actual, expected):
                culprits |= self._arrivals(key, actual, expected, units)
        return {number: reason for number, reason in culprits.items() if number in live}

    def _cut_otherwise(self, found: Numbers, codes: Codes, live: Sequence[int]) -> dict[int, str]:
        """The spaces of which a slice or split takes other old channels than before."""
        culprits: dict[int, str] = {}
        if len(found.cuts) != len(self._numbers.cuts):
            return culprits
        for old, new in zip(self._numbers.cuts, found.cuts, strict=True):
            before = self._arranged.codes_of(old, live)
            after = codes[np.asarray(new, dtype=np.int64)]
            before, after = before[before >= 0], after[after >= 0]
            after = after[self._is_old(after)]
            if not np.array_equal(before, after):
                text = "a slice or split in the code takes other channels once there are more"
                culprits |= dict.fromkeys(spaces_in(np.setxor1d(before, after)) or spaces_in(before), text)
        return culprits

    def _is_old(self, codes: Codes) -> NDArray[np.bool_]:
        """Whether codes are of units that the model has at its own widths."""
        return units_of(codes) < np.array(self._arranged.units)[spaces_of(codes)]

    def _arrivals(self, key: Key, actual: Codes, expected: Codes, units: Sequence[int]) -> dict[int, str]:
        """Read off where channels arrive, for spaces of one unit, which do not tell it before; else who is to blame."""
        involved, arranged = spaces_in(actual) | spaces_in(expected), self._arranged
        now = arranged.units
        if any(now[number] == 1 for number in involved):
            try:
                runs = arranged.parse(actual, key, units)
            except Torn:
                runs = None
            known = owners_of(arranged.axes[key], now)
            if runs is not None and np.array_equal(owners_of(runs, now)[:, 0], known[:, 0]):
                arranged.axes[key] = runs
                return {}
            if (actual < 0).all():  # what is made of all channels, as their mean, is of none
                return dict.fromkeys(involved, "its channels depend on each other")
        if len(actual) < len(expected):
            return dict.fromkeys(involved, f"a literal size in the code: new channels do not arrive at {key[0]}")
        return dict.fromkeys(
            involved, f"a literal size in the code: channels arrive elsewhere at {key[0]} once there are more"
        )


def _by_class(found: Numbers, known: Mapping[Key, Codes]) -> tuple[Codes, Codes]:
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


def _spaces_of(roots: Codes, low: Codes, high: Codes) -> set[int]:
    """The spaces of some classes of the widened model, given the lowest and highest code of each."""
    roots = roots[high[roots] >= 0]
    return spaces_in(np.append(low[roots], high[roots]))
