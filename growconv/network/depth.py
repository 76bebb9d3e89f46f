"""Growing in depth: a new layer in front of a reader that leaves the function as it is."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from growconv.errors import ArgumentValueError, SiteError
from growconv.network import layers
from growconv.network.graph import unwrapped
from growconv.network.optimizer import add_parameters, as_optimizers
from growconv.network.routes import Activation
from growconv.network.site import GrowthSite
from growconv.network.surgery import GrowthEvent, count_parameters

KINDS = ("convolution", "residual")
IDEMPOTENT = {"relu": nn.ReLU, "relu6": nn.ReLU6}  # f(f(x)) = f(x)
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Residual(nn.Module):
    """x + body(x).

    Args:
        body: what is added; its last norm starts at zero, so that the block starts as the identity.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        return x + self.body(x)


def insert_layer(
    model: nn.Module,
    site: GrowthSite,
    *,
    kind: str = "convolution",
    kernel_size: int = 3,
    consumer: str | None = None,
    optimizer: Any = None,
) -> GrowthEvent:
    """Put a new layer in front of a reader of a site; the model's function stays as it is, in train and eval mode.

    The reader's module becomes a Sequential of the new layer ("inserted") and the reader itself ("reader"), so that its
    parameters have new paths. Find the sites again afterwards: the new layer's channels are one.

    Args:
        model: the raw model of the site.
        site: where; the new layer gets as many channels as the reader reads.
        kind: "convolution": an identity convolution and an activation that does not change what it reads (the one
            before, where applying it twice changes nothing, else a PReLU of slope 1). "residual": x + body(x) with two
            convolutions whose last norm starts at zero.
        kernel_size: odd number of taps per axis; a linear reader gets a linear layer.
        consumer: which reader, where the site has several.
        optimizer: the optimizer (or a list); new parameters join the group of the reader's weight.

    Returns:
        The event; its edits replay through apply_edits.

    Raises:
        SiteError: when the site has several readers and none was named.
        ArgumentValueError: for an unknown kind or an even kernel size.
    """
    model = unwrapped(model)
    site.check(model)
    if kind not in KINDS:
        raise ArgumentValueError("unknown kind of layer", expected=" or ".join(KINDS), got=kind)
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ArgumentValueError(
            "the kernel of an inserted layer needs a centre", expected="an odd size", got=kernel_size
        )
    path = consumer if consumer is not None else site.consumers[0]
    if path not in site.consumers or (consumer is None and len(site.consumers) > 1):
        raise SiteError(
            "name the reader that gets a layer in front",
            where=site.name,
            expected=" or ".join(site.consumers),
            got=consumer,
        )
    reader = model.get_submodule(path)
    optimizers = as_optimizers(optimizer)
    weight = next(reader.parameters())
    add_parameters(optimizers, weight, (), path)  # before anything changes
    alone = len(site.spaces.bindings[(path, "reads", 0)].layout) == 1  # else other channels went another way
    steps = next((route.steps for route in site.routes if route.consumer == path and alone), ())
    names = [step.name.lower() for step in steps if isinstance(step, Activation)]
    activation = names[-1] if names and names[-1] in IDEMPOTENT else "prelu"
    grid_axes = _grid_axes(site, path)
    if kind == "residual" and isinstance(reader, nn.Linear) and grid_axes:
        raise SiteError("a residual block needs a reader of one location a sample, or a convolution", where=path)
    specification = {
        "kind": kind,
        "channels": layers.input_width(reader),
        "axes": 0 if isinstance(reader, nn.Linear) else layers.axes_of(reader),
        "kernel_size": kernel_size,
        "activation": activation,
    }
    before = count_parameters(model)
    edit = {"module": path, "insert": specification}
    inserted = replay_insertion(model, edit)
    add_parameters(optimizers, weight, inserted.parameters(), path)
    return GrowthEvent(
        site=site.name,
        method="insert_layer",
        channels=0,
        width_before=site.width,
        width_after=site.width,
        amplitude=0.0,
        gains=(),
        reason=f"an identity {kind} in front of {path}",
        edits=(edit,),
        parameters_before=before,
        parameters_after=count_parameters(model),
    )


def replay_insertion(model: nn.Module, edit: Mapping[str, Any]) -> nn.Module:
    """Put the layer that an edit describes in front of a module; returns the new layer."""
    path = str(edit["module"])
    reader = model.get_submodule(path)
    weight = next(reader.parameters())
    new = build(**edit["insert"]).to(weight.device, weight.dtype).train(reader.training)
    pair = nn.Sequential()
    pair.add_module("inserted", new)
    pair.add_module("reader", reader)
    pair.training = reader.training
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, pair)
    return new


def build(kind: str, channels: int, axes: int, kernel_size: int, activation: str) -> nn.Module:
    """A new layer that starts as the identity on what its activation leaves alone.

    Args:
        kind: "convolution" or "residual".
        channels: channels in and out.
        axes: grid axes; 0 for a linear layer.
        kernel_size: odd number of taps per axis.
        activation: "relu", "relu6" or "prelu".
    """
    if kind == "convolution":
        layer = _layer(channels, axes, kernel_size)
        with torch.no_grad():
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
            _identity(layer, axes)
        return nn.Sequential(layer, _activation(activation))
    last = _BATCH_NORMS[axes](channels)
    nn.init.zeros_(last.weight)
    body = nn.Sequential(
        _layer(channels, axes, kernel_size, bias=False),
        _BATCH_NORMS[axes](channels),
        nn.ReLU(),
        _layer(channels, axes, kernel_size, bias=False),
        last,
    )
    return Residual(body)


def _layer(channels: int, axes: int, kernel_size: int, bias: bool = True) -> nn.Module:
    if axes == 0:
        return nn.Linear(channels, channels, bias=bias)
    return _CONVOLUTIONS[axes](channels, channels, kernel_size, padding=kernel_size // 2, bias=bias)


def _identity(layer: nn.Module, axes: int) -> None:
    weight: Any = layer.weight
    if axes == 0:
        nn.init.eye_(weight)
    else:
        nn.init.dirac_(weight)


def _activation(name: str) -> nn.Module:
    return nn.PReLU(init=1.0) if name == "prelu" else IDEMPOTENT[name]()


def _grid_axes(site: GrowthSite, path: str) -> int:
    """Axes besides the sample and the features in what a linear reader reads."""
    source = site.spaces.bindings[(path, "reads", 0)].nodes[0].all_input_nodes[0]
    return len(site.spaces.graph.values[source]) - 2
