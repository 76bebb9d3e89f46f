"""What a model costs: FLOPs of one sample, layer by layer, followed through growth without a new forward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from growconv.network import layers
from growconv.network.model import example_arguments, undisturbed
from growconv.network.plan import plan_size
from growconv.network.site import Site


@dataclass
class Spent:
    """FLOPs (2 × MACs) that were spent so far."""

    flops: float = 0.0


class ModelCost:
    """Counts FLOPs as 2 × weight entries × locations, for every convolution and linear layer.

    A convolution multiplies each of its weight entries once per output location (a transposed one: per input location),
    whatever its groups, stride and dilation, so that the count follows growth from the shapes of the weights alone.
    Additions of biases, norms, activations and pooling are left out.

    Args:
        model: the model.
        locations: locations at which each layer (by module path) applies its kernel to one sample.
    """

    def __init__(self, model: nn.Module, locations: Mapping[str, float | int]) -> None:
        self.model = model
        self.locations = dict(locations)

    @classmethod
    def measure(cls, model: nn.Module, inputs: object) -> "ModelCost":
        """Run one forward pass and note at how many locations each layer works.

        Args:
            model: the model; its state is as before afterwards.
            inputs: what the model reads: a tensor, a tuple of positional or a mapping of keyword arguments.

        Returns:
            The meter, per sample.
        """
        locations: dict[str, float] = {}
        samples = max(batch_size(inputs), 1)

        def note(path: str, module: nn.Module, count: float) -> None:
            locations[path] = locations.get(path, 0.0) + count / samples

        arguments, keywords = example_arguments(inputs)
        with undisturbed(model), torch.no_grad(), _watched(model, note):
            model.eval()
            model(*arguments, **keywords)
        return cls(model, locations)

    def layer(self, path: str, weight_entries: float | int) -> float:
        """FLOPs that so many weight entries cost in one layer, per sample."""
        return 2.0 * weight_entries * self.locations.get(path, 0.0)

    def channel(self, site: Site) -> tuple[float, float]:
        """What one more channel costs at the site's present shapes.

        Args:
            site: where; one of the model's.

        Returns:
            (parameters, FLOPs of one sample's forward pass).
        """
        if site.room == 0:
            return 0.0, 0.0
        parameters = plan_size(site, site.granularity) / site.granularity
        return parameters, sum(self.layer(path, entries) for path, entries in site.multiplications.items())

    def flops(self) -> int:
        """FLOPs (2 × MACs) of one sample's forward pass with the model's present shapes."""
        total = 0.0
        for path in self.locations:
            total += self.layer(path, _entries(self.model.get_submodule(path)))
        return round(total)

    @contextmanager
    def counting(self) -> Iterator[Spent]:
        """Count what the layers compute meanwhile; a pass that records gradients counts three times, for its backward.

        Yields:
            A counter that grows with every layer that runs, in the model or in a copy that is made of it meanwhile.
        """
        spent = Spent()

        def note(path: str, module: nn.Module, count: float) -> None:
            passes = 3 if torch.is_grad_enabled() else 1
            spent.flops += passes * 2.0 * _entries(module) * count

        with _watched(self.model, note):
            yield spent


@contextmanager
def _watched(model: nn.Module, note: Callable[[str, nn.Module, float], None]) -> Iterator[None]:
    """Tell at how many locations each convolution and linear layer is applied, whenever one runs."""

    def watch(path: str, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        x = arguments[0] if arguments else output  # given by name, as no convolution's input is
        note(path, module, layers.weighted(module).locations(x, output))

    counted = [(path, module) for path, module in model.named_modules() if layers.is_weighted(module)]
    hooks = [module.register_forward_hook(partial(watch, path)) for path, module in counted]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _entries(module: nn.Module) -> float:
    """Multiply-adds per location."""
    return layers.weighted(module).multiplications()


def batch_size(inputs: object) -> int:
    """Samples in a batch: the length of the first tensor found; 0 where there is none."""
    if isinstance(inputs, Tensor):
        return inputs.shape[0] if inputs.dim() else 0
    values = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else ()
    return next((size for value in values if (size := batch_size(value))), 0)
