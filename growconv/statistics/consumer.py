"""ConsumerStatistics: averages over samples of everything that concerns one consumer of a site."""

from dataclasses import dataclass, replace
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from growconv.errors import StatisticsError
from growconv.linalg import solve_psd
from growconv.statistics.held import Held


@dataclass(eq=False)
class ConsumerStatistics:
    """Averages over samples that concern one consumer of a site. A statistic that was not collected is None.

    Attributes:
        consumer: its module path.
        samples: number of samples n averaged over.
        outgoing_shape: shape of the consumer's weight, (C2, C1, *k2); (C2, features) for a linear layer.
        bias: whether the consumer has a bias, the last entry of axis d.
        moments: the averages by name; float64.
        gradient_energy: ‖v‖²/n, summed over output locations and channels.
        pending: why N is missing, if it needs a second pass over the batches.
        held: batches from which N, N_raw and P are computed when they are read; None if `moments` is complete.
        known_update: W*, where it was known before these samples were seen.
    """

    consumer: str
    samples: int
    outgoing_shape: tuple[int, ...]
    bias: bool
    moments: dict[str, Tensor]
    gradient_energy: float
    pending: str | None = None
    held: Held | None = None
    known_update: Float[Tensor, "d c"] | None = None

    @property
    def S(self) -> Float[Tensor, "a a"] | None:
        """S_aa' = (1/n) Σ_imb X_imab X_ima'b."""
        return self.moments.get("S")

    @cached_property
    def N_raw(self) -> Float[Tensor, "a b c"] | None:
        """(1/n) Σ_im X_imab v_imc: N without the projection."""
        if self.held is not None and "N_raw" not in self.moments:
            return self.held.average("N_raw")
        return self.moments.get("N_raw")

    @property
    def M(self) -> Float[Tensor, "d c"] | None:
        """(1/n) Σ Hp_imd v_imc, Hp being the patches of the consumer's own input."""
        return self.moments.get("M")

    @property
    def S2(self) -> Float[Tensor, "d d"] | None:
        """(1/n) Σ Hp_imd Hp_imd'."""
        return self.moments.get("S2")

    @cached_property
    def P(self) -> Float[Tensor, "a b d"] | None:
        """(1/n) Σ_im X_imab Hp_imd; None where it would be larger than scratch_bytes."""
        if self.held is not None and self.held.holds_projection:
            return self.held.average("P")
        return self.moments.get("P")

    @property
    def S_full(self) -> Float[Tensor, "ab ab"] | None:
        """(1/n) Σ_im X_imab X_ima'b', rows and columns ordered (a, b); None where it would exceed scratch_bytes."""
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
        best = self.best_update
        if best is not None and self.held is not None:
            return self.held.average("N_raw", best)
        raw, cross = self.N_raw, self.P
        return None if best is None or raw is None or cross is None else raw - cross @ best

    @cached_property
    def best_update(self) -> Float[Tensor, "d c"] | None:
        """W* = S2⁺ M, the best first-order update of the existing weights, with the bias in the last row."""
        if self.known_update is not None:
            return self.known_update
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

    def settled(self) -> "ConsumerStatistics":
        """The same with N_raw and P among the moments and no batches held: what can be averaged with others.

        Raises:
            StatisticsError: where P does not fit.
        """
        if self.held is None:
            return self
        if not self.held.holds_projection:
            raise StatisticsError(
                "P, which other processes need, is larger than scratch_bytes",
                where=self.consumer,
                fix="collect with hold_bytes=0 and a second pass, or with a larger scratch_bytes",
            )
        found = {name: value for name, value in (("N_raw", self.N_raw), ("P", self.P)) if value is not None}
        return replace(self, moments=self.moments | found, held=None)

    def merged(self, other: "ConsumerStatistics") -> "ConsumerStatistics":
        """Average over the samples of both."""
        if (self.held is None) != (other.held is None):
            return self.settled().merged(other.settled())
        if self.consumer != other.consumer or self.moments.keys() != other.moments.keys():
            raise StatisticsError(
                "statistics of different consumers or quantities cannot be merged",
                expected=f"{self.consumer} with {sorted(self.moments)}",
                got=f"{other.consumer} with {sorted(other.moments)}",
            )
        projected = "N" in self.moments and (self.known_update is None or self.known_update is not other.known_update)
        if self.pending or other.pending or projected:
            raise StatisticsError(
                "statistics projected in a second pass, or off different W*, cannot be merged",
                where=self.consumer,
                fix="collect once over all batches, or with a larger scratch_bytes",
            )
        total = self.samples + other.samples
        mine, theirs = self.samples / total, other.samples / total
        moments = {name: mine * value + theirs * other.moments[name] for name, value in self.moments.items()}
        energy = mine * self.gradient_energy + theirs * other.gradient_energy
        held = None if self.held is None or other.held is None else self.held.joined(other.held)
        return replace(self, samples=total, moments=moments, gradient_energy=energy, held=held)
