"""A counter of the FLOPs spent."""

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils.flop_counter import flop_registry


class FlopMeter(TorchDispatchMode):
    """Counts inside its block every operation that torch.utils.flop_counter has a formula for, backward included.

    These are convolutions and matrix products, at 2 × multiply-accumulates; decompositions of small matrices have no
    formula. Unlike FlopCounterMode it attaches no hook to any module, so that statistics can be collected inside.

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
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and add its count."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            plain = getattr(formula, "__wrapped__", None)
            if plain is None:
                self.flops += int(formula(*args, **kwargs, out_val=result))
            else:  # torch's own way to the shapes takes as long as a small product
                self.flops += int(plain(*map(_shape, args), **_shape(kwargs), out_shape=_shape(result)))
        return result


def count_once(known: dict[Hashable, int], key: Hashable, work: Callable[[], None]) -> None:
    """Run work that takes as many FLOPs each time, and have them counted one by one the first time only.

    A call from torch to Python for each of many small operations costs more than they do. Other dispatch modes than a
    FlopMeter see them all.

    Args:
        known: FLOPs of what has been counted.
        key: what they depend on.
        work: what is to be done.
    """
    meter = _get_current_dispatch_mode()
    if not isinstance(meter, FlopMeter):
        work()
    elif key in known:
        with _pop_mode_temporarily():
            work()
        meter.flops += known[key]
    else:
        before = meter.flops
        work()
        known[key] = meter.flops - before


def _shape(value: Any) -> Any:
    """The same with the shapes of tensors in their place."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, dict):
        return {name: _shape(each) for name, each in value.items()}
    return [_shape(each) for each in value] if isinstance(value, list | tuple) else value
