"""What a growth or removal will change: every tensor with its new entries, every attribute. Nothing is changed here."""

import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

from growconv.errors import SurgeryError
from growconv.network import layers
from growconv.network.layout import FILL, GROUP_IN, GROUP_OUT, Key, Sizes
from growconv.network.model import module_at, tensor_at
from growconv.network.new_entries import NewEntries, check_proposal, revision
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import Site
from growconv.network.tensors import Change, Insertion

Growing = Sequence[tuple[Site, int]]
"""Sites, and how many new channels each gets."""
Values = Callable[[str, str, Growing], Mapping[str, Tensor]]
"""Per path and side, the new entries of some sites, one site's after the other's; by tensor name, zeros if missing."""


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
    """Plan and validate the growth of a site.

    Args:
        site: where, in the model as it is now.
        growth: what.
        amplitude: multiplies the outgoing weights.

    Raises:
        SurgeryError: naming the tensor that does not fit.
    """
    check_proposal(site, growth)
    sizes = site.sizes
    new = NewEntries(site, growth, amplitude, sizes)
    plan = plan_entries([(site, growth.channels)], lambda path, side, _: new(path, side), sizes)
    for path, replacement in growth.revised.items():
        plan.change(path).revised = revision(site, growth, path, replacement)
    return plan


def plan_size(site: Site, channels: int) -> int:
    """Parameters that so many new channels, a multiple of the site's granularity, would add."""
    return plan_entries([(site, channels)], lambda *_: {}, site.sizes).added_parameters()


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
    plan, sizes = Plan(site.model), site.sizes
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


def plan_entries(growing: Growing, values: Values, sizes: Sizes) -> Plan:
    """Plan new channels of sites of one layout for every layer and bare tensor of theirs, unchecked.

    Args:
        growing: the sites, and how many new channels each gets.
        values: gives the new entries of some of them along an axis.
        sizes: the lengths of the axes now.
    """
    plan, on = Plan(growing[0][0].model), dict[str, dict[str, list[tuple[Site, int]]]]()
    for each in growing:
        for path, sides in _sides(each[0]).items():
            for side in sides:
                on.setdefault(path, {}).setdefault(side, []).append(each)
    for path, sides in on.items():
        adapter, added = next(iter(sides.values()))[0][0].adapter(path), dict[str, int]()
        for side, own in sides.items():
            alone = any(slot.groups > 1 for slot in adapter.slots(side))
            for part in [[each] for each in own] if alone else [own]:  # each site has its share of every group
                _insert(plan, adapter, (path, side), part, values, sizes)
            added[side] = sum(site.new_entries(path, side, channels) for site, channels in own)
        plan.lengthen(adapter, path, added)
    for site, channels in growing:
        plan.follow(site, channels // site.granularity)
    return plan


def _insert(plan: Plan, adapter: layers.Adapter, key: Key, growing: Growing, values: Values, sizes: Sizes) -> None:
    """New entries along one axis."""
    (path, side), layout = key, growing[0][0].layout
    listed = GROUP_OUT if side == GROUP_IN else side  # filters of new groups are listed along the outputs
    units = {site.space: channels // site.granularity for site, channels in growing}
    places = order = layout.places(key, units, sizes)
    if listed != side:
        order = layout.places((path, listed), units, sizes)
    found: dict[str, list[Insertion]] = {}
    for name, insertion in adapter.insertions(side, places, values(path, listed, growing), order):
        found.setdefault(name, []).append(insertion)
    for name, own in found.items():
        insertions = plan.change(f"{path}.{name}").insertions
        known = set(insertions)  # a shared tensor may have them already
        insertions += [insertion for insertion in own if insertion not in known]


def together(parts: Sequence[Mapping[str, Tensor]], axis: int = 0) -> Mapping[str, Tensor]:
    """The new entries of several sites, one after the other along an axis."""
    if len(parts) < 2:
        return parts[0] if parts else {}
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: torch.cat([part[name].to(parts[0][name].device) for part in parts], axis) for name in names}
