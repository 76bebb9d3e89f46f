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
    """The request for new channels at one site, with what is known about it.

    Attributes:
        site: the site.
        channels: how many; validated, a multiple of the site's granularity. "auto" only for a method that `counts`.
        statistics: statistics of the site; None if there are none, which never happens for a method with non-empty
            `reads`.
        generator: source of randomness; None: torch's global generator, unused by a deterministic method.
    """

    site: GrowthSite
    channels: Channels
    statistics: PairStatistics | None = None
    generator: torch.Generator | None = None

    @property
    def model(self) -> nn.Module:
        """The model that the site belongs to; do not change it."""
        return self.site.model

    @property
    def number(self) -> int:
        """`channels` as a number."""
        return cast(int, self.channels)

    @property
    def subject(self) -> PairStatistics:
        """`statistics`, for a method that reads them."""
        return cast(PairStatistics, self.statistics)
