"""What a growth or removal will change: every tensor with its new entries, every attribute. Nothing is changed here."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from torch import Tensor, nn

from growconv.errors import SurgeryError
from growconv.network import layers
from growconv.network.layout import ENTRY, FILL, GROUP_IN, GROUP_OUT, Layout, Sizes
from growconv.network.model import module_at
from growconv.network.new_entries import NewEntries, check_proposal, revision, tensor_at
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import Site
from growconv.network.tensors import Insertion, enlarge, without


@dataclass
class Change:
    """One tensor of the model that gets other entries.

    Attributes:
        path: module path and tensor name.
        tensor: the tensor as it is now.
        insertions: what comes in, where.
        removed: per axis the entries that go.
        revised: other values for the old entries, or None.
    """

    path: str
    tensor: Tensor
    insertions: list[Insertion] = field(default_factory=list)
    removed: dict[int, tuple[int, ...]] = field(default_factory=dict)
    revised: Tensor | None = None

    @property
    def resizes(self) -> bool:
        """Whether the tensor gets another shape."""
        return bool(self.insertions or self.removed)

    def resized(self, tensor: Tensor, fill: bool = True, axes: Sequence[bool] | None = None) -> Tensor:
        """A tensor of the old shape in the new one.

        Args:
            fill: put the new values in; else new entries are zero.
            axes: which axes a tensor of optimizer state shares with this one; None: all.
        """
        own = [each for each in self.insertions if axes is None or axes[each.axis]]
        if own:
            tensor = enlarge(tensor, own, fill)
        for axis, entries in self.removed.items():
            if axes is None or axes[axis]:
                tensor = without(tensor, axis, entries)
        return tensor


class Plan:
    """All changes of one growth or removal, or of growths of several sites at once.

    Args:
        model: the model that they are for.

    Attributes:
        changes: one per tensor, also where several modules share it.
        attributes: per module path and name the value to set.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.changes: list[Change] = []
        self.attributes: dict[tuple[str, str], int | Sequence[int]] = {}
        self._by_tensor: dict[int, Change] = {}
        self._by_path: dict[str, Change] = {}
        self._inserted: set[tuple[int, Insertion]] = set()
        self._adapters: dict[str, layers.Adapter] = {}
        self._sizes: dict[int, tuple[Layout, Sizes]] = {}
        self._parts: dict[str, list[layers.Part]] = {}
        self._added: dict[str, Counter[str]] = {}

    def change(self, path: str) -> Change:
        """The change of a tensor, which is one even where several modules share it."""
        if path not in self._by_path:
            tensor = tensor_at(self.model, path)
            if id(tensor) not in self._by_tensor:
                self.changes.append(Change(path, tensor))
                self._by_tensor[id(tensor)] = self.changes[-1]
            self._by_path[path] = self._by_tensor[id(tensor)]
        return self._by_path[path]

    def adapter(self, path: str) -> layers.Adapter:
        """What knows a layer of the model."""
        if path not in self._adapters:
            self._adapters[path] = layers.adapter(module_at(self.model, path))
        return self._adapters[path]

    def sizes(self, site: Site) -> Sizes:
        """The lengths of the axes of a site's layout, which nothing changes as long as the plan is being made."""
        return self._sizes.setdefault(id(site.layout), (site.layout, site.sizes))[1]

    def insert(self, path: str, insertion: Insertion) -> None:
        """Add an insertion, unless a shared tensor has it already."""
        change = self.change(path)
        if (id(change), insertion) not in self._inserted:
            self._inserted.add((id(change), insertion))
            change.insertions.append(insertion)

    def add(
        self, path: str, parts: Sequence[layers.Part], removals: Sequence[layers.Removal], added: Mapping[str, int]
    ) -> None:
        """Add what happens to one layer.

        Args:
            path: of the layer.
            parts: new entries.
            removals: entries that go.
            added: per side how many more entries it has afterwards.
        """
        adapter = self.adapter(path)
        for name, insertion in parts:
            self.insert(f"{path}.{name}", insertion)
        for removal in removals:
            self.change(f"{path}.{removal.name}").removed[removal.axis] = removal.entries
        all_parts = self._parts.setdefault(path, [])
        all_parts += parts
        for name, values in adapter.revised(all_parts, removals).items():
            self.change(f"{path}.{name}").revised = values
        all_added = self._added.setdefault(path, Counter())
        all_added.update(added)
        for name, value in adapter.counts(all_added).items():
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


