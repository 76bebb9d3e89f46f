"""ChannelGrowth: the new channels of one site, as a solver proposes them and surgery takes them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from growconv.errors import SolverError


@dataclass(frozen=True, eq=False)
class ChannelGrowth:
    """Weights of K new channels of one site, for every layer that writes, carries or reads them.

    Attributes:
        site: name of the site.
        method: name of the solver.
        incoming: per writer, the new filters (K, in, *kernel); (K, in) for a linear layer.
        incoming_bias: per writer that has a bias, the new entries (K,).
        outgoing: per reader, the weights on the new channels (out, K·ratio, *kernel); (out, K·ratio) for a linear
            layer.
        gains: (K,) captured energy of each channel, descending, in the unit of ‖v‖²/n (σ_k² for `tiny`); zeros
            where a method has no notion of it.
        requested: number of channels asked for.
        reason: why the number of channels differs from the one asked for; None where it does not.
        norms: per norm layer in between, mean and variance (K,) of the new channels' own values before the norm, for a
            transparent insertion. A norm layer that is missing here is given mean 0 and variance 1.
        norm_scale: (K,) factor on the weight and bias that norm layers in between get for the new channels; None: 1. It
            brings them to the size at which the old channels come out, the outgoing weights being divided by it.
        carried: per depthwise or grouped layer in between, the new kernels (K, in/groups, *kernel), the same
            ones each time where the channels come several times. Missing: the identity tap.
        revised: path of a parameter or buffer to a replacement for its old entries (its shape before growth), for
            methods that change existing weights.
        copied_from: (K,) index of the old channel that each new one copies, for methods that duplicate channels: every
            norm layer and depthwise layer in between then gives the new channel the entries (weight, bias, running
            statistics, kernel) of that old channel, in place of `norms` and `carried`. None: the new channels are no
            copies.
        expected_decrease: first-order decrease of the mean loss at amplitude 1; None where it was not computed.
        spectrum: gains of more candidates than were taken, best first, the channels' own in front; None: only `gains`.
    """

    site: str
    method: str
    incoming: dict[str, Tensor]
    outgoing: dict[str, Tensor]
    gains: Tensor
    incoming_bias: dict[str, Tensor] = field(default_factory=dict)
    requested: int = 0
    reason: str | None = None
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    norm_scale: Tensor | None = None
    carried: dict[str, Tensor] = field(default_factory=dict)
    revised: dict[str, Tensor] = field(default_factory=dict)
    copied_from: Tensor | None = None
    expected_decrease: float | None = None
    spectrum: Tensor | None = None

    @property
    def channels(self) -> int:
        """Number of new channels K."""
        return next(iter(self.incoming.values())).shape[0]

    @property
    def alpha(self) -> Tensor:
        """New filters (K, C0, kh1, kw1) of the only writer."""
        return self._only(self.incoming, "writer")

    @property
    def alpha_bias(self) -> Tensor | None:
        """New bias entries (K,) of the only writer, or None where it has no bias."""
        self._only(self.incoming, "writer")
        return next(iter(self.incoming_bias.values()), None)

    @property
    def omega(self) -> Tensor:
        """Weights (C2, K, kh2, kw2) of the only reader on the new channels."""
        return self._only(self.outgoing, "reader")

    def _only(self, weights: dict[str, Tensor], role: str) -> Tensor:
        if len(weights) != 1:
            raise SolverError(
                f"this growth has {len(weights)} {role}s, so there is no single weight",
                where=self.site,
                got=", ".join(weights),
                fix="read growth.incoming and growth.outgoing by module path",
            )
        return next(iter(weights.values()))

    def subset(self, channels: Sequence[int], reason: str | None = None) -> "ChannelGrowth":
        """The same proposal with only some of its channels, in the order given.

        Args:
            channels: indices into this proposal's channels; one or more.
            reason: why it was cut; None keeps the reason there is.

        Returns:
            A new proposal; `expected_decrease` is dropped, since it belonged to the whole.
        """
        index = list(channels)
        if not index or min(index) < 0 or max(index) >= self.channels:
            raise SolverError(
                "a subset needs channels of this proposal",
                expected=f"indices from 0 to {self.channels - 1}",
                got=index,
                where=self.site,
            )

        def pick_outgoing(weight: Tensor) -> Tensor:
            ratio = weight.shape[1] // self.channels
            blocks = weight.unflatten(1, (self.channels, ratio))
            return blocks[:, index].flatten(1, 2)

        return replace(
            self,
            incoming={path: weight[index] for path, weight in self.incoming.items()},
            incoming_bias={path: bias[index] for path, bias in self.incoming_bias.items()},
            outgoing={path: pick_outgoing(weight) for path, weight in self.outgoing.items()},
            gains=self.gains[index],
            norms={path: (mean[index], variance[index]) for path, (mean, variance) in self.norms.items()},
            norm_scale=None if self.norm_scale is None else self.norm_scale[index],
            carried={path: kernel[index] for path, kernel in self.carried.items()},
            copied_from=None if self.copied_from is None else self.copied_from[index],
            reason=reason or self.reason,
            expected_decrease=None,
        )

    def __str__(self) -> str:
        """One line: site, method, how many channels and why, the leading gains."""
        gains = ", ".join(f"{gain:.3g}" for gain in self.gains[:4].tolist())
        more = ", ..." if self.channels > 4 else ""
        note = f"; {self.reason}" if self.reason else ""
        return f"{self.site}: {self.channels} channels by {self.method}, gains {gains}{more}{note}"
