"""The cost of a model, updated through growth without a new forward pass."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from growconv.network import layers
from growconv.network.layout import IN, OUT
from growconv.network.model import copied, example_arguments, undisturbed
from growconv.network.plan import plan_size
from growconv.network.site import Site
from growconv.statistics.flops import FlopMeter


class ModelCost:
    """Counts FLOPs as 2 × weight entries × locations, for every convolution and linear layer.

    A convolution multiplies each of its weight entries once per output location (a transposed one: per input location),
    whatever its groups, stride and dilation, so that the count follows growth from the shapes of the weights alone.
    Additions of biases, norms, activations and pooling are left out.

    Args:
        locations: number of locations at which each layer (by module path) applies its kernel to one sample.
    """

    def __init__(self, model: nn.Module, locations: Mapping[str, float | int]) -> None:
        self.model = model
        self.locations = dict(locations)

    @classmethod
    def measure(cls, model: nn.Module, inputs: object) -> "ModelCost":
        """Run one forward pass and count the locations at which each layer applies its kernel, per sample.

        Args:
            model: the model; its state is as before afterwards.
            inputs: what the model reads: a tensor, a tuple of positional or a mapping of keyword arguments.
        """
        locations: dict[str, float] = {}
        samples = max(batch_size(inputs), 1)

        def note(path: str, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            x = given[0] if given else output  # given by name, as no convolution's input is
            locations[path] = locations.get(path, 0.0) + layers.weighted(module).locations(x, output) / samples

        arguments, keywords = example_arguments(inputs)
        weighted = [(path, module) for path, module in model.named_modules() if layers.is_weighted(module)]
        hooks = [module.register_forward_hook(partial(note, path)) for path, module in weighted]
        try:
            with undisturbed(model), torch.no_grad():
                model.eval()
                model(*arguments, **keywords)
        finally:
            for hook in hooks:
                hook.remove()
        return cls(model, locations)

    def layer(self, path: str, weight_entries: float | int) -> float:
        """FLOPs that a number of weight entries costs in one layer, per sample."""
        return 2.0 * weight_entries * self.locations.get(path, 0.0)

    def activations(self) -> float:
        """Approximate bytes that a training step keeps per sample: the outputs of each layer and norm."""
        norms = sum(map(layers.is_norm, self.model.modules()))
        return 4 * self._entries(self.locations, OUT) * (1 + norms / max(1, len(self.locations)))

    def maps(self, site: Site) -> dict[tuple[str, str], float]:
        """Approximate bytes of a site's x, h and v, per sample: by layer, and whether it reads or gives them."""
        site = site.measured
        read = {(path, IN): 4 * self._entries([path], IN) for path in (*site.producers, *site.consumers)}
        return read | {(path, OUT): 4 * self._entries([path], OUT) for path in site.consumers}

    def _entries(self, paths: Iterable[str], side: str) -> float:
        """Entries that layers read or give, per sample."""
        total = 0.0
        for path in paths:
            layer = layers.weighted(self.model.get_submodule(path))
            stride = getattr(layer.module, "stride", ()) if side == IN and not layer.transposed else ()
            total += self.locations.get(path, 0.0) * math.prod(stride) * layer.size(side)
        return total

    def channel(self, site: Site) -> tuple[float, float]:
        """What one more channel costs at the site's present shapes: parameters, FLOPs of a sample's forward pass."""
        if site.room == 0:
            return 0.0, 0.0
        flops = sum(self.layer(path, entries) for path, entries in site.multiplications.items())
        return plan_size(site, site.granularity) / site.granularity, flops

    def flops(self) -> int:
        """FLOPs (2 × MACs) of one sample's forward pass with the model's present shapes."""
        layer = self.model.get_submodule
        return round(sum(self.layer(path, layers.weighted(layer(path)).multiplications()) for path in self.locations))


def batch_size(inputs: object) -> int:
    """Samples in a batch: the length of the first tensor found; 0 where there is none."""
    if isinstance(inputs, Tensor):
        return inputs.shape[0] if inputs.dim() else 0
    values = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else ()
    return next((size for value in values if (size := batch_size(value))), 0)


def training_flops(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Callable[[Any, Tensor], Tensor]) -> float:
    """FLOPs (2 × MACs) of the forward and backward pass of one sample, from a few.

    They are counted on a copy of the model, as it runs. Meta tensors would need no arithmetic, but their first use
    imports torch._dynamo, which takes longer than a few samples.
    """
    twin = copied(model).train()
    with torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []), FlopMeter() as meter:
        loss(twin(inputs), targets).backward()
    return meter.flops / len(inputs)
