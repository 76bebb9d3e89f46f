"""What one training step costs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from growconv.growth.cost import FlopMeter
from growconv.network.model import copied


def training_flops(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Callable[[Any, Tensor], Tensor]) -> float:
    """Operations of the forward and backward pass of one sample.

    They are counted on a copy of the model, as it runs. Meta tensors would need no arithmetic, but their first use
    imports torch._dynamo, which takes longer than a few samples.

    Args:
        model: the model; left as it is.
        inputs: (n, channels, height, width), a few samples.
        targets: their targets.
        loss: loss(output, targets), a scalar.

    Returns:
        FLOPs per sample; 2 × MACs.
    """
    twin = copied(model).train()
    with torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []), FlopMeter() as meter:
        loss(twin(inputs), targets).backward()
    return meter.flops / len(inputs)
