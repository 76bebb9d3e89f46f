"""Layers with one entry a channel: batch, instance and group norms, and PReLU."""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from growconv.errors import SurgeryError
from growconv.network.layers.base import Adapter, Slot, stored
from growconv.network.layout import ENTRY

TENSORS = ("weight", "bias", "running_mean", "running_var")


class Norm(Adapter):
    """BatchNorm1d-3d, SyncBatchNorm and InstanceNorm1d-3d, with or without weights and running statistics."""

    kinds = (_BatchNorm, _InstanceNorm)
    sides = (ENTRY,)
    count = "num_features"
    normalises = True

    def size(self, side: str) -> int:
        """Channels that it normalises."""
        return int(getattr(self.module, self.count))

    def slots(self, side: str) -> list[Slot]:
        """Weight, bias and running statistics, as far as it has them."""
        return [Slot(name, 0) for name in self.old(side)]

    def old(self, side: str) -> dict[str, Tensor]:
        """Its tensors."""
        found = {name: stored(self.module, name) for name in TENSORS}
        return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}

    def channel_axis(self, ndim: int) -> int:
        """Axis 1; 0 for an instance norm that is given no sample axis."""
        if isinstance(self.module, _InstanceNorm) and ndim == self.module._get_no_batch_dim():
            return 0
        return min(1, ndim - 1)

    def groups(self, entries: int) -> list[slice]:
        """Entries that are normalised together with others."""
        return []

    def entries(self, slot: Slot, side: str, order: Sequence[int], values: Mapping[str, Tensor]) -> Tensor | None:
        """Those given for the tensor, (entries,)."""
        given = values.get(slot.name)
        return None if given is None else given[list(order)].to(self.old(side)[slot.name].dtype)

    def counts(self, added: Mapping[str, int]) -> dict[str, int]:
        """The number of channels."""
        return {self.count: self.size(ENTRY) + added.get(ENTRY, 0)}

    def transparent(self, mean: Tensor, variance: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Entries that make the layer the identity on new channels with this mean and variance, times `scale`.

        All are (entries,); no scale is 1.
        """
        weight, bias = (variance + float(getattr(self.module, "eps", 1e-5))).sqrt(), mean
        if scale is not None:
            weight, bias = weight * scale.to(weight), mean * scale.to(weight)
        return {"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance}

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (entries,) with which it is the identity on what it is given on average, in float64."""
        dims = [axis for axis in range(x.dim()) if axis != 1]
        exact = x.detach().double()
        return self.pooled(exact.mean(dims), exact.var(dims, unbiased=False))

    def inserted(self, x: Tensor, mean: Tensor, variance: Tensor, scale: Tensor | None = None) -> Tensor:
        """What the layer does to the values (n, entries, *grid) of new channels that come with `transparent` entries.

        A batch norm is the identity on them; norms over the locations of a sample are run with its own statistics.
        """
        values = self.transparent(mean, variance, scale)
        weight, bias = (None if stored(self.module, name) is None else values[name].to(x) for name in TENSORS[:2])
        return self._applied(x, [weight, bias, mean.to(x), variance.to(x)])

    @property
    def by_sample(self) -> bool:
        """Whether it normalises with the statistics of each sample, so that it takes no scale through."""
        return isinstance(self.module, _InstanceNorm) and (self.module.training or not self.module.track_running_stats)

    def copied(self, x: Tensor, index: Tensor) -> Tensor:
        """What the layer does to new channels that copy old entries, (entries,), with its running statistics."""
        own = self.old(ENTRY)
        return self._applied(x, [own[name][index].to(x) if name in own else None for name in TENSORS])

    def _applied(self, x: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
        """The layer with other TENSORS; without a mean, the batch's own."""
        weight, bias, mean, variance = tensors
        eps = float(getattr(self.module, "eps", 1e-5))
        if self.by_sample:
            return F.instance_norm(x, None, None, weight, bias, True, 0.0, eps)
        return F.batch_norm(x, mean, variance, weight, bias, mean is None, 0.0, eps)

    def pooled(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """The moments that make the layer the identity, from the entries' own."""
        return mean, variance


class GroupNorm(Norm):
    """GroupNorm: channels come and go with their groups, so that no old channel is normalised with new ones."""

    kinds = (nn.GroupNorm,)
    count = "num_channels"

    def _per_group(self) -> int:
        return self.size(ENTRY) // int(self.module.num_groups)  # pyright: ignore[reportArgumentType]

    def groups(self, entries: int) -> list[slice]:
        """Entries that are normalised together, when there are so many of them in groups as large as now."""
        size = self._per_group()
        return [slice(start, start + size) for start in range(0, entries, size)]

    def counts(self, added: Mapping[str, int]) -> dict[str, int]:
        """The numbers of channels and groups."""
        more, size = added.get(ENTRY, 0), self._per_group()
        if more % size:
            raise SurgeryError(
                "channels of a group norm come in whole groups", expected=f"multiples of {size}", got=more
            )
        return {**super().counts(added), "num_groups": int(self.module.num_groups) + more // size}  # pyright: ignore[reportArgumentType]

    @property
    def by_sample(self) -> bool:
        """It always does."""
        return True

    def pooled(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Those of each entry's group, the channels of a group one after the other."""
        size = self._per_group()
        grouped = mean.unflatten(0, (-1, size)).mean(1, keepdim=True)
        spread = (variance + mean.square()).unflatten(0, (-1, size)).mean(1, keepdim=True) - grouped.square()
        return tuple(each.expand(-1, size).flatten() for each in (grouped, spread.clamp_min(0)))  # pyright: ignore

    def _applied(self, x: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
        return F.group_norm(x, x.shape[1] // self._per_group(), *tensors[:2], float(self.module.eps))  # pyright: ignore


class PReLU(Norm):
    """PReLU with one slope a channel; new channels get the mean slope."""

    count = "num_parameters"
    kinds = (nn.PReLU,)
    normalises = False

    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        """Whether it has a slope for each channel."""
        return int(module.num_parameters) > 1  # pyright: ignore[reportArgumentType]

    def transparent(self, mean: Tensor, variance: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        """The mean slope: new channels get what the old ones have."""
        weight = stored(self.module, "weight")
        return {} if weight is None else {"weight": weight.detach().mean().expand(len(mean))}

    def _applied(self, x: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
        return x if tensors[0] is None else F.prelu(x, tensors[0])
