"""Plans of removals: the entries that go from every layer that writes, carries, normalises or reads channels."""

from collections.abc import Sequence

from torch import nn

from growconv.errors import SurgeryError
from growconv.network import layers, parametrized
from growconv.network.layouts import Binding
from growconv.network.plan import Plan, places, set_counts, tensors_of
from growconv.network.site import GrowthSite


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
        for name, axis in tensors_of(model, binding):
            if stored is not None and name == "weight":
                continue
            out_axis = binding.role == "carries" and not (layers.is_transposed(module) and name == "weight")
            change = plan.change(model, "" if binding.role == "parameter" else binding.path, name)
            change.removed[axis] = written if out_axis else entries
        set_counts(plan, model, binding, -len(entries), -len(written))
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
    axis = tensors_of(site.model, binding)[0][1]
    plan.change(site.model, binding.path, v).removed[axis] = entries
    if axis == stored.dim:
        plan.change(site.model, binding.path, g).removed[axis] = entries
    else:
        plan.change(site.model, binding.path, g).revised = parametrized.shortened_length(module, stored, axis, entries)
