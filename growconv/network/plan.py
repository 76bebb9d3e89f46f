"""What a growth or removal will change: every tensor with its new entries, every attribute. Nothing is changed here.

The new entries are those of a proposal, checked, and in the shapes of the model as it is now. A proposal may be older
than the model: where neighbours have grown since it was solved, its weights on their new channels are zero; where they
have shrunk, or nobody can tell, it is refused.
"""

import math
from collections.abc import Mapping, Sequence
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.errors import SurgeryError
from growconv.network import layers
from growconv.network.layout import ENTRY, FILL, GROUP_IN, GROUP_OUT, IN, OUT, Key, Layout, Sizes
from growconv.network.model import found_at, module_at
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import Site
from growconv.network.tensors import Change, Insertion

AGAIN = "solve again on statistics of the model as it is now"


class Plan:
    """All changes of one growth or removal, or of growths of several sites of a model at once.

    Attributes:
        changes: one per tensor, also where several modules share it.
        attributes: per module path and name the value to set.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.changes: list[Change] = []
        self.attributes: dict[tuple[str, str], int | Sequence[int]] = {}
        self._of_tensor: dict[int, Change] = {}
        self._of_path: dict[str, Change] = {}
        self._sizes: dict[int, tuple[Layout, Sizes]] = {}

    def change(self, path: str) -> Change:
        """The change of a tensor, which is one even where several modules share it."""
        path = path.rstrip(".")  # a bare tensor has no name of its own
        if path not in self._of_path:
            tensor = tensor_at(self.model, path)
            if id(tensor) not in self._of_tensor:
                self._of_tensor[id(tensor)] = Change(path, tensor)
                self.changes.append(self._of_tensor[id(tensor)])
            self._of_path[path] = self._of_tensor[id(tensor)]
        return self._of_path[path]

    def sizes(self, site: Site) -> Sizes:
        """The lengths of the axes of a site's layout, which nothing changes as long as the plan is being made."""
        return self._sizes.setdefault(id(site.layout), (site.layout, site.sizes))[1]

    def lengthen(self, adapter: layers.Adapter, path: str, added: Mapping[str, int]) -> None:
        """Let a layer follow its new or missing entries, of which `added` says how many more each side has."""
        for name, values in adapter.revised(lambda name: self.change(f"{path}.{name}")).items():
            self.change(f"{path}.{name}").revised = values
        for name, value in adapter.counts(added).items():
            self.attributes[path, name] = value

    def follow(self, site: Site, units: int) -> None:
        """Let the sizes follow that the code of modules keeps beside their tensors."""
        for each in site.layout.attributes:
            place, more = (each.path, each.name), each.rates.get(site.space, 0) * units
            if more:
                value: int | Sequence[int] = getattr(module_at(self.model, each.path), each.name)
                self.attributes[place] = each.enlarged(self.attributes.get(place, value), more)

    def edits(self) -> list[dict[str, object]]:
        """The plan as plain values, to be replayed in this order."""
        edits: list[dict[str, object]] = []
        for change in self.changes:
            module, _, name = change.path.rpartition(".")
            for each in sorted(change.insertions, key=attrgetter("position"), reverse=True):
                place = {"axis": each.axis, "position": each.position, "count": each.count}
                edits.append({"module": module, "tensor": name, **place})
            for axis, entries in change.removed.items():
                edits.append({"module": module, "tensor": name, "axis": axis, "removed": sorted(entries)})
        for (path, name), value in self.attributes.items():
            edits.append({"module": path, "attribute": name, "value": value})
        return edits

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Path and Parameter of everything that is replaced."""
        return [(c.path, c.tensor) for c in self.changes if c.resizes and isinstance(c.tensor, nn.Parameter)]

    def added_parameters(self) -> int:
        """How many parameter entries the plan adds (negative: takes away)."""
        total = 0
        for change in self.changes:
            if isinstance(change.tensor, nn.Parameter):
                shape = list(change.tensor.shape)
                for each in change.insertions:
                    shape[each.axis] += each.count
                for axis, entries in change.removed.items():
                    shape[axis] -= len(entries)
                total += math.prod(shape) - change.tensor.numel()
        return total


def plan_growth(site: Site, growth: ChannelGrowth, amplitude: float = 1.0) -> Plan:
    """Plan and validate a growth; nothing is changed.

    Args:
        growth: what; for the model as it is now.
        amplitude: multiplies the outgoing weights.

    Raises:
        SurgeryError: naming the tensor that does not fit.
    """
    return plan_growths([(site, growth)], amplitude)


def plan_growths(growths: Sequence[tuple[Site, ChannelGrowth]], amplitude: float = 1.0) -> Plan:
    """Plan and validate growths of several sites of a model in one; where new channels of two meet, weights are zero.

    Args:
        growths: one or more sites of one layout, each with what; see `plan_growth`.
    """
    plan = Plan(growths[0][0].model)
    for site, growth in growths:
        check_proposal(site, growth)
    _add(
        plan,
        [(site, growth.channels, NewEntries(site, growth, amplitude, plan.sizes(site))) for site, growth in growths],
    )
    for site, growth in growths:
        for path, replacement in growth.revised.items():
            plan.change(path).revised = revision(site, growth, path, replacement)
    return plan


def plan_size(site: Site, channels: int) -> int:
    """Parameters that so many new channels, a multiple of the site's granularity, would add."""
    plan = Plan(site.model)
    _add(plan, [(site, channels, None)])
    return plan.added_parameters()


