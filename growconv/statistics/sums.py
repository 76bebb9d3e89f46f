"""Sums over batches in float64, and arithmetic in full precision whatever the training loop has switched on."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute without autograd, autocast, TF32 or bfloat16 shortcuts, and put every switch back afterwards.

    Inside a hook of a training step autocast turns even products of float32 tensors into bfloat16.

    Args:
        device: where the tensors live.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_exact_products())
        yield


@contextmanager
def _exact_products() -> Iterator[None]:
    backends: Any = torch.backends
    places = (
        [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
        if (hasattr(backends.cudnn, "conv") and hasattr(backends.mkldnn, "matmul"))
        else []
    )
    if places:
        saved = [place.fp32_precision for place in places]
        try:
            for place in places:
                place.fp32_precision = "ieee"
            yield
        finally:
            for place, precision in zip(places, saved, strict=True):
                place.fp32_precision = precision
        return
    matmul, convolution = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        backends.cudnn.allow_tf32 = convolution


def is_exact(tensor: Tensor) -> bool:
    """Whether autograd's own products of tensors of this type and device are in full precision as things are set."""
    convolution: Any = getattr(torch.backends.mkldnn, "conv", None)
    shortcut = convolution is not None and convolution.fp32_precision not in ("none", "ieee")
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64) and not shortcut


PART = 2**18
"""Entries that are added to a sum at a time."""


class Totals(dict[str, Tensor]):
    """Named sums. Each addend comes in the precision of its batch, the sums are float64."""

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum, or start it.

        Args:
            name: of the sum.
            value: the addend; the same shape each time.
        """
        if name in self:
            # in parts, since an addend of another type is converted whole before it is added
            for total, part in zip(self[name].view(-1).split(PART), value.reshape(-1).split(PART), strict=True):
                total.add_(part)
        else:
            self[name] = value.to(torch.float64, copy=True, memory_format=torch.contiguous_format)

    def absorb(self, other: "Totals") -> None:
        """Add all sums of another collection."""
        for name, value in other.items():
            self.add(name, value)


def entries_text(count: int) -> str:
    """A number of float64 entries with its size, for messages."""
    size = 8 * count
    unit = max(0, min(3, int(math.log(max(size, 1), 1024))))
    return f"{count:,} entries ({size / 1024**unit:.3g} {('B', 'KiB', 'MiB', 'GiB')[unit]})"
