"""Convolutions, transposed convolutions and linear layers, also with a forward of their own (standardised weights).

CP and Tucker convolutions grow in rank (`network.rank`), not in channels.

Everybody else sees the weight as *filters* (out, in/groups, *kernel), whichever way round the layer stores it; a linear
layer's kernel has no axes. Torch stores a transposed convolution as (in, out/groups, *kernel). So one axis of what is
stored lists all channels of one side, group after group, and the other has those of the other side within a group.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from growconv.convolution.cost import multiplications_per_output
from growconv.convolution.cp import CPConv
from growconv.convolution.factorized import FactorizedConv
from growconv.convolution.geometry import Geometry
from growconv.convolution.tucker import TuckerConv
from growconv.convolution.unfold import convolve
from growconv.errors import SurgeryError
from growconv.network.layers.base import Adapter, Slot, stored
from growconv.network.layout import GROUP_IN, GROUP_OUT, IN, OUT
from growconv.network.tensors import Change, without


@dataclass(frozen=True)
class NormalizedWeight:
    """A weight that is stored as lengths g and directions v of its slices along one axis, w = g·v/‖v‖.

    New slices bring a length and a direction of their own. New entries inside the slices make them longer: g grows with
    them, so that the old entries of w stay as they are.

    Attributes:
        module: the layer.
        dim: the axis of the weight along which the slices lie.
        length: name of g, from the layer.
        direction: name of v, from the layer.
    """

    module: nn.Module
    dim: int
    length: str
    direction: str

    def _g(self) -> Tensor:
        return self.module.get_parameter(self.length)

    def _v(self) -> Tensor:
        return self.module.get_parameter(self.direction)

    def effective(self) -> Tensor:
        """The weight that the layer multiplies with, in the way the layer stores it."""
        return torch._weight_norm(self._v(), self._g(), self.dim)  # pyright: ignore

    def names(self, axis: int) -> list[str]:
        """The stored tensors that are as long as an axis of the weight."""
        return [self.direction, self.length] if axis == self.dim else [self.direction]

    def entries(self, name: str, axis: int, values: Tensor | None) -> Tensor:
        """New entries of a stored tensor, from those of the weight along an axis; None: zeros."""
        g, v = self._g().detach(), self._v().detach()
        if values is None:
            values = v.new_zeros([1 if each == axis else size for each, size in enumerate(v.shape)])
        if axis != self.dim:
            return values.to(g) * torch.where(g == 0, 1.0, _norms(v, self.dim) / g)
        length = _norms(values.to(g), self.dim)
        if name == self.length:
            return length
        return torch.where(length > 0, values.to(g), torch.ones_like(length))  # zeros have no direction: v/‖v‖

    def revised(self, change: Callable[[str], Change]) -> dict[str, Tensor]:
        """Lengths of the old slices that leave the old entries of the weight alone; no direction where it was zero."""
        g, v, planned = self._g().detach(), self._v().detach(), change(self.direction)
        old = _norms(v, self.dim)
        for axis, entries in planned.removed.items():
            if axis != self.dim:
                return {self.length: g * _norms(without(v, axis, entries), self.dim) / old}
        inside = [each.values for each in planned.insertions if each.axis != self.dim and each.values is not None]
        if not inside:
            return {}
        added = sum((_norms(values, self.dim).square() for values in inside), torch.zeros_like(g))
        empty = (g == 0) & (added > 0)
        length = torch.where(g == 0, added.sqrt(), g / old * (old.square() + added).sqrt())
        return {self.length: length, self.direction: torch.where(empty, torch.zeros_like(v), v)}

    def refresh(self) -> None:
        """Compute what the old hook leaves on the layer between two calls."""
        for hook in self.module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                setattr(self.module, hook.name, hook.compute_weight(self.module))


def normalized_weight(module: nn.Module) -> NormalizedWeight | None:
    """How a layer's weight is normalized; None for one that is no weight norm along an axis."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == "weight" and hook.dim != -1:
            return NormalizedWeight(module, hook.dim % module.weight_v.dim(), "weight_g", "weight_v")  # pyright: ignore
    kinds = _parametrizations(module)
    if kinds is not None and list(kinds) == ["weight"] and len(kinds["weight"]) == 1:
        only, prefix = kinds["weight"][0], "parametrizations.weight"
        if isinstance(only, parametrizations._WeightNorm) and only.dim != -1:
            direction = module.get_parameter(f"{prefix}.original1")
            return NormalizedWeight(module, only.dim % direction.dim(), f"{prefix}.original0", f"{prefix}.original1")
    return None


