"""Kept samples: whole batches of inputs and gradients of a site's layers, and what new channels would compute on them.

For every call, a batch keeps the inputs of the producers (x) and of the consumers (h), the change that the loss asks
for in the consumers' outputs (v), and the region between them. Batches are never mixed. If one loss has run the model
several times, its passes are kept together.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.errors import ArgumentValueError, StatisticsError
from growconv.network import layers
from growconv.network.layout import IN
from growconv.network.seats import Calls, Inserted, Moments, Region, some_of
from growconv.network.site import GrowthSite
from growconv.statistics.columns import designs, positions
from growconv.statistics.consumer import ConsumerStatistics
from growconv.statistics.own_update import best_update

Maps = dict[str, tuple[Tensor, ...]]
"""Per layer one tensor for each of its calls."""


@dataclass(frozen=True, eq=False)
class KeptPass:
    """One forward pass.

    Attributes:
        x: per producer its inputs (n, C0, *size), as the module was given them.
        h: per consumer its inputs (n, C1, *grid), likewise.
        v: per consumer −∂(Σ_i loss_i)/∂z, (n, C2, *out); zeros for a call that the loss does not depend on.
        region: what lies between them.
    """

    x: Maps
    h: Maps
    v: Maps
    region: Region

    @property
    def samples(self) -> int:
        """Rows that the pass had."""
        return self.region.samples or next(iter(self.v.values()))[0].shape[0]

    def part(self, index: slice | Tensor) -> "KeptPass":
        """Some of the samples, where the region allows that."""
        count = self.samples

        def pick(maps: Maps) -> Maps:
            return {path: tuple(some_of(each, index, count) for each in calls) for path, calls in maps.items()}

        return KeptPass(pick(self.x), pick(self.h), pick(self.v), self.region.part(index))

    def widened(self, wide: Callable[[Tensor], Tensor]) -> "KeptPass":
        """The same with something done to every tensor."""
        x, h, v = ({path: tuple(map(wide, calls)) for path, calls in maps.items()} for maps in (self.x, self.h, self.v))
        return replace(self, x=x, h=h, v=v)

    def produced(self, incoming: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> dict[str, Calls]:
        """What new filters (K·ratio, in/groups, *kernel) give, per producer and call."""
        found: dict[str, Calls] = {}
        for path, weight in incoming.items():
            bias, calls = biases.get(path), []
            for x in self.x[path]:
                calls.append(self.region.produced(path, x, _as(weight, x), None if bias is None else _as(bias, x)))
            found[path] = calls
        return found

    def read(
        self,
        incoming: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        inserted: Inserted | None = None,
        measured: dict[str, Moments] | None = None,
    ) -> Maps:
        """What the consumers would read of new channels; see `Region.read`."""
        return self.region.read(self.produced(incoming, biases), inserted, measured)

    def added(self, read: Mapping[str, Calls], outgoing: Mapping[str, Tensor]) -> Maps:
        """δz, what columns (out, K·ratio/groups, *kernel) on new channels add, per consumer and call."""
        found: Maps = {}
        for path, weight in outgoing.items():
            calls = []
            for each in read[path]:
                calls.append(self.region.consumed(path, each, _as(weight, each)))
            found[path] = tuple(calls)
        return found

    def beside_v(self, changes: Mapping[str, Calls]) -> Iterator[tuple[Tensor, Tensor]]:
        """Changes of the consumers' outputs, call by call, each with its v."""
        for path, calls in changes.items():
            yield from zip(calls, self.v[path], strict=True)

    def agreement(self, changes: Mapping[str, Calls]) -> Tensor:
        """⟨v, δz⟩, summed over samples, consumers and calls."""
        return torch.stack([(delta * wanted).sum() for delta, wanted in self.beside_v(changes)]).sum()

    def design(self, path: str, read: Calls) -> list[Tensor]:
        """What a consumer multiplies its new columns with, (d, p) for each of its groups, all calls side by side.

        Rows channel by channel and tap by tap; a column for each sample and location.
        """
        module = self.region.site.model.get_submodule(path)
        groups = layers.groups_of(module)
        if groups > 1:
            axis = layers.channel_axis(module, read[0].dim())
            order = self.region.by_group(path, IN, read[0].shape[axis])
            read = [each.index_select(axis, order) for each in read]
        return designs(module, read, groups)

    def own_design(self, path: str) -> list[Tensor]:
        """The same of what a consumer reads now, all columns in the order of its weights."""
        module = self.region.site.model.get_submodule(path)
        return designs(module, self.h[path], layers.groups_of(module))

    def targets(self, path: str) -> list[Tensor]:
        """V of a consumer as (c, p) for each of its groups, columns as those of `design`."""
        module = self.region.site.model.get_submodule(path)
        wanted = torch.cat([positions(module, each) for each in self.v[path]], 1)
        return list(wanted.chunk(layers.groups_of(module), 0))


