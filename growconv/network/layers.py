"""What each layer type is made of: which tensors have which channel axes, and which attributes tell their number."""

from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from growconv.convolution.factorized import FactorizedConv
from growconv.network import parametrized

BATCH_NORMS = (_BatchNorm,)
INSTANCE_NORMS = (_InstanceNorm,)
NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink,
    nn.Threshold, nn.LogSigmoid, nn.RReLU, nn.PReLU,
)  # fmt: skip
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ADAPTIVE_AVERAGE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
ADAPTIVE_MAX_POOLS = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
PADS = (
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
)  # fmt: skip
UNPOOLS = (nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d)
OTHER_GRID = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.LPPool1d, nn.LPPool2d)
GRID_MODULES = MAX_POOLS + AVERAGE_POOLS + ADAPTIVE_AVERAGE_POOLS + ADAPTIVE_MAX_POOLS + PADS + OTHER_GRID


@dataclass(frozen=True)
class Slot:
    """One tensor of a layer that has a channel axis: its name and which axis that is."""

    name: str
    axis: int


def is_leaf(module: nn.Module) -> bool:
    """True for a module that is one step of the data flow: of torch.nn (or with its forward), or a factorized conv."""
    if isinstance(module, FactorizedConv):
        return True
    source = getattr(type(module).forward, "__module__", "") or ""
    container = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict))
    return source.startswith("torch.nn") and not container and type(module).forward is not nn.Module.forward


def is_transposed(module: nn.Module) -> bool:
    """True for a transposed convolution."""
    return isinstance(module, _ConvTransposeNd)


def is_convolution(module: nn.Module) -> bool:
    """True for a (transposed) convolution of 1, 2 or 3 axes."""
    return isinstance(module, _ConvNd)


def is_weighted(module: nn.Module) -> bool:
    """True for a layer that writes new channels: a convolution or a linear layer, with torch's own forward."""
    return isinstance(module, (_ConvNd, nn.Linear, FactorizedConv))


def axes_of(module: nn.Module) -> int:
    """Number of grid axes of a convolution, pooling or norm layer by its name: Conv2d has 2."""
    if isinstance(module, FactorizedConv):
        return module.axes
    return next((int(digit) for digit in ("1", "2", "3") if f"{digit}d" in _stock_name(module)), 0)


def _stock_name(module: nn.Module) -> str:
    return next(base.__name__ for base in type(module).__mro__ if (base.__module__ or "").startswith("torch.nn"))


def channel_axis(module: nn.Module, ndim: int) -> int:
    """The channel axis of a tensor with `ndim` axes that a convolution or linear layer reads or writes."""
    if isinstance(module, nn.Linear):
        return ndim - 1
    if hasattr(module, "kernel_size"):
        return ndim - 1 - len(getattr(module, "kernel_size"))  # noqa: B009
    if isinstance(module, _InstanceNorm) and ndim == module._get_no_batch_dim():
        return 0
    return min(1, ndim - 1)


def input_width(module: nn.Module) -> int:
    """Channels or features that a convolution or linear layer reads."""
    return int(getattr(module, "in_features" if isinstance(module, nn.Linear) else "in_channels"))


def output_width(module: nn.Module) -> int:
    """Channels or features that a convolution or linear layer writes."""
    return int(getattr(module, "out_features" if isinstance(module, nn.Linear) else "out_channels"))


def groups_of(module: nn.Module) -> int:
    """Groups of a convolution; 1 for a linear layer."""
    return int(getattr(module, "groups", 1))


def group_granularity(module: nn.Module) -> tuple[int, Fraction]:
    """Channels per group that a grouped convolution reads, and how many it writes per channel read."""
    return input_width(module) // groups_of(module), Fraction(output_width(module), input_width(module))


def writing_slots(module: nn.Module) -> list[Slot]:
    """The tensors of a layer with an output channel axis."""
    weight = Slot("weight", 1 if is_transposed(module) else 0)
    if isinstance(module, FactorizedConv):
        weight = Slot("out_factor", 0)
    return [weight, Slot("bias", 0)] if getattr(module, "bias", None) is not None else [weight]


def reading_slots(module: nn.Module) -> list[Slot]:
    """The tensors of a layer with an input channel axis."""
    if isinstance(module, FactorizedConv):
        return [Slot("in_factor", 0)]
    return [Slot("weight", 0 if is_transposed(module) else 1)]


def norm_slots(module: nn.Module) -> list[Slot]:
    """The tensors of a norm or PReLU layer with one entry a channel."""
    names = ("weight", "bias", "running_mean", "running_var")
    return [Slot(name, 0) for name in names if getattr(module, name, None) is not None]


def least_common_multiple(first: int, second: int) -> int:
    """Least common multiple of two positive numbers."""
    return first * second // gcd(first, second)


def problem(module: nn.Module) -> str | None:
    """Why a layer's tensors cannot be enlarged, in one line; None where they can."""
    for name, parameter in module.named_parameters(recurse=True):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            return f"{name} is not initialized yet"
        if hasattr(parameter, "device_mesh"):
            return f"{name} is sharded over devices"
    if is_weighted(module) and not isinstance(module, FactorizedConv):
        return parametrized.problem(module)
    return None