def _problem(module: nn.Module) -> str | None:
    """Why a weight that is computed from stored tensors cannot be enlarged, in one line; None where it can."""
    if normalized_weight(module) is not None or "weight" in module._parameters:
        return None
    kinds = _parametrizations(module)
    names = [type(each).__name__ for found in (kinds or {}).values() for each in found]
    if "_SpectralNorm" in names or any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
        return "it is spectral-normalized, and the power iteration would move its old weights after a growth"
    if names == ["_WeightNorm"] or any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values()):
        return "its weight is normalized as a whole, so new entries would change the old ones"
    return (
        f"its parametrization ({', '.join(names)}) is not known"
        if names
        else "its weight is computed from other parameters"
    )


def _parametrizations(module: nn.Module) -> dict[str, list[nn.Module]] | None:
    """Per parametrized tensor what computes it; None for a layer without."""
    if not parametrize.is_parametrized(module):
        return None
    return {name: list(found.children()) for name, found in module.get_submodule("parametrizations").named_children()}


def _norms(tensor: Tensor, dim: int) -> Tensor:
    """Norm of each slice along an axis, with the other axes kept at length 1."""
    return tensor.norm(2, [axis for axis in range(tensor.dim()) if axis != dim], keepdim=True)


class Weighted(Adapter):
    """A layer with weights between its inputs and its outputs.

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
        entry = torch.arange(entries, device=filters.device)
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
            mean = tensor.mean(0, keepdim=True).expand(len(weight), *tensor.shape[1:])
            parameters[name] = mean if len(weight) < len(tensor) else torch.cat([tensor, mean[len(tensor) :]])
        for name, tensor in per_weight.items():
            mean = tensor.mean((0, 1), keepdim=True)
            parameters[name] = tensor if tensor.shape == turned.shape else mean.expand(turned.shape)
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

    def old(self, side: str) -> dict[str, Tensor]:
        """Filters and bias of outputs."""
        bias = self.bias()
        return {"weight": self.filters().detach()} | ({} if bias is None else {"bias": bias.detach()})

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
        reason = super().problem() or _problem(self.module)
        if reason:
            return reason
        known = {"weight", "bias", *(slot.name for side in (OUT, IN) for slot in self.slots(side))}
        known |= set() if self._normalized is None else {self._normalized.length}
        tensors = (*self.module.named_parameters(), *self.module.named_buffers())
        strange = [name for name, tensor in tensors if name not in known and tensor.numel() > 1]
        return f"nobody knows which channels its {strange[0]} belongs to" if strange else None

    def entries(self, slot: Slot, side: str, order: Sequence[int], values: Mapping[str, Tensor]) -> Tensor | None:
        """New entries of the weight, the bias, and whatever else a subclass has: of that the mean of the old ones.

        Of `values`, "weight" has filters as in `shape`, channel by channel, and "bias" is (entries,). Along OUT and IN
        every group gets channels; GROUP_IN and GROUP_OUT are whole groups, in the order of their outputs.
        """
        for beside, axes in zip(self._beside, ((0,), (0, 1)), strict=True):
            if slot.name in beside:
                return beside[slot.name].detach().mean(axes, keepdim=True)
        given = values.get("bias" if slot.name == "bias" else "weight")
        if given is None:
            normalized = None if slot.name == "bias" else self._normalized
            return None if normalized is None else normalized.entries(slot.name, slot.axis, None)
        if slot.name == "bias":
            return given[list(order)]
        groups = self.groups
        if list(order) == list(range(len(order))):
            filters = given
        elif side == IN:  # every group of outputs has the columns of its own inputs
            places = torch.tensor(order).view(groups, -1).argsort(1).argsort(1)
            filters = torch.cat([rows[:, own] for rows, own in zip(given.chunk(groups), places, strict=True)])
        else:
            filters = given[list(order)]
        if side not in (IN, OUT):
            groups = len(order) * groups // self.size(OUT)
        new = self.as_stored(filters, groups)
        return new if self._normalized is None else self._normalized.entries(slot.name, slot.axis, new)

    def revised(self, change: Callable[[str], Change]) -> dict[str, Tensor]:
        """Lengths of weight-normalized filters that got longer or shorter."""
        return {} if self._normalized is None else self._normalized.revised(change)

    def refresh(self) -> None:
        """Compute a weight anew that an old weight-norm hook leaves on the layer."""
        if self._normalized is not None:
            self._normalized.refresh()

    def counts(self, added: Mapping[str, int]) -> dict[str, int]:
        """Numbers of channels, and of groups where whole groups come or go."""
        found, whole = {}, self.size(IN) // self.groups
        if added.get(GROUP_IN, 0) % whole:
            raise SurgeryError("groups come as a whole", expected=f"multiples of {whole}", got=added[GROUP_IN])
        for side, more in added.items():
            found[self.names[side in (IN, GROUP_IN)]] = self.size(side) + more
        if added.get(GROUP_IN):
            found["groups"] = self.groups + added[GROUP_IN] // whole
        return found


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