@dataclass(frozen=True, eq=False)
class KeptBatch:
    """The forward passes of one loss, with the number of samples that the loss is a mean or sum over."""

    samples: int
    passes: tuple[KeptPass, ...]

    @property
    def divisible(self) -> bool:
        """Whether some of the samples can be taken by themselves."""
        return all(each.samples == self.samples and each.region.divisible for each in self.passes)

    def part(self, index: slice | Tensor) -> "KeptBatch":
        """Some of the samples."""
        parts = tuple(each.part(index) for each in self.passes)
        return KeptBatch(parts[0].samples, parts)

    def widened(self, wide: Callable[[Tensor], Tensor]) -> "KeptBatch":
        """The same with something done to every tensor."""
        return replace(self, passes=tuple(each.widened(wide) for each in self.passes))


@dataclass(frozen=True, eq=False)
class KeptSamples:
    """Batches of samples of one site, and what new channels do on them.

    Attributes:
        site: the site, as it was when the samples were collected.
        batches: in the order in which they came.
        consumers: the statistics that the samples belong to, by consumer.
    """

    site: GrowthSite
    batches: tuple[KeptBatch, ...]
    consumers: dict[str, ConsumerStatistics]

    def __len__(self) -> int:
        """Number of samples."""
        return sum(batch.samples for batch in self.batches)

    @property
    def passes(self) -> tuple[KeptPass, ...]:
        """The forward passes of all batches."""
        return tuple(each for batch in self.batches for each in batch.passes)

    # ------------------------------------------------------------------------------------------ as tensors

    @property
    def x(self) -> dict[str, Tensor]:
        """Per producer its inputs, all calls and all batches whose tensors have the shapes of the first one's."""
        return self._joined("x")

    @property
    def h(self) -> dict[str, Tensor]:
        """Per consumer its inputs; rows as those of `x`."""
        return self._joined("h")

    @property
    def v(self) -> dict[str, Tensor]:
        """Per consumer −∂(Σ_i loss_i)/∂z; rows as those of `x`."""
        return self._joined("v")

    def _joined(self, kind: str) -> dict[str, Tensor]:
        passes = [each for each in self.passes if _shapes(each) == _shapes(self.passes[0])]
        return {
            path: torch.cat([tensor for each in passes for tensor in getattr(each, kind)[path]])
            for path in getattr(passes[0], kind)
        }

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of the samples."""
        return next(iter(self.passes[0].v.values()))[0]

    def changed(self, change: Callable[[KeptPass], KeptPass]) -> "KeptSamples":
        """The same samples with something done to every pass."""
        batches = (replace(batch, passes=tuple(map(change, batch.passes))) for batch in self.batches)
        return replace(self, batches=tuple(batches))

    # ------------------------------------------------------------------------------------------ some of them

    def subset(self, index: slice | Tensor) -> "KeptSamples":
        """Some of the samples; of batches that cannot be divided all or none.

        Args:
            index: a slice, or a tensor of indices, in the order of all samples; a batch that cannot be divided comes
                with its first sample.
        """
        chosen = set(torch.arange(len(self))[index].tolist())
        found, start = [], 0
        for batch in self.batches:
            own = [each for each in range(batch.samples) if start + each in chosen]
            start += batch.samples
            if len(own) == batch.samples or (own and own[0] == 0 and not batch.divisible):
                found.append(batch)
            elif own and batch.divisible:
                found.append(batch.part(torch.tensor(own, device=self.like.device)))
        return replace(self, batches=tuple(found))

    def split(self, fraction: float) -> tuple["KeptSamples", "KeptSamples"]:
        """The first `fraction` of the samples and the rest, at least one in each; batches divided where they can be.

        Args:
            fraction: share of the first part, between 0 and 1.

        Raises:
            ArgumentValueError: for an impossible share, or samples that cannot be divided.
        """
        if not 0 < fraction < 1 or len(self) < 2 or (len(self.batches) == 1 and not self.batches[0].divisible):
            raise ArgumentValueError(
                "the kept samples cannot be split",
                expected="a share between 0 and 1 of at least 2 samples, in two batches if the operations between the "
                "layers need whole batches",
                got=f"{fraction} of {len(self)} samples in {len(self.batches)} batches",
                where=self.site.name,
                fix="keep more samples: keep_samples=...",
            )
        left = min(max(1, round(fraction * len(self))), len(self) - 1)
        first: list[KeptBatch] = []
        rest: list[KeptBatch] = []
        for number, batch in enumerate(self.batches):
            last = number == len(self.batches) - 1 and not rest
            take = min(left, batch.samples) if batch.divisible else batch.samples * (2 * left >= batch.samples)
            take = 0 if last and not batch.divisible else take
            take = batch.samples if not first and not take and not batch.divisible and not rest else take
            if 0 < take < batch.samples:
                first.append(batch.part(slice(0, take)))
                rest.append(batch.part(slice(take, None)))
            else:
                (first if take else rest).append(batch)
            left = max(0, left - take)
        return replace(self, batches=tuple(first)), replace(self, batches=tuple(rest))

    def parts(self, least: int) -> list["KeptSamples"]:
        """Disjoint parts of whole batches, as many as give at least so many samples each; all in one where none do."""
        count = max(1, min(len(self.batches), len(self) // least))
        return [replace(self, batches=self.batches[index::count]) for index in range(count)]

    def few(self, count: int) -> "KeptSamples":
        """About as many of the first samples."""
        return replace(self, batches=self.batches[:1]).subset(slice(0, count))

    def pieces(self, entries: int, scratch: int) -> Iterator[KeptPass]:
        """All passes, in pieces where they can be divided.

        Args:
            entries: how many entries a sample needs at once.
            scratch: how many there is room for.
        """
        step = max(1, scratch // max(1, entries))
        for batch in self.batches:
            if batch.samples <= step or not batch.divisible:
                yield from batch.passes
                continue
            for start in range(0, batch.samples, step):
                yield from batch.part(slice(start, start + step)).passes

    # ------------------------------------------------------------------------------------------ what is wanted

    @cached_property
    def energy(self) -> float:
        """‖v‖², summed over samples and consumers."""
        norms = [
            torch.linalg.vector_norm(each.flatten(), dtype=torch.float64)
            for kept in self.passes
            for calls in kept.v.values()
            for each in calls
        ]
        return float(torch.stack(norms).square().sum()) if norms else 0.0

    def projected(self) -> "KeptSamples":
        """The same samples with v⊥ in the place of v: what no update of the consumers' own weights can give.

        The update is W* of the statistics where it was collected. Else it is fitted to these samples, with a ridge
        chosen by cross-validation where they are few: a plain least-squares update would explain noise, in the end all
        of v.
        """
        return self._projected

    @cached_property
    def _projected(self) -> "KeptSamples":
        updates = {}
        for path, statistics in self.consumers.items():
            layer, weight, bias = self.site.layer(path), statistics.update, statistics.update_bias
            if weight is None:
                pairs = [pair for each in self.passes for pair in zip(each.h[path], each.v[path], strict=True)]
                weight, bias = best_update(layer.module, pairs)
            updates[path] = layer, weight, bias

        def projected(each: KeptPass) -> KeptPass:
            found: Maps = {}
            for path, calls in each.v.items():
                (layer, weight, bias), left = updates[path], []
                for h, v in zip(each.h[path], calls, strict=True):
                    left.append(v - layer.apply(h, _as(weight, h), None if bias is None else _as(bias, h)))
                found[path] = tuple(left)
            return replace(each, v=found)

        return self.changed(projected)

    def v_perp(self, consumer: str) -> Tensor:
        """v⊥ of one consumer; rows as those of `v`.

        Args:
            consumer: its module path.
        """
        return self.projected().v[consumer]

    # ------------------------------------------------------------------------------------------ new channels

    def moments(self, incoming: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> dict[str, Moments]:
        """Mean and variance (entries,) of new channels in front of every norm layer in between, over all samples.

        Args:
            incoming: per producer new filters (K·ratio, in/groups, *kernel).
            biases: per producer with a bias (K·ratio,).
        """
        totals: dict[str, tuple[Tensor, Tensor, float]] = {}
        if not self.site.followers:
            return {}
        with torch.no_grad():
            for each in self.passes:
                measured: dict[str, Moments] = {}
                new = each.produced(incoming, biases)
                each.region.read(new, None, measured)
                weight = float(sum(value.numel() for calls in new.values() for value in calls))
                for path, (mean, variance) in measured.items():
                    first, second, count = totals.get(path, (0.0, 0.0, 0.0))
                    second = second + weight * (variance + mean.square())
                    totals[path] = (first + weight * mean, second, count + weight)
        found = {}
        for path, (first, second, count) in totals.items():
            mean = first / count
            found[path] = (mean, (second / count - mean.square()).clamp_min(0))
        return found

    def require_finite(self) -> None:
        """Refuse samples that are not finite.

        Raises:
            StatisticsError: naming the layer.
        """
        for each in self.passes:
            for path, calls in (*each.x.items(), *each.h.items(), *each.v.items()):
                if not all(bool(torch.isfinite(tensor).all()) for tensor in calls):
                    raise StatisticsError(
                        "the kept samples are not finite",
                        where=f"{self.site.name}, {path}",
                        fix="look for an overflow in the loss, or lower the loss scale",
                    )

    def of(self, site: GrowthSite) -> "KeptSamples":
        """The same samples with the site of another model of the same names and widths."""
        return replace(self.changed(lambda each: replace(each, region=replace(each.region, site=site))), site=site)

    def joined(self, other: "KeptSamples", consumers: Iterable[ConsumerStatistics]) -> "KeptSamples":
        """The samples of both, with the statistics that belong to all of them."""
        by_path = {each.consumer: each for each in consumers}
        return KeptSamples(self.site, (*self.batches, *other.batches), by_path)


def _as(weight: Tensor, like: Tensor) -> Tensor:
    return weight.to(like.dtype) if weight.device == like.device else weight.to(like)


def _shapes(kept: KeptPass) -> list[torch.Size]:
    maps = (*kept.x.values(), *kept.h.values(), *kept.v.values())
    return [each.shape[1:] for calls in maps for each in calls]


def by_sample(rows: Float[Tensor, "rows *any"], samples: int) -> Float[Tensor, "n *any"]:
    """Rows added up by sample; rows beyond a multiple of the samples are counted with the first ones."""
    index = torch.arange(len(rows), device=rows.device)
    index = index * samples // len(rows) if len(rows) % samples == 0 else index % samples
    return rows.new_zeros(samples, *rows.shape[1:]).index_add(0, index, rows)
