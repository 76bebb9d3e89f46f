"""Convolutions, transposed convolutions and linear layers, also with a forward of their own (standardised weights).

CP and Tucker convolutions grow in rank (`network.rank`), not in channels.

Everybody else sees the weight as *filters* (out, in/groups, *kernel), whichever way round the layer stores it; a linear
layer's kernel has no axes. Torch stores a transposed convolution as (in, out/groups, *kernel). So one axis of what is
stored lists all channels of one side, group after group, and the other has those of the other side within a group.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from growconv.convolution.cost import multiplications_per_output
from growconv.convolution.cp import CPConv
from growconv.convolution.factorized import FactorizedConv
from growconv.convolution.geometry import Geometry
from growconv.convolution.tucker import TuckerConv
from growconv.convolution.unfold import convolve
from growconv.errors import SurgeryError
from growconv.network.layers.base import Adapter, Part, Slot, stored
from growconv.network.layers.normalized import NormalizedWeight, normalized_weight, problem
from growconv.network.layout import GROUP_IN, GROUP_OUT, IN, OUT, Place
from growconv.network.tensors import Change, Insertion


class Weighted(Adapter):
    """A layer with weights between its inputs and its outputs.

    Args:
        module: a convolution, transposed convolution or linear layer.

    Attributes:
        groups: groups of channels; 1 for a linear layer.
        kernel_size: taps per axis of the kernel; none for a linear layer.
        transposed: whether the stored weight lists inputs first.
    """

    kinds = (nn.Linear,)
    sides = (OUT, IN)
    names = ("out_features", "in_features")
    transposed = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.groups = int(getattr(module, "groups", 1))
        self.kernel_size: tuple[int, ...] = tuple(getattr(module, "kernel_size", ()))

    @cached_property
    def _normalized(self) -> NormalizedWeight | None:
        return None if "weight" in self.module._parameters else normalized_weight(self.module)

    def size(self, side: str) -> int:
        """Channels or features that it writes or reads."""
        return int(getattr(self.module, self.names[0 if side in (OUT, GROUP_OUT) else 1]))

    def channel_axis(self, ndim: int) -> int:
        """The axis in front of the grid; the last one for a linear layer."""
        return ndim - 1 - len(self.kernel_size)

    # ---------------------------------------------------------------------------------------------- weights

    def filters(self) -> Tensor:
        """The weight that the layer multiplies with, (out, in/groups, *kernel), differentiable."""
        weight = stored(self.module, "weight") if self._normalized is None else self._normalized.effective()
        if weight is None:
            raise SurgeryError("this layer has no weight of its own", where=type(self.module).__name__)
        return self.as_stored(weight)

    def bias(self) -> Tensor | None:
        """The bias (out,); None where there is none."""
        return stored(self.module, "bias")

    def shape(self, side: str, entries: int) -> tuple[int, ...]:
        """Shape of the filters of new entries along a side.

        Args:
            side: OUT: new filters (entries, in/groups, *kernel). IN: new columns (out, entries/groups, *kernel), those
                of a group of outputs being what its own inputs get, in their order. GROUP_OUT: filters of new groups.
            entries: new entries along that side.
        """
        if side == IN:
            return (self.size(OUT), entries // self.groups, *self.kernel_size)
        return (entries, self.size(IN) // self.groups, *self.kernel_size)

    def identity(self, entries: int) -> Tensor:
        """Filters (entries, in/groups, *kernel) of new groups that copy their input at the kernel's centre tap.

        Output j of a group reads input j modulo the group's inputs.
        """
        inputs, outputs = self.size(IN) // self.groups, self.size(OUT) // self.groups
        filters = self.filters().new_zeros(self.shape(GROUP_OUT, entries))
        centre = tuple((taps - 1) // 2 for taps in self.kernel_size)
        for entry in range(entries):
            filters[(entry, entry % outputs % inputs, *centre)] = 1
        return filters.detach()

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int | None = None) -> Tensor:
        """Run the layer with other weights: the module's own forward, so that what it does to a weight happens too.

        What it returns is differentiable in all that is given. Hooks are not called, and the module is not touched.

        Args:
            x: what the layer would be given, with as many channels as the weight reads.
            weight: filters (outputs, inputs/groups, *kernel), any number of both. A normalized layer uses them as they
                are; a layer with a forward of its own treats them as its parameter.
            bias: (outputs,) or None.
            groups: how many groups the weight has; None for the layer's own.
        """
        groups = self.groups if groups is None else groups
        kind: type[nn.Module] = parametrize.type_before_parametrizations(self.module)
        twin = object.__new__(kind)
        twin.__dict__.update(self.module.__dict__)
        twin.__dict__.pop("weight", None)  # where an old hook puts the normalized weight
        turned, (per_output, per_weight) = self.as_stored(weight, groups), self._beside
        parameters = {**self.module._parameters, "weight": turned, "bias": bias}
        for name, tensor in per_output.items():
            parameters[name] = _widened(tensor, len(weight))
        for name, tensor in per_weight.items():
            parameters[name] = tensor if tensor.shape == turned.shape else _spread(tensor, turned.shape)
        twin.__dict__["_parameters"] = parameters
        twin.__dict__.update(zip(self.names, (weight.shape[0], weight.shape[1] * groups), strict=True))
        if groups != self.groups:
            twin.__dict__["groups"] = groups
        return kind.forward(twin, x)

    def as_stored(self, filters: Tensor, groups: int | None = None) -> Tensor:
        """Filters (out, in/groups, *kernel) the way round in which the layer stores its weight, or the reverse."""
        if not self.transposed:
            return filters
        return filters.unflatten(0, (self.groups if groups is None else groups, -1)).transpose(1, 2).flatten(0, 1)

    @property
    def plain(self) -> bool:
        """Whether the layer multiplies with its stored weight, and not with what a forward of its own makes of it."""
        kind = parametrize.type_before_parametrizations(self.module)
        methods = [getattr(kind, name, None) for name in ("forward", "_conv_forward")]
        return all(each is None or each.__module__.startswith("torch.") for each in methods)

    @property
    def rewritable(self) -> bool:
        """Whether the weight is a parameter of its own, so that old entries can be given other values."""
        return self.module._parameters.get("weight") is not None

    # ---------------------------------------------------------------------------------------------- cost

    def multiplications(self) -> float:
        """Multiply-adds at each location at which the layer applies its kernel."""
        return float(self.filters().numel())

    def locations(self, x: Tensor, output: Tensor) -> float:
        """At how many locations the layer applies its kernel to x, which gives the output, over all samples."""
        return output.numel() / self.size(OUT)

    # ---------------------------------------------------------------------------------------------- surgery

    def _listed(self, side: str) -> bool:
        """Whether the stored weight's axis 0 lists all channels of the side; axis 1 has it within groups otherwise."""
        return (side in (OUT, GROUP_OUT)) != self.transposed

    def slots(self, side: str) -> list[Slot]:
        """The weight; for outputs also the bias, and whatever else a subclass has for each output."""
        own = [Slot("bias", 0)] if self.bias() is not None else []
        own += [Slot(name, 0) for name in self._beside[0]]
        if side == GROUP_IN and not self.transposed:
            return []
        if side == GROUP_OUT and self.transposed:
            return own
        axis, groups = (0, 1) if self._listed(side) else (1, self.groups)
        names = ["weight"] if self._normalized is None else self._normalized.names(axis)
        weights = [Slot(name, axis, groups) for name in (*names, *self._beside[1])]
        return weights if side in (IN, GROUP_IN) else [*weights, *own]

    @cached_property
    def _beside(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a subclass stores beside weight and bias, by name.

        First tensors with one entry for each output, as the gain of a standardised convolution, then those with one for
        each weight, as the mask of a pruned convolution.
        """
        weight, per_output, per_weight = stored(self.module, "weight"), {}, {}
        named = () if self._normalized is not None else (self.module._parameters, self.module._buffers)
        for name, tensor in chain.from_iterable(map(dict.items, named)):
            if tensor is None or name in ("weight", "bias") or not tensor.is_floating_point():
                continue
            if tensor.dim() and tensor.numel() == len(tensor) == self.size(OUT):
                per_output[name] = tensor
            if weight is not None and tensor is not weight and tensor.dim() > 1 and tensor.shape == weight.shape:
                per_weight[name] = tensor
        return per_output, per_weight

    def problem(self) -> str | None:
        """Also: parameters that are not known to belong to the outputs."""
        reason = super().problem() or problem(self.module)
        if reason:
            return reason
        known = {"weight", "bias", *(slot.name for side in (OUT, IN) for slot in self.slots(side))}
        known |= set() if self._normalized is None else {self._normalized.length}
        tensors = (*self.module.named_parameters(), *self.module.named_buffers())
        strange = [name for name, tensor in tensors if name not in known and tensor.numel() > 1]
        return f"nobody knows which channels its {strange[0]} belongs to" if strange else None

    def insertions(self, side: str, places: Sequence[Place], values: Mapping[str, Tensor]) -> list[Part]:
        """New entries along outputs or inputs.

        Args:
            side: OUT or IN.
            places: where they come, along all channels of that side; inside every group for a grouped convolution.
            values: "weight": filters as in `shape`, channel by channel; "bias" (entries,).
        """
        listed, weight, parts = self._listed(side), values.get("weight"), list[Part]()
        size, rows = self.size(side) // self.groups, self.size(OUT) // self.groups
        groups = [(place.position - 1) // size for place in places]  # new entries come behind their group's old ones
        shares: dict[int, list[tuple[int, int, Tensor | None]]] = {}  # group, entries and weights, by stored position
        for group, place in zip(groups, places, strict=True):
            new = None
            if weight is not None and side == IN:  # columns of its own group, for the outputs that read it
                own = [each.entries for owner, each in zip(groups, places, strict=True) if owner == group]
                column = {entry: index for index, entry in enumerate(sorted(chain(*own)))}
                new = weight[group * rows : (group + 1) * rows, [column[entry] for entry in place.entries]]
            elif weight is not None:
                new = place.of(weight)
            new = new.transpose(0, 1) if new is not None and self.transposed else new
            position = place.position if listed else place.position - group * size
            shares.setdefault(position, []).append((group, len(place.entries), new))
        for position, share in shares.items():
            owners, counts, blocks = zip(*share, strict=True)
            if not listed and (owners != tuple(range(self.groups)) or len(set(counts)) > 1):
                raise SurgeryError(
                    "every group of a grouped convolution has to get the same number of new channels",
                    expected=f"equal shares for {self.groups} groups",
                    got={place.position: len(place.entries) for place in places},
                )
            new = None if weight is None else torch.cat(blocks)
            parts.append(("weight", Insertion(0 if listed else 1, position, counts[0], new)))
        return self._stored_parts(parts) + (self._per_output(places, values) if side == OUT else [])

    def group_insertions(
        self, places_in: Sequence[Place], places_out: Sequence[Place], values: Mapping[str, Tensor]
    ) -> list[Part]:
        """New entries of a grouped convolution that gets whole groups.

        Args:
            places_in: where the new channels come along the inputs.
            places_out: where they come along the outputs.
            values: "weight": filters (entries, in/groups, *kernel) of the new groups, channel by channel along the
                outputs; "bias" (entries,).
        """
        inputs, outputs = self.size(IN) // self.groups, self.size(OUT) // self.groups
        for size, places in ((inputs, places_in), (outputs, places_out)):
            if any(place.position % size or len(place.entries) % size for place in places):
                expected = f"multiples of {size}"
                raise SurgeryError("groups come as a whole, between others", expected=expected, got=places)
        if not self.transposed:
            return self.insertions(OUT, places_out, values)
        weight, parts = values.get("weight"), list[Part]()
        written = [entry for place in places_out for entry in place.entries]
        for place in places_in:
            count = len(place.entries) // inputs
            own, written = written[: count * outputs], written[count * outputs :]
            rows = None if weight is None else self.as_stored(weight[own], count)
            parts.append(("weight", Insertion(0, place.position, len(place.entries), rows)))
        return self._stored_parts(parts) + self._per_output(places_out, values)

    def _stored_parts(self, parts: list[Part]) -> list[Part]:
        """New entries of the weight as the layer stores them; tensors with an entry for each weight get their mean."""
        if self._normalized is not None:
            return self._normalized.parts(parts)
        beside = []
        for name, tensor in self._beside[1].items():
            for _, each in parts:
                shape = list(tensor.shape)
                shape[each.axis] = each.count
                beside.append((name, replace(each, values=_spread(tensor.detach(), shape))))
        return parts + beside

    def revised(self, change: Callable[[str], Change]) -> dict[str, Tensor]:
        """Lengths of weight-normalized filters that got longer or shorter."""
        return {} if self._normalized is None else self._normalized.revised(change)

    def refresh(self) -> None:
        """Compute a weight anew that an old weight-norm hook leaves on the layer."""
        if self._normalized is not None:
            self._normalized.refresh()

    def counts(self, added: Mapping[str, int]) -> dict[str, int]:
        """Numbers of channels, and of groups where whole groups come or go."""
        found = {}
        for side, more in added.items():
            found[self.names[side in (IN, GROUP_IN)]] = self.size(side) + more
        if added.get(GROUP_IN):
            found["groups"] = self.groups + added[GROUP_IN] * self.groups // self.size(IN)
        return found

    def _per_output(self, places: Sequence[Place], values: Mapping[str, Tensor]) -> list[Part]:
        """New entries of the bias, and of whatever else a subclass has for each output: the mean of the old ones."""
        parts = []
        for place in places:
            count, own = len(place.entries), values.get("bias")
            insertion = Insertion(0, place.position, count, None if own is None else place.of(own))
            if self.bias() is not None:
                parts.append(("bias", insertion))
            for name, tensor in self._beside[0].items():
                new = _widened(tensor.detach(), len(tensor) + count)[len(tensor) :]
                parts.append((name, replace(insertion, values=new)))
        return parts


class Convolution(Weighted):
    """Conv1d, Conv2d, Conv3d."""

    sides = (OUT, IN, GROUP_IN, GROUP_OUT)
    names = ("out_channels", "in_channels")

    kinds = (_ConvNd,)


class TransposedConvolution(Convolution):
    """ConvTranspose1d, ConvTranspose2d, ConvTranspose3d."""

    kinds = (_ConvTransposeNd,)
    transposed = True

    def locations(self, x: Tensor, output: Tensor) -> float:
        """Every input location is multiplied with the whole kernel."""
        return x.numel() / self.size(IN)


@dataclass(frozen=True)
class Rank:
    """One rank of a factorized kernel: a number of terms.

    Attributes:
        producer: the parameter that takes inputs to the terms.
        consumer: the parameter that takes the terms to outputs.
        carriers: parameters in between.
        dims: along which dimension each of them has the terms.
        bound: the rank above which no kernel of this shape needs another term.
    """

    producer: str
    consumer: str
    carriers: tuple[str, ...]
    dims: Mapping[str, int]
    bound: int


class Factorized(Weighted):
    """A convolution whose kernel is stored as factors."""

    kinds = (FactorizedConv,)
    names = ("out_channels", "in_channels")

    def ranks(self) -> dict[str | None, Rank]:
        """The ranks by side: of a CP kernel one under None, of a Tucker kernel "out" and "in"."""
        outputs, inputs, taps = self.size(OUT), self.size(IN), math.prod(self.kernel_size)
        if isinstance(self.module, CPConv):
            shape = (outputs, inputs, *self.kernel_size)
            carriers = [f"axis_factor_{axis}" for axis in range(self.module.axes)]
            dims = dict.fromkeys(("in_factor", "out_factor", *carriers), 1)
            return {None: Rank("in_factor", "out_factor", tuple(carriers), dims, math.prod(shape) // max(shape))}
        if isinstance(self.module, TuckerConv):
            return {
                "out": Rank("core", "out_factor", (), {"core": 0, "out_factor": 1}, min(outputs, inputs * taps)),
                "in": Rank("in_factor", "core", (), {"in_factor": 1, "core": 1}, min(inputs, outputs * taps)),
            }
        return {}

    def filters(self) -> Tensor:
        """The full kernel, differentiable in every factor."""
        return self.module.weight  # pyright: ignore[reportReturnType]

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int | None = None) -> Tensor:
        """Convolve with a full kernel."""
        return convolve(x, weight, Geometry.of(self.module), bias, groups or 1)

    def multiplications(self) -> float:
        """Those of the convolutions that it runs; what builds a kernel from factors is left out."""
        return multiplications_per_output(self.module)  # pyright: ignore[reportArgumentType]

    def slots(self, side: str) -> list[Slot]:
        """None: its channels stay as they are."""
        return []

    def problem(self) -> str:
        """Why it gets no channels."""
        return "its kernel is stored as factors, which grow in rank (growconv.find_rank_sites) and not in channels"


def _spread(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor with an entry for each weight, for other numbers of channels: everywhere the mean at each tap."""
    return tensor.mean((0, 1), keepdim=True).expand(shape)


def _widened(tensor: Tensor, rows: int) -> Tensor:
    """A tensor with one entry for each output, for another number of outputs: further ones have the mean."""
    mean = tensor.mean(0, keepdim=True).expand(rows, *tensor.shape[1:])
    return mean if rows < len(tensor) else torch.cat([tensor, mean[len(tensor) :]])
