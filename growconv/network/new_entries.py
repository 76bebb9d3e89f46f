"""The new entries that a proposal gives each layer, checked, and in the shapes that the layers have now.

A proposal may be older than the model: where neighbours have grown since it was solved, its weights on their new
channels are zero; where they have shrunk, or nobody can tell, it is refused.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from growconv.errors import SurgeryError
from growconv.network import layers
from growconv.network.layout import ENTRY, FILL, GROUP_OUT, IN, OUT, Key, Sizes
from growconv.network.model import module_at, tensor_at
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import Site

AGAIN = "solve again on statistics of the model as it is now"


class NewEntries:
    """The new entries that a proposal gives each layer, checked and in the shapes that the layers have now."""

    def __init__(self, site: Site, growth: ChannelGrowth, amplitude: float, sizes: Sizes) -> None:
        self.site, self.growth, self.amplitude, self.sizes = site, growth, amplitude, sizes

    def __call__(self, path: str, side: str) -> Mapping[str, Tensor]:
        """By tensor name, for a path and side, channel by channel; those of a bare tensor are under ""."""
        entries = self.site.new_entries(path, side, self.growth.channels)
        kinds = {OUT: self._produced, IN: self._consumed, GROUP_OUT: self._carried, ENTRY: self._normalised}
        found = (self._bare if path in self.site.layout.dims else kinds[side])(path, entries)
        copied = self._copied(path, side) if side in (ENTRY, GROUP_OUT) else None
        if copied is None:
            return found
        return {name: _mixed(copied, old, found.get(name)) for name, old in self.site.adapter(path).old(side).items()}

    def _produced(self, path: str, entries: int) -> dict[str, Tensor]:
        layer, growth, label = self.site.layer(path), self.growth, f"incoming weights of {path}"
        shape, bias = layer.shape(OUT, entries), growth.incoming_bias.get(path)
        found = {"weight": self._fitted(growth.incoming[path], shape, label, 1, (path, IN), layer.groups)}
        return found if bias is None else found | {"bias": self._fitted(bias, (entries,), f"incoming bias of {path}")}

    def _consumed(self, path: str, entries: int) -> dict[str, Tensor]:
        layer, label = self.site.layer(path), f"outgoing weights of {path}"
        weight = self._fitted(self.growth.outgoing[path], layer.shape(IN, entries), label, 0, (path, OUT))
        return {"weight": weight.to(layer.filters().dtype) * self.amplitude}

    def _normalised(self, path: str, entries: int) -> Mapping[str, Tensor]:
        """New channels of a norm layer start as the identity on their own mean and variance, times `norm_scale`."""
        norm, growth = layers.norm(module_at(self.site.model, path)), self.growth
        zeros, scale = torch.zeros(entries, dtype=torch.float64), growth.norm_scale
        mean, variance = zeros, zeros + 1
        if path in growth.norms:
            mean, variance = growth.norms[path]
            mean = self._per_entry(mean, entries, f"mean for {path}")
            variance = self._per_entry(variance, entries, f"variance for {path}")
            if bool((variance < 0).any()):
                got = float(variance.min())
                raise SurgeryError("a variance is negative", where=path, expected="at least 0", got=got)
        if scale is not None:
            scale = self._per_entry(scale, entries, f"norm_scale for {path}")
        return norm.transparent(mean, variance, scale)

    def _carried(self, path: str, entries: int) -> dict[str, Tensor]:
        layer, filters = self.site.layer(path), self.growth.carried.get(path)
        if filters is None:
            filters = layer.identity(entries)
        else:
            filters = self._fitted(filters, layer.shape(GROUP_OUT, entries), f"new filters of {path}")
        return {"weight": filters, "bias": filters.new_zeros(entries)}

    def _bare(self, path: str, entries: int) -> dict[str, Tensor]:
        """New entries of a bare tensor, its channel axis in front."""
        site, growth = self.site, self.growth
        tensor = tensor_at(site.model, path).detach()
        front = tensor.movedim(site.layout.dims[path], 0)
        shape = (entries, *front.shape[1:])
        if path in site.producers:
            found = self._fitted(_padded(growth.incoming[path], shape), shape, f"incoming entries of {path}")
        elif path in site.consumers:
            given = _padded(growth.outgoing[path].movedim(1, 0), shape)
            found = self._fitted(given, shape, f"outgoing entries of {path}") * self.amplitude
        elif path in growth.entries:
            found = self._fitted(growth.entries[path], shape, f"new entries of {path}")
        elif not tensor.is_floating_point() and not tensor.is_complex():
            found = front[-1:].expand(shape)
        else:
            found = front[site.entries(path, ENTRY)].mean(0, keepdim=True).expand(shape)
        return {"": found}

    def _per_entry(self, value: Tensor, entries: int, label: str) -> Tensor:
        """A value a channel, or one an entry, as one an entry."""
        if value.shape == (self.growth.channels,) and entries % self.growth.channels == 0:
            value = value.repeat_interleave(entries // self.growth.channels)
        return self._fitted(value, (entries,), label)

    def _copied(self, path: str, side: str) -> list[int] | None:
        """The old entries that the new ones copy, channel by channel, −1 for those that copy none; None: none does."""
        if self.growth.copied_from is None:
            return None
        channels, size = self.growth.copied_from.tolist(), self.site.granularity
        per_unit = self.site.layout.per_unit((path, side), self.site.space)
        if per_unit % size:  # channels of a unit share entries
            channels, size = [channel // size for channel in channels[::size]], 1  # −1 stays −1
        own, old = per_unit // size, self.site.entries(path, side)
        return [-1 if channel < 0 else old[channel * own + each] for channel in channels for each in range(own)]

    def _fitted(
        self, tensor: Tensor, shape: tuple[int, ...], label: str, axis: int = 0, key: Key | None = None, groups: int = 1
    ) -> Tensor:
        """A proposed tensor of the shape that the model needs now; neighbours that grew in the meantime get zeros."""
        require_finite(tensor, label, self.site)
        tensor = tensor.detach()
        if key is not None and tensor.dim() == len(shape):
            at = positions_now(self.site, key, tensor.shape[axis], self.growth.units, label, groups, self.sizes)
            if at != list(range(shape[axis])):
                size = [*tensor.shape[:axis], shape[axis], *tensor.shape[axis + 1 :]]
                tensor = tensor.new_zeros(size).index_copy(axis, torch.tensor(at, device=tensor.device), tensor)
        if tuple(tensor.shape) != tuple(shape):
            raise _misshapen(label, self.site, tuple(shape), tuple(tensor.shape))
        return tensor


def _mixed(index: list[int], old: Tensor, fresh: Tensor | None) -> Tensor:
    """The old entries of an index, and new ones where it is −1."""
    at = torch.tensor(index, device=old.device)
    copies = old.detach()[at.clamp_min(0)]
    if fresh is None:
        return copies
    return torch.where((at >= 0).view(-1, *[1] * (copies.dim() - 1)), copies, fresh.detach().to(copies))


def _misshapen(label: str, site: Site, expected: object, got: object) -> SurgeryError:
    return SurgeryError(f"the {label} have the wrong shape", where=site.name, expected=expected, got=got, fix=AGAIN)


def positions_now(
    site: Site, key: Key, length: int, units: Mapping[int, int], label: str, groups: int = 1, sizes: Sizes | None = None
) -> list[int]:
    """Where the entries that an axis had once lie now: `length` positions along it.

    Args:
        site: whose layout tells it.
        length: how many entries it had; of one group, if there are several.
        units: how many units each space had then; where it says nothing, it is read off `length`.
        label: what has that length, for the message.

    Raises:
        SurgeryError: channels have gone since, or the length leaves in doubt which ones have come.
    """
    sizes, layout = sizes or site.sizes, site.layout
    size, now = sizes(key) // groups, layout.units_along(key, sizes)
    then = {space: units.get(space, now[space]) for space in now}
    if len(now) == 1 and not set(now) & set(units):
        (space,) = now
        fewer, rest = divmod((size - length) * groups, layout.per_unit(key, space))
        then[space] -= fewer + bool(rest)
    for space in now:
        if then[space] > now[space]:
            owners = " + ".join(path for path, side in layout.keys(space) if side == OUT)
            raise SurgeryError(
                f"channels that the {label} belong to have been taken away since",
                where=f"{site.name}: {key[0]}",
                expected=f"at least {then[space]} units of {owners or key[0]}",
                got=now[space],
                fix=AGAIN,
            )
    if then == now and length == size:
        return list(range(length))
    new = set[int]()  # units always come behind the old ones of a run
    for space, units_then in then.items():
        new.update(layout.entries(key, space, sizes)[units_then * layout.per_unit(key, space) :])
    old = [at for at in range(sizes(key)) if at not in new]
    if len(old) != length * groups:
        raise _misshapen(label, site, f"{size} entries for {key[0]} ({key[1]})", length)
    inside = {tuple(at % size for at in old[start : start + length]) for start in range(0, len(old), length)}
    if len(inside) > 1:
        raise SurgeryError(f"the groups that the {label} belong to have grown unequally", where=key[0], fix=AGAIN)
    return list(inside.pop())


def _padded(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros behind the entries of every axis: slices of a kernel whose other rank has grown since, at its end."""
    if values.dim() != len(shape) or any(mine > now for mine, now in zip(values.shape, shape, strict=True)):
        return values
    return F.pad(values, [side for m, n in zip(values.shape[::-1], shape[::-1], strict=True) for side in (0, n - m)])


