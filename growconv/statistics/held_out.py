"""Averages over kept samples alone, and statistics without them."""

from dataclasses import replace

import torch
from torch import Tensor

from growconv.errors import StatisticsError
from growconv.statistics.accumulator import SCRATCH_BYTES, TENSOR_STATISTICS, ConsumerSums
from growconv.statistics.consumer import ConsumerStatistics
from growconv.statistics.held import HeldBatch
from growconv.statistics.pair import PairStatistics
from growconv.statistics.producers import site_problem
from growconv.statistics.samples import KeptSamples


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
