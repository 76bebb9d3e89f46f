"""Variance Transfer: channels in pairs that cancel, and old weights rescaled to the larger fan-in.

Yuan, Savarese and Maire 2023, "Accelerated Training via Incrementally Growing Neural Networks using Variance Transfer
and Learning Rate Adaptation", NeurIPS.

New channels come in pairs with the same incoming weights V and opposite outgoing weights Z and -Z, so that they cancel
(section 3.1). Old weights of a layer whose fan-in grows from C_t to C_t+1 are scaled by √(C_t / C_t+1), as if the large
network had been initialised at once (Table 1, hidden layers), and so are the running statistics of the BatchNorm behind
it, so that the network computes the same as before. New weights have variance 1 / fan-in. The learning rates of
the stages, η_t = η_0 ‖W_Δt‖ / ‖W_0‖ (section 3.2), belong to the schedule: `growth.learning_rate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from growconv.errors import SolverError
from growconv.network import layers
from growconv.network.layout import IN
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite, Norm
from growconv.solvers.base import Request, Solver, register
from growconv.solvers.weights import (
    bias_of,
    columns_of,
    filters_of,
    normal,
    not_homogeneous,
    not_rewritable,
    random_filters,
    units_of,
    with_scaled_columns,
)


@register("variance_transfer")
@dataclass(frozen=True)
class VarianceTransfer(Solver):
    """Pairs of new channels that cancel, and old weights rescaled to the larger fan-in.

    Attributes:
        output_layers: paths of consumers that are output layers. Table 1 has another rule for them: old weights times
            C_t / C_t+1, new ones of variance 1 / fan-in². Nothing compensates for this: at first the logits are smaller
            by that factor.
        rescale: scale the old outgoing weights by √(C_t / C_t+1). The change is compensated where this is free: in the
            running statistics of a BatchNorm behind the consumer (as in the paper), or else, if everything in between
            is positively homogeneous, in the old incoming weights or the last norm in between (ours). Where neither is
            possible, the old weights stay as they are, and the growth says so.
    """

    rescale: bool = True
    output_layers: Sequence[str] = ()
    counts = False

    @property
    def function_preserving(self) -> bool:
        """Whether no output layer is scaled down."""
        return not self.output_layers

    def solve(self, request: Request) -> ChannelGrowth:
        """See `Solver.solve`; of an odd number of channels (or groups) the last gets zero outgoing weights."""
        site, requested, generator = request.site, request.number, request.generator
        size = site.granularity
        unknown = [path for path in self.output_layers if path not in dict(site.model.named_modules())]
        if unknown:
            raise SolverError("the model has no such output layer", got=unknown[0], where="output_layers")
        units = requested // size
        pairs = units // 2
        single = units - 2 * pairs
        drawn = random_filters(site, (pairs + single) * size, generator)
        filters = drawn.picked([*range(pairs), *range(pairs + single)])
        outgoing = {}
        for path in site.consumers:
            old = columns_of(site, path)
            fan_in = filters_of(site, path).shape[1] + units * old.shape[2]
            fan_in *= old[0, 0, 0].numel()
            half = normal((old.shape[0], pairs, *old.shape[2:]), old, generator)
            half = half / fan_in ** (1.0 if path in self.output_layers else 0.5)
            rest = old.new_zeros(old.shape[0], single, *old.shape[2:])
            outgoing[path] = torch.cat([half, -half, rest], 1).flatten(1, 2)
        revised, reason = self._rescaled(site, requested) if self.rescale else ({}, None)
        return filters.proposed(self.name, outgoing, requested=requested, reason=reason, revised=revised)

    def _rescaled(self, site: GrowthSite, channels: int) -> tuple[dict[str, Tensor], str | None]:
        fixed = not_rewritable(site, *site.producers, *site.consumers)
        if fixed is not None:
            return {}, f"old weights not rescaled: {fixed}"
        ratio = site.width / (site.width + channels)
        heads = [path for path in site.consumers if path in self.output_layers]
        others = [path for path in site.consumers if path not in heads]
        behind = {path: batch_norm_behind(site, path) for path in others}
        if all(norm is not None for norm in behind.values()):
            return _rescaled_columns(site, heads, ratio) | _rescaled_consumers(site, channels, behind), None
        own = (key for key in site.axes if key[1] != IN)
        mixed = next((path for path, side in own if len(site.layout.axes[path, side]) > 1), None)
        obstacle = not_homogeneous(site, behind_norms=True)
        if mixed is not None:
            obstacle = f"{mixed} holds channels of other sites too"
        elif len(site.producers) > 1:
            obstacle = f"{len(site.producers)} layers produce the channels"
        if obstacle is not None:
            return {}, f"old weights not rescaled: {obstacle}, and no BatchNorm follows every consumer"
        # what they read is scaled up by the root, for the output layers too
        scaled = _rescaled_columns(site, others, ratio**0.5) | _rescaled_columns(site, heads, ratio**1.5)
        return scaled | _scaled_up(site, ratio**-0.5), None


def batch_norm_behind(site: GrowthSite, path: str) -> str | None:
    """Path of the BatchNorm with running statistics that alone takes what a consumer gives; None: there is none."""
    norm = next((route.behind for route in site.routes if route.consumer == path), None)
    module = None if norm is None else site.model.get_submodule(norm)
    return norm if layers.is_batch_norm(module) else None


def _rescaled_consumers(site: GrowthSite, channels: int, behind: dict[str, str | None]) -> dict[str, Tensor]:
    """Every consumer's old weights and bias scaled for its larger fan-in, and the BatchNorm behind it to match."""
    revised = {}
    for path in behind:
        layer, filters = site.layer(path), filters_of(site, path)
        width = filters.shape[1]
        scale = (width / (width + int(channels * site.ratio(path)) // layer.groups)) ** 0.5
        revised[f"{path}.weight"] = layer.as_stored(filters * scale)
        bias = bias_of(site, path)
        if bias is not None:
            revised[f"{path}.bias"] = bias * scale
        norm = site.model.get_submodule(str(behind[path]))
        mean, variance = (norm.get_buffer(name) for name in ("running_mean", "running_var"))
        revised[f"{behind[path]}.running_mean"] = mean * scale
        # the root that eval mode divides by, with its eps, scales exactly
        eps = float(norm.eps)  # pyright: ignore[reportArgumentType]
        revised[f"{behind[path]}.running_var"] = (scale**2 * (variance + eps) - eps).clamp_min(0)
    return revised


def _rescaled_columns(site: GrowthSite, paths: Sequence[str], scale: float) -> dict[str, Tensor]:
    """Old outgoing weights of some consumers times a factor."""
    factor = torch.full((units_of(site),), scale, dtype=torch.float64)
    return {f"{path}.weight": with_scaled_columns(site, path, factor) for path in paths}


def _scaled_up(site: GrowthSite, scale: float) -> dict[str, Tensor]:
    """What sets the scale of what the consumers read, times a factor: the last norm of each route, or its producer."""
    revised = {}
    for route in site.routes:
        path = next((step.path for step in reversed(route.steps) if isinstance(step, Norm)), route.producer)
        module = site.model.get_submodule(path)
        for name in ("weight", "bias"):
            value = getattr(module, name, None)
            if isinstance(value, Tensor):
                revised[f"{path}.{name}"] = value.detach() * scale
    return revised
