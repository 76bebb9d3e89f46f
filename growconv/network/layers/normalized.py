"""Weight normalization, by torch's old hook and its new parametrization: what the stored tensors get for new channels.

The layer stores lengths g and directions v of the slices of its weight along one axis, w = g·v/‖v‖. New slices bring a
length and a direction of their own. New entries inside the slices make them longer: g grows with them, so that the old
entries of w stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from growconv.network.tensors import Change, without


@dataclass(frozen=True)
class NormalizedWeight:
    """A weight that is stored as lengths and directions.

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

    def entries(self, name: str, axis: int, values: Tensor) -> Tensor:
        """New entries of a stored tensor, from those of the weight along an axis."""
        g, v = self._g().detach(), self._v().detach()
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


def problem(module: nn.Module) -> str | None:
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
