"""Pruning back: taking away the channels that matter least, until the model fits into a budget again."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from growconv.convolution.cost import multiplications_per_output
from growconv.convolution.factorized import FactorizedConv
from growconv.errors import ScheduleError
from growconv.growth.cost import ModelCost
from growconv.growth.decision import Policy
from growconv.growth.distributed import agreed, reduce_statistics
from growconv.growth.proposing import Batch, Loss
from growconv.growth.when import When, require_positive
from growconv.network import layers, parametrized
from growconv.network.graph import attribute
from growconv.network.removing import plan_removal
from growconv.network.site import GrowthSite
from growconv.solvers.existing import filters_of, readings_of
from growconv.statistics.collect import collect_statistics
from growconv.statistics.pair import PairStatistics


@dataclass
class PruneBack(Policy):
    """Shrink the model to a budget, the least important channels of all sites first.

    Attributes:
        when: when to prune; a step at which growth is due as well prunes.
        parameters: parameters of the whole model that may stay.
        flops: FLOPs (2 × MACs, forward, one sample) that may stay.
        score: "norm" takes the size of a channel's weights, "energy" what the channel contributes to its readers'
            outputs on the growth batches, ‖z_k‖²/n; both relative to the mean of the site.
        keep: channels that every site keeps at least.
    """

    when: When
    parameters: int | None = None
    flops: int | None = None
    score: Literal["norm", "energy"] = "norm"
    keep: int = 1

    def __post_init__(self) -> None:
        if self.parameters is None and self.flops is None:
            raise ScheduleError("pruning back to nothing", where="PruneBack", fix="give parameters or flops")
        for name in ("parameters", "flops"):
            if getattr(self, name) is not None:
                require_positive(self, name, getattr(self, name))
        require_positive(self, "keep", self.keep)
        if self.score not in ("norm", "energy"):
            raise ScheduleError("unknown score", expected="norm or energy", got=self.score, where="PruneBack.score")

    def state_dict(self) -> dict[str, object]:
        """The state of `when`."""
        return {"when": self.when.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Hand the state back to `when`."""
        when = state.get("when")
        if not isinstance(when, Mapping):
            raise ScheduleError("the saved state belongs to another policy", got=state, where="PruneBack")
        self.when.load_state_dict(when)

    @property
    def personal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether `when` is."""
        return self.when.personal

    def choose(
        self, model: nn.Module, sites: Sequence[GrowthSite], scores: Mapping[GrowthSite, Tensor], cost: ModelCost
    ) -> dict[GrowthSite, list[int]]:
        """The channels to take away, by site.

        Args:
            model: the model.
            sites: where channels may go.
            scores: importance (width,) of each site's channels.
            cost: the model's cost meter.

        Returns:
            Indices of channels, whole groups each; as few as the budget allows.

        Raises:
            ScheduleError: the budget is out of reach with `keep` channels everywhere.
        """
        blocks = []
        for order, site in enumerate(sites):
            score = scores[site].double().cpu()
            relative = (score / score.mean().clamp(min=1e-300)).view(-1, site.granularity).sum(1)
            least = -(-self.keep // site.granularity)
            ranked = torch.argsort(relative, stable=True)[: max(0, len(relative) - least)]
            blocks += [(float(relative[group]) / site.granularity, order, int(group)) for group in ranked]
        sizes = Sizes(model, sites, cost)
        removed: dict[GrowthSite, list[int]] = {site: [] for site in sites}
        for _, order, group in sorted(blocks):
            if self._fits(*sizes.after(removed)):
                break
            size = sites[order].granularity
            removed[sites[order]] += range(group * size, (group + 1) * size)
        parameters, flops = sizes.after(removed)
        if not self._fits(parameters, flops):
            raise ScheduleError(
                "the model cannot be pruned to this budget",
                expected=f"parameters ≤ {self.parameters}, flops ≤ {self.flops}",
                got=f"{parameters} parameters and {flops} FLOPs with {self.keep} channels at every site",
                where="PruneBack",
                fix="raise the budget or list more sites",
            )
        return {site: sorted(channels) for site, channels in removed.items() if channels}

    def _fits(self, parameters: int, flops: float | int) -> bool:
        within = self.parameters is None or parameters <= self.parameters
        return within and (self.flops is None or flops <= self.flops)


class Sizes:
    """Parameters and FLOPs that a model would have without some channels, several sites at once.

    Args:
        model: the model.
        sites: where channels may go.
        cost: the model's cost meter.
    """

    def __init__(self, model: nn.Module, sites: Sequence[GrowthSite], cost: ModelCost) -> None:
        self.cost = cost
        self.tensors = {id(parameter): parameter for parameter in model.parameters()}
        self.modules = {path: model.get_submodule(path) for path in cost.locations}
        self.cuts: dict[int, list[tuple[int, GrowthSite, float]]] = {}
        for site in sites:
            if site.width > site.granularity:
                for change in plan_removal(site, range(site.granularity)).changes:
                    for axis, entries in change.removed.items():
                        cut = (axis, site, len(entries) / site.granularity)
                        self.cuts.setdefault(id(change.tensor), []).append(cut)

    def after(self, removed: Mapping[GrowthSite, Sequence[int]]) -> tuple[int, float]:
        """(parameters, flops) without the channels."""
        shapes = {key: list(tensor.shape) for key, tensor in self.tensors.items()}
        for key, shape in shapes.items():
            for axis, site, ratio in self.cuts.get(key, ()):
                shape[axis] -= round(len(removed.get(site, ())) * ratio)
        entries = {key: math.prod(shape) for key, shape in shapes.items()}
        flops = 0.0
        for path, module in self.modules.items():
            if isinstance(module, FactorizedConv):
                resized: Any = copy.copy(module)
                resized.in_channels = shapes[id(module.in_factor)][0]
                resized.out_channels = shapes[id(module.out_factor)][0]
                flops += self.cost.layer(path, multiplications_per_output(resized))
            else:
                flops += self.cost.layer(path, entries[id(_stored_kernel(module))])
        return sum(entries.values()), flops


def _stored_kernel(module: nn.Module) -> Tensor:
    """The parameter that has a layer's weight's shape."""
    stored = parametrized.stored_weight(module)
    if stored is None:
        return module.get_parameter("weight")
    return attribute(module, stored.names[0 if stored.spectral else 1])


def norm_scores(site: GrowthSite) -> Tensor:
    """Importance (width,) of a site's channels by weight: ‖incoming‖ · ‖outgoing‖.

    It does not change when one side is scaled up and the other down. Behind a norm layer, which erases the incoming
    scale, the layer's |γ| takes the incoming norm's place.
    """
    incoming = sum(_squares(filters_of(site.model, path, site), site.width) for path in site.producers)
    outgoing = sum(_squares(readings_of(site, site.model, path).transpose(0, 1), site.width) for path in site.consumers)
    gamma: list[Tensor] = []
    for binding in site.bindings:
        member = attribute(site.model, binding.path)
        if binding.role == "norm" and getattr(member, "weight", None) is not None and isinstance(member, layers.NORMS):
            start, stop = _span(site, binding.layout)
            scales = member.weight.detach()[start:stop]
            gamma.append(_squares(scales, site.width) / (len(scales) / site.width))
    size = torch.stack(gamma).mean(0) if gamma else torch.as_tensor(incoming)
    return (size * torch.as_tensor(outgoing)).sqrt()


def _squares(entries: Tensor, width: int) -> Tensor:
    """Sum of squares (width,) of what belongs to each channel, along the first axis, in float64 on the CPU."""
    return entries.detach().double().cpu().reshape(width, -1).square().sum(1)


def energy_scores(
    model: nn.Module, sites: Sequence[GrowthSite], batches: Sequence[Batch], loss: Loss, options: Mapping[str, Any]
) -> dict[GrowthSite, Tensor]:
    """Importance (width,) of channels by what they write: Σ_c w_kᵀ S2_kk w_k = ‖z_k‖²/n, summed over the readers.

    Args:
        model: the model; as before afterwards.
        sites: where; sites without closed-form statistics fall back on their weights' norms.
        batches: growth batches.
        loss: loss(output, targets).
        options: further options of `collect_statistics`.

    Returns:
        Scores by site.
    """
    known = [site for site in sites if site.closed_form is None]
    settings = {"quantities": {"S2"}, **options}
    own = collect_statistics(model, known, batches, loss, run=agreed, **settings) if known else {}
    statistics = reduce_statistics(own)
    return {site: _energy(site, statistics[site.name]) if site in known else norm_scores(site) for site in sites}


def _energy(site: GrowthSite, statistics: PairStatistics) -> Tensor:
    total = torch.zeros(site.width, dtype=torch.float64)
    for reader in statistics.readers:
        readings = readings_of(site, site.model, reader.consumer).detach().double().cpu()
        taps = readings[0, 0, 0].numel()
        start, stop = site.span(reader.consumer)
        entries = slice(start * taps, stop * taps)
        columns = readings.flatten(2)
        size = columns.shape[2]
        second = torch.empty(0) if reader.S2 is None else reader.S2
        blocks = second.double().cpu()[entries, entries].view(site.width, size, site.width, size)
        own = torch.einsum("kdke->kde", blocks)
        total += torch.einsum("ckd,kde,cke->k", columns, own, columns)
    return total


def _span(site: GrowthSite, layout: Any) -> tuple[int, int]:
    """First and one past the last entry of the site's channels along an axis with this layout."""
    start = 0
    for part in layout:
        size = int(site.spaces.width(part.space) * part.ratio)
        if part.space.root() is site.space:
            return start, start + size
        start += size
    raise ScheduleError("the layer has no channels of the site", where=site.name)