def convolve(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """A convolution with a module's stride, padding and dilation, and other weights."""
    if isinstance(module, FactorizedConv):
        return module.convolve(x, weight, bias, groups)
    geometry: dict[str, Any] = {name: getattr(module, name) for name in ("stride", "padding", "dilation")}
    if is_transposed(module):
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes_of(module) - 1]
        geometry["output_padding"] = module.output_padding
    else:
        function = (F.conv1d, F.conv2d, F.conv3d)[axes_of(module) - 1]
        if module.padding_mode != "zeros":
            sides: Any = module._reversed_padding_repeated_twice
            x = F.pad(x, list(sides), mode=str(module.padding_mode))
            geometry["padding"] = 0
    return function(x, weight, bias, groups=groups, **geometry)


def carrying_slots(module: nn.Module) -> list[Slot]:
    """The tensors of a grouped convolution with one entry per output (transposed: per input) channel."""
    return [Slot("weight", 0), Slot("bias", 0)] if getattr(module, "bias", None) is not None else [Slot("weight", 0)]


def filter_shape(module: nn.Module, channels: int) -> tuple[int, ...]:
    """Shape (K, in, *kernel) of new filters of a layer; (K, in) for a linear layer."""
    return (channels, input_width(module), *getattr(module, "kernel_size", ()))


def column_shape(module: nn.Module, entries: int) -> tuple[int, ...]:
    """Shape (out, entries, *kernel) of a layer's weights on new inputs; (out, entries) for a linear layer."""
    return (output_width(module), entries, *getattr(module, "kernel_size", ()))


def counting_attributes(module: nn.Module, role: str, entries: int, written: int) -> list[tuple[str, int | tuple]]:
    """Attributes that tell numbers of channels, with their values after `entries` (and `written`) more."""
    if role == "writes":
        name = "out_features" if isinstance(module, nn.Linear) else "out_channels"
        return [(name, output_width(module) + entries)]
    if role == "reads":
        name = "in_features" if isinstance(module, nn.Linear) else "in_channels"
        return [(name, input_width(module) + entries)]
    if role == "carries":
        groups = groups_of(module) + entries // (input_width(module) // groups_of(module))
        inputs, outputs = input_width(module) + entries, output_width(module) + written
        return [("in_channels", inputs), ("out_channels", outputs), ("groups", groups)]
    if isinstance(module, nn.GroupNorm):
        per_group = module.num_channels // module.num_groups
        return [
            ("num_channels", module.num_channels + entries),
            ("num_groups", module.num_groups + entries // per_group),
        ]
    if isinstance(module, nn.PReLU):
        return [("num_parameters", module.num_parameters + entries)]
    return [("num_features", int(getattr(module, "num_features", 0)) + entries)]


def transparent_values(module: nn.Module, mean: Tensor, variance: Tensor) -> dict[str, Tensor]:
    """Entries of new channels that make a norm layer the identity on values with this mean and variance."""
    if isinstance(module, nn.PReLU):
        return {"weight": module.weight.detach().mean().expand(len(mean))}
    eps = float(getattr(module, "eps", 1e-5))
    return {"weight": (variance + eps).sqrt(), "bias": mean, "running_mean": mean, "running_var": variance}


def is_norm(module: nn.Module) -> bool:
    """True for a layer with one entry per channel that is applied to each channel alike."""
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    return isinstance(module, (_BatchNorm, _InstanceNorm, nn.GroupNorm))


def norm_groups(module: nn.Module, count: int) -> list[slice]:
    """Entries that a norm layer normalises together."""
    if not isinstance(module, nn.GroupNorm):
        return []
    size = count // max(1, count * module.num_groups // module.num_channels)
    return [slice(start, start + size) for start in range(0, count, size)]


def size(module: nn.Module, side: str) -> int:
    """Length of an axis."""
    if side in ("out", "group out"):
        return output_width(module)
    if side in ("in", "group in"):
        return input_width(module)
    for name in ("num_features", "num_channels", "num_parameters"):
        if hasattr(module, name):
            return int(getattr(module, name))
    raise TypeError(type(module))


def has_side(module: Any, side: str) -> bool:
    """Whether a layer has such an axis."""
    return is_norm(module) if side == "entry" else is_weighted(module)


def described(module: Any) -> str:
    """One line."""
    return str(module)


def set_size(module: nn.Module, side: str, value: int) -> None:
    """Set the attribute that tells a layer's outputs."""
    setattr(module, "out_features" if isinstance(module, nn.Linear) else "out_channels", value)


def pretended(module: Any, x: Tensor, width: int | None) -> Tensor:
    """An output of the shape that a layer gives for any number of input channels, nothing computed.

    Args:
        module: convolution or linear layer.
        x: its input.
        width: its outputs; None: as many as it has (whole groups more where it reads whole groups more).
    """
    if isinstance(module, nn.Linear):
        return x.new_zeros(*x.shape[:-1], width or module.out_features)
    axis = channel_axis(module, x.dim())
    if width is None:
        width = output_width(module) * (x.shape[axis] if groups_of(module) > 1 else input_width(module)) // input_width(module)
    one = x.narrow(axis, 0, 1)
    weight = x.new_zeros(1, 1, *module.kernel_size)
    grid = convolve(module, one, weight, None).shape[axis + 1:]
    return x.new_zeros(*x.shape[:axis], width, *grid)
