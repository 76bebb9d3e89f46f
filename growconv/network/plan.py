"""What a growth or removal will change: every tensor with its new entries, every attribute."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from growconv.network import layers
from growconv.network.graph import attribute
from growconv.network.layouts import Binding, Layout
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
class Place:
    """Where new channels come along one axis: `count` entries before `position`."""

    start: int  # first entry of the site's own channels
    position: int
    count: int
    ratio: int
    scale: Fraction  # entries per channel


def places(spaces: Spaces, layout: Layout, site: GrowthSite, channels: int) -> list[Place]:
    """Where new channels of a site come along an axis with this layout, at its present widths."""
    found = []
    offset = 0
    for segment in layout:
        size = int(spaces.width(segment.space) * segment.ratio)
        if segment.space.root() is site.space:
            found.append(
                Place(offset, offset + size, int(channels * segment.ratio), int(segment.ratio) or 1, segment.ratio)
            )
        offset += size
    return found


def tensors_of(model: nn.Module, binding: Binding) -> list[tuple[str, int]]:
    """Names of a layer's tensors that have an entry for each channel, and the axis."""
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


def set_counts(plan: Plan, model: nn.Module, binding: Binding, entries: int, written: int = 0) -> None:
    """Attributes that have to tell the new numbers."""
    if binding.role == "parameter":
        return
    module = model.get_submodule(binding.path)
    for name, value in layers.counting_attributes(module, binding.role, entries, written):
        plan.set(binding.path, name, value)
