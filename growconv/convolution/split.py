"""One kernel as two smaller ones in a row: the best rank-K split, by bilinear least squares.

Most kernels are no product of two smaller ones. A 5×5 kernel has 25·C0·C2 free numbers; two 3×3 kernels with K hidden
channels have 9·K·(C0 + C2), less K² for a change of hidden basis. With one channel everywhere, the composite of two
kernels is a product of two polynomials, and most polynomials in two variables have no factors. Enough hidden channels
always suffice: with C0·taps1 of them the first kernel can pass on every entry of its patch, with C2·taps2 the second
one can place every entry of its output.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.convolution.geometry import PerAxis, per_axis
from growconv.convolution.kernels import compose_kernels, pair_steps
from growconv.errors import ArgumentValueError, GeometryError
from growconv.linalg import bilinear_least_squares, conjugate_gradients

Pair = tuple[Tensor, Tensor]


class SplitKernel(NamedTuple):
    """Two kernels whose composite stands for one.

    Attributes:
        first: (K, C0, *first size).
        second: (C2, K, *second size).
        residual: ‖kernel − composite‖ / ‖kernel‖ (0 for a kernel of zeros).
    """

    first: Tensor
    second: Tensor
    residual: float


def split_kernel(
    kernel: Float[Tensor, "outputs inputs *taps"],
    hidden: int,
    first_size: PerAxis,
    *,
    first_stride: PerAxis = 1,
    first_dilation: PerAxis = 1,
    second_dilation: PerAxis = 1,
) -> SplitKernel:
    """Best approximation of a kernel by the composite of two kernels with K hidden channels.

    Minimises ‖kernel − compose_kernels(first, second)‖² over both by `bilinear_least_squares`: Θ_abc with a = (input
    channel, tap of the first), b = tap of the second, c = output channel has rank K, and the composite is linear in Θ.
    Where the residual comes near zero, Gauss–Newton steps take it to rounding error.

    Args:
        kernel: (C2, C0, *kernel_size) on one to three axes, taps of dilation 1.
        hidden: number K of hidden channels, at most min(C0·taps of the first, C2·taps of the second), which split any
            kernel exactly.
        first_size: kernel size of the first; that of the second follows from `composite_size`.
        first_stride: stride of the first convolution.
        first_dilation: dilation of the first.
        second_dilation: dilation of the second.

    Returns:
        Both kernels, in the kernel's dtype, with the same norm on both sides of every hidden channel; and the residual.

    Raises:
        GeometryError: no second kernel gives the kernel's size.
        ArgumentValueError: for an invalid number of hidden channels, or values that are not finite.

    Example:
        >>> kernel = growconv.compose_kernels(torch.randn(2, 3, 3, 3), torch.randn(4, 2, 3, 3))
        >>> growconv.split_kernel(kernel, 2, 3).residual < 1e-5
        True
    """
    where = "split_kernel"
    axes = kernel.dim() - 2
    size = tuple(kernel.shape[2:])
    taps1 = per_axis(first_size, axes, "first_size", 1, where)
    inner, reach = pair_steps(axes, first_stride, first_dilation, second_dilation, where)
    rest = [full - (d * (k - 1) + 1) for full, k, d in zip(size, taps1, inner, strict=True)]
    if any(left < 0 or left % step for left, step in zip(rest, reach, strict=True)):
        raise GeometryError(
            "no second kernel completes this kernel size",
            expected=f"kernel size = first effective size + a multiple of {reach}",
            got=f"kernel {size}, first {taps1} with dilation {inner}",
            where=where,
        )
    taps2 = tuple(left // step + 1 for left, step in zip(rest, reach, strict=True))
    if not bool(torch.isfinite(kernel).all()):
        raise ArgumentValueError("the kernel has values that are not finite", where=where)
    work = kernel.detach().double()
    composition = _Composition(size, taps1, taps2, inner, reach, work.shape[1], work.device)
    shapes = ((hidden, work.shape[1], *taps1), (work.shape[0], hidden, *taps2))
    target = _Target(work, partial(compose_kernels, first_dilation=inner, second_dilation=reach))
    pairs: list[Pair] = []
    for first, second in _candidates(work, hidden, composition):
        pairs.append(target.polished((first.reshape(shapes[0]), second.reshape(shapes[1]))))
        if target.residual(pairs[-1]) < 1e-9:
            break
    first, second = (part.to(kernel.dtype) for part in _balanced(min(pairs, key=target.residual)))
    return SplitKernel(first, second, target.residual((first.double(), second.double())))


def _candidates(kernel: Tensor, hidden: int, composition: "_Composition") -> Iterator[Pair]:
    """First (K, C0·taps1) and second (C2, K·taps2) kernels as matrices; more of them until one splits exactly."""
    outputs = kernel.shape[0]
    taps1, taps2 = composition.position.shape
    sides = (kernel.shape[1] * taps1, outputs * taps2)
    if isinstance(hidden, bool) or not isinstance(hidden, int) or not 1 <= hidden <= min(sides):
        raise ArgumentValueError(
            "this number of hidden channels is invalid",
            expected=f"1 to {min(sides)}, which splits any such kernel exactly",
            got=hidden,
            where="split_kernel",
        )
    target = kernel.flatten(2)[:, :, composition.position]  # (C2, C0, taps1, taps2)
    shared = target / composition.multiplicity[composition.position]
    eye = torch.eye(hidden, dtype=kernel.dtype, device=kernel.device)
    if hidden == sides[0]:  # the first kernel hands on its patch
        yield eye, shared.reshape(outputs, -1)
        return
    if hidden == sides[1]:  # the second kernel places its output
        second = eye.reshape(hidden, outputs, taps2).transpose(0, 1).reshape(outputs, -1)
        yield shared.permute(0, 3, 1, 2).reshape(hidden, -1), second
        return
    stacked = target.permute(1, 2, 3, 0).flatten(0, 1)  # (a, b, c)
    starts = _low_rank_start(kernel, hidden, composition)
    for count, rounds in ((0, 10), (4, 60)) if starts else ((4, 60),):
        fit = bilinear_least_squares(
            [(composition, stacked)], hidden, starts=starts, random_starts=count, rounds=rounds, tolerance=1e-7
        )
        missing = hidden - fit.left.shape[0]  # fewer terms came back: the kernel is zero
        left = torch.nn.functional.pad(fit.left, (0, 0, 0, missing))
        right = torch.nn.functional.pad(fit.rights[0], (0, 0, 0, 0, 0, missing))
        yield left, right.permute(2, 0, 1).flatten(1)


def _low_rank_start(kernel: Tensor, hidden: int, composition: "_Composition", sweeps: int = 60) -> list[Tensor]:
    """First kernels (K, C0·taps1) read off the Θ of lowest rank among all whose composite is the kernel.

    Lowest rank in the sense of log det(ΘΘᵀ + ε), by reweighted least squares with ε falling to the K+1st singular value
    (Mohan & Fazel 2012). From it the bilinear fit finds composites that random starts miss half of the time. Kernels
    whose linear system would be large go without.
    """
    inputs, length = composition.inputs, composition.length
    if inputs * length > 1024:
        return []
    outputs = kernel.shape[0]
    position = composition.position
    taps1, taps2 = position.shape
    if hidden >= min(inputs * taps1, taps2 * outputs):
        return []
    right = kernel.flatten(2).permute(1, 2, 0).reshape(inputs * length, outputs)
    shared = kernel.flatten(2)[:, :, position] / composition.multiplicity[position]
    theta = shared.permute(1, 2, 3, 0).reshape(inputs * taps1, taps2 * outputs)
    eye = torch.eye(inputs * taps1, dtype=kernel.dtype, device=kernel.device)
    epsilon = float("inf")
    vectors = eye[:hidden]
    for _ in range(sweeps):
        values, directions = torch.linalg.eigh(theta @ theta.T)
        if float(values[-1]) <= 0:
            break
        vectors = directions.flip(1)[:, :hidden].T.contiguous()
        epsilon = max(min(0.9 * epsilon, float(values.flip(0)[hidden])), 1e-10 * float(values[-1]))
        weights = (theta @ theta.T + epsilon * eye).view(inputs, taps1, inputs, taps1)
        system = kernel.new_zeros(inputs, length, inputs, length)
        for tap in range(taps2):
            at = position[:, tap]
            system[:, at[:, None], :, at[None, :]] += weights.permute(1, 3, 0, 2)
        matrix = system.reshape(inputs * length, -1)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed):
            break
        multipliers = torch.cholesky_solve(right, factor).view(inputs, length, outputs)
        theta = weights.reshape(eye.shape) @ multipliers[:, position].reshape(inputs * taps1, taps2 * outputs)
    return [vectors]


class _Composition:
    """The quadratic form ‖composite of Θ‖², in the shape that `bilinear_least_squares` asks for.

    It couples taps only, not input channels: with the first kernels shifted by every tap of the second, the form is one
    matrix product, and no matrix of size (a·b)² is needed.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        taps1: tuple[int, ...],
        taps2: tuple[int, ...],
        inner: tuple[int, ...],
        reach: tuple[int, ...],
        inputs: int,
        device: torch.device,
    ) -> None:
        def place(taps: tuple[int, ...], steps: tuple[int, ...]) -> Tensor:
            """Where in the composite kernel, row-major, each tap lies."""
            found = torch.zeros(1, dtype=torch.long, device=device)
            for count, step, length in zip(taps, steps, size, strict=True):
                found = (found[:, None] * length + step * torch.arange(count, device=device)).flatten()
            return found

        self.position = place(taps1, inner)[:, None] + place(taps2, reach)  # of pairs of taps, (taps1, taps2)
        self.length = math.prod(size)
        self.multiplicity = torch.bincount(self.position.flatten(), minlength=self.length).double()
        self.inputs = inputs

    def reduced(self) -> Tensor:
        """Equal taps of the second kernel never meet in one composite tap: taps2 times the identity."""
        taps1, taps2 = self.position.shape
        return taps2 * torch.eye(self.inputs * taps1, dtype=torch.float64, device=self.position.device)

    def gram(self, left: Tensor) -> Tensor:
        """Inner products of the shifted first kernels."""
        shifted = self._shift(left).flatten(2).flatten(0, 1)
        return shifted @ shifted.mT

    def pull(self, left: Tensor, coupling: Tensor) -> Tensor:
        """The coupled shifted kernels, shifted back."""
        shifted = self._shift(left)
        mixed = (coupling.mT @ shifted.flatten(2).flatten(0, 1)).view_as(shifted)  # (k, taps2, C0, composite taps)
        index = self.position.T[None, :, None, :].expand(*mixed.shape[:3], -1)
        return mixed.gather(3, index).sum(1).flatten(1)

    def _shift(self, left: Tensor) -> Tensor:
        """(k, C0·taps1) to (k, taps2, C0, composite taps): each first kernel where each tap of the second puts it."""
        taps1, taps2 = self.position.shape
        kernels = left.view(-1, 1, self.inputs, taps1).expand(-1, taps2, -1, -1)
        index = self.position.T[None, :, None, :].expand(kernels.shape)
        return left.new_zeros(*kernels.shape[:3], self.length).scatter(3, index, kernels)


