"""Brute force: grow every site of a copy of a model, run it, and compare with the model as it was."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.network import layers
from growconv.network.event import GrowthEvent, apply_edits, grow
from growconv.network.layout import IN, OUT
from growconv.network.model import example_arguments, tensors_in
from growconv.network.plan import plan_size
from growconv.network.proof import copied_growth, silent_growth
from growconv.network.site import GrowthSite

EXACT = 1e-9
"""Change of the output in float64, relative to its largest entry, that counts as none."""


@dataclass
class Grown:
    """A copy all of whose sites have grown, and what was done to it."""

    model: nn.Module
    sites: tuple[GrowthSite, ...]
    events: list[GrowthEvent]
    channels: dict[str, int]


def prepared(model: nn.Module) -> nn.Module:
    """A model in float64 with norms that are not trivial, without dropout."""
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if (
            isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm)
            and module.weight is not None
        ):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        if hasattr(module, "p"):
            module.p = 0.0
    return model


def outputs(model: nn.Module, example: object, mode: str) -> list[Tensor]:
    """Everything that a copy of a model gives in a mode, without chance."""
    twin = copy.deepcopy(model).train(mode == "train")
    arguments = copy.deepcopy(example_arguments(example))  # some write to it
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors_in(twin(*arguments[0], **arguments[1]))


def grow_all(model: nn.Module, sites: Sequence[GrowthSite], units: Sequence[int] = (1, 2, 3)) -> Grown:
    """Grow every site of a copy at amplitude 0, or by copies where its channels depend on each other.

    Args:
        model: stays as it is.
        sites: of it.
        units: by how many multiples of its granularity each site grows, taken in turn.
    """
    twin, grown = copy.deepcopy(model), Grown(model, (), [], {})
    grown.model, grown.sites = twin, tuple(site.of(twin) for site in sites)
    for place, site in enumerate(grown.sites):
        channels = units[place % len(units)] * (site.width if site.copied else site.granularity)
        growth = copied_growth(site, channels) if site.copied else silent_growth(site, channels)
        before, width, predicted = _parameters(twin), site.width, plan_size(site, channels)
        grown.events.append(grow(twin, site, growth, 1.0 if site.copied else 0.0))
        grown.channels[site.name] = channels
        assert site.width == width + channels
        assert _parameters(twin) == before + predicted, f"{site.name}: {_parameters(twin) - before} and not {predicted}"
    return grown


def check(
    model: nn.Module,
    examples: object,
    sites: Sequence[GrowthSite],
    units: Sequence[int] = (1, 2, 3),
    modes: Sequence[str] = ("eval", "train"),
) -> Grown:
    """Grow all sites of a copy: the function stays, new weights train, and a fresh model can be grown alike."""
    runs = [(each, mode) for each in (examples if isinstance(examples, list) else [examples]) for mode in modes]
    before = [outputs(model, example, mode) for example, mode in runs]
    grown = grow_all(model, sites, units)
    for (example, mode), expected in zip(runs, before, strict=True):
        for new, old in zip(outputs(grown.model, example, mode), expected, strict=True):
            assert new.shape == old.shape
            assert float((new - old).abs().max()) <= EXACT * max(1.0, float(old.abs().max())), mode
    fresh = copy.deepcopy(model)
    apply_edits(fresh, [edit for event in grown.events for edit in event.edits])
    fresh.load_state_dict(grown.model.state_dict())
    for example, mode in runs:
        for new, old in zip(outputs(fresh, example, mode), outputs(grown.model, example, mode), strict=True):
            assert torch.equal(new, old)
    return grown


def untrained(grown: Grown, examples: object) -> list[str]:
    """Layers whose new weights get no gradient although their old ones do, once new outgoing weights are not 0.

    ReLUs leak here, since a channel that is off on the whole example says nothing.
    """
    model, rows = copy.deepcopy(grown.model).train(), []
    sites = [site.of(model) for site in grown.sites]
    torch.manual_seed(1)
    for site in sites:
        for path in site.consumers:
            if layers.groups_of(model.get_submodule(path)) > 1:  # its new entries lie in every group: move all
                with torch.no_grad():
                    for weight in model.get_submodule(path).parameters():
                        weight += 0.1 * torch.randn_like(weight)
            for weight, new, _ in _new_entries(site, path, IN, grown.channels):
                with torch.no_grad():
                    weight[new] += 0.1 * torch.randn_like(weight[new])
    for example in examples if isinstance(examples, list) else [examples]:
        arguments = copy.deepcopy(example_arguments(example))
        with mock.patch.object(F, "relu", lambda x, inplace=False: F.leaky_relu(x, 0.1)):
            found = tensors_in(model(*arguments[0], **arguments[1]))
        sum(each.mul(torch.randn_like(each)).sum() for each in found if each.requires_grad).backward()
    for site in sites:
        for path, side in (*((path, OUT) for path in site.producers), *((path, IN) for path in site.consumers)):
            for weight, new, old in _new_entries(site, path, side, grown.channels):
                gradient = weight.grad  # None where the output does not need the layer at all
                if gradient is not None and not gradient[new].abs().max() > 0 and gradient[old].abs().max() > 0:
                    rows.append(f"{site.name}: {path} ({side})")
    return rows


def _new_entries(site: GrowthSite, path: str, side: str, channels: Mapping[str, int]) -> list[tuple]:
    """The stored weights of a layer along a side, with where their new and their old entries are."""
    module = site.model.get_submodule(path)
    if layers.groups_of(module) > 1:
        return []
    entries = site.entries(path, side)
    new = int(channels[site.name] * site.ratio(path, side))
    found = []
    for slot in layers.adapter(module).slots(side):
        weight = module
        for part in slot.name.split("."):
            weight = getattr(weight, part)
        if slot.name == "weight" and weight.requires_grad and weight.is_leaf:
            lead = (slice(None),) * slot.axis
            found.append((weight, (*lead, entries[-new:]), (*lead, entries[:-new])))
    return found


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
