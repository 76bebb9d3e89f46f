"""Memory for copies that outlive the passes over the batches."""

import torch
from torch import Tensor

BLOCK_BYTES = 33 * 2**20
"""Larger than 32 MiB, glibc's greatest limit for memory of its heap: a block is mapped by itself, untouched pages of it
take nothing, and it goes back to the system as a whole."""


class Shelf:
    """Long-lived copies side by side in large blocks.

    Single ones would lie among the tensors that every pass allocates and frees, and leave gaps between them that an
    aligned allocation of the same size does not fit. Other devices than the CPU have allocators that reuse such gaps.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A new tensor.

        Args:
            like: of which shape and on which device.
            dtype: its type.
        """
        size = like.numel() * dtype.itemsize
        if like.device.type != "cpu":
            return torch.empty(like.shape, dtype=dtype, device=like.device)
        if size > len(self._block):
            self._block = torch.empty(max(size, BLOCK_BYTES), dtype=torch.uint8)
        part, self._block = self._block[:size], self._block[-(-size // 64) * 64 :]
        return part.view(dtype).view(like.shape)

    def copy(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of a tensor."""
        return self.empty(tensor, dtype or tensor.dtype).copy_(tensor)
