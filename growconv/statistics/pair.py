"""PairStatistics: averages over samples of all that the solvers read about one site; and over all but some samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.errors import StatisticsError
from growconv.network.site import Site
from growconv.statistics.accumulator import SCRATCH_BYTES, TENSOR_STATISTICS, ConsumerSums
from growconv.statistics.consumer import ConsumerStatistics
from growconv.statistics.held import HeldBatch
from growconv.statistics.problem import site_problem
from growconv.statistics.samples import KeptSamples

Updates = dict[tuple[str, str], Tensor]
"""W* of consumers, by the names of site and consumer."""


@dataclass(eq=False)
class PairStatistics:
    """What the data says about one site.

    A statistic that was not collected is None. If the site has one consumer, its statistics are attributes here, too.

    Attributes:
        site: name of the site.
        growth_site: the site itself.
        samples: number of samples n.
        consumers: one entry per consumer, in the order of site.consumers; of a rank its layer.
        incoming_shapes: per producer, the shape of its filters (C0, *k1), or (features,) for a linear layer. Axis a
            has the patches of all producers one after the other, each ending in a constant entry if the producer has a
            bias.
        patch_mean: mean of the producer's patches over samples and locations (a,), including the constant entry; None
            if there are several producers.
        patch_gram: second moment of the patches (a, a).
        samples_kept: tensors of the kept samples; None if none were requested.
        skipped_batches: number of batches left out because they contained values that are not finite.
        units: `GrowthSite.units` when they were collected: the widths that the axes of the tensors belong to.
        notes: what remains to be done, one line each.

    Example:
        >>> stats = growconv.collect_statistics(model, sites[0], batches, loss)[sites[0].name]
        >>> stats.update.shape
        torch.Size([6, 4, 3, 3])
    """

    site: str
    growth_site: Site
    samples: int
    consumers: tuple[ConsumerStatistics, ...]
    incoming_shapes: Mapping[str, tuple[int, ...]]
    patch_mean: Float[Tensor, " a"] | None = None
    patch_gram: Float[Tensor, "a a"] | None = None
    samples_kept: KeptSamples | None = None
    skipped_batches: int = 0
    units: Mapping[int, int] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())

    @property
    def consumer(self) -> ConsumerStatistics:
        """The only consumer.

        Raises:
            StatisticsError: there are several.
        """
        if len(self.consumers) != 1:
            raise StatisticsError(
                f"this site has {len(self.consumers)} consumers, so there is no single such statistic",
                where=self.site,
                got=", ".join(consumer.consumer for consumer in self.consumers),
                fix="read stats.consumers, one entry per consumer",
            )
        return self.consumers[0]

    @property
    def outgoing_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every consumer's weight."""
        return {consumer.consumer: consumer.outgoing_shape for consumer in self.consumers}

    @property
    def S(self) -> Float[Tensor, "a a"] | None:
        """S summed over the consumers."""
        parts = [consumer.S for consumer in self.consumers]
        present = [part for part in parts if part is not None]
        return torch.stack(present).sum(dim=0) if len(present) > 1 else (present[0] if present else None)

    @property
    def N(self) -> Float[Tensor, "a b c"] | None:
        """N of the only consumer."""
        return self.consumer.N

    @property
    def N_raw(self) -> Float[Tensor, "a b c"] | None:
        """N_raw of the only consumer."""
        return self.consumer.N_raw

    @property
    def M(self) -> Float[Tensor, "d c"] | None:
        """M of the only consumer."""
        return self.consumer.M

    @property
    def S2(self) -> Float[Tensor, "d d"] | None:
        """S2 of the only consumer."""
        return self.consumer.S2

    @property
    def P(self) -> Float[Tensor, "a b d"] | None:
        """P of the only consumer."""
        return self.consumer.P

    @property
    def S_full(self) -> Float[Tensor, "ab ab"] | None:
        """S_full of the only consumer."""
        return self.consumer.S_full

    @property
    def update(self) -> Tensor | None:
        """W* of the only consumer, in the shape of its weight."""
        return self.consumer.update

    @property
    def update_bias(self) -> Float[Tensor, " c"] | None:
        """W*'s change of the only consumer's bias."""
        return self.consumer.update_bias

    @property
    def gradient_energy(self) -> float:
        """‖v‖²/n, summed over the consumers."""
        return sum(consumer.gradient_energy for consumer in self.consumers)

    @property
    def bottleneck_energy(self) -> float | None:
        """‖v⊥‖²/n, summed over the consumers."""
        parts = [consumer.bottleneck_energy for consumer in self.consumers]
        return None if any(part is None for part in parts) else sum(part for part in parts if part is not None)

    @property
    def columns(self) -> Float[Tensor, "a n"] | None:
        """N of all consumers as columns (a, Σ b·c)."""
        return _stacked([consumer.N for consumer in self.consumers])

    def merge(self, other: "PairStatistics") -> "PairStatistics":
        """Statistics over the samples of both, as if they had been collected together.

        Args:
            other: statistics of the same site with the same quantities and widths.

        Returns:
            A new object, with the kept samples of both.

        Raises:
            StatisticsError: they do not belong together.
        """
        same = (self.site, self.incoming_shapes, self.outgoing_shapes) == (
            other.site,
            other.incoming_shapes,
            other.outgoing_shapes,
        )
        if not same or (self.patch_gram is None) != (other.patch_gram is None):
            raise StatisticsError(
                "these statistics do not belong together",
                expected=f"{self.site}, {self.incoming_shapes} to {self.outgoing_shapes}",
                got=f"{other.site}, {other.incoming_shapes} to {other.outgoing_shapes}",
                fix="merge statistics of one site, collected at the same width with the same quantities",
            )
        consumers = tuple(mine.merged(theirs) for mine, theirs in zip(self.consumers, other.consumers, strict=True))
        total = self.samples + other.samples
        mine, theirs = self.samples / total, other.samples / total

        def average(first: Tensor | None, second: Tensor | None) -> Tensor | None:
            return None if first is None or second is None else mine * first + theirs * second

        return replace(
            self,
            samples=total,
            consumers=consumers,
            patch_mean=average(self.patch_mean, other.patch_mean),
            patch_gram=average(self.patch_gram, other.patch_gram),
            samples_kept=self._samples_with(other, consumers),
            skipped_batches=self.skipped_batches + other.skipped_batches,
        )

    def with_samples(self, kept: KeptSamples | None) -> "PairStatistics":
        """The same with kept samples that were collected apart from them."""
        consumers = {each.consumer: each for each in self.consumers}
        return replace(self, samples_kept=None if kept is None else replace(kept, consumers=consumers))

    def _samples_with(self, other: "PairStatistics", consumers: Sequence[ConsumerStatistics]) -> KeptSamples | None:
        mine, theirs = self.samples_kept, other.samples_kept
        if mine is None or theirs is None:
            kept = mine or theirs
            return None if kept is None else replace(kept, consumers={each.consumer: each for each in consumers})
        return mine.joined(theirs, consumers)

    def __add__(self, other: "PairStatistics") -> "PairStatistics":
        """Same as merge."""
        return self.merge(other)

    def __str__(self) -> str:
        """Site, samples, what was collected, and the energies."""
        known = {name for consumer in self.consumers for name in consumer.moments if name != "N_energy"}
        names = sorted(known | ({"N"} if any(consumer.held for consumer in self.consumers) else set()))
        lines = [f"{self.site}: {self.samples} samples; {', '.join(names) or 'samples only'}"]
        for consumer in self.consumers:
            b = "unknown" if consumer.bottleneck_energy is None else f"{consumer.bottleneck_energy:.4g}"
            lines.append(f"  {consumer.consumer}: gradient energy {consumer.gradient_energy:.4g}, bottleneck {b}")
        if self.skipped_batches:
            lines.append(f"  {self.skipped_batches} batches skipped: not finite")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def best_updates(statistics: Mapping[str, PairStatistics]) -> Updates:
    """W* of every consumer that it is known of.

    Args:
        statistics: by name of the site.

    Example:
        >>> first = growconv.collect_statistics(model, sites[0], batches, loss, quantities={"update"})
        >>> known = growconv.statistics.best_updates(first)
        >>> growconv.collect_statistics(model, sites[0], batches, loss, updates=known)[sites[0].name].N.shape
        torch.Size([10, 9, 6])
    """
    known: dict[str, ConsumerStatistics] = {}
    updates: Updates = {}
    for name, found in statistics.items():
        for each in found.consumers:
            first = known.setdefault(each.consumer, each)
            same = first.S2 is each.S2 and first.M is each.M and each.known_update is None
            update = (first if same else each).best_update  # solved once for all sites that it reads
            if update is not None:
                updates[name, each.consumer] = update
    return updates


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part.flatten(1) for part in parts if part is not None]
    return torch.cat(present, dim=1) if len(present) == len(parts) else None


