"""Counting floating-point operations as they are done: 2 × multiply-accumulates of convolutions and matrix products."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from growconv.network.model import copied


class FlopMeter(TorchDispatchMode):
    """Counts inside its block every operation that torch.utils.flop_counter has a formula for, backward included.

    Unlike FlopCounterMode it attaches no hook to any module, so that statistics can be collected inside.

    Attributes:
        flops: operations so far.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True, torch's default, would import torch._dynamo at the first operation

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and add its count."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=result))
        return result


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