def plan_removal(site: Site, channels: Sequence[int]) -> Plan:
    """Plan and validate the removal of channels, by index; SurgeryError for all of them, or parts of a group."""
    index, size = sorted({int(channel) for channel in channels}), site.granularity
    if not index or index[0] < 0 or index[-1] >= site.width or len(index) == site.width:
        expected = f"some, but not all, of the channels 0 to {site.width - 1}"
        raise SurgeryError("these channels cannot be removed", where=site.name, expected=expected, got=index)
    units = sorted({channel // size for channel in index})
    if len(units) * size != len(index):
        expected = f"runs of {size} channels that start at a multiple of {size}"
        raise SurgeryError("channels of this site go in whole groups", where=site.name, expected=expected, got=index)
    plan = Plan(site.model)
    sizes = plan.sizes(site)

    for path, sides in _sides(site).items():
        adapter, gone = site.adapter(path), dict[str, int]()
        for side in sides:
            entries, per_unit = site.entries(path, side, sizes), site.layout.per_unit((path, side), site.space)
            gone[side] = -len(units) * per_unit
            own = [entries[unit * per_unit + each] for unit in units for each in range(per_unit)]
            for slot in adapter.slots(side):
                plan.change(f"{path}.{slot.name}").removed[slot.axis] = slot.positions(own, adapter.size(side))
        plan.lengthen(adapter, path, gone)
    plan.follow(site, -len(units))
    return plan


def shared_names(model: nn.Module) -> dict[str, list[str]]:
    """Per name of a parameter or buffer that has several, all of them."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                names.setdefault(id(tensor), []).append(f"{path}.{name}".lstrip("."))
    return {name: own for own in names.values() if len(own) > 1 for name in own}


def tied_weights(site: Site, shared: Mapping[str, Sequence[str]] | None = None) -> str | None:
    """Why a weight that several layers share keeps a site from growing, in one line; None where none does.

    Layers may share a weight where all of them play the same part: then new channels are the same for all. A weight
    that produces the channels in one layer and consumes them in another (encoder and decoder), or that belongs to a
    layer outside of the site too, cannot keep the function and grow.

    Args:
        shared: what several names of its model stand for, as `shared_names` gives it, if it is known.
    """
    shared = shared_names(site.model) if shared is None else shared
    concerned = shared.keys() | site.layout.dims.keys()
    parts: dict[str, dict[str, set[tuple[str, int]]]] = {}

    def parts_of(name: str) -> dict[str, set[tuple[str, int]]]:
        names = shared.get(name, [name])
        return parts.setdefault(names[0], {each: set() for each in names})

    for path, sides in sorted(_sides(site).items(), key=lambda item: item[0] in site.layout.dims):  # bare ones last
        for side in sides if concerned else ():
            for slot in site.adapter(path).slots(side):
                name = f"{path}.{slot.name}".rstrip(".")
                if name in concerned:
                    own = parts_of(name)
                    where = f"{name} (used on its own)" if not slot.name and own.get(name) else name
                    own.setdefault(where, set()).add((side, slot.axis))
    for own in parts.values():
        if any(part != next(iter(own.values())) for part in own.values()):
            return f"{' and '.join(own)} are one weight, but play different parts for these channels"
    return None


def _sides(site: Site) -> dict[str, list[str]]:
    """Per layer and bare tensor of a site the sides that the channels lie along."""
    found: dict[str, list[str]] = {}
    for path, side in site.axes:
        if side != FILL:
            found.setdefault(path, []).append(side)
    return found


def _add(plan: Plan, growing: Sequence[tuple[Site, int, "NewEntries | None"]]) -> None:
    """New channels of sites for every layer and bare tensor of theirs, so many of each; zeros without values."""
    on: dict[str, dict[str, list[tuple[Site, int, NewEntries | None]]]] = {}
    for each in growing:
        for path, sides in _sides(each[0]).items():
            for side in sides:
                on.setdefault(path, {}).setdefault(side, []).append(each)
    for path, sides in on.items():
        adapter, added = next(iter(sides.values()))[0][0].adapter(path), dict[str, int]()
        for side, own in sides.items():
            layout, alone = own[0][0].layout, any(slot.groups > 1 for slot in adapter.slots(side))
            for part in [[each] for each in own] if alone else [own]:  # each site has its share of every group
                _insert(plan, adapter, (path, side), part)
            added[side] = sum(n // s.granularity * layout.per_unit((path, side), s.space) for s, n, _ in own)
        plan.lengthen(adapter, path, added)
    for site, channels, _ in growing:
        plan.follow(site, channels // site.granularity)


def _insert(
    plan: Plan, adapter: layers.Adapter, key: Key, growing: Sequence[tuple[Site, int, "NewEntries | None"]]
) -> None:
    """New entries along one axis."""
    (path, side), layout, sizes = key, growing[0][0].layout, plan.sizes(growing[0][0])
    listed = GROUP_OUT if side == GROUP_IN else side  # filters of new groups are listed along the outputs
    units = {site.space: channels // site.granularity for site, channels, _ in growing}
    places = order = layout.places(key, units, sizes)
    if listed != side:
        order = layout.places((path, listed), units, sizes)
    values = _together([values(path, listed) for _, _, values in growing if values is not None], 1 if side == IN else 0)
    found: dict[str, list[Insertion]] = {}
    for name, insertion in adapter.insertions(side, places, values, order):
        found.setdefault(name, []).append(insertion)
    for name, own in found.items():
        insertions = plan.change(f"{path}.{name}").insertions
        known = set(insertions)  # a shared tensor may have them already
        insertions += [insertion for insertion in own if insertion not in known]


def _together(parts: Sequence[Mapping[str, Tensor]], axis: int) -> Mapping[str, Tensor]:
    """The new entries of several sites, one after the other along an axis."""
    if len(parts) < 2:
        return parts[0] if parts else {}
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: torch.cat([part[name].to(parts[0][name].device) for part in parts], axis) for name in names}


# ------------------------------------------------------------------------------------------ new entries


class NewEntries:
    """The new entries that a proposal gives each layer, checked and in the shapes that the layers have now."""

    def __init__(self, site: Site, growth: ChannelGrowth, amplitude: float, sizes: Sizes) -> None:
        self.site, self.growth, self.amplitude, self.sizes = site, growth, amplitude, sizes

    def __call__(self, path: str, side: str) -> Mapping[str, Tensor]:
        """By tensor name, for a path and side, channel by channel; those of a bare tensor are under ""."""
        entries = self.site.layout.per_unit((path, side), self.site.space) * self.growth.channels
        entries //= self.site.granularity
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
    if not isinstance(tensor, Tensor) or not bool(torch.isfinite(tensor).all()):
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
    result, where = tensor.detach().clone(), []
    for axis, length in enumerate(replacement.shape):
        at = list(range(length))
        if axis in keys:
            at = positions_now(site, keys[axis][0], length, growth.units, label, keys[axis][1])
        elif length != tensor.shape[axis]:
            raise _misshapen(label, site, tuple(tensor.shape), tuple(replacement.shape))
        where.append(torch.tensor(at).view([-1 if each == axis else 1 for each in range(tensor.dim())]))
    result[tuple(where)] = replacement.detach().to(result)
    return result


def tensor_at(model: nn.Module, path: str) -> Tensor:
    """A parameter or buffer of a model; SurgeryError where there is none."""
    found = found_at(model, path)
    if not isinstance(found, Tensor):
        raise SurgeryError("this parameter does not exist", where=path, fix="name parameters or buffers of the model")
    return found
