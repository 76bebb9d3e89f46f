"""What a growth will change: every tensor with its new entries, every attribute; checked before anything changes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from growconv.convolution.factorized import FactorizedConv
from growconv.errors import SurgeryError
from growconv.network import layers, parametrized
from growconv.network.between import identity_kernels
from growconv.network.factorized import FactorFit, fit_channels, new_terms, term_insertions
from growconv.network.graph import attribute
from growconv.network.layouts import Binding, Layout
from growconv.network.proposal import ChannelGrowth
from growconv.network.rank_site import RankSite
from growconv.network.site import GrowthSite
from growconv.network.spaces import Spaces
from growconv.network.tensors import Insertion, enlarge, enlarged_shape, without


@dataclass
class Change:
    """One tensor of the model that gets other entries.

    Attributes:
        path: module path and tensor name.
        tensor: the tensor as it is now.
        insertions: what comes in, where.
        values: per insertion its entries; None for zeros.
        removed: per axis the entries that go.
        revised: other values for the old entries, or None.
    """

    path: str
    tensor: Tensor
    insertions: list[Insertion] = field(default_factory=list)
    values: list[Tensor | None] = field(default_factory=list)
    removed: dict[int, list[int]] = field(default_factory=dict)
    revised: Tensor | None = None

    def resized(self, tensor: Tensor, fill: bool = True) -> Tensor:
        """A tensor of the old shape in the new one; without `fill` new entries are zero."""
        if self.insertions:
            tensor = enlarge(tensor, self.insertions, self.values if fill else [None] * len(self.values))
        for axis, entries in self.removed.items():
            tensor = without(tensor, axis, entries)
        return tensor

    def resize_state(self, tensor: Tensor, axes: tuple[bool, ...]) -> Tensor:
        """Optimizer state in the new shape; `axes` says which axes it shares with the parameter."""
        insertions = [each for each in self.insertions if axes[each.axis]]
        if insertions:
            tensor = enlarge(tensor, insertions, [None] * len(insertions))
        for axis, entries in self.removed.items():
            if axes[axis]:
                tensor = without(tensor, axis, entries)
        return tensor


@dataclass
class Plan:
    """All changes of one growth or removal."""

    changes: list[Change] = field(default_factory=list)
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    revised: dict[str, Tensor] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Index the changes by their tensor."""
        self._by_tensor = {id(change.tensor): change for change in self.changes}
        self._named: set[tuple[str, str]] = set()

    def set(self, path: str, name: str, value: Any) -> None:
        """Set an attribute of a module, once."""
        if (path, name) not in self._named:
            self._named.add((path, name))
            self.attributes.append((path, name, value))

    def change(self, model: nn.Module, module: str, name: str) -> Change:
        """The change of a tensor, which is one even where several modules share it."""
        path = f"{module}.{name}" if module else name
        tensor = attribute(model, path)
        if id(tensor) not in self._by_tensor:
            self._by_tensor[id(tensor)] = Change(path, tensor)
            self.changes.append(self._by_tensor[id(tensor)])
        return self._by_tensor[id(tensor)]

    def insert(self, change: Change, insertion: Insertion, values: Tensor | None) -> None:
        """Add an insertion, unless a shared tensor has it already."""
        if insertion not in change.insertions:
            change.insertions.append(insertion)
            change.values.append(values)

    def edits(self) -> list[dict[str, Any]]:
        """The plan as plain values, to be replayed by apply_edits in this order."""
        edits: list[dict[str, Any]] = []
        for change in self.changes:
            module, _, name = change.path.rpartition(".")
            for each in sorted(change.insertions, key=lambda each: -each.position):
                place = {"axis": each.axis, "position": each.position, "count": each.count}
                edits.append({"module": module, "tensor": name, **place})
            for axis, entries in change.removed.items():
                edits.append({"module": module, "tensor": name, "axis": axis, "removed": sorted(entries)})
        for path, name, value in self.attributes:
            edits.append(
                {"module": path, "attribute": name, "value": list(value) if isinstance(value, tuple) else value}
            )
        return edits

    def added_parameters(self) -> int:
        """How many parameter entries the plan adds (negative: takes away)."""
        total = 0
        for change in self.changes:
            if isinstance(change.tensor, nn.Parameter):
                shape = list(enlarged_shape(change.tensor.shape, change.insertions))
                for axis, entries in change.removed.items():
                    shape[axis] -= len(entries)
                total += int(torch.Size(shape).numel()) - change.tensor.numel()
        return total