def sample_batches(kept: KeptSamples, consumer: str) -> list[HeldBatch]:
    """One consumer of a site and its samples as maps, in float64, one entry for each call and batch.

    Args:
        kept: samples of a site with a closed form; their v is taken, so give `kept.projected()` for v⊥.
    """
    found: list[HeldBatch] = []
    for each in kept.passes:
        for index, (h, v) in enumerate(zip(each.h[consumer], each.v[consumer], strict=True)):
            x = {path: each.x[path][index].double() for path in kept.site.producers}
            maps = site_problem(kept.site, consumer, x, h.double(), v.double())
            found.append(HeldBatch(*maps, samples=0 if found else len(kept)))
    return found


def without(subject: PairStatistics, left_out: KeptSamples, remaining: KeptSamples) -> PairStatistics:
    """The same statistics over all samples but some.

    W* still knows the samples that are left out; a gain measured on those is therefore very slightly optimistic.

    Args:
        subject: statistics of a site with a closed form.
        left_out: kept samples, fewer than were averaged over.
        remaining: the other kept samples.
    """
    count = len(left_out)

    def reduced(total: Tensor, part: Tensor, samples: int) -> Tensor:
        return (samples * total - count * part.to(total)) / (samples - count)

    consumers: list[ConsumerStatistics] = []
    patches: dict[str, Tensor] = {}
    for index, consumer in enumerate(subject.consumers):
        if consumer.samples <= count:
            raise StatisticsError(
                "no samples would be left to solve on",
                expected=f"more than {count} samples",
                got=consumer.samples,
                where=subject.site,
                fix="collect on more batches than are kept as samples",
            )
        names = frozenset(consumer.moments) & TENSOR_STATISTICS
        first = index == 0 and subject.patch_gram is not None
        own = sample_averages(left_out, consumer.consumer, names | ({"patch_gram"} if first else frozenset()))
        moments = {name: reduced(consumer.moments[name], own[name], consumer.samples) for name in names}
        if "N" in consumer.moments:
            projected = sample_averages(left_out.projected(), consumer.consumer, frozenset({"N_raw"}))["N_raw"]
            moments["N"] = reduced(consumer.moments["N"], projected, consumer.samples)
        for name in ("patch_mean", "patch_gram"):
            total = getattr(subject, name)
            if first and total is not None:
                patches[name] = reduced(total, own[name], subject.samples)
        held = consumer.held
        if held is not None:
            held = replace(held, left_out=(*held.left_out, *sample_batches(left_out, consumer.consumer)))
        consumers.append(replace(consumer, samples=consumer.samples - count, moments=moments, held=held))
    kept = replace(remaining, consumers={consumer.consumer: consumer for consumer in consumers})
    return replace(subject, samples=subject.samples - count, consumers=tuple(consumers), samples_kept=kept, **patches)


@torch.no_grad()
def sample_averages(kept: KeptSamples, consumer: str, names: frozenset[str]) -> dict[str, Tensor]:
    """Averages over the kept samples.

    Args:
        kept: samples of a site with a closed form; with those of `kept.projected()`, N_raw is N.
        names: among S, S_full, N_raw, M, S2, P and patch_gram (with patch_mean).
    """
    sums = ConsumerSums(f"{kept.site.name}, consumer {consumer}", names, "auto", SCRATCH_BYTES)
    for each in sample_batches(kept, consumer):
        sums.add(each.problem, each.x, each.h, each.v, each.samples)
    return sums.averages()
