"""CP and Tucker convolutions: they grow in rank (`network.rank`), not in channels."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from growconv.convolution.factorized import FactorizedConv
from growconv.network.layers.base import Part, Slot
from growconv.network.layers.weighted import Weighted
from growconv.network.layout import Place


class Factorized(Weighted):
    """A convolution whose kernel is stored as factors."""

    names = ("out_channels", "in_channels")

    @staticmethod
    def serves(module: nn.Module) -> bool:
        """Whether it is a CP or Tucker convolution."""
        return isinstance(module, FactorizedConv)

    def filters(self) -> Tensor:
        """The full kernel, differentiable in every factor."""
        return self.module.weight  # pyright: ignore[reportReturnType]

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int | None = None) -> Tensor:
        """Convolve with a full kernel."""
        return self.module.convolve(x, weight, bias, 1 if groups is None else groups)  # pyright: ignore[reportCallIssue]

    def slots(self, side: str) -> list[Slot]:
        """None: its channels stay as they are."""
        return []

    def insertions(self, side: str, places: Sequence[Place], values: Mapping[str, Tensor]) -> list[Part]:
        """None: its channels stay as they are."""
        return []

    def problem(self) -> str:
        """Why it gets no channels."""
        return "its kernel is stored as factors, which grow in rank (growconv.find_rank_sites) and not in channels"
