"""Kinds of layers: how many channels they have, where they store them, and what new ones change.

`isinstance` on kinds of layers lives here alone. A new kind is one more adapter, named in `ADAPTERS`.
"""

from torch import Tensor, nn

from growconv.errors import SiteError
from growconv.network.layers.base import Adapter, Part, Removal, Slot
from growconv.network.layers.factorized import Factorized
from growconv.network.layers.norms import GroupNorm, Norm, PReLU
from growconv.network.layers.weighted import Convolution, TransposedConvolution, Weighted

__all__ = [
    "Adapter", "Norm", "Part", "Removal", "Slot", "Weighted", "adapter", "channel_axis", "described", "groups_of",
    "has_side", "is_norm", "is_transposed", "is_weighted", "norm", "norm_groups", "pretended", "problem", "set_size",
    "size", "weighted",
]  # fmt: skip

ADAPTERS: tuple[type[Adapter], ...] = (Factorized, TransposedConvolution, Convolution, Weighted, GroupNorm, Norm, PReLU)


def _find(module: object) -> Adapter | None:
    if not isinstance(module, nn.Module):
        return None
    return next((kind(module) for kind in ADAPTERS if kind.serves(module)), None)


def adapter(module: nn.Module) -> Adapter:
    """What knows a layer.

    Raises:
        SiteError: for a module that is no weighted layer, norm or PReLU.
    """
    found = _find(module)
    if found is None:
        raise SiteError(
            "no layer that channels lie on", got=type(module).__name__, expected="a convolution, linear layer or norm"
        )
    return found


def weighted(module: nn.Module) -> Weighted:
    """What knows a convolution or linear layer.

    Raises:
        SiteError: for anything else.
    """
    found = _find(module)
    if not isinstance(found, Weighted):
        raise SiteError("no layer with weights", got=type(module).__name__, expected="a convolution or linear layer")
    return found


def norm(module: nn.Module) -> Norm:
    """What knows a norm or PReLU.

    Raises:
        SiteError: for anything else.
    """
    found = _find(module)
    if not isinstance(found, Norm):
        raise SiteError(
            "no norm layer", got=type(module).__name__, expected="a batch, instance or group norm, or PReLU"
        )
    return found


def is_weighted(module: object) -> bool:
    """True for a layer with weights between inputs and outputs: a convolution or a linear layer."""
    return isinstance(_find(module), Weighted)


def is_norm(module: object) -> bool:
    """True for a layer with an entry for each channel that treats every channel alike: a norm, or such a PReLU."""
    return isinstance(_find(module), Norm)


def is_transposed(module: object) -> bool:
    """True for a transposed convolution."""
    return isinstance(_find(module), TransposedConvolution)


def groups_of(module: object) -> int:
    """Groups of a convolution; 1 for every other layer."""
    found = _find(module)
    return found.groups if isinstance(found, Weighted) else 1


def norm_groups(module: nn.Module, entries: int) -> list[slice]:
    """Entries that a norm layer normalises together, of so many; none where each stands alone."""
    return norm(module).groups(entries)


def has_side(module: object, side: str) -> bool:
    """Whether channels can lie along such an axis of a layer; False for what is no layer with channels."""
    found = _find(module)
    return found is not None and side in found.sides


def size(module: nn.Module, side: str) -> int:
    """Entries of a layer along an axis, now.

    Raises:
        SiteError: the layer has no such axis.
    """
    return adapter(module).size(side)


def set_size(module: nn.Module, side: str, value: int) -> None:
    """Set the attribute that tells the length of an axis, and nothing else."""
    found = adapter(module)
    for name in found.counts({side: value - found.size(side)}):
        setattr(module, name, value)


def pretended(module: nn.Module, x: Tensor, width: int | None) -> Tensor:
    """Zeros of the shape that a weighted layer would return, for any number of channels; see `Weighted.pretended`."""
    return weighted(module).pretended(x, width)


def channel_axis(module: nn.Module, ndim: int) -> int:
    """The channel axis of an input or output with `ndim` axes."""
    return adapter(module).channel_axis(ndim)


def problem(module: nn.Module) -> str | None:
    """Why a layer's tensors cannot be enlarged, in one line; None where they can."""
    return adapter(module).problem()


def described(value: nn.Module | Tensor) -> str:
    """A layer as it prints itself, or the shape of a bare tensor."""
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else " ".join(str(value).split())
