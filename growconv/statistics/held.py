"""Batches held until W* is known: N, N_raw and P from x, h and v themselves; and the memory that copies are held in."""

import contextlib
import itertools
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.convolution.unfold import convolve
from growconv.statistics.accumulator import ConsumerSums
from growconv.statistics.problem import PairProblem
from growconv.statistics.sums import full_precision

GROUP_BYTES = 6 * 2**20
"""Calls on small batches are summed together up to this size: every product has costs that no sample adds to."""


def applied_update(
    problem: PairProblem, h: Float[Tensor, "n c *hidden"], update: Float[Tensor, "d c2"]
) -> Float[Tensor, "n c2 *out"]:
    """W*·Hp: what an update of the consumer's own weights adds to its output.

    Args:
        h: input of the consumer.
        update: W*, the bias in the last row where the consumer has one.
    """
    second, update = problem.second, update.to(h)
    weight, bias = (update[:-1], update[-1]) if problem.second_bias else (update, None)
    weight = weight.T.reshape(-1, h.shape[1], *second.kernel_size)
    return convolve(h, weight, second, bias)


BLOCK_BYTES = 33 * 2**20
"""Larger than 32 MiB, glibc's greatest limit for memory of its heap: a block is mapped by itself, untouched pages of it
take nothing, and it goes back to the system as a whole."""


def _block(size: int) -> Tensor:
    """Fresh memory, in large pages where the system has them: to take small ones costs more than to fill them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


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
            self._block = _block(max(size, BLOCK_BYTES))
        part, self._block = self._block[:size], self._block[-(-size // 64) * 64 :]
        return part.view(dtype).view(like.shape)

    def copy(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of a tensor."""
        return self.empty(tensor, dtype or tensor.dtype).copy_(tensor)


@dataclass(frozen=True, eq=False)
class HeldBatch:
    """One call on one batch.

    Attributes:
        problem: shapes and geometry.
        inputs: of the producer (n, C0, *size); of several producers each one's own, as its layer saw it.
        h: input of the consumer (n, C1, *grid).
        v: desired change of the consumer's output (n, C2, *out).
        samples: how many new samples these are; 0 for a further call on the same ones.
        joins: makes one input of those of several producers, anew each time, since it may be large.
        left_out: second moments that are not summed of it.
        kept: whether the tensors are kept samples, which stay as they are.
        M: M without the entries of the bias, where autograd has computed it; None where it has not.
    """

    problem: PairProblem
    inputs: Tensor | Mapping[str, Tensor]
    h: Tensor
    v: Tensor
    samples: int
    joins: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    left_out: frozenset[str] = frozenset()
    kept: bool = False
    M: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """Input of the producer, or of all producers taken as one."""
        if isinstance(self.inputs, Tensor):
            return self.inputs
        return cast(Callable[..., Tensor], self.joins)(self.inputs)

    @property
    def size(self) -> int:
        """Bytes."""
        own = (self.inputs,) if isinstance(self.inputs, Tensor) else self.inputs.values()
        return sum(each.numel() * each.element_size() for each in (*own, self.h, self.v))

    @property
    def extra(self) -> int:
        """Bytes that holding it takes beyond kept samples."""
        return 0 if self.kept else self.size

    def copied(self, shelf: Shelf) -> "HeldBatch":
        """A batch that nobody else changes."""
        if self.kept:
            return self
        own = self.inputs
        copied = shelf.copy(own) if isinstance(own, Tensor) else {path: shelf.copy(x) for path, x in own.items()}
        return replace(self, inputs=copied, h=shelf.copy(self.h), v=shelf.copy(self.v))


def grouped(batches: Iterable[HeldBatch]) -> Iterator[HeldBatch]:
    """Small batches of one shape, one after the other, as larger ones.

    Args:
        batches: in the order in which they came.
    """

    def shapes(batch: HeldBatch) -> tuple[object, ...]:
        return batch.problem, *((each.dtype, each.device) for each in (batch.h, batch.v))

    for _, alike in itertools.groupby(batches, key=shapes):
        waiting: list[HeldBatch] = []
        for batch in alike:
            full = sum(each.size for each in (*waiting, batch)) > GROUP_BYTES
            if waiting and (full or batch.joins is not None):
                yield _joined(waiting)
                waiting = []
            waiting.append(batch)
        yield _joined(waiting)


def _joined(batches: list[HeldBatch]) -> HeldBatch:
    if len(batches) == 1:
        return batches[0]
    x, h, v = (torch.cat([getattr(each, name) for each in batches]) for name in "xhv")
    given = [each.M for each in batches if each.M is not None]
    M = torch.stack(given).sum(dim=0) if len(given) == len(batches) else None
    return replace(batches[0], inputs=x, h=h, v=v, samples=sum(each.samples for each in batches), M=M)


@dataclass(frozen=True, eq=False)
class Held:
    """All batches of one consumer.

    With W* at hand N is one correlation, of x and v⊥ = v − W*·Hp; without it takes P, the dearest statistic.

    Attributes:
        where: name of site and consumer, for messages.
        path: as `ConsumerSums`.
        scratch_bytes: as `ConsumerSums`; P is given where it fits into as much.
        batches: what is held.
        left_out: batches that an average is to leave out again.
    """

    where: str
    path: str
    scratch_bytes: int
    batches: tuple[HeldBatch, ...]
    left_out: tuple[HeldBatch, ...] = ()

    @property
    def holds_projection(self) -> bool:
        """Whether P fits."""
        return 8 * self.batches[0].problem.projection_entries <= self.scratch_bytes

    def average(self, name: str, update: Float[Tensor, "d c2"] | None = None) -> Tensor:
        """An average over the samples.

        Args:
            name: N_raw or P.
            update: W*; N_raw is then N.
        """
        total, samples = self._average(self.batches, name, update)
        if not self.left_out:
            return total
        part, fewer = self._average(self.left_out, name, update)
        return (samples * total - fewer * part.to(total)) / (samples - fewer)

    def _average(self, batches: Iterable[HeldBatch], name: str, update: Tensor | None) -> tuple[Tensor, int]:
        sums = ConsumerSums(self.where, frozenset({name}), self.path, self.scratch_bytes)
        for batch in grouped(batches):
            with full_precision(batch.v.device):
                v = batch.v if update is None else batch.v - applied_update(batch.problem, batch.h, update)
                sums.add(batch.problem, batch.x, batch.h, v, batch.samples)
        with full_precision(torch.device("cpu")):
            return sums.averages()[name], sums.samples

    def joined(self, other: "Held") -> "Held":
        """With the batches of another."""
        left_out = (*self.left_out, *other.left_out)
        return replace(self, batches=(*self.batches, *other.batches), left_out=left_out)