@dataclass(frozen=True)
class _Place:
    """Where new channels come along one axis: `count` entries before `position`."""

    start: int  # first entry of the site's own channels
    position: int
    count: int
    ratio: int
    scale: Fraction  # entries per channel


def places(spaces: Spaces, layout: Layout, site: GrowthSite, channels: int) -> list[_Place]:
    """Where new channels of a site come along an axis with this layout, at its present widths."""
    found = []
    offset = 0
    for segment in layout:
        size = int(spaces.width(segment.space) * segment.ratio)
        if segment.space.root() is site.space:
            found.append(
                _Place(offset, offset + size, int(channels * segment.ratio), int(segment.ratio) or 1, segment.ratio)
            )
        offset += size
    return found


def plan_growth(site: GrowthSite, growth: ChannelGrowth, amplitude: float) -> Plan:
    """Plan and validate a growth; nothing is changed.

    Raises:
        SurgeryError: naming the tensor that does not fit.
    """
    if isinstance(site, RankSite):
        return _plan_terms(site, site.changes(growth, amplitude))
    _check_proposal(site, growth)
    plan = Plan()
    for binding in site.bindings:
        _PARTS[binding.role](plan, site, binding, growth, amplitude)
    for path, replacement in growth.revised.items():
        _revise(plan, site, path, replacement)
    return plan


def plan_size(site: GrowthSite, channels: int) -> int:
    """Parameters that `channels` new channels would add."""
    if isinstance(site, RankSite):
        return _plan_terms(site, [(*each, None) for each in site.insertions(channels)]).added_parameters()
    plan = Plan()
    empty = ChannelGrowth(site.name, "size", {"": torch.zeros(channels)}, {}, torch.zeros(channels))
    for binding in site.bindings:
        if binding.role in ("writes", "reads"):
            _resize_weighted(plan, site, binding, channels, None)
        else:
            _PARTS[binding.role](plan, site, binding, empty, 0.0)
    return plan.added_parameters()


def _plan_terms(site: RankSite, changes: Sequence[tuple[str, Insertion, Tensor | None]]) -> Plan:
    plan = Plan()
    for name, insertion, values in changes:
        plan.insert(plan.change(site.model, site.path, name), insertion, values)
    return plan


