"""What a growth method is asked for."""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn

from growconv.network.site import GrowthSite
from growconv.statistics.pair import PairStatistics

Channels = int | Literal["auto"]
"""A number of new channels, or "auto": as many as the samples can tell from noise."""


@dataclass(frozen=True, eq=False)
class Request:
    """New channels for one site, and what is known about it.

    Attributes:
        site: where.
        channels: how many; validated, a multiple of the site's granularity. "auto" only for a method that `counts`.
        statistics: of the site; None where there are none, which a method with non-empty `reads` never sees.
        generator: source of randomness; None draws from torch's global one, or nothing for a deterministic method.
    """

    site: GrowthSite
    channels: Channels
    statistics: PairStatistics | None = None
    generator: torch.Generator | None = None

    @property
    def model(self) -> nn.Module:
        """The model that the site belongs to; not to be changed."""
        return self.site.model

    @property
    def number(self) -> int:
        """`channels`, where it is a number."""
        return cast(int, self.channels)

    @property
    def subject(self) -> PairStatistics:
        """`statistics`, for a method that reads some."""
        return cast(PairStatistics, self.statistics)
