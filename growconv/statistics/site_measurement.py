"""SiteMeasurement: what is measured of one site. What several of its consumers share is summed once."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from growconv.errors import StatisticsError
from growconv.network import layers
from growconv.network.site import GrowthSite, Site
from growconv.statistics.accumulator import OF_CONSUMER, OF_PRODUCERS, QUANTITIES, ConsumerSums
from growconv.statistics.consumer import ConsumerStatistics
from growconv.statistics.held import HeldBatch
from growconv.statistics.measurement import Measurement
from growconv.statistics.pair import PairStatistics, Updates
from growconv.statistics.problem import pair_problem, reaches, site_input, site_problem, widest_of
from growconv.statistics.samples import KeptBatch, KeptSamples

JOINT_BYTES = 4 * 2**20
"""What the common input of several producers, which is made anew for each consumer, may take at once."""


@dataclass(frozen=True)
class Wanted:
    """What a collector was asked for; see `StatisticsCollector`."""

    quantities: frozenset[str]
    path: str
    keep_samples: int
    keep_dtype: torch.dtype | None
    scratch_bytes: int
    moments_every: int
    updates: Updates


@dataclass(eq=False)
class SiteMeasurement:
    """One site, or both ranks of one layer, as the layers that are measured, and what has been kept of its samples.

    Attributes:
        sites: the site, or both ranks.
        site: its layers; without producers where nothing is asked of them.
        wanted: what was asked for.
        consumers: by path.
        widest: per consumer the one that S and S_full are summed for, see `widest_of`.
        kept: of its samples.
        skipped: calls of consumers that were left out, since something was not finite.
    """

    sites: Sequence[Site]
    site: GrowthSite
    wanted: Wanted
    consumers: dict[str, Measurement]
    widest: dict[str, str]
    kept: list[KeptBatch] = field(default_factory=list)
    skipped: int = 0

    @classmethod
    def of(cls, sites: Sequence[Site], wanted: Wanted, first: dict[str, Measurement]) -> "SiteMeasurement":
        """Begin to measure a site.

        Args:
            sites: the site, or both ranks of a layer.
            wanted: what is asked for.
            first: per consumer where M and S2 are summed, whichever sites it reads; consumers that nobody measures yet
                are added.

        Raises:
            StatisticsError: the site has no such statistics.
        """
        names, site = _summed(sites[0], wanted), sites[0].measured
        if names <= OF_CONSUMER and not wanted.keep_samples:
            site = replace(site, producers=())  # what these read is not needed
        of_producers, consumers = names & OF_PRODUCERS, dict[str, Measurement]()
        widest = widest_of(site) if of_producers else {path: path for path in site.consumers}
        users = Counter(widest.values())
        for path in site.consumers:
            where = site.name if len(site.consumers) == 1 else f"{site.name}, consumer {path}"
            update = wanted.updates.get((site.name, path))
            again = frozenset({"patch_gram"}) if consumers else frozenset[str]()  # the same of every consumer
            if widest[path] != path:
                again |= of_producers
            if update is None and path in first:
                again |= OF_CONSUMER
            sums, apart = (
                ConsumerSums(where, each, wanted.path, wanted.scratch_bytes) for each in (names - again, of_producers)
            )
            alone = users[widest[path]] == 1
            consumers[path] = Measurement(path, sums, None if alone else apart, wanted.moments_every)
            if update is None:
                first.setdefault(path, consumers[path])
            if names and site.producers:
                consumers[path].expect_projection(wanted.quantities, update)
        return cls(sites, site, wanted, consumers, widest)

    @property
    def samples_kept(self) -> int:
        """Number of samples kept so far."""
        return sum(batch.samples for batch in self.kept)

    @property
    def wants_samples(self) -> bool:
        """Whether samples are still to be kept."""
        return bool(self.site.producers) and self.wanted.keep_samples > self.samples_kept

    def sharing(self, path: str) -> tuple[str, ...]:
        """The consumers that have their S from where a consumer has it, itself included."""
        return tuple(other for other, wide in self.widest.items() if wide == self.widest[path])

    def batches(
        self, path: str, x: Mapping[str, Tensor], maps: tuple[Tensor, Tensor], count: int, kept: bool
    ) -> Iterator[HeldBatch]:
        """One call of a consumer; of several producers in parts whose common input takes JOINT_BYTES at most.

        That input is made when it is needed: where it is their patches, it is many times as large as their inputs.

        Args:
            path: of the consumer.
            x: per producer its input.
            maps: h and v of the consumer.
            count: how many new samples these are.
            kept: whether the tensors are kept samples.
        """
        site, (h, v) = self.site, maps
        if len(site.producers) < 2:
            yield HeldBatch(*site_problem(site, path, x, h, v), samples=count, kept=kept)
            return
        problem, one, *_ = site_problem(site, path, {producer: each[:1] for producer, each in x.items()}, h[:1], v[:1])
        step = max(1, min(JOINT_BYTES, self.wanted.scratch_bytes // 4) // (one.numel() * one.element_size()))
        route = next(route for route in site.routes if route.consumer == path)
        producer, layer = (site.model.get_submodule(each) for each in (route.producer, path))
        for start in range(0, len(h), step):
            part = slice(start, start + step)
            raw = {name: each[part] for name, each in x.items()}
            _, _, own, given = pair_problem(route, producer, layer, raw[route.producer], h[part], v[part])
            joins = partial(site_input, site, path, h=_shaped(h[part]), v=_shaped(v[part]))
            yield HeldBatch(problem, raw, own, given, count if start == 0 else 0, joins, kept=kept)

    # ------------------------------------------------------------------------------------------------ results

    def statistics(
        self, own: dict[str, dict[str, Tensor]], wide: Callable[[Tensor], Tensor], last: bool
    ) -> dict[str, PairStatistics]:
        """Averages over the samples so far, by name of the site.

        Args:
            own: per consumer M and S2 of the sites before; those of others are added.
            wide: what makes float32 of a kept tensor.
            last: whether nothing more is collected: what they were summed up in is let go.
        """
        site, model = self.site, self.site.model
        found: dict[str, ConsumerStatistics] = {}
        patches: dict[str, Tensor] = {}
        for path, consumer in self.consumers.items():
            found[path], of_patches = consumer.statistics(model.get_submodule(path))
            patches = patches or of_patches
            moments = found[path].moments
            if OF_CONSUMER & moments.keys():
                own.setdefault(path, {name: moments[name] for name in OF_CONSUMER & moments.keys()})
            moments |= own.get(path, {})
            if last:
                consumer.let_go()
        self._share(found)
        kept = None
        if self.wanted.keep_samples and site.producers:
            batches = tuple(self.kept)
            if self.wanted.keep_dtype is not None:
                batches = tuple(each.widened(wide) for each in batches)
                self.kept = [] if last else self.kept
            kept = KeptSamples(site, batches, found)
        whole = PairStatistics(
            site=site.name,
            growth_site=site,
            samples=max(consumer.samples for consumer in found.values()),
            consumers=tuple(found.values()),
            incoming_shapes={
                path: tuple(layers.weighted(model.get_submodule(path)).filters().shape[1:])
                for path in self.sites[0].measured.producers
            },
            patch_mean=patches.get("patch_mean"),
            patch_gram=patches.get("patch_gram"),
            samples_kept=kept,
            units=site.units,
            skipped_batches=self.skipped,
            notes=tuple(each.second_pass for each in self.consumers.values() if each.second_pass),
        )
        return {each.name: replace(whole, site=each.name, growth_site=each) for each in self.sites}

    def _share(self, found: Mapping[str, ConsumerStatistics]) -> None:
        """Give consumers the S and S_full that were summed for another one, which reads all that they read."""
        whole = {path: found[path].moments for path in set(self.widest.values())}
        whole = {path: {name: own[name] for name in OF_PRODUCERS & own.keys()} for path, own in whole.items()}
        for path, wide in self.widest.items():
            apart = self.consumers[path].apart
            if apart is None:
                continue
            moments, mask = found[path].moments, None if wide == path else reaches(self.site, path)
            for name, value in whole[wide].items():
                if mask is not None and not mask.all():
                    entries = mask.repeat_interleave(len(value) // len(mask)).to(value)
                    value = value * entries[:, None] * entries
                moments[name] = value
            together = (self.consumers[wide].projected or self.consumers[wide].sums).moment_samples
            for name, value in (apart.averages() if apart.samples else {}).items():
                samples, rest = apart.moment_samples[name], together[name] if name in moments else 0
                before = moments.get(name, torch.zeros_like(value))
                moments[name] = (samples * value + rest * before) / (samples + rest)

    def explain(self, first: Mapping[str, Measurement]) -> list[str]:
        """How each statistic is computed, a line each, below its site and consumer."""
        lines: list[str] = []
        for path, consumer in self.consumers.items():
            lines += [consumer.sums.where, *(f"  {line}" for line in consumer.describe())]
            if consumer.apart is not None and self.widest[path] != path:
                names = ", ".join(sorted(consumer.apart.quantities))
                lines.append(f"  {names} by what is summed for {self.widest[path]}")
            other = first.get(path, consumer)
            if other is not consumer and (own := sorted(other.sums.quantities & OF_CONSUMER)):
                lines.append(f"  {', '.join(own)} by what is summed for {other.sums.where}")
        return lines


def _summed(site: Site, wanted: Wanted) -> frozenset[str]:
    """The sums that what is asked for takes of a site."""
    names, measured = frozenset[str]().union(*(QUANTITIES[name] for name in wanted.quantities)), site.measured
    if not measured.producers:
        names &= OF_CONSUMER
    several = len(measured.producers) > 1
    if names == {"patch_gram"} and wanted.keep_samples and (several or not measured.closed_form):
        return frozenset()  # who reads it takes it from the samples there
    if names and site.no_closed_form:
        raise StatisticsError(
            "this site has no closed-form statistics",
            got=site.no_closed_form,
            where=measured.name,
            fix="collect quantities=('samples',) only, for methods such as functional",
        )
    if several and names == {"patch_gram"}:
        raise StatisticsError(
            "the patches of several producers have no moments of their own",
            where=measured.name,
            fix="collect quantities=('patch', 'samples') with keep_samples=512, say",
        )
    return names - {"patch_gram"} if several else names


def _shaped(tensor: Tensor) -> Tensor:
    """Something of the same shape, which takes no memory."""
    return tensor.new_empty(1).expand(tensor.shape)
