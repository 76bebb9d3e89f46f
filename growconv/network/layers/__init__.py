"""Kinds of layers: how many channels they have, where they store them, and what new ones change.

`isinstance` on kinds of layers lives here alone. A new kind is one more adapter, named in `ADAPTERS`.
"""

from functools import cache
from typing import TypeVar, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from growconv.errors import SiteError
from growconv.network.layers.base import Adapter, Bare, stored
from growconv.network.layers.norms import GroupNorm, Norm, PReLU
from growconv.network.layers.weighted import Convolution, Factorized, Rank, TransposedConvolution, Weighted
from growconv.network.layout import IN, OUT

__all__ = [
    "Adapter", "Bare", "Norm", "Shapes", "Weighted", "adapter", "channel_axis", "described", "groups_of",
    "has_side", "is_batch_norm", "is_dropout", "is_norm", "is_plain_convolution", "is_plain_dropout",
    "is_transposed", "is_weighted",
    "norm", "pretended", "ranks", "scale_of", "size", "stored", "tells_its_entries", "weighted",
]  # fmt: skip

ADAPTERS: tuple[type[Adapter], ...] = (Factorized, TransposedConvolution, Convolution, Weighted, GroupNorm, Norm, PReLU)
Kind = TypeVar("Kind", bound=Adapter)


@cache
def _kind_of(layer: type) -> type[Adapter] | None:
    return next((kind for kind in ADAPTERS if issubclass(layer, kind.kinds)), None)


def _find(module: object) -> Adapter | None:
    kind, layer = _kind_of(type(module)), cast(nn.Module, module)
    return kind(layer) if kind is not None and kind.serves(layer) else None


_is_kind_of = cache(issubclass)  # of an abstract class it takes long


def _is(module: object, wanted: type[Adapter]) -> bool:
    kind = _kind_of(type(module))
    return kind is not None and _is_kind_of(kind, wanted) and kind.serves(cast(nn.Module, module))


def _require(module: nn.Module, kind: type[Kind], expected: str) -> Kind:
    found = _find(module)
    if not isinstance(found, kind):
        got = type(module).__name__
        raise SiteError("this module is no layer of the kind that is needed", expected=expected, got=got)
    return found


def adapter(module: nn.Module) -> Adapter:
    """What knows a layer that channels can lie on; SiteError for a module that is none."""
    return _require(module, Adapter, "a convolution, linear layer, norm or PReLU")


def weighted(module: nn.Module) -> Weighted:
    """What knows a convolution or linear layer; SiteError for anything else."""
    return _require(module, Weighted, "a convolution or linear layer")


def norm(module: nn.Module) -> Norm:
    """What knows a norm or PReLU; SiteError for anything else."""
    return _require(module, Norm, "a batch, instance or group norm, or PReLU")


def ranks(module: object) -> dict[str | None, Rank]:
    """The ranks of a factorized convolution, by side; none for anything else."""
    found = _find(module)
    return found.ranks() if isinstance(found, Factorized) else {}


def tells_its_entries(module: object, name: str) -> bool:
    """True for an attribute that always counts what the module is given, as the shape that a layer norm normalises."""
    return name == "normalized_shape" and isinstance(module, nn.LayerNorm | nn.RMSNorm)


def is_weighted(module: object) -> bool:
    """True for a layer with weights between inputs and outputs: a convolution or a linear layer."""
    return _is(module, Weighted)


def is_norm(module: object) -> bool:
    """True for a layer with an entry for each channel that treats every channel alike: a norm, or such a PReLU."""
    return _is(module, Norm)


def is_batch_norm(module: object) -> bool:
    """True for a batch norm that keeps running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def is_dropout(module: object) -> bool:
    """True for a layer that does nothing but in training, where it leaves entries out at random."""
    return isinstance(module, _DropoutNd)


def is_plain_dropout(module: nn.Module) -> bool:
    """True for a dropout with torch's own forward, which leaves all channels where they are."""
    return is_dropout(module) and type(module).forward.__module__ == _DropoutNd.__module__


def is_transposed(module: object) -> bool:
    """True for a transposed convolution."""
    return _is(module, TransposedConvolution)


def is_plain_convolution(module: nn.Module) -> bool:
    """True for torch's own Conv1d to Conv3d with a weight of its own."""
    return type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and "weight" in module._parameters


def groups_of(module: object) -> int:
    """Groups of a convolution; 1 for every other layer."""
    found = _find(module)
    return found.groups if isinstance(found, Weighted) else 1


def has_side(module: object, side: str) -> bool:
    """Whether channels can lie along such an axis of a layer; False for what is no layer with channels."""
    found = _find(module)
    return found is not None and side in found.sides


def size(module: nn.Module, side: str) -> int:
    """Entries of a layer along an axis, now; SiteError where it has no such axis."""
    found = adapter(module)
    if side not in found.sides:
        expected, got = " or ".join(found.sides), f"{side} of {type(module).__name__}"
        raise SiteError("this layer has no such side", expected=expected, got=got)
    return found.size(side)


def scale_of(value: object) -> Tensor | None:
    """What a norm multiplies each normalised channel with; None for a norm without weights, and for anything else."""
    found = _find(value)
    return stored(found.module, "weight") if isinstance(found, Norm) and found.normalises else None


def channel_axis(module: nn.Module, ndim: int) -> int:
    """The channel axis of an input or output with `ndim` axes."""
    return adapter(module).channel_axis(ndim)


def in_whole_groups(module: nn.Module) -> bool:
    """Whether a grouped convolution grows by whole groups: where it has at least as many as channels in one."""
    groups = groups_of(module)
    return groups > 1 and groups >= size(module, IN) // groups


Shapes = dict[tuple[nn.Module, tuple[int, ...]], tuple[int, ...]]
"""Per layer and shape of its input, the channels left out, the shape of its output without them."""


def pretended(module: nn.Module, x: Tensor, shapes: Shapes, outputs: int | None = None) -> Tensor:
    """Zeros of the shape that a weighted layer gives for any number of input channels, on the memory of one.

    Args:
        x: its input.
        shapes: those that are known; this one is added.
        outputs: how many it has; None: as many as now, whole groups more where it is given whole groups more.
    """
    layer = weighted(module)
    axis = layer.channel_axis(x.dim())
    key = module, (*x.shape[:axis], *x.shape[axis + 1 :])
    if key not in shapes:
        twice = x.narrow(axis, 0, 1).expand(*x.shape[:axis], 2, *x.shape[axis + 1 :])  # one weight has no variance
        one = layer.apply(twice, x.new_zeros(1, 2, *layer.kernel_size), None, groups=1).shape
        shapes[key] = *one[:axis], *one[axis + 1 :]
    inputs = x.shape[axis] if layer.groups > 1 else layer.size(IN)
    count = outputs or layer.size(OUT) * inputs // layer.size(IN)
    return x.new_zeros([1] * x.dim()).expand(*shapes[key][:axis], count, *shapes[key][axis:])


def described(value: nn.Module | Tensor) -> str:
    """A layer as it prints itself, or the shape of a bare tensor."""
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else " ".join(str(value).split())