Values = Callable[[str, str], Mapping[str, Tensor]]
"""Per path and side the new entries by tensor name, channel by channel; a bare tensor's own are under ""."""


def plan_growth(site: Site, growth: ChannelGrowth, amplitude: float = 1.0, plan: Plan | None = None) -> Plan:
    """Plan and validate a growth; nothing is changed.

    Args:
        growth: what; for the model as it is now.
        amplitude: multiplies the outgoing weights.
        plan: a plan for other sites of the model, which this growth is added to; where new channels of two sites meet,
            weights are zero.

    Raises:
        SurgeryError: naming the tensor that does not fit.
    """
    check_proposal(site, growth)
    plan = plan or Plan(site.model)
    _add(plan, site, growth.channels, NewEntries(site, growth, amplitude, plan.sizes(site)))
    for path, replacement in growth.revised.items():
        plan.change(path).revised = revision(site, growth, path, replacement)
    return plan


def plan_size(site: Site, channels: int) -> int:
    """Parameters that so many new channels would add.

    Args:
        channels: a multiple of the site's granularity.
    """
    plan = Plan(site.model)
    _add(plan, site, channels, lambda path, side: {})
    return plan.added_parameters()


def plan_removal(site: Site, channels: Sequence[int]) -> Plan:
    """Plan and validate the removal of channels; nothing is changed.

    Args:
        channels: their indices; whole units where channels come in groups.

    Raises:
        SurgeryError: for channels that are not there, all of them, or parts of a group.
    """
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

    def gone(path: str, side: str) -> list[int]:
        entries = site.entries(path, side, sizes)
        per_unit = site.layout.per_unit((path, side), site.space)
        return sorted(entries[unit * per_unit + each] for unit in units for each in range(per_unit))

    for path, sides in _sides(site).items():
        if path in site.layout.dims:
            plan.change(path).removed[site.layout.dims[path]] = tuple(gone(path, ENTRY))
            continue
        adapter = plan.adapter(path)
        entries = {side: gone(path, side) for side in sides}
        removals = [each for side in sides for each in adapter.removals(side, entries[side])]
        plan.add(path, [], removals, {side: -len(found) for side, found in entries.items()})
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
        if path in site.layout.dims:
            own = parts_of(path)
            where = f"{path} (used on its own)" if own.get(path) else path
            own.setdefault(where, set()).add((ENTRY, site.layout.dims[path]))
            continue
        for side in sides if concerned else ():
            for slot in layers.adapter(module_at(site.model, path)).slots(side):
                name = f"{path}.{slot.name}"
                if name in concerned:
                    parts_of(name)[name].add((side, slot.axis))
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


def _add(plan: Plan, site: Site, channels: int, values: Values) -> None:
    """New channels for every layer and bare tensor of a site."""
    sizes, units = plan.sizes(site), channels // site.granularity
    for path, sides in _sides(site).items():
        places = {side: site.layout.places((path, side), site.space, units, sizes) for side in sides}
        if path in site.layout.dims:
            axis, own = site.layout.dims[path], values(path, ENTRY).get("")
            for place in places[ENTRY]:
                part = None if own is None else place.of(own).movedim(0, axis)
                plan.insert(path, Insertion(axis, place.position, len(place.entries), part))
            continue
        adapter, parts = plan.adapter(path), list[layers.Part]()
        if isinstance(adapter, layers.Weighted) and GROUP_OUT in sides:
            parts += adapter.group_insertions(places[GROUP_IN], places[GROUP_OUT], values(path, GROUP_OUT))
        else:
            for side in sides:
                parts += adapter.insertions(side, places[side], values(path, side))
        plan.add(path, parts, [], {side: units * site.layout.per_unit((path, side), site.space) for side in sides})
    plan.follow(site, units)
