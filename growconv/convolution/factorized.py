"""What CP and Tucker convolutions have in common: a conv whose kernel is stored as factors."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from growconv.convolution.decomposition import Fit
from growconv.convolution.geometry import Geometry, PerAxis
from growconv.convolution.kernels import Conv, make_conv
from growconv.convolution.ranks import Rank
from growconv.errors import ArgumentTypeError, ArgumentValueError, GeometryError

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FORWARD = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class FactorizedConv(nn.Module, ABC):
    """A convolution whose kernel is a low-rank tensor, stored as its factors.

    `CPConv2d` and its like are each of one order; `CPConv` and `TuckerConv` take theirs from the entries of
    `kernel_size`. The factors are `nn.Parameter`s made once; an implementation only says how they meet the input, so
    that state dicts load across implementations. Stride, padding, padding mode, dilation and bias mean what they mean
    to `nn.Conv2d`.

    Args:
        in_channels: C1.
        out_channels: C2.
        kernel_size: one number, or one per axis; one per axis in a class of any order.
        stride: step per output location.
        padding: zeros (or what `padding_mode` says) on both sides of every axis, "same" or "valid".
        dilation: step between taps.
        groups: 1; a factorized kernel mixes all channels.
        bias: whether a bias (C2,) is added.
        padding_mode: as in `nn.Conv2d`.
        rank: see `cp_rank` and `tucker_ranks`; "same" keeps the number of parameters.
        implementation: "factorized" runs a chain of small convs, "reconstructed" builds the full kernel on every call
            (best where the rank is high); all give the same output.
        device: where the factors live.
        dtype: of the factors.
    """

    axes: int = 0  # in a class of any order
    implementations: ClassVar[tuple[str, ...]] = ("factorized", "reconstructed")
    expected_factors: ClassVar[str]
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: PerAxis,
        stride: PerAxis = 1,
        padding: PerAxis | str = 0,
        dilation: PerAxis = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        rank: Rank = "same",
        implementation: str = "factorized",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if groups != 1:
            raise ArgumentValueError(
                "a factorized kernel mixes all channels", expected="groups=1", got=f"groups={groups}", where=name
            )
        self.in_channels = _positive(in_channels, "in_channels", name)
        self.out_channels = _positive(out_channels, "out_channels", name)
        self.axes = type(self).axes or _order(kernel_size, name)
        self.geometry = Geometry.read(kernel_size, stride, padding, dilation, padding_mode, axes=self.axes, where=name)
        self.kernel_size = self.geometry.kernel_size
        self.stride = self.geometry.stride
        self.dilation = self.geometry.dilation
        self.padding = padding if isinstance(padding, str) else tuple(low for low, _ in self.geometry.padding)
        self.padding_mode = padding_mode
        self.groups = 1
        self.fit: Fit | None = None
        self.implementation = implementation
        self._make_factors(rank, {"device": device, "dtype": dtype})
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @abstractmethod
    def _make_factors(self, rank: Rank, factory: dict[str, Any]) -> None:
        """Register empty factors of the right shapes."""

    @classmethod
    @abstractmethod
    def _meant_by(cls, factors: Sequence[Tensor]) -> tuple[tuple[int, ...], Rank] | None:
        """Shape (C2, C1, *kernel_size) and rank of these factors' kernel; None where they do not fit together."""

    @abstractmethod
    def _load_kernel(self, kernel: Tensor, **options: Any) -> Fit:
        """Set the factors to a decomposition of a kernel."""

    @abstractmethod
    def _chain(self, x: Tensor) -> Tensor:
        """The output by the chosen chain of small convs."""

    def reset_parameters(self) -> None:
        """Draw random factors whose kernel has the variance of an `nn.Conv2d`'s own start, 1 / (3·C1·taps)."""
        factors, fan_in = self.factors(), self.in_channels * math.prod(self.kernel_size)
        terms = self.rank if isinstance(self.rank, int) else math.prod(self.rank)
        deviation = (1 / (3 * fan_in * terms)) ** (0.5 / len(factors))
        for factor in factors:
            nn.init.normal_(factor, std=deviation)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(fan_in**-0.5), fan_in**-0.5)

    @property
    @abstractmethod
    def rank(self) -> int | tuple[int, int]:
        """Rank of the factors as they are now."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """Full kernel (C2, C1, *kernel_size), differentiable in every factor."""

    @property
    def implementation(self) -> str:
        """How the factors meet the input; may be changed at any time."""
        return self._implementation

    @implementation.setter
    def implementation(self, value: str) -> None:
        if value not in self.implementations:
            raise ArgumentValueError(
                "there is no such implementation",
                expected=" or ".join(self.implementations),
                got=repr(value),
                where=type(self).__name__,
            )
        self._implementation = value

    def forward(self, x: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: (n, C1, *size), or without the sample axis.

        Returns:
            (n, C2, *output size).
        """
        if self.implementation == "reconstructed":
            return self.convolve(x, self.weight, self.bias)
        return self._chain(x)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Module,
        rank: Rank = "same",
        implementation: str = "factorized",
        *,
        iterations: int | None = None,
        decompose_weights: bool = True,
    ) -> "FactorizedConv":
        """A factorized stand-in for a convolution, by decomposing its kernel.

        Args:
            conv: `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` as fits the class, with groups=1.
            rank: see the class.
            implementation: see the class.
            iterations: most sweeps of the decomposition; None takes its default.
            decompose_weights: False keeps the random factors of a new layer in place of a decomposition.

        Returns:
            A module on the conv's device with its dtype, geometry, bias and mode. `module.fit` holds the relative error
            of the kernel, the sweeps, and whether they converged; None where nothing was decomposed. A
            `ConvergenceWarning` says when the decomposition was still improving.
        """
        expected = (_CONVS[cls.axes],) if cls.axes else tuple(_CONVS.values())
        if not isinstance(conv, Conv) or not isinstance(conv, expected):
            raise ArgumentTypeError(
                "this class cannot replace this layer",
                expected=" or ".join(f"nn.{each.__name__}" for each in expected),
                got=type(conv).__name__,
                where=f"{cls.__name__}.from_conv",
            )
        module = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            rank=rank,
            implementation=implementation,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        with torch.no_grad():
            if decompose_weights:
                options = {} if iterations is None else {"iterations": iterations}
                module.fit = module._load_kernel(conv.weight, where=f"{cls.__name__}.from_conv", **options)
            if module.bias is not None and conv.bias is not None:
                module.bias.copy_(conv.bias)
        for parameter in module.factors():
            parameter.requires_grad_(conv.weight.requires_grad)
        if module.bias is not None and conv.bias is not None:
            module.bias.requires_grad_(conv.bias.requires_grad)
        return module.train(conv.training)

    @classmethod
    def from_factors(cls, factors: Sequence[Tensor], bias: Tensor | None = None, **options: Any) -> "FactorizedConv":
        """A layer with given factors.

        Args:
            factors: in the order of `factors()`. CP: (C2, R), (C1, R), then (taps, R) per axis of the kernel. Tucker:
                the core (r2, r1, *kernel_size), (C2, r2), (C1, r1). They are copied.
            bias: (C2,); None for a layer without one.
            **options: stride, padding, dilation, padding_mode and implementation, see the class.

        Returns:
            A module on the factors' device, with their dtype.

        Raises:
            ArgumentValueError: factors that do not fit together or are not of this class, or a bias of another size.
        """
        where = f"{cls.__name__}.from_factors"
        alike = len({(each.dtype, each.device) for each in factors}) == 1 and factors[0].is_floating_point()
        meant = cls._meant_by(factors) if alike else None
        if meant is None or len(meant[0]) - 2 not in ((cls.axes,) if cls.axes else _CONVS):
            raise ArgumentValueError(
                "these factors do not form a kernel of this class",
                expected=f"{cls.expected_factors}, of one dtype on one device",
                got=", ".join(f"{tuple(each.shape)} {each.dtype} on {each.device}" for each in factors) or "none",
                where=where,
            )
        (outputs, inputs, *kernel_size), rank = meant
        if bias is not None and bias.shape != (outputs,):
            raise ArgumentValueError("the bias does not fit", expected=(outputs,), got=tuple(bias.shape), where=where)
        options |= {"rank": rank, "device": factors[0].device, "dtype": factors[0].dtype, "bias": bias is not None}
        module = cls(inputs, outputs, tuple(kernel_size), **options)
        with torch.no_grad():
            for parameter, factor in zip(module.factors(), factors, strict=True):
                parameter.copy_(factor)
            if module.bias is not None and bias is not None:
                module.bias.copy_(bias)
        return module

    def to_conv(self) -> Conv:
        """The ordinary convolution with the reconstructed kernel; its parameters are copies."""
        bias = None if self.bias is None else self.bias.detach()
        conv = make_conv(self.weight, bias, self.stride, self.padding, self.dilation, padding_mode=self.padding_mode)
        return conv.train(self.training)

    def factors(self) -> tuple[nn.Parameter, ...]:
        """Every parameter of the kernel, without the bias."""
        return tuple(parameter for name, parameter in self.named_parameters() if name != "bias")

    def extra_repr(self) -> str:
        """The arguments that shaped this module."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        defaults = {"padding": (0,) * self.axes, "dilation": (1,) * self.axes, "padding_mode": "zeros"}
        parts += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        parts += [] if self.bias is not None else ["bias=False"]
        return ", ".join([*parts, f"rank={self.rank}, implementation={self.implementation!r}"])

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """A conv over the module's own geometry; `weight` may be any kernel with this module's taps."""
        x, padding = self._padded(x, range(self.axes))
        return _FORWARD[self.axes](x, weight, bias, self.stride, padding, self.dilation, groups)

    def _convolve_axis(self, x: Tensor, axis: int, weight: Tensor) -> Tensor:
        """A depthwise conv along one axis; `weight` (channels, taps of that axis)."""
        x, padding = self._padded(x, (axis,))
        shape, stride, dilation = [1] * self.axes, [1] * self.axes, [1] * self.axes
        shape[axis], stride[axis], dilation[axis] = weight.shape[1], self.stride[axis], self.dilation[axis]
        kernel = weight.reshape(weight.shape[0], 1, *shape)
        return _FORWARD[self.axes](x, kernel, None, stride, padding, dilation, weight.shape[0])

    def _mix(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A conv of one tap; `weight` (outputs, inputs)."""
        return _FORWARD[self.axes](x, weight.reshape(*weight.shape, *[1] * self.axes), bias)

    def _padded(self, x: Tensor, along: range | tuple[int, ...]) -> tuple[Tensor, list[int]]:
        """The input with what a conv cannot pad itself, and the padding left for the conv."""
        sides = [self.geometry.padding[axis] if axis in along else (0, 0) for axis in range(self.axes)]
        if self.padding_mode == "zeros" and all(low == high for low, high in sides):
            return x, [low for low, _ in sides]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        amounts = [amount for pair in reversed(sides) for amount in pair]
        return functional.pad(x, amounts, mode), [0] * self.axes


def _order(kernel_size: PerAxis, where: str) -> int:
    if isinstance(kernel_size, int) or len(kernel_size) not in _CONVS:
        raise GeometryError(
            "the kernel size does not say how many axes the convolution has",
            expected="one to three entries, one per axis",
            got=kernel_size,
            where=where,
            fix=f"write (3, 3) for 3, or use {where}2d",
        )
    return len(kernel_size)


def _positive(value: object, what: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{what} is not an integer", got=repr(value), where=where)
    if value < 1:
        raise ArgumentValueError(f"{what} is invalid", expected="1 or more", got=value, where=where)
    return value
