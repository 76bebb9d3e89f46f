"""ConsumerStatistics: averages over samples of everything that concerns one consumer of a site."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from growconv.convolution.geometry import Geometry
from growconv.convolution.unfold import pad
from growconv.errors import StatisticsError
from growconv.linalg import solve_psd

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

MatrixFree = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class ConsumerStatistics:
    """Averages over samples that concern one consumer of a site. A statistic that was not collected is None.

    Attributes:
        consumer: its module path.
        samples: number of samples n averaged over.
        outgoing_shape: shape of the consumer's weight, (C2, C1, *k2); (C2, features) for a linear layer.
        bias: whether the consumer has a bias, the last entry of axis d.
        geometry: of the consumer; None for a linear layer.
        moments: the averages by name; float64.
        gradient_energy: ‖v‖²/n, summed over output locations and channels.
        pending: why N is not there yet, where it needs a second pass over the batches.
        full_product: Θ (a, b, c) to S_full·Θ where S_full itself is too large to hold.
    """

    consumer: str
    samples: int
    outgoing_shape: tuple[int, ...]
    bias: bool
    geometry: Geometry | None
    moments: dict[str, Tensor]
    gradient_energy: float
    pending: str | None = None
    full_product: MatrixFree | None = None

    @property
    def S(self) -> Float[Tensor, "a a"] | None:
        """S_aa' = (1/n) Σ_imb X_imab X_ima'b."""
        return self.moments.get("S")

    @property
    def N_raw(self) -> Float[Tensor, "a b c"] | None:
        """(1/n) Σ_im X_imab v_imc: N without the projection."""
        return self.moments.get("N_raw")

    @property
    def M(self) -> Float[Tensor, "d c"] | None:
        """(1/n) Σ Hp_imd v_imc, Hp being the patches of the consumer's own input."""
        return self.moments.get("M")

    @property
    def S2(self) -> Float[Tensor, "d d"] | None:
        """(1/n) Σ Hp_imd Hp_imd'."""
        return self.moments.get("S2")

    @property
    def P(self) -> Float[Tensor, "a b d"] | None:
        """(1/n) Σ_im X_imab Hp_imd; None where N comes from a second pass."""
        return self.moments.get("P")

    @property
    def S_full(self) -> Float[Tensor, "ab ab"] | None:
        """(1/n) Σ_im X_imab X_ima'b', rows and columns ordered (a, b); None where it is too large, see apply_S_full."""
        return self.moments.get("S_full")

    @cached_property
    def N(self) -> Float[Tensor, "a b c"] | None:
        """N_abc = (1/n) Σ_im X_imab v⊥_imc = N_raw − P·W*.

        Raises:
            StatisticsError: where P is too large and the second pass has not been made.
        """
        if "N" in self.moments:
            return self.moments["N"]
        if self.pending:
            raise StatisticsError("N needs a second pass over the same batches", where=self.consumer, fix=self.pending)
        best, raw, cross = self.best_update, self.N_raw, self.P
        if best is None or raw is None or cross is None:
            return None
        return raw - cross @ best

    @cached_property
    def best_update(self) -> Float[Tensor, "d c"] | None:
        """W* = S2⁺ M, the best first-order update of the existing weights, with the bias in the last row."""
        if self.S2 is None or self.M is None:
            return None
        return solve_psd(self.S2, self.M)

    @property
    def update(self) -> Tensor | None:
        """W* in the shape of the consumer's weight."""
        best = self.best_update
        if best is None:
            return None
        return (best[:-1] if self.bias else best).T.reshape(self.outgoing_shape)

    @property
    def update_bias(self) -> Float[Tensor, " c"] | None:
        """W*'s change of the consumer's bias; None for a consumer without one."""
        best = self.best_update
        return best[-1] if best is not None and self.bias else None

    @cached_property
    def bottleneck_energy(self) -> float | None:
        """‖v⊥‖²/n: what no update of the existing weights can give."""
        if "N_energy" in self.moments:
            return float(self.moments["N_energy"])
        best = self.best_update
        if best is None or self.M is None or self.S2 is None:
            return None
        explained = 2 * (best * self.M).sum() - (best * (self.S2 @ best)).sum()
        return max(0.0, self.gradient_energy - float(explained))

    def apply_S_full(self, theta: Float[Tensor, "a b c"]) -> Float[Tensor, "a b c"]:
        """S_full·Θ, without the matrix where it was too large to hold.

        Args:
            theta: Θ (a, b, c), any number of columns c.

        Raises:
            StatisticsError: where S_full was not collected.
        """
        full = self.S_full
        if full is not None:
            return (full @ theta.to(full).flatten(0, 1)).view_as(theta)
        if self.full_product is None:
            raise StatisticsError(
                "S_full was not collected",
                where=self.consumer,
                fix="collect with full=True, or with 'S_full' among the quantities",
            )
        return self.full_product(theta)

    def apply_update(self, h: Tensor) -> Tensor:
        """What W* would add to the consumer's output.

        Args:
            h: input of the consumer as the module receives it.

        Raises:
            StatisticsError: where M and S2 were not collected.
        """
        weight, bias = self.update, self.update_bias
        if weight is None:
            raise StatisticsError(
                "W* was not collected", where=self.consumer, fix="collect with 'N' or 'update' among the quantities"
            )
        weight, bias = weight.to(h), None if bias is None else bias.to(h)
        if self.geometry is None:
            return F.linear(h, weight, bias)
        convolve = _CONVOLUTIONS[self.geometry.axes]
        padded = pad(h, self.geometry)
        return convolve(padded, weight, bias, self.geometry.stride, 0, self.geometry.dilation)

    def merged(self, other: "ConsumerStatistics") -> "ConsumerStatistics":
        """Average over the samples of both."""
        if self.consumer != other.consumer or self.moments.keys() != other.moments.keys():
            raise StatisticsError(
                "statistics of different consumers or quantities cannot be merged",
                expected=f"{self.consumer} with {sorted(self.moments)}",
                got=f"{other.consumer} with {sorted(other.moments)}",
            )
        if self.pending or other.pending or "N" in self.moments or self.full_product or other.full_product:
            raise StatisticsError(
                "statistics projected in a second pass, or with S_full as a product, cannot be merged",
                where=self.consumer,
                fix="collect once over all batches, or with a larger scratch_bytes",
            )
        total = self.samples + other.samples
        mine, theirs = self.samples / total, other.samples / total
        moments = {name: mine * value + theirs * other.moments[name] for name, value in self.moments.items()}
        energy = mine * self.gradient_energy + theirs * other.gradient_energy
        return replace(self, samples=total, moments=moments, gradient_energy=energy)
