"""Pruning back: taking away the channels that matter least, until the model fits into a budget again."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from growconv.errors import ScheduleError
from growconv.growth.cost import ModelCost
from growconv.growth.decision import Policy
from growconv.growth.validation import hollow
from growconv.growth.when import When
from growconv.limits import limited
from growconv.network import layers
from growconv.network.event import count_parameters, shrink
from growconv.network.layout import ENTRY
from growconv.network.model import attribute
from growconv.network.site import GrowthSite
from growconv.solvers.weights import columns_of, old_filters


@dataclass
class PruneBack(Policy):
    """Shrink the model to a budget by removing the channels with the smallest weights of their site (`norm_scores`).

    Attributes:
        when: when to prune; a step at which growth is also due prunes.
        parameters: the most parameters that the model may keep.
        flops: the most FLOPs (2 × MACs, forward, one sample) that it may keep.
        keep: the fewest channels that every site keeps.
    """

    when: When
    parameters: float | int | None = limited(None, above=0)
    flops: float | int | None = limited(None, above=0)
    keep: int = limited(1, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parameters is None and self.flops is None:
            raise ScheduleError("pruning needs a budget", where="PruneBack", fix="give parameters or flops")

    @property
    def personal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether `when` is."""
        return self.when.personal

    def choose(self, model: nn.Module, sites: Sequence[GrowthSite], cost: ModelCost) -> dict[GrowthSite, list[int]]:
        """The channels to take away of each site, in whole groups; as few as the budget allows, or a ScheduleError."""
        blocks = []
        for order, site in enumerate(sites):
            score = norm_scores(site)
            relative = (score / score.mean().clamp(min=1e-300)).view(-1, site.granularity).sum(1)
            least = -(-self.keep // site.granularity)
            ranked = torch.argsort(relative, stable=True)[: max(0, len(relative) - least)]
            blocks += [(float(relative[group]) / site.granularity, order, int(group)) for group in ranked]
        blocks.sort()

        def without(count: int) -> dict[GrowthSite, list[int]]:
            """The channels of so many blocks."""
            removed: dict[GrowthSite, list[int]] = {site: [] for site in sites}
            for _, order, group in blocks[:count]:
                size = sites[order].granularity
                removed[sites[order]] += range(group * size, (group + 1) * size)
            return {site: sorted(channels) for site, channels in removed.items() if channels}

        counts = range(len(blocks) + 1)
        fewest = bisect_left(counts, True, key=lambda count: self._fits(*size_without(model, cost, without(count))))
        if fewest == len(counts):
            parameters, flops = size_without(model, cost, without(len(blocks)))
            raise ScheduleError(
                "the model cannot be pruned to this budget",
                expected=f"parameters ≤ {self.parameters}, flops ≤ {self.flops}",
                got=f"{parameters} parameters and {flops} FLOPs with {self.keep} channels at every site",
                where="PruneBack",
                fix="raise the budget or list more sites",
            )
        return without(fewest)

    def _fits(self, parameters: int, flops: float | int) -> bool:
        within = self.parameters is None or parameters <= self.parameters
        return within and (self.flops is None or flops <= self.flops)


def size_without(model: nn.Module, cost: ModelCost, removed: Mapping[GrowthSite, Sequence[int]]) -> tuple[int, int]:
    """Parameters and FLOPs that a model would have without some channels: of a copy without memory that is shrunk."""
    twin = hollow(model)
    for site, channels in removed.items():
        shrink(twin, site, channels)
    return count_parameters(twin), ModelCost(twin, cost.locations).flops()


def norm_scores(site: GrowthSite) -> Tensor:
    """Importance (width,) of a site's channels by weight: ‖incoming‖ · ‖outgoing‖.

    It does not change when one side is scaled up and the other down. Behind a norm layer, which erases the incoming
    scale, the layer's |γ| takes the incoming norm's place.
    """
    incoming = sum(_squares(filters, site) for filters in old_filters(site).weights[0].values())
    columns = [columns_of(site, path).transpose(0, 1) for path in site.consumers]
    outgoing = sum(_squares(each.movedim(2, 1).flatten(0, 1), site) for each in columns)
    gamma: list[Tensor] = []
    for path in site.followers:
        scale = layers.scale_of(attribute(site.model, path))
        if scale is not None:
            gamma.append(
                scale.detach()[site.entries(path, ENTRY)].reshape(site.width, -1).double().cpu().square().mean(1)
            )
    size = torch.stack(gamma).mean(0) if gamma else torch.as_tensor(incoming)
    return (size * torch.as_tensor(outgoing)).sqrt()


def _squares(entries: Tensor, site: GrowthSite) -> Tensor:
    """Sum of squares (width,) of what belongs to each channel, along the first axis, in float64 on the CPU.

    Channels of a unit that share entries get equal parts of them.
    """
    squares = entries.detach().double().cpu().flatten(1).square().sum(1)
    share = 1 if len(squares) % site.width == 0 else site.granularity
    return squares.reshape(site.width // share, -1).sum(1).repeat_interleave(share) / share
