"""What the rest of network/ asks of a layer; one adapter a kind of layer answers it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from growconv.errors import SurgeryError
from growconv.network.layout import ENTRY, Place
from growconv.network.tensors import Change, Insertion

Part = tuple[str, Insertion]
"""New entries of a stored tensor: its name from the layer, and what comes where."""


@dataclass(frozen=True)
class Slot:
    """A stored tensor with entries for channels: its name from the layer, and the axis that they lie along.

    Where groups share that axis, each has its own channels there, one group like the other.
    """

    name: str
    axis: int
    groups: int = 1

    def stretches(self, places: Sequence[Place], size: int) -> list[tuple[int, int]]:
        """Where new entries of a side of this size come along the axis: before which old entry, and how many."""
        one, found = size // self.groups, dict[int, list[tuple[int, int]]]()
        for place in places:
            group = (place.position - 1) // one if self.groups > 1 else 0  # they come behind their group's old ones
            found.setdefault(group, []).append((place.position - group * one, len(place.entries)))
        shares = list(found.values())
        if shares.count(shares[0]) != self.groups:
            raise SurgeryError(
                "every group of a grouped convolution has to get the same number of new channels",
                expected=f"equal shares for {self.groups} groups",
                got={place.position: len(place.entries) for place in places},
            )
        return shares[0]

    def positions(self, entries: Sequence[int], size: int) -> tuple[int, ...]:
        """Where entries of a side of this size lie along the axis; SurgeryError if not every group has the same."""
        found = sorted({entry % (size // self.groups) for entry in entries})
        if len(found) * self.groups != len(set(entries)):
            raise SurgeryError("every group has to lose the same channels", where=self.name, got=list(entries))
        return tuple(found)


class Adapter(ABC):
    """One layer: what it is made of, and what new or missing channels change in it.

    Nothing here changes the layer; what is to change is returned as data.

    Attributes:
        kinds: the classes of layers that it is for.
        sides: the axes of this layer that channels can lie along, as in `network.layout`.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = ()
    sides: ClassVar[tuple[str, ...]] = ()

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @classmethod
    def serves(cls, module: nn.Module) -> bool:
        """Whether this very layer of one of these classes has an entry for each channel."""
        return True

    @abstractmethod
    def size(self, side: str) -> int:
        """Entries along a side now."""

    @abstractmethod
    def slots(self, side: str) -> list[Slot]:
        """The stored tensors with entries for the channels of a side."""

    @abstractmethod
    def old(self, side: str) -> dict[str, Tensor]:
        """What it has for the channels of a side, as `insertions` takes it: per tensor the entries along axis 0."""

    @abstractmethod
    def channel_axis(self, ndim: int) -> int:
        """The channel axis of an input or output with so many axes."""

    @abstractmethod
    def entries(self, slot: Slot, side: str, order: Sequence[int], values: Mapping[str, Tensor]) -> Tensor | None:
        """New entries of a stored tensor in the order in which they lie along its axis, or one for all; None: zeros.

        `order` says which of the entries in `values`, channel by channel, comes first, second, ... along the side.
        """

    def insertions(
        self, side: str, places: Sequence[Place], values: Mapping[str, Tensor], listed: Sequence[Place] | None = None
    ) -> list[Part]:
        """New entries of every stored tensor along a side.

        Args:
            side: one of the layer's.
            places: where they come along it.
            values: per tensor the entries of the new channels, channel by channel; zeros for those missing.
            listed: where they come along the side whose entries `values` has; None: along this one.
        """
        parts, order = list[Part](), [entry for place in (listed or places) for entry in place.entries]
        for slot in self.slots(side):
            stretches, new = slot.stretches(places, self.size(side)), self.entries(slot, side, order, values)
            own: Sequence[Tensor | None] = [new] * len(stretches)
            if new is not None and new.shape[slot.axis] > 1:
                own = new.split([count for _, count in stretches], slot.axis)
            for (position, count), entries in zip(stretches, own, strict=True):
                parts.append((slot.name, Insertion(slot.axis, position, count, entries)))
        return parts

    @abstractmethod
    def counts(self, added: Mapping[str, int]) -> dict[str, int]:
        """Attributes that tell numbers of channels, with their values after so many more entries along each side."""

    def revised(self, change: Callable[[str], Change]) -> dict[str, Tensor]:
        """Other values of old entries that keep the old weights as they are, where the layer stores them otherwise.

        They are by stored tensor, in the shape before the change; `change` tells what is planned for one, by its name.
        """
        return {}

    def refresh(self) -> None:  # noqa: B027 (most layers derive nothing)
        """Bring what the layer derives from its stored tensors up to date, after they were exchanged."""

    def problem(self) -> str | None:
        """Why the stored tensors cannot be enlarged, in one line; None where they can."""
        for name, parameter in self.module.named_parameters():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                return f"{name} is not initialized yet"
            if parameter.is_complex():
                return f"{name} is complex"
            if hasattr(parameter, "device_mesh"):
                return f"{name} is sharded over devices"
        return None


class Bare(Adapter):
    """A parameter or buffer outside of layers, with its entries for the channels along dimension `dim`."""

    sides = (ENTRY,)

    def __init__(self, tensor: Tensor, dim: int) -> None:
        self.tensor, self.dim = tensor, dim

    def size(self, side: str) -> int:
        """Its length."""
        return self.tensor.shape[self.dim]

    def slots(self, side: str) -> list[Slot]:
        """The tensor itself, under no name."""
        return [Slot("", self.dim)]

    def old(self, side: str) -> dict[str, Tensor]:
        """The tensor itself."""
        return {"": self.tensor.detach().movedim(self.dim, 0)}

    def channel_axis(self, ndim: int) -> int:
        """The dimension."""
        return self.dim

    def entries(self, slot: Slot, side: str, order: Sequence[int], values: Mapping[str, Tensor]) -> Tensor | None:
        """Those given, with the channel axis in front."""
        own = values.get("")
        return None if own is None else own[list(order)].movedim(0, self.dim)

    def counts(self, added: Mapping[str, int]) -> dict[str, int]:
        """None."""
        return {}


def stored(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of a layer, "a.b" for one of a submodule; None where there is none."""
    owner_path, _, last = name.rpartition(".")
    owner = module.get_submodule(owner_path) if owner_path else module
    found = owner._parameters.get(last)
    return found if found is not None else owner._buffers.get(last)
