"""What the rest of network/ asks of a layer; one adapter a kind of layer answers it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from growconv.errors import SurgeryError
from growconv.network.layout import Place
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

    @property
    def serves(self) -> bool:
        """Whether this very layer has an entry for each channel."""
        return True

    @abstractmethod
    def size(self, side: str) -> int:
        """Entries along a side now."""

    @abstractmethod
    def slots(self, side: str) -> list[Slot]:
        """The stored tensors with entries for the channels of a side."""

    @abstractmethod
    def channel_axis(self, ndim: int) -> int:
        """The channel axis of an input or output with so many axes."""

    @abstractmethod
    def insertions(self, side: str, places: Sequence[Place], values: Mapping[str, Tensor]) -> list[Part]:
        """New entries of every stored tensor along a side.

        Args:
            side: one of the layer's.
            places: where they come along it.
            values: per tensor the entries of the new channels, channel by channel; zeros for those missing.
        """

    @abstractmethod
    def counts(self, added: Mapping[str, int]) -> dict[str, int]:
        """Attributes that tell numbers of channels, with their values after so many more entries along each side."""

    def revised(self, change: Callable[[str], Change]) -> dict[str, Tensor]:
        """Other values of old entries that keep the old weights as they are, where the layer stores them otherwise.

        Args:
            change: what is planned for a stored tensor, by its name.

        Returns:
            Per stored tensor its old entries, in the shape before the change.
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


def stored(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of a layer, "a.b" for one of a submodule; None where there is none."""
    owner_path, _, last = name.rpartition(".")
    owner = module.get_submodule(owner_path) if owner_path else module
    found = owner._parameters.get(last)
    return found if found is not None else owner._buffers.get(last)
