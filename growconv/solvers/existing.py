"""What the methods that look at a site's old weights share: reading them in one layout, whatever the layer."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from growconv.errors import SolverError
from growconv.network import layers


def filters_of(model: nn.Module, path: str, site: Any = None) -> Tensor:
    """Weight of a producer as (out, in, *kernel), detached; with a site only the filters of its channels.

    A transposed convolution keeps its axes the other way; a producer has other filters than the site's where something
    else takes its channels in pieces.
    """
    module = model.get_submodule(path)
    weight = _weight(module, path)
    weight = weight.transpose(0, 1) if layers.is_transposed(module) else weight
    return weight if site is None else weight[site.entries(path, "writes")]


def bias_of(model: nn.Module, path: str, site: Any = None) -> Tensor | None:
    """Bias of a producer, detached; None where it has none; with a site only the entries of its channels."""
    bias = getattr(model.get_submodule(path), "bias", None)
    if not isinstance(bias, Tensor):
        return None
    return bias.detach() if site is None else bias.detach()[site.entries(path, "writes")]


def readings_of(site: Any, model: nn.Module, path: str) -> Tensor:
    """A consumer's weights on the site's old channels, (out, width, ratio, *kernel), detached."""
    module = model.get_submodule(path)
    weight = _weight(module, path)
    weight = weight.transpose(0, 1) if layers.is_transposed(module) else weight
    return weight[:, site.entries(path)].unflatten(1, (site.width, -1))


def revised_readings(site: Any, model: nn.Module, path: str, readings: Tensor) -> Tensor:
    """The consumer's whole weight in its own layout, with other (out, width, ratio, *kernel) on the old channels."""
    module = model.get_submodule(path)
    weight = _weight(module, path).clone()
    target = weight.transpose(0, 1) if layers.is_transposed(module) else weight
    target[:, site.entries(path)] = readings.flatten(1, 2)
    return weight


def own_layout(model: nn.Module, path: str, filters: Tensor) -> Tensor:
    """Filters (out, in, *kernel) as the layer stores its weight."""
    return filters.transpose(0, 1) if layers.is_transposed(model.get_submodule(path)) else filters


def filter_norms(site: Any, model: nn.Module) -> Float[Tensor, " width"]:
    """Norm of each old channel's incoming weights, biases included, over all producers."""
    square: Any = 0
    for path in site.producers:
        square = square + filters_of(model, path, site).flatten(1).square().sum(1)
        bias = bias_of(model, path, site)
        square = square if bias is None else square + bias.square()
    return square.sqrt()


def normalised(
    incoming: Mapping[str, Tensor], biases: Mapping[str, Tensor], norm: Tensor | float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same filters, each channel's norm over all producers set to one value; a channel of zeros stays as it is."""
    total: Any = sum(weight.flatten(1).square().sum(1) for weight in incoming.values())
    total = total + sum(bias.square() for bias in biases.values())
    factor = norm / torch.where(total > 0, total, 1.0).sqrt()
    scaled = {path: weight * factor.view(-1, *[1] * (weight.dim() - 1)) for path, weight in incoming.items()}
    return scaled, {path: bias * factor for path, bias in biases.items()}


def random_filters(
    site: Any, model: nn.Module, channels: int, generator: torch.Generator | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gaussian filters of variance 1 / fan-in for every producer, and biases of zero where it has one."""
    incoming, biases = {}, {}
    for path in site.producers:
        like = filters_of(model, path)
        fan_in = like[0].numel()
        incoming[path] = normal((channels, *like.shape[1:]), like, generator) / fan_in**0.5
        bias = bias_of(model, path)
        if bias is not None:
            biases[path] = bias.new_zeros(channels)
    return incoming, biases


def silent_outgoing(site: Any, model: nn.Module, channels: int) -> dict[str, Tensor]:
    """Outgoing weights of zero, (out, channels·ratio, *kernel) per consumer."""
    outgoing = {}
    for path in site.consumers:
        old = readings_of(site, model, path)
        outgoing[path] = old.new_zeros(old.shape[0], channels * old.shape[2], *old.shape[3:])
    return outgoing


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers on the device of `like`, drawn where the generator lives: a seed means the same."""
    place = generator.device if generator is not None else torch.device("cpu")
    return torch.randn(shape, generator=generator, device=place, dtype=torch.float64).to(like)


def require_number(channels: Any, method: str, site: Any) -> int:
    """The number of channels as int; methods without a measure of noise refuse "auto"."""
    if channels == "auto":
        raise SolverError(
            f"the method {method!r} has no measure by which to choose a number of channels",
            expected="an integer of at least 1",
            got="'auto'",
            where=site.name,
            fix="give a number, or use method='tiny', 'exact' or 'functional'",
        )
    return int(channels)


def _weight(module: nn.Module, path: str) -> Tensor:
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise SolverError("this layer has no weight", where=path)
    return weight.detach()