def require_finite(tensor: Tensor, label: str, site: Site) -> None:
    """Refuse a proposed tensor that is none, or not of finite numbers."""
    finite = isinstance(tensor, Tensor)
    if finite and tensor.numel():  # many times as fast as looking at each entry; what is not a number comes through
        finite = all(bool(torch.isfinite(edge)) for edge in torch.aminmax(tensor.detach()))
    if not finite:
        got = "not all finite" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise SurgeryError(f"the {label} are no finite numbers", where=site.name, expected="a finite tensor", got=got)


def check_proposal(site: Site, growth: ChannelGrowth) -> None:
    """Refuse a proposal for another site, for layers that it does not have, or for an impossible number of channels."""
    if growth.site != site.name:
        raise SurgeryError("the proposal is for another site", expected=site.name, got=growth.site)
    layered = [path for path in site.producers if path not in site.layout.dims]
    needed = {
        "incoming": ("incoming weights", site.producers),
        "incoming_bias": ("incoming bias", [path for path in layered if site.layer(path).bias() is not None]),
        "outgoing": ("outgoing weights", site.consumers),
    }
    for label in (*needed, "norms", "carried", "entries"):
        given, (name, allowed) = getattr(growth, label), needed.get(label, (label, site.followers))
        problem = None
        if set(given) - set(allowed):
            problem = f"{label} names layers that are not part of the site, or without one"
        elif label in needed and set(allowed) - set(given):
            problem = f"the proposal has no {name} for some layers"
        if problem is not None:
            expected, got = ", ".join(allowed) or "none", ", ".join(given)
            raise SurgeryError(problem, where=site.name, expected=expected, got=got)
    if growth.channels < 1 or growth.channels % site.granularity:
        raise SurgeryError(
            "this number of channels cannot be added",
            where=site.name,
            expected=f"a positive multiple of {site.granularity}" if site.granularity > 1 else "at least 1",
            got=growth.channels,
            fix=f"ask for {site.growable_channels(max(growth.channels, 1))} channels",
        )
    then = growth.units.get(site.space)
    if growth.revised and then not in (None, site.units.get(site.space)):
        raise SurgeryError(
            "the site has been grown or shrunk since this proposal gave old weights new values",
            where=site.name,
            expected=f"{then} units of {', '.join(site.producers)}",
            got=site.units.get(site.space),
            fix="solve again",
        )
    index = growth.copied_from
    if index is not None and (index.shape != (growth.channels,) or index.min() < -1 or index.max() >= site.width):
        raise SurgeryError("copied_from needs one old channel per new one", where=site.name, got=index.tolist())


