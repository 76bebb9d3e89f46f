"""Plans of growths: the new entries of every layer that writes, carries, normalises or reads new channels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from growconv.convolution.factorized import FactorizedConv
from growconv.errors import SurgeryError
from growconv.network import layers, parametrized
from growconv.network.between import identity_kernels
from growconv.network.factorized import FactorFit, fit_channels, new_terms, term_insertions
from growconv.network.fitting import check_proposal, embed, fit, given, require_finite, stale_entries
from growconv.network.graph import attribute
from growconv.network.layouts import Binding
from growconv.network.plan import Place, Plan, places, set_counts, tensors_of
from growconv.network.proposal import ChannelGrowth
from growconv.network.rank_site import RankSite
from growconv.network.site import GrowthSite
from growconv.network.tensors import Insertion


def plan_growth(site: GrowthSite, growth: ChannelGrowth, amplitude: float) -> Plan:
    """Plan and validate a growth; nothing is changed.

    Raises:
        SurgeryError: naming the tensor that does not fit.
    """
    if isinstance(site, RankSite):
        return _plan_terms(site, site.changes(growth, amplitude))
    check_proposal(site, growth)
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


def _resize_weighted(
    plan: Plan, site: GrowthSite, binding: Binding, channels: int, values: dict[str, Tensor | None] | None
) -> None:
    """The entries that new channels add to the output or the input axis of a convolution or linear layer."""
    total = 0
    module = site.model.get_submodule(binding.path)
    if values is None and isinstance(module, FactorizedConv):
        count = sum(place.count for place in places(site.spaces, binding.layout, site, channels))
        factor = tensors_of(site.model, binding)[0][0]
        _insert_terms(plan, site, binding.path, term_insertions(module, new_terms(module, count, factor)))
    found = places(site.spaces, binding.layout, site, channels)
    total = sum(place.count for place in found)
    stored = parametrized.stored_weight(module)
    for name, axis in tensors_of(site.model, binding):
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
    set_counts(plan, site.model, binding, total)


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
    weight = given(growth.incoming, path, "incoming", site)
    shape = layers.filter_shape(module, growth.channels)
    reading = site.spaces.bindings[(path, "reads", 0)].layout
    weight = fit(site.spaces, weight, shape, {1: reading}, f"incoming weights of {path}", site)
    if layers.is_transposed(module):
        weight = weight.transpose(0, 1)
    values: dict[str, Tensor | None] = {"weight": weight}
    if isinstance(module, FactorizedConv):
        values = {"out_factor": _factor_rows(plan, site, path, module, weight, "out_factor")}
    if getattr(module, "bias", None) is not None:
        bias = given(growth.incoming_bias, path, "incoming bias", site)
        values["bias"] = fit(site.spaces, bias, (growth.channels,), {}, f"incoming bias of {path}", site)
    elif path in growth.incoming_bias:
        raise SurgeryError("a bias was given for a layer without one", where=path, fix="leave it out of incoming_bias")
    _resize_weighted(plan, site, binding, growth.channels, values)


def _read(plan: Plan, site: GrowthSite, binding: Binding, growth: ChannelGrowth, amplitude: float) -> None:
    path, module = binding.path, site.model.get_submodule(binding.path)
    weight = given(growth.outgoing, path, "outgoing", site)
    entries = growth.channels * site.ratio(path)
    shape = layers.column_shape(module, entries)
    written = site.spaces.bindings[(path, "writes", 0)].layout
    weight = fit(site.spaces, weight, shape, {0: written}, f"outgoing weights of {path}", site)
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
        kernel = fit(site.spaces, kernel, shape, {}, f"new kernels of {path}", site)
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
    set_counts(plan, site.model, binding, read, wrote)


def _norm(plan: Plan, site: GrowthSite, binding: Binding, growth: ChannelGrowth, amplitude: float) -> None:
    """New channels of a norm layer start as the identity on their own mean and variance, times `norm_scale`."""
    path, module = binding.path, site.model.get_submodule(binding.path)
    total, scale = 0, growth.norm_scale
    if scale is not None:
        fit(site.spaces, scale, (growth.channels,), {}, f"norm_scale for {path}", site)
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
    set_counts(plan, site.model, binding, total)


def _moments(site: GrowthSite, growth: ChannelGrowth, path: str, place: Place) -> tuple[Tensor, Tensor]:
    given = growth.norms.get(path)
    if given is None:
        return torch.zeros(place.count, dtype=torch.float64), torch.ones(place.count, dtype=torch.float64)
    mean, variance = given
    for label, moment in (("mean", mean), ("variance", variance)):
        fit(site.spaces, moment, (growth.channels,), {}, f"{label} for {path}", site)
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
        replacement = embed(replacement.to(tensor), index, tensor.detach().clone(), f"the revision of {path}", site)
    require_finite(replacement, f"the revision of {path}", site)
    for change in plan.changes:
        if change.tensor is tensor:
            change.revised = replacement.detach()
            return
    plan.revised[path] = replacement.detach().to(tensor)
