"""ChannelGrowth: the new channels of one site, as a solver proposes them and surgery takes them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from growconv.errors import SolverError


@dataclass(frozen=True, eq=False)
class ChannelGrowth:
    """Weights of K new channels of one site, for every layer that produces, carries or consumes them.

    Most axes have one entry per channel; a flattened (K, H, W) map has H·W, the values and gates in front of a GLU 2.
    Several entries come channel by channel: all entries of the first new channel, then those of the
    second (`GrowthSite.ratio` says how many). Filters are (out, in/groups, *kernel) for every kind of layer, without
    kernel axes for a linear one.

    Attributes:
        site: name of the site.
        method: name of the solver.
        incoming: per producer, the new filters (entries, in/groups, *kernel).
        incoming_bias: per producer that has a bias, its new entries (entries,).
        outgoing: per consumer, the weights on the new channels (out, entries, *kernel); (out, entries/groups, *kernel)
            for one with groups, where every group of outputs has the columns of its own inputs, unit by unit.
        gains: (K,) captured energy of each channel, descending, in the unit of ‖v‖²/n (σ_k² for `tiny`); zeros
            where a method has no notion of it.
        requested: number of channels requested.
        reason: why the number of channels differs from the number requested; None if it does not.
        norms: per norm layer in between, mean and variance of the new channels' own values before the norm, (entries,)
            or (K,), for a transparent insertion. A norm layer that is missing here is given mean 0 and variance 1.
        norm_scale: (K,) factor on the weight and bias that norm layers in between get for the new channels; None: 1. It
            brings them to the size at which the old channels come out, the outgoing weights being divided by it.
        carried: per depthwise or grouped layer in between, the filters of the new groups (entries, in/groups, *kernel).
            Missing: the identity tap.
        entries: per bare parameter or buffer its new entries, with the channel axis in front (entries, *others).
            Missing: the mean of the old ones, which is right for a factor and for a summand.
        revised: path of a parameter or buffer to a replacement for its old entries (its shape when this was solved),
            for methods that change existing weights.
        copied_from: (K,) index of the old channel that each new one copies, for methods that duplicate channels: every
            norm layer, grouped layer and bare parameter in between then gives the new channel the entries (weight,
            bias, running statistics, kernel) of that old channel. −1: this one is no copy; None: none of them is.
        expected_decrease: first-order decrease of the mean loss at amplitude 1; None if it was not computed.
        spectrum: gains of more candidates than were used, best first, starting with the channels' own; None: only
            `gains`.
        measured: further numbers that policies read, by name: `score`, SENN's expansion score of the old weights;
            `rank`, the share of directions that the old channels' responses use.
        units: `GrowthSite.units` when this was solved: the widths that the other axes of the weights belong to. Where
            neighbours have grown since, surgery fills their new channels with zeros. Empty: read off the shapes where
            they leave no doubt.

    Example:
        >>> growth = growconv.solve(sites[0], "random", channels=3, model=model)
        >>> growth.alpha.shape, growth.omega.shape
        (torch.Size([3, 1, 3, 3]), torch.Size([6, 3, 3, 3]))
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
    entries: dict[str, Tensor] = field(default_factory=dict)
    revised: dict[str, Tensor] = field(default_factory=dict)
    copied_from: Tensor | None = None
    expected_decrease: float | None = None
    spectrum: Tensor | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    units: Mapping[int, int] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """Number of new channels K."""
        return len(self.gains)

    @property
    def alpha(self) -> Tensor:
        """New filters (K, C0, kh1, kw1) of the only producer."""
        return self._only(self.incoming, "producer")

    @property
    def alpha_bias(self) -> Tensor | None:
        """New bias entries (K,) of the only producer, or None where it has no bias."""
        self._only(self.incoming, "producer")
        return next(iter(self.incoming_bias.values()), None)

    @property
    def omega(self) -> Tensor:
        """Weights (C2, K, kh2, kw2) of the only consumer on the new channels."""
        return self._only(self.outgoing, "consumer")

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

        def pick(value: Tensor, axis: int = 0) -> Tensor:
            """The entries of these channels along an axis that has all of them, channel by channel or unit by unit."""
            blocks = math.gcd(value.shape[axis], self.channels)
            size = self.channels // blocks  # channels that share entries: those of one unit
            picked = [channel // size for channel in index[::size]]
            if [block * size + offset for block in picked for offset in range(size)] != index:
                raise SolverError(
                    "channels of this site come in whole groups",
                    expected=f"runs of {size} channels that start at a multiple of {size}",
                    got=index,
                    where=self.site,
                )
            chosen = torch.tensor(picked, device=value.device)
            return value.unflatten(axis, (blocks, -1)).index_select(axis, chosen).flatten(axis, axis + 1)

        return replace(
            self,
            incoming={path: pick(weight) for path, weight in self.incoming.items()},
            incoming_bias={path: pick(bias) for path, bias in self.incoming_bias.items()},
            outgoing={path: pick(weight, 1) for path, weight in self.outgoing.items()},
            gains=pick(self.gains),
            norms={path: (pick(mean), pick(variance)) for path, (mean, variance) in self.norms.items()},
            norm_scale=None if self.norm_scale is None else pick(self.norm_scale),
            carried={path: pick(filters) for path, filters in self.carried.items()},
            entries={path: pick(values) for path, values in self.entries.items()},
            copied_from=None if self.copied_from is None else pick(self.copied_from),
            reason=reason or self.reason,
            expected_decrease=None,
        )

    def __str__(self) -> str:
        """One line: site, method, how many channels and why, the leading gains."""
        gains = ", ".join(f"{gain:.3g}" for gain in self.gains[:4].tolist())
        more = ", ..." if self.channels > 4 else ""
        note = f"; {self.reason}" if self.reason else ""
        return f"{self.site}: {self.channels} channels by {self.method}, gains {gains}{more}{note}"