@dataclass
class _Target:
    """The kernel that two kernels should compose to, in double precision."""

    kernel: Tensor
    compose: Callable[[Tensor, Tensor], Tensor]

    def residual(self, pair: Pair) -> float:
        """Relative distance of the composite."""
        norm = float(self.kernel.norm())
        return float((self.kernel - self.compose(*pair)).norm()) / norm if norm else 0.0

    def polished(self, pair: Pair) -> Pair:
        """Damped Gauss–Newton by conjugate gradients, as long as it helps."""
        damping, best = 1e-6, self.residual(pair)
        for _ in range(20 if best > 0 else 0):
            pair = _balanced(pair)
            first, second = pair
            step1, step2 = self._step(pair, damping * float(first.square().mean()))
            moved = first + step1, second + step2
            value = self.residual(moved)
            if value >= best:
                damping *= 100
                if damping > 1e3:
                    break
                continue
            pair, damping, best, previous = moved, damping * min(0.1, value / best), value, best
            if best < 1e-14 or best > 0.999 * previous:
                break
        return pair

    def _step(self, pair: Pair, damping: float) -> Pair:
        first, second = pair
        composed, transposed = torch.func.vjp(self.compose, first, second)[:2]

        def flat(parts: Pair) -> Tensor:
            return torch.cat([part.flatten() for part in parts])

        def pair_of(vector: Tensor) -> Pair:
            return vector[: first.numel()].view_as(first), vector[first.numel() :].view_as(second)

        def normal(vector: Tensor) -> Tensor:
            one, two = pair_of(vector)
            return flat(transposed(self.compose(one, second) + self.compose(first, two))) + damping * vector

        return pair_of(conjugate_gradients(normal, flat(transposed(self.kernel - composed)), 300, 1e-10))


def _balanced(pair: Pair) -> Pair:
    """The same composite, with equal norms on both sides of every hidden channel."""
    first, second = pair
    one, two = first.flatten(1).norm(dim=1), second.transpose(0, 1).flatten(1).norm(dim=1)
    ratio = torch.where((one > 0) & (two > 0), two / one.clamp_min(torch.finfo(one.dtype).tiny), 1.0).sqrt()
    shape = [1] * (first.dim() - 2)
    return first * ratio.view(-1, 1, *shape), second / ratio.view(1, -1, *shape)