def revision(site: Site, growth: ChannelGrowth, path: str, replacement: Tensor) -> Tensor:
    """Other values for a tensor's old entries; channels that have come since the proposal was made keep theirs."""
    owner, _, name = path.rpartition(".")
    label = f"new values of {path}"
    tensor, module = tensor_at(site.model, path), module_at(site.model, owner)
    if layers.stored(module, name) is None:
        raise SurgeryError(
            "this weight is computed from others, and cannot be replaced",
            where=path,
            fix="use a method that leaves old weights as they are, or store the weight as it is",
        )
    require_finite(replacement, label, site)
    if replacement.dim() != tensor.dim():
        raise _misshapen(label, site, tuple(tensor.shape), tuple(replacement.shape))
    keys: dict[int, tuple[Key, int]] = {}
    for at, side in site.layout.axes:
        for slot in site.adapter(at).slots(side) if at in (owner, path) and side != FILL else ():
            if f"{at}.{slot.name}".rstrip(".") == path:
                keys[slot.axis] = (at, side), slot.groups
    where = []
    for axis, length in enumerate(replacement.shape):
        at = list(range(length))
        if axis in keys:
            at = positions_now(site, keys[axis][0], length, growth.units, label, keys[axis][1])
        elif length != tensor.shape[axis]:
            raise _misshapen(label, site, tuple(tensor.shape), tuple(replacement.shape))
        where.append(torch.tensor(at).view([-1 if each == axis else 1 for each in range(tensor.dim())]))
    result = tensor.detach().clone()
    if replacement.shape == result.shape:
        return result.copy_(replacement.detach())
    result[tuple(where)] = replacement.detach().to(result)
    return result
