"""Variance Transfer: channels in pairs that cancel, and old weights rescaled to the larger fan-in.

Yuan, Savarese and Maire 2023, "Accelerated Training via Incrementally Growing Neural Networks using Variance Transfer
and Learning Rate Adaptation", NeurIPS.

New channels come in pairs with the same incoming weights V and opposite outgoing weights Z and -Z, so that they cancel
(section 3.1). Old weights of a layer whose fan-in grows from C_t to C_t+1 are scaled by √(C_t / C_t+1), as if the large
network had been initialised at once (Table 1, hidden layers), and the running statistics of the BatchNorm behind it by
the same factor, so that the network computes what it did. New weights have variance 1 / fan-in. The learning rates of
the stages, η_t = η_0 ‖W_Δt‖ / ‖W_0‖ (section 3.2), are a matter of the schedule: `growth.learning_rate`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from growconv.network.proposal import ChannelGrowth
from growconv.network.routes import Activation, AdaptivePool, Flatten, Norm, Pool
from growconv.solvers.assembly import weight_of
from growconv.solvers.base import Channels, Solver, register
from growconv.solvers.existing import (
    bias_of,
    filters_of,
    normal,
    random_filters,
    readings_of,
    require_number,
    revised_readings,
)

HOMOGENEOUS = frozenset(("relu", "leaky_relu", "leakyrelu", "prelu", "identity", "abs", "rrelu"))
"""Activations with f(c·x) = c·f(x) for c > 0."""


@register("variance_transfer")
@dataclass(frozen=True)
class VarianceTransfer(Solver):
    """Pairs of new channels that cancel, and old weights rescaled to the larger fan-in.

    Attributes:
        rescale: scale the old outgoing weights by √(C_t / C_t+1). Their change is undone where it costs nothing: in the
            running statistics of a BatchNorm behind the consumer (the paper's way), else, where all in between is
            positively homogeneous, in the old incoming weights or the last norm in between (ours). Where neither is
            possible the old weights are left alone, and the growth says so.
    """

    rescale: bool = True
    function_preserving = True

    def solve(
        self,
        subject: Any,
        site: Any,
        channels: Channels,
        model: nn.Module,
        generator: torch.Generator | None = None,
    ) -> ChannelGrowth:
        """See `Solver.solve`; of an odd number of channels (or groups) the last reads but is not read."""
        requested = require_number(channels, self.name, site)
        pairs = requested // site.granularity // 2 * site.granularity
        single = requested - 2 * pairs
        drawn, zeros = random_filters(site, model, pairs + single, generator)
        incoming = {path: torch.cat([weight[:pairs], weight]) for path, weight in drawn.items()}
        biases = {path: bias.new_zeros(requested) for path, bias in zeros.items()}
        outgoing = {}
        for path in site.consumers:
            old = readings_of(site, model, path)
            fan_in = filters_of(model, path).shape[1] + requested * old.shape[2]
            fan_in *= old[0, 0, 0].numel()
            half = normal((old.shape[0], pairs, *old.shape[2:]), old, generator) / fan_in**0.5
            rest = old.new_zeros(old.shape[0], single, *old.shape[2:])
            outgoing[path] = torch.cat([half, -half, rest], 1).flatten(1, 2)
        revised, reason = self._rescaled(site, model, requested) if self.rescale else ({}, None)
        like = next(iter(incoming.values()))
        return ChannelGrowth(
            site=site.name,
            method=self.name,
            incoming=incoming,
            incoming_bias=biases,
            outgoing=outgoing,
            gains=like.new_zeros(requested),
            requested=requested,
            reason=reason,
            revised=revised,
        )

    def _rescaled(self, site: Any, model: nn.Module, channels: int) -> tuple[dict[str, Tensor], str | None]:
        behind = {path: batch_norm_behind(site, model, path) for path in site.consumers}
        if all(norm is not None for norm in behind.values()):
            return _rescaled_consumers(site, model, channels, behind), None
        obstacle = _not_homogeneous(site, model)
        if obstacle is not None:
            return {}, f"old weights not rescaled: {obstacle}, and no BatchNorm follows every consumer"
        return _rescaled_pair(site, model, (site.width / (site.width + channels)) ** 0.5), None


def batch_norm_behind(site: Any, model: nn.Module, path: str) -> str | None:
    """Path of the BatchNorm with running statistics that alone takes what a layer writes; None where there is none."""
    graph = site.spaces.graph
    found = set()
    for node in graph.nodes:
        if node.op == "call_module" and str(node.target) == path:
            users = list(node.users)
            if len(users) != 1 or users[0].op != "call_module":
                return None
            found.add(str(users[0].target))
    if len(found) != 1:
        return None
    norm = found.pop()
    module = model.get_submodule(norm)
    calls = sum(node.op == "call_module" and str(node.target) == norm for node in graph.nodes)
    tracked = isinstance(module, _BatchNorm) and module.running_mean is not None
    return norm if tracked and calls == 1 else None


def _rescaled_consumers(site: Any, model: nn.Module, channels: int, behind: dict[str, str | None]) -> dict[str, Tensor]:
    """Every consumer's old weights and bias scaled for its larger fan-in, and the BatchNorm behind it to match."""
    revised = {}
    for path in site.consumers:
        width = filters_of(model, path).shape[1]
        scale = (width / (width + channels * site.ratio(path))) ** 0.5
        revised[f"{path}.weight"] = weight_of(model, path) * scale
        bias = bias_of(model, path)
        if bias is not None:
            revised[f"{path}.bias"] = bias * scale
        norm: Any = model.get_submodule(str(behind[path]))
        revised[f"{behind[path]}.running_mean"] = norm.running_mean * scale
        # the root that eval mode divides by, with its eps, scales exactly
        variance = scale**2 * (norm.running_var + norm.eps) - norm.eps
        revised[f"{behind[path]}.running_var"] = variance.clamp_min(0)
    return revised


def _rescaled_pair(site: Any, model: nn.Module, scale: float) -> dict[str, Tensor]:
    """Old outgoing weights scaled down, and what they read scaled up by the same factor."""
    revised = {}
    for path in site.consumers:
        revised[f"{path}.weight"] = revised_readings(site, model, path, readings_of(site, model, path) * scale)
    for path in _scaled_layers(site):
        module = model.get_submodule(path)
        for name in ("weight", "bias"):
            value = getattr(module, name, None)
            if isinstance(value, Tensor):
                revised[f"{path}.{name}"] = value.detach() / scale
    return revised


def _scaled_layers(site: Any) -> tuple[str, ...]:
    """The layers that set the scale of what the consumers read: the last norm of each route, or the producers."""
    return tuple(dict.fromkeys(_last_norm(route.steps) or route.producer for route in site.routes))


def _last_norm(steps: Sequence[Any]) -> str | None:
    return next((step.path for step in reversed(steps) if isinstance(step, Norm)), None)


def _not_homogeneous(site: Any, model: nn.Module) -> str | None:
    """The first thing in between through which a scale does not pass; None where it passes through all."""
    for binding in site.bindings:
        if binding.role != "reads" and len(binding.layout) > 1:
            return f"{binding.path} holds channels of other sites too"
    for route in site.routes:
        if route.problem:
            return route.problem
        norm = _last_norm(route.steps)
        if norm is not None and getattr(model.get_submodule(norm), "weight", None) is None:
            return f"{norm} has no scale of its own"
        after = len(route.steps) if norm is None else route.steps[::-1].index(Norm(norm))
        for step in route.steps[len(route.steps) - after :]:
            if isinstance(step, Activation) and step.name.lower() not in HOMOGENEOUS:
                return f"{step.name} lies in between"
            if not isinstance(step, (Activation, Pool, AdaptivePool, Flatten)):
                return f"{getattr(step, 'path', getattr(step, 'name', step))} lies in between"
    return None
