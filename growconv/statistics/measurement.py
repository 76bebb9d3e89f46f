"""What one consumer's samples add up to, and how N is freed from what an update of the existing weights can give."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from growconv.network import layers
from growconv.statistics.accumulator import QUANTITIES, ConsumerSums
from growconv.statistics.consumer import ConsumerStatistics
from growconv.statistics.held import GROUP_BYTES, Held, HeldBatch, applied_update, grouped
from growconv.statistics.sums import entries_text, full_precision


@dataclass(eq=False)
class Measurement:
    """One consumer of one site.

    N takes W*, which is known at the end. Batches are held for it while there is room; beyond that P is summed, or N
    comes from a second pass over the same batches.

    Attributes:
        path: module path of the consumer.
        sums: the sums over samples.
        moments_every: of how many losses one gives second moments.
        losses: how many have been seen.
        waiting: what is not summed as long as batches are held.
        held: these batches.
        held_bytes: what they take beyond kept samples.
        small: batches that are to be summed together with the next ones.
        projected: sums of the second pass.
        second_pass: why there is to be one.
    """

    path: str
    sums: ConsumerSums
    moments_every: int = 1
    losses: int = 0
    waiting: frozenset[str] = frozenset()
    held: list[HeldBatch] = field(default_factory=list)
    held_bytes: int = 0
    small: list[HeldBatch] = field(default_factory=list)
    projected: ConsumerSums | None = None
    second_pass: str | None = None

    def wait_for(self, quantities: frozenset[str]) -> None:
        """Let what only N asks for wait, where it has a choice.

        Args:
            quantities: all that was asked for.
        """
        others = frozenset[str]().union(*(QUANTITIES[name] for name in quantities - {"N"}))
        if "N" in quantities and "P" not in others:
            self.waiting = QUANTITIES["N"] - QUANTITIES["update"] - others
            self.sums.quantities -= self.waiting

    def add(self, batch: HeldBatch, size: int | None, projects: bool) -> None:
        """Add a batch.

        Args:
            batch: its tensors; they stay as they are.
            size: bytes that holding it takes; None where it must not be held.
            projects: whether P may be summed in the place of held batches.
        """
        self.losses += batch.samples > 0  # none are new in a further call
        batch = replace(batch, moments=(self.losses - 1) % self.moments_every == 0)
        if self.waiting and size is not None:
            self.held.append(batch)
            self.held_bytes += size
        elif self.waiting:
            self._settle(batch.problem.projection_entries, projects)
        if sum(each.size for each in (*self.small, batch)) > GROUP_BYTES:
            self.sum_up()
        self.small.append(batch)
        if self.second_pass:
            self.sum_up()  # for want of room

    def sum_up(self) -> None:
        """Sum what has waited for more."""
        small, self.small = self.small, []
        for moments in (True, False):
            for each in grouped(batch for batch in small if batch.moments == moments):
                with full_precision(each.v.device):
                    self.sums.add(each.problem, each.x, each.h, each.v, each.samples, moments)

    def _settle(self, entries: int, projects: bool) -> None:
        """Hold no longer: sum P, or leave N to a second pass."""
        self.sum_up()
        names, self.waiting = self.waiting, frozenset()
        held, self.held, self.held_bytes = self.held, [], 0
        if not projects or 8 * entries > self.sums.scratch_bytes:
            reason = (
                f"P would have {entries_text(entries)}, more than scratch_bytes" if projects else "hold_bytes are full"
            )
            self.second_pass = f"{reason}: N comes from a second pass over the same batches"
            return
        for each in grouped(held):
            self.sums.add_only(names, each.problem, each.x, each.h, each.v)
        self.sums.quantities |= names

    # ------------------------------------------------------------------------------------------- second pass

    @property
    def waits_for_second_pass(self) -> bool:
        """Whether N is still to come."""
        return self.second_pass is not None and self.projected is None

    def begin_second_pass(self) -> None:
        """Sum N from now on, where it waits."""
        if self.second_pass is not None:
            self.projected = ConsumerSums(
                self.sums.where, frozenset({"N_raw"}), self.sums.path, self.sums.scratch_bytes
            )

    def add_projected(self, batch: HeldBatch, update: Tensor) -> None:
        """Add a batch of the second pass.

        Args:
            batch: its tensors.
            update: W*.
        """
        if self.projected is not None:
            v = batch.v - applied_update(batch.problem, batch.h, update)
            self.projected.add(batch.problem, batch.x, batch.h, v, samples=batch.samples)

    # ------------------------------------------------------------------------------------------- results

    def describe(self) -> list[str]:
        """How each statistic is computed, a line each."""
        self.sum_up()
        lines = self.sums.describe()
        if self.held:
            size = sum(each.size for each in self.held) / 2**20
            lines.append(f"N from x, h and v, held of {len(self.held)} calls ({size:.3g} MiB)")
        return [*lines, *([self.second_pass] if self.second_pass else [])]

    def statistics(self, layer: nn.Module) -> tuple[ConsumerStatistics, dict[str, Tensor]]:
        """Averages over the samples so far, and those of the producer's patches.

        Args:
            layer: the consumer.
        """
        self.sum_up()
        with full_precision(torch.device("cpu")):
            averages = self.sums.averages()
            if self.projected is not None:
                averages["N"] = self.projected.averages()["N_raw"]
                averages["N_energy"] = averages["N"].new_tensor(self.projected.energy / self.projected.samples)
        patches = {name: averages.pop(name) for name in ("patch_mean", "patch_gram") if name in averages}
        held, weights, pending = None, layers.weighted(layer), None
        if self.held:
            held = Held(self.sums.where, self.sums.path, self.sums.scratch_bytes, tuple(self.held))
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
        )
        return found, patches