def plan_removal(site: GrowthSite, channels: Sequence[int]) -> Plan:
    """Plan and validate the removal of channels; nothing is changed."""
    index = sorted({int(channel) for channel in channels})
    if not index or index[0] < 0 or index[-1] >= site.width or len(index) == site.width:
        raise SurgeryError(
            "these channels cannot be removed",
            where=site.name,
            expected=f"some, but not all, of the channels 0 to {site.width - 1}",
            got=index,
        )
    size = site.granularity
    groups = sorted({channel // size for channel in index})
    if len(groups) * size != len(index):
        raise SurgeryError(
            "channels of this site go in whole groups",
            where=site.name,
            expected=f"runs of {size} channels that start at a multiple of {size}",
            got=index,
        )
    plan = Plan()
    spaces, model = site.spaces, site.model
    for binding in site.bindings:
        entries: list[int] = []
        written: list[int] = []
        for place in places(spaces, binding.layout, site, 0):
            blocks = [range(int(g * size * place.scale), int((g + 1) * size * place.scale)) for g in groups]
            entries += [place.start + entry for block in blocks for entry in block]
        if binding.role == "carries":
            module = model.get_submodule(binding.path)
            per_group, ratio = layers.group_granularity(module)
            blocks = [range(int(e * ratio), int((e + per_group) * ratio)) for e in entries[::per_group]]
            written = [entry for block in blocks for entry in block]
        stored = _stored(model, binding)
        if stored is not None:
            _remove_stored(plan, site, binding, stored, entries)
        for name, axis in _tensors(model, binding):
            if stored is not None and name == "weight":
                continue
            out_axis = binding.role == "carries" and not (layers.is_transposed(module) and name == "weight")
            change = plan.change(model, "" if binding.role == "parameter" else binding.path, name)
            change.removed[axis] = written if out_axis else entries
        _attributes(plan, model, binding, -len(entries), -len(written))
    return plan


def _stored(model: nn.Module, binding: Binding) -> parametrized.Stored | None:
    if binding.role not in ("writes", "reads"):
        return None
    return parametrized.stored_weight(model.get_submodule(binding.path))


def _remove_stored(
    plan: Plan, site: GrowthSite, binding: Binding, stored: parametrized.Stored, entries: list[int]
) -> None:
    """Entries that go from a weight-normalized weight; the weights that stay keep their values."""
    module = site.model.get_submodule(binding.path)
    if stored.spectral:
        raise SurgeryError(
            "channels of a spectral-normalized layer cannot be removed without changing its other weights",
            where=binding.path,
            fix="remove the spectral norm first",
        )
    g, v = stored.names
    axis = _tensors(site.model, binding)[0][1]
    plan.change(site.model, binding.path, v).removed[axis] = entries
    if axis == stored.dim:
        plan.change(site.model, binding.path, g).removed[axis] = entries
    else:
        plan.change(site.model, binding.path, g).revised = parametrized.shortened_length(module, stored, axis, entries)


def _tensors(model: nn.Module, binding: Binding) -> list[tuple[str, int]]:
    if binding.role == "parameter":
        return [(binding.path, binding.axis)]
    module = model.get_submodule(binding.path)
    slots: Callable[[nn.Module], list[layers.Slot]] = {
        "writes": layers.writing_slots,
        "reads": layers.reading_slots,
        "norm": layers.norm_slots,
        "carries": layers.carrying_slots,
    }[binding.role]
    return [(slot.name, slot.axis) for slot in slots(module)]


def _attributes(plan: Plan, model: nn.Module, binding: Binding, entries: int, written: int = 0) -> None:
    """Attributes that have to tell the new numbers."""
    if binding.role == "parameter":
        return
    module = model.get_submodule(binding.path)
    for name, value in layers.counting_attributes(module, binding.role, entries, written):
        plan.set(binding.path, name, value)


def _resize_weighted(
    plan: Plan, site: GrowthSite, binding: Binding, channels: int, values: dict[str, Tensor | None] | None
) -> None:
    """The entries that new channels add to the output or the input axis of a convolution or linear layer."""
    total = 0
    module = site.model.get_submodule(binding.path)
    if values is None and isinstance(module, FactorizedConv):
        count = sum(place.count for place in places(site.spaces, binding.layout, site, channels))
        factor = _tensors(site.model, binding)[0][0]
        _insert_terms(plan, site, binding.path, term_insertions(module, new_terms(module, count, factor)))
    found = places(site.spaces, binding.layout, site, channels)
    total = sum(place.count for place in found)
    stored = parametrized.stored_weight(module)
    for name, axis in _tensors(site.model, binding):
        inserted: list[tuple[Insertion, Tensor | None]] = []
        taken = 0
        for place in found:
            part = None if values is None else values[name]
            if part is not None and len(found) > 1:  # read several times: all entries of the first channel come first
                blocks = part.unflatten(axis, (channels, total // channels))
                part = blocks.narrow(axis + 1, taken // channels, place.count // channels).flatten(axis, axis + 1)
            inserted.append((Insertion(axis, place.position, place.count), part))
            taken += place.count
        if stored is not None and name == "weight":
            _insert_stored(plan, site, binding.path, stored, inserted)
            continue
        for insertion, part in inserted:
            plan.insert(plan.change(site.model, binding.path, name), insertion, part)
    _attributes(plan, site.model, binding, total)


def _insert_stored(
    plan: Plan,
    site: GrowthSite,
    path: str,
    stored: parametrized.Stored,
    inserted: list[tuple[Insertion, Tensor | None]],
) -> None:
    """New entries of a weight- or spectral-normalized weight, put into the tensors that it is computed from."""
    module = site.model.get_submodule(path)
    for insertion, part in inserted:
        for name, each, entries in parametrized.added(module, stored, insertion, part):
            plan.insert(plan.change(site.model, path, name), each, entries)
    for name, values in parametrized.revised(module, stored, inserted).items():
        plan.change(site.model, path, name).revised = values


def _write(plan: Plan, site: GrowthSite, binding: Binding, growth: ChannelGrowth, amplitude: float) -> None:
    path, module = binding.path, site.model.get_submodule(binding.path)
    weight = _given(growth.incoming, path, "incoming", site)
    shape = layers.filter_shape(module, growth.channels)
    reading = site.spaces.bindings[(path, "reads", 0)].layout
    weight = _fitted(site.spaces, weight, shape, {1: reading}, f"incoming weights of {path}", site)
    if layers.is_transposed(module):
        weight = weight.transpose(0, 1)
    values: dict[str, Tensor | None] = {"weight": weight}
    if isinstance(module, FactorizedConv):
        values = {"out_factor": _factor_rows(plan, site, path, module, weight, "out_factor")}
    if getattr(module, "bias", None) is not None:
        bias = _given(growth.incoming_bias, path, "incoming bias", site)
        values["bias"] = _fitted(site.spaces, bias, (growth.channels,), {}, f"incoming bias of {path}", site)
    elif path in growth.incoming_bias:
        raise SurgeryError("a bias was given for a layer without one", where=path, fix="leave it out of incoming_bias")
    _resize_weighted(plan, site, binding, growth.channels, values)


def _read(plan: Plan, site: GrowthSite, binding: Binding, growth: ChannelGrowth, amplitude: float) -> None:
    path, module = binding.path, site.model.get_submodule(binding.path)
    weight = _given(growth.outgoing, path, "outgoing", site)
    entries = growth.channels * site.ratio(path)
    shape = layers.column_shape(module, entries)
    written = site.spaces.bindings[(path, "writes", 0)].layout
    weight = _fitted(site.spaces, weight, shape, {0: written}, f"outgoing weights of {path}", site)
    if isinstance(module, FactorizedConv):
        rows = _factor_rows(plan, site, path, module, weight, "in_factor")
        _resize_weighted(plan, site, binding, growth.channels, {"in_factor": rows * amplitude})
        return
    weight = weight.to(next(module.parameters()).dtype) * amplitude
    if layers.is_transposed(module):
        weight = weight.transpose(0, 1)
    _resize_weighted(plan, site, binding, growth.channels, {"weight": weight})


def _factor_rows(plan: Plan, site: GrowthSite, path: str, module: FactorizedConv, block: Tensor, factor: str) -> Tensor:
    """Rows of a factorized convolution for new channels; the terms that they need go into the plan."""
    first = not any(change.path.startswith(f"{path}.") and change.insertions for change in plan.changes)
    fit = fit_channels(module, block, factor, more_terms=first)  # a layer of both roles gets its terms once
    _insert_terms(plan, site, path, [(name, insertion) for name, insertion, _ in fit.terms], fit)
    plan.details.setdefault("kernel_errors", {})[f"{path}.{factor}"] = fit.error
    return fit.rows


def _insert_terms(
    plan: Plan, site: GrowthSite, path: str, terms: list[tuple[str, Insertion]], fit: FactorFit | None = None
) -> None:
    values = {} if fit is None else {(name, insertion): value for name, insertion, value in fit.terms}
    if any(each.axis == insertion.axis for name, insertion in terms[:1] for each in _planned(plan, f"{path}.{name}")):
        return
    for name, insertion in terms:
        plan.insert(plan.change(site.model, path, name), insertion, values.get((name, insertion)))


def _planned(plan: Plan, path: str) -> list[Insertion]:
    return [insertion for change in plan.changes if change.path == path for insertion in change.insertions]


def _carry(plan: Plan, site: GrowthSite, binding: Binding, growth: ChannelGrowth, amplitude: float) -> None:
    path, module = binding.path, site.model.get_submodule(binding.path)
    _, ratio = layers.group_granularity(module)
    read = wrote = 0
    for place in places(site.spaces, binding.layout, site, growth.channels):
        position, count = int(place.position * ratio), int(place.count * ratio)
        weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
        axis_entries = place.count if layers.is_transposed(module) else count
        kernel = growth.carried.get(path)
        if growth.copied_from is not None:
            scale = place.ratio if layers.is_transposed(module) else place.ratio * ratio
            first = place.start if layers.is_transposed(module) else int(place.start * ratio)
            kernel = weight.detach()[first + _entries(growth.copied_from, int(scale), weight)]
        elif kernel is None:
            kernel = identity_kernels(module, place.count)
        shape = (axis_entries, *weight.shape[1:])
        kernel = _fitted(site.spaces, kernel, shape, {}, f"new kernels of {path}", site)
        at = place.position if layers.is_transposed(module) else position
        plan.insert(plan.change(site.model, path, "weight"), Insertion(0, at, axis_entries), kernel)
        bias = getattr(module, "bias", None)
        if bias is not None:
            values = None
            if growth.copied_from is not None:
                values = bias.detach()[
                    int(place.start * ratio) + _entries(growth.copied_from, int(place.ratio * ratio), bias)
                ]
            plan.insert(plan.change(site.model, path, "bias"), Insertion(0, position, count), values)
        read, wrote = read + place.count, wrote + count
    _attributes(plan, site.model, binding, read, wrote)


def _norm(plan: Plan, site: GrowthSite, binding: Binding, growth: ChannelGrowth, amplitude: float) -> None:
    """New channels of a norm layer start as the identity on their own mean and variance, times `norm_scale`."""
    path, module = binding.path, site.model.get_submodule(binding.path)
    total, scale = 0, growth.norm_scale
    if scale is not None:
        _fitted(site.spaces, scale, (growth.channels,), {}, f"norm_scale for {path}", site)
    for place in places(site.spaces, binding.layout, site, growth.channels):
        values = layers.transparent_values(module, *_moments(site, growth, path, place))
        for slot in layers.norm_slots(module):
            tensor = getattr(module, slot.name)
            value = values[slot.name]
            if scale is not None and slot.name in ("weight", "bias") and isinstance(module, layers.NORMS):
                value = value * scale.to(value).repeat_interleave(place.count // growth.channels)
            if growth.copied_from is not None:
                value = tensor.detach()[place.start + _entries(growth.copied_from, place.ratio, tensor)]
            plan.insert(plan.change(site.model, path, slot.name), Insertion(0, place.position, place.count), value)
        total += place.count
    _attributes(plan, site.model, binding, total)


def _moments(site: GrowthSite, growth: ChannelGrowth, path: str, place: _Place) -> tuple[Tensor, Tensor]:
    given = growth.norms.get(path)
    if given is None:
        return torch.zeros(place.count, dtype=torch.float64), torch.ones(place.count, dtype=torch.float64)
    mean, variance = given
    for label, moment in (("mean", mean), ("variance", variance)):
        _fitted(site.spaces, moment, (growth.channels,), {}, f"{label} for {path}", site)
    if bool((variance < 0).any()):
        raise SurgeryError(
            "a variance is negative", where=path, expected="variances of at least 0", got=float(variance.min())
        )
    repeats = place.count // growth.channels
    return mean.detach().repeat_interleave(repeats), variance.detach().repeat_interleave(repeats)


def _parameter(plan: Plan, site: GrowthSite, binding: Binding, growth: ChannelGrowth, amplitude: float) -> None:
    tensor = attribute(site.model, binding.path)
    for place in places(site.spaces, binding.layout, site, growth.channels):
        shape = list(tensor.shape)
        shape[binding.axis] = place.count
        values = tensor.new_full(shape, binding.fill)
        if growth.copied_from is not None:
            index = place.start + _entries(growth.copied_from, place.ratio, tensor)
            values = tensor.detach().index_select(binding.axis, index)
        plan.insert(
            plan.change(site.model, "", binding.path), Insertion(binding.axis, place.position, place.count), values
        )


_PARTS: dict[str, Callable[[Plan, GrowthSite, Binding, ChannelGrowth, float], None]] = {
    "writes": _write,
    "reads": _read,
    "carries": _carry,
    "norm": _norm,
    "parameter": _parameter,
}


def _entries(channels: Tensor, ratio: int, like: Tensor) -> Tensor:
    """Entries of channels along an axis with `ratio` entries a channel, from the segment's start."""
    start = channels.to(like.device, torch.long) * ratio
    return (start[:, None] + torch.arange(ratio, device=like.device)).flatten()


def _revise(plan: Plan, site: GrowthSite, path: str, replacement: Tensor) -> None:
    try:
        tensor = attribute(site.model, path)
        owner = site.model.get_submodule(path.rpartition(".")[0])
        if path.endswith(".weight") and parametrized.stored_weight(owner) is not None:
            raise SurgeryError(
                "the old weights of a normalized layer cannot be replaced",
                where=path,
                fix="use a method that leaves old weights as they are",
            )
    except AttributeError:
        raise SurgeryError("this parameter does not exist", where=path, fix="revise parameters of the model") from None
    module, _, name = path.rpartition(".")
    if isinstance(site.model.get_submodule(module), FactorizedConv) and name == "weight":
        raise SurgeryError(
            "the kernel of a factorized convolution is stored as factors, and cannot be replaced",
            where=path,
            fix="use a method that leaves old weights as they are, or an ordinary convolution (module.to_conv())",
        )
    if tuple(replacement.shape) != tuple(tensor.shape):
        layouts = site.spaces.axis_layouts(module, name)
        index = [
            stale_entries(site.spaces, layouts[axis], size) if axis in layouts else None
            for axis, size in enumerate(replacement.shape)
        ]
        replacement = _embed(replacement.to(tensor), index, tensor.detach().clone(), f"the revision of {path}", site)
    _finite(replacement, f"the revision of {path}", site)
    for change in plan.changes:
        if change.tensor is tensor:
            change.revised = replacement.detach()
            return
    plan.revised[path] = replacement.detach().to(tensor)


def _check_proposal(site: GrowthSite, growth: ChannelGrowth) -> None:
    if growth.site != site.name:
        raise SurgeryError("the proposal is for another site", expected=site.name, got=growth.site)
    for label, given, allowed in (
        ("incoming", growth.incoming, site.producers),
        ("outgoing", growth.outgoing, site.consumers),
        ("norms", growth.norms, site.followers),
        ("carried", growth.carried, site.followers),
    ):
        extra = set(given) - set(allowed)
        if extra:
            raise SurgeryError(
                f"{label} names layers that are not part of the site",
                where=site.name,
                expected=", ".join(allowed) or "none",
                got=", ".join(sorted(extra)),
            )
    if not growth.incoming:
        raise SurgeryError("the proposal has no incoming weights", where=site.name, expected=", ".join(site.producers))
    if growth.channels < 1 or growth.channels % site.granularity:
        raise SurgeryError(
            "this number of channels cannot be added",
            where=site.name,
            expected=f"a positive multiple of {site.granularity}" if site.granularity > 1 else "at least 1",
            got=growth.channels,
            fix=f"ask for {site.growable_channels(max(growth.channels, 1))} channels",
        )
    if growth.copied_from is not None:
        index = growth.copied_from
        if index.shape != (growth.channels,) or index.min() < 0 or index.max() >= site.width:
            raise SurgeryError("copied_from needs one old channel per new one", where=site.name, got=index.tolist())


def _given(weights: dict[str, Tensor], path: str, label: str, site: GrowthSite) -> Tensor:
    if path not in weights:
        raise SurgeryError(
            f"the proposal has no {label} weights for this layer", where=path, got=", ".join(weights) or "none"
        )
    return weights[path]


def _finite(tensor: Tensor, label: str, site: GrowthSite) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise SurgeryError(f"the {label} are not finite", where=site.name, fix="check the loss and the statistics")


def fitted(site: GrowthSite, growth: ChannelGrowth) -> ChannelGrowth:
    """A proposal in the shapes that the model has now: neighbours that grew since it was solved get zeros.

    Args:
        site: where.
        growth: the proposal.

    Returns:
        The proposal itself where nothing has changed.

    Raises:
        SurgeryError: weights that never had a shape of this model.
    """
    if isinstance(site, RankSite):
        return site.refitted(growth)
    bindings = site.spaces.bindings
    incoming, outgoing = {}, {}
    for path in site.producers:
        shape = layers.filter_shape(site.model.get_submodule(path), growth.channels)
        weight = _given(growth.incoming, path, "incoming", site)
        layout = bindings[(path, "reads", 0)].layout
        incoming[path] = _fitted(site.spaces, weight, shape, {1: layout}, f"incoming weights of {path}", site)
    for path in site.consumers:
        shape = layers.column_shape(site.model.get_submodule(path), growth.channels * site.ratio(path))
        weight = _given(growth.outgoing, path, "outgoing", site)
        layout = bindings[(path, "writes", 0)].layout
        outgoing[path] = _fitted(site.spaces, weight, shape, {0: layout}, f"outgoing weights of {path}", site)
    return replace(growth, incoming=incoming, outgoing=outgoing)


def _fitted(
    spaces: Spaces, tensor: Tensor, shape: Sequence[int], layouts: dict[int, Layout], label: str, site: GrowthSite
) -> Tensor:
    """A proposed tensor of the shape that the model needs now; neighbours that grew in the meantime get zeros."""
    _finite(tensor, label, site)
    tensor = tensor.detach()
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    index: list[list[int] | None] = [None] * len(shape)
    if tensor.dim() == len(shape):
        for axis, layout in layouts.items():
            if tensor.shape[axis] != shape[axis]:
                index[axis] = stale_entries(spaces, layout, tensor.shape[axis])
    return _embed(tensor, index, tensor.new_zeros(tuple(shape)), label, site)


def _embed(tensor: Tensor, index: list[list[int] | None], into: Tensor, label: str, site: GrowthSite) -> Tensor:
    fits = tensor.dim() == into.dim() and all(
        mine == theirs if entries is None else mine == len(entries)
        for mine, theirs, entries in zip(tensor.shape, into.shape, index, strict=False)
    )
    if not fits:
        raise SurgeryError(
            f"the {label} have the wrong shape",
            where=site.name,
            expected=tuple(into.shape),
            got=tuple(tensor.shape),
            fix="solve again on statistics of the model as it is now",
        )
    for axis, entries in enumerate(index):
        if entries is not None:
            shape = list(tensor.shape)
            shape[axis] = into.shape[axis]
            base = into if list(into.shape) == shape else tensor.new_zeros(shape)
            tensor = base.index_copy(axis, torch.tensor(entries, device=tensor.device), tensor)
    return tensor


def stale_entries(spaces: Spaces, layout: Layout, length: int) -> list[int] | None:
    """Which entries of an axis were there when it had `length` entries, before the latest growths; None if never."""
    widths = {id(segment.space.root()): spaces.width(segment.space) for segment in layout}
    sizes = [int(widths[id(segment.space.root())] * segment.ratio) for segment in layout]
    for space, count in reversed(spaces.log):
        if id(space.root()) not in widths:
            continue
        if count < 0:
            return None  # channels were taken away since
        widths[id(space.root())] -= count
        old = [int(widths[id(segment.space.root())] * segment.ratio) for segment in layout]
        if sum(old) == length:
            starts = [sum(sizes[:index]) for index in range(len(sizes))]
            return [start + entry for start, kept in zip(starts, old, strict=True) for entry in range(kept)]
    return None
