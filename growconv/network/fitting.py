"""Proposals held against the model as it is now: checked, and brought into the shapes of layers that grew since."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from growconv.errors import SurgeryError
from growconv.network import layers
from growconv.network.layouts import Layout
from growconv.network.proposal import ChannelGrowth
from growconv.network.rank_site import RankSite
from growconv.network.site import GrowthSite
from growconv.network.spaces import Spaces


def check_proposal(site: GrowthSite, growth: ChannelGrowth) -> None:
    """Refuse a proposal for another site, for layers that are not part of it, or for an impossible number of channels.

    Raises:
        SurgeryError: what does not fit.
    """
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


def given(weights: dict[str, Tensor], path: str, label: str, site: GrowthSite) -> Tensor:
    """The proposed weights of a layer; `label` says which, for the message.

    Raises:
        SurgeryError: there are none.
    """
    if path not in weights:
        raise SurgeryError(
            f"the proposal has no {label} weights for this layer", where=path, got=", ".join(weights) or "none"
        )
    return weights[path]


def require_finite(tensor: Tensor, label: str, site: GrowthSite) -> None:
    """Refuse infinite or undefined entries.

    Raises:
        SurgeryError: naming the tensor by `label`.
    """
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
        weight = given(growth.incoming, path, "incoming", site)
        layout = bindings[(path, "reads", 0)].layout
        incoming[path] = fit(site.spaces, weight, shape, {1: layout}, f"incoming weights of {path}", site)
    for path in site.consumers:
        shape = layers.column_shape(site.model.get_submodule(path), growth.channels * site.ratio(path))
        weight = given(growth.outgoing, path, "outgoing", site)
        layout = bindings[(path, "writes", 0)].layout
        outgoing[path] = fit(site.spaces, weight, shape, {0: layout}, f"outgoing weights of {path}", site)
    return replace(growth, incoming=incoming, outgoing=outgoing)


def fit(
    spaces: Spaces, tensor: Tensor, shape: Sequence[int], layouts: dict[int, Layout], label: str, site: GrowthSite
) -> Tensor:
    """A proposed tensor of the shape that the model needs now; neighbours that grew in the meantime get zeros."""
    require_finite(tensor, label, site)
    tensor = tensor.detach()
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    index: list[list[int] | None] = [None] * len(shape)
    if tensor.dim() == len(shape):
        for axis, layout in layouts.items():
            if tensor.shape[axis] != shape[axis]:
                index[axis] = stale_entries(spaces, layout, tensor.shape[axis])
    return embed(tensor, index, tensor.new_zeros(tuple(shape)), label, site)


def embed(tensor: Tensor, index: list[list[int] | None], into: Tensor, label: str, site: GrowthSite) -> Tensor:
    """A tensor put into a larger one: per axis the entries that it has there, None for all.

    Raises:
        SurgeryError: it does not fit, naming it by `label`.
    """
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
