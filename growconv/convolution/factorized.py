"""What CP and Tucker convolutions have in common: a conv whose kernel is stored as factors."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import index
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from growconv.convolution.decomposition import Fit
from growconv.convolution.geometry import Geometry, PerAxis
from growconv.convolution.kernels import CONVS, Conv, make_conv
from growconv.convolution.unfold import convolve
from growconv.errors import ArgumentTypeError, ArgumentValueError, GeometryError

Rank = int | float | str | tuple[int, ...] | list[int]
"""What a user may ask for: a number of terms, a share of the full kernel's parameters, or "same" for all of them."""

_ONE = {axes: Geometry.covering((1,) * axes) for axes in CONVS}


class Stage(NamedTuple):
    """One of the convolutions that a layer runs, without a bias.

    Attributes:
        weight: (outputs, inputs / groups, *taps).
        geometry: of its window.
        groups: as in `nn.Conv2d`.
    """

    weight: Tensor
    geometry: Geometry
    groups: int = 1

    def run(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve."""
        return convolve(x, self.weight, self.geometry, bias, self.groups)


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
        for what, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
                raise ArgumentValueError(f"{what} is invalid", expected="1 or more", got=repr(channels), where=name)
        if not self.axes and (isinstance(kernel_size, int) or len(kernel_size) not in CONVS):
            raise GeometryError(
                "the kernel size does not say how many axes the convolution has",
                expected="one to three entries, one per axis",
                got=kernel_size,
                where=name,
                fix=f"write (3, 3) for 3, or use {name}2d",
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.axes = self.axes or len(tuple(kernel_size))  # pyright: ignore[reportArgumentType]
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
    def _decomposed(self, kernel: Tensor, **options: Any) -> tuple[tuple[Tensor, ...], Fit]:
        """Factors for a kernel, in the order of `factors()`."""

    @abstractmethod
    def _chain(self) -> list[Stage]:
        """The small convolutions of the chosen implementation."""

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
        """Convolve (n, C1, *size), or without the sample axis, to (n, C2, *output size)."""
        *before, last = self.stages()
        for stage in before:
            x = stage.run(x)
        return last.run(x, self.bias)

    def stages(self) -> list[Stage]:
        """The convolutions that it runs, in order; the bias is added behind the last."""
        return [Stage(self.weight, self.geometry)] if self.implementation == "reconstructed" else self._chain()

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
        expected = (CONVS[cls.axes],) if cls.axes else tuple(CONVS.values())
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
        factors: Sequence[Tensor] = module.factors()
        if decompose_weights:
            options = {} if iterations is None else {"iterations": iterations}
            factors, module.fit = module._decomposed(conv.weight, where=f"{cls.__name__}.from_conv", **options)
        module._fill(factors, conv.bias)
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
        if meant is None or len(meant[0]) - 2 not in ((cls.axes,) if cls.axes else CONVS):
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
        module._fill(factors, bias)
        return module

    @torch.no_grad()
    def _fill(self, factors: Sequence[Tensor], bias: Tensor | None) -> None:
        """Copy values into the factors, and into the bias where there is one."""
        for parameter, factor in zip(self.factors(), factors, strict=True):
            parameter.copy_(factor)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

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


def one_tap(weight: Tensor, axes: int) -> Stage:
    """The convolution that mixes channels location by location; `weight` (outputs, inputs)."""
    return Stage(weight.reshape(*weight.shape, *[1] * axes), _ONE[axes])


def share_of(rank: Rank, where: str | None) -> float | None:
    """The share of parameters that a float or "same" stands for; None for integers."""
    if rank == "same":
        return 1.0
    if isinstance(rank, str) or (isinstance(rank, float) and not (math.isfinite(rank) and rank > 0)):
        raise ArgumentValueError(
            "this is no rank",
            expected="an integer, a positive share of the parameters or 'same'",
            got=repr(rank),
            where=where,
        )
    return rank if isinstance(rank, float) else None


def whole_ranks(rank: object, bounds: Sequence[int], where: str | None) -> list[int]:
    """One integer for all ranks of a kernel, or one for each, within the bounds above which no kernel needs more."""
    given = rank if isinstance(rank, tuple | list) else (rank,) * len(bounds)
    try:
        if len(given) != len(bounds) or bool in map(type, given):
            raise TypeError
        ranks = [index(each) for each in given]  # pyright: ignore[reportArgumentType]
    except TypeError:
        kind = "an integer" if len(bounds) == 1 else "an integer, or one of each of (output rank, input rank)"
        raise ArgumentTypeError(
            "this is no rank of such a kernel", expected=f"{kind}; a share; or 'same'", got=repr(rank), where=where
        ) from None
    if not all(1 <= each <= bound for each, bound in zip(ranks, bounds, strict=True)):
        expected = " and ".join(f"1 to {bound}" for bound in bounds)
        raise ArgumentValueError("the rank is out of bounds", expected=expected, got=rank, where=where)
    return ranks
