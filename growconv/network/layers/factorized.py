"""CP and Tucker convolutions: they grow in rank (`network.rank`), not in channels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from growconv.convolution.cost import multiplications_per_output
from growconv.convolution.cp import CPConv
from growconv.convolution.factorized import FactorizedConv
from growconv.convolution.tucker import TuckerConv
from growconv.network.layers.base import Part, Slot
from growconv.network.layers.weighted import Weighted
from growconv.network.layout import IN, OUT, Place


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
            shape, carriers = (
                (outputs, inputs, *self.kernel_size),
                [f"axis_factor_{axis}" for axis in range(self.module.axes)],
            )
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
        return self.module.convolve(x, weight, bias, groups or 1)  # pyright: ignore[reportCallIssue]

    def multiplications(self) -> float:
        """Those of the convolutions that it runs; what builds a kernel from factors is left out."""
        return multiplications_per_output(self.module)  # pyright: ignore[reportArgumentType]

    def slots(self, side: str) -> list[Slot]:
        """None: its channels stay as they are."""
        return []

    def insertions(self, side: str, places: Sequence[Place], values: Mapping[str, Tensor]) -> list[Part]:
        """None: its channels stay as they are."""
        return []

    def problem(self) -> str:
        """Why it gets no channels."""
        return "its kernel is stored as factors, which grow in rank (growconv.find_rank_sites) and not in channels"
