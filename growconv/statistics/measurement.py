"""What one consumer's samples add up to, and how N is freed from what an update of the existing weights can give."""

from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from growconv.network import layers
from growconv.statistics.accumulator import OF_GRADIENT, OF_PRODUCERS, QUANTITIES, SECOND_MOMENTS, ConsumerSums
from growconv.statistics.consumer import ConsumerStatistics
from growconv.statistics.held import GROUP_BYTES, Held, HeldBatch, Shelf, applied_update, grouped
from growconv.statistics.sums import Totals, entries_text, full_precision

Place = tuple[int, int, int, int]
"""Of a batch: the number of the loss, of the forward pass, of the call, and of the part of it."""


@dataclass(eq=False)
class Measurement:
    """One consumer of one site.

    N takes W*, which is known at the end, unless it was given. Batches are held for it while there is room; beyond that
    P is summed, or N comes from a second pass over the batches that are not held.

    Attributes:
        path: module path of the consumer.
        sums: the sums over samples.
        apart: S and S_full of passes in which not all consumers that read alike were called; None where no other does.
        moments_every: of how many losses one gives second moments.
        losses: how many have been seen, and how many of them `apart`: the first of both kinds gives second moments.
        waiting: what is not summed as long as batches are held.
        held: these batches.
        small: batches that are to be summed together with the next ones.
        update: W*, once it is known.
        projected: sums over v⊥ in the place of v, from then on.
        second_pass: why there is to be one.
        missed: the batches that it is to see.
    """

    path: str
    sums: ConsumerSums
    apart: ConsumerSums | None = None
    moments_every: int = 1
    losses: Counter[bool] = field(default_factory=Counter)
    waiting: frozenset[str] = frozenset()
    held: dict[Place, HeldBatch] = field(default_factory=dict)
    small: list[HeldBatch] = field(default_factory=list)
    update: Tensor | None = None
    projected: ConsumerSums | None = None
    second_pass: str | None = None
    missed: set[Place] = field(default_factory=set)

    def expect_projection(self, quantities: frozenset[str], update: Tensor | None) -> None:
        """Let what only N asks for wait, where it has a choice; with W* at hand, N is summed from the first batch on.

        What does not depend on v is then summed together with N, since it reads the same patches.

        Args:
            quantities: all that was asked for.
            update: W*; None where it is not known.
        """
        if "N" not in quantities:
            return
        others = self.sums.quantities & frozenset[str]().union(*(QUANTITIES[name] for name in quantities - {"N"}))
        if update is not None:
            self.update, self.sums.quantities = update, others & OF_GRADIENT
            self.projected = self._sums_of(others - OF_GRADIENT | {"N_raw"})
        elif "P" not in others:
            self.waiting = QUANTITIES["N"] - QUANTITIES["update"] - others
            self.sums.quantities -= self.waiting

    @property
    def sums_maps(self) -> bool:
        """Whether anything is summed of a batch beside its energy."""
        return bool(self.sums.quantities) or self.projected is not None or self.apart is not None

    @property
    def held_bytes(self) -> int:
        """What held batches take beyond kept samples."""
        return sum(batch.extra for batch in self.held.values())

    def add(self, place: Place, batch: HeldBatch, fits: bool, projects: bool, shelf: Shelf) -> None:
        """Add a batch.

        Args:
            place: which one.
            batch: its tensors, which are copied where they are needed later.
            fits: whether there is room to hold it.
            projects: whether P may be summed in the place of held batches.
            shelf: for copies.
        """
        apart = batch.left_out == OF_PRODUCERS
        self.losses[apart] += batch.samples > 0  # none are new in a further call
        if (self.losses[apart] - 1) % self.moments_every:
            batch = replace(batch, left_out=SECOND_MOMENTS)
        if fits and (self.waiting or (self.second_pass and batch.kept)):
            self.held[place] = batch = batch.copied(shelf)
        else:
            if self.waiting:
                self._settle(batch.problem.projection_entries, projects)
            if self.second_pass:
                self.missed.add(place)
        if sum(each.size for each in (*self.small, batch)) > GROUP_BYTES:
            self.sum_up()
        cramped = bool(self.second_pass) or not (fits or projects)
        alone = cramped or batch.size > GROUP_BYTES  # for want of room, or since no other would join it
        self.small.append(batch if alone or place in self.held else batch.copied(shelf))
        if alone:
            self.sum_up()

    def sum_up(self) -> None:
        """Sum what has waited for more."""
        small, self.small = self.small, []
        for left_out in dict.fromkeys(batch.left_out for batch in small):
            for each in grouped(batch for batch in small if batch.left_out == left_out):
                with full_precision(each.v.device):
                    if self.sums.quantities:
                        self.sums.add(each.problem, each.x, each.h, each.v, each.samples, left_out, each.M)
                    else:
                        self.sums.count(each.v, each.samples)
                    if self.apart is not None and left_out == OF_PRODUCERS:
                        self.apart.add(each.problem, each.x, each.h, each.v, each.samples)
                    self.add_projected(each)

    def _settle(self, entries: int, projects: bool) -> None:
        """Hold no longer: sum P, or leave N to a second pass."""
        self.sum_up()
        names, self.waiting = self.waiting, frozenset()
        held, self.held = self.held, {}
        if not projects or 8 * entries > self.sums.scratch_bytes:
            reason = (
                f"P would have {entries_text(entries)}, more than scratch_bytes" if projects else "hold_bytes are full"
            )
            self.second_pass = f"{reason}: N comes from a second pass over the same batches"
            self.held = {place: batch for place, batch in held.items() if not batch.extra}
            self.missed.update(held.keys() - self.held.keys())
            return
        for each in grouped(held.values()):
            self.sums.add_only(names, each.problem, each.x, each.h, each.v)
        self.sums.quantities |= names

    # ------------------------------------------------------------------------------------------- second pass

    @property
    def waits_for_second_pass(self) -> bool:
        """Whether N is still to come."""
        return self.second_pass is not None and self.projected is None

    def misses(self, loss: int) -> bool:
        """Whether a second pass is to see batches of a loss."""
        return any(place[0] == loss for place in self.missed)

    def begin_second_pass(self, update: Tensor | None) -> None:
        """Sum N from now on, where it waits, and right now over the batches that are held.

        Args:
            update: W*.
        """
        if self.second_pass is None or update is None:
            return
        self.update = update
        self.projected = self._sums_of(frozenset({"N_raw"}))
        for batch in grouped(self.held.values()):
            with full_precision(batch.v.device):
                self.add_projected(batch)

    def _sums_of(self, quantities: frozenset[str]) -> ConsumerSums:
        return ConsumerSums(self.sums.where, quantities, self.sums.path, self.sums.scratch_bytes)

    def add_projected(self, batch: HeldBatch) -> None:
        """Sum a batch with v⊥ in the place of v, where W* is known.

        Args:
            batch: its tensors.
        """
        if self.update is not None and self.projected is not None:
            v = batch.v - applied_update(batch.problem, batch.h, self.update)
            self.projected.add(batch.problem, batch.x, batch.h, v, batch.samples, batch.left_out)

    def end_second_pass(self, statistics: ConsumerStatistics) -> None:
        """Give N to the statistics of the first pass, which then are complete."""
        if self.second_pass is not None and self.projected is not None:
            statistics.moments |= self._projected_averages(self.projected)
            statistics.pending = None

    @staticmethod
    def _projected_averages(sums: ConsumerSums) -> dict[str, Tensor]:
        with full_precision(torch.device("cpu")):
            averages = sums.averages()
        N = averages.pop("N_raw")
        return {**averages, "N": N, "N_energy": N.new_tensor(sums.energy / sums.samples)}

    # ------------------------------------------------------------------------------------------- results

    def describe(self) -> list[str]:
        """How each statistic is computed, a line each."""
        self.sum_up()
        lines = self.sums.describe() if self.sums.quantities or self.projected is None else []
        if self.projected is not None:
            lines += [line.replace("N_raw", "N") for line in self.projected.describe()]
        if self.held:
            size = sum(batch.size for batch in self.held.values()) / 2**20
            lines.append(f"N from x, h and v, held of {len(self.held)} calls ({size:.3g} MiB)")
        return [*lines, *([self.second_pass] if self.second_pass else [])]

    def let_go(self) -> None:
        """Let go of the sums, once their averages are known."""
        self.sums = replace(self.sums, closed=Totals(), _open={})
        if self.projected is not None:
            self.projected = replace(self.projected, closed=Totals(), _open={})

    def statistics(self, layer: nn.Module) -> tuple[ConsumerStatistics, dict[str, Tensor]]:
        """Averages over the samples so far, and those of the producer's patches.

        Args:
            layer: the consumer.
        """
        self.sum_up()
        with full_precision(torch.device("cpu")):
            averages = self.sums.averages()
        if self.projected is not None:
            averages |= self._projected_averages(self.projected)
        patches = {name: averages.pop(name) for name in ("patch_mean", "patch_gram") if name in averages}
        held, weights, pending = None, layers.weighted(layer), None
        if self.held and not self.second_pass:
            held = Held(self.sums.where, self.sums.path, self.sums.scratch_bytes, tuple(self.held.values()))
        if self.waits_for_second_pass:
            pending = f"{self.second_pass}: run the batches again inside `with collector.second_pass():`"
        found = ConsumerStatistics(
            consumer=self.path,
            samples=self.sums.samples,
            outgoing_shape=tuple(weights.filters().shape),
            bias=weights.bias() is not None,
            moments=averages,
            gradient_energy=self.sums.energy / self.sums.samples,
            pending=pending,
            held=held,
            known_update=self.update,
        )
        return found, patches
