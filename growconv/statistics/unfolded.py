"""The unfold path: patches in chunks of bounded size and no mask tensor; any stride, dilation, padding and kernel."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from growconv.convolution.geometry import Geometry
from growconv.convolution.unfold import pad, tap_multiplicities, unfold, windows
from growconv.statistics.problem import PairProblem
from growconv.statistics.sums import Totals

_WEIGHT_GRADIENTS: dict[int, Callable[..., Tensor]] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}

SYMMETRIC_BLOCK = 96
"""Rows of a Gram matrix that are multiplied at a time, with all that come after."""


def gram(rows: Float[Tensor, "a n"]) -> Float[Tensor, "a a"]:
    """rows·rowsᵀ, leaving out most of the products that symmetry gives.

    Args:
        rows: matrix of a rows.
    """
    size = rows.shape[0]
    result = rows.new_empty(size, size)
    for start in range(0, size, SYMMETRIC_BLOCK):
        part = rows[start : start + SYMMETRIC_BLOCK] @ rows[start:].T
        result[start : start + SYMMETRIC_BLOCK, start:] = part
        result[start:, start : start + SYMMETRIC_BLOCK] = part.T
    return result


def weight_gradient(
    maps: Float[Tensor, "n c *size"],
    v: Float[Tensor, "n d *out"],
    geometry: Geometry,
    padding: int | tuple[int, ...] = 0,
) -> Float[Tensor, "c b d"]:
    """Σ over samples and outputs of (what tap b reads in channel c) times v: the gradient of a convolution's weight.

    Args:
        maps: input maps.
        v: maps on the output grid.
        geometry: kernel, stride and dilation; its padding is not looked at.
        padding: zero padding to assume around the maps, the same on both sides of an axis.
    """
    size = (v.shape[1], maps.shape[1], *geometry.kernel_size)
    gradient = _WEIGHT_GRADIENTS[geometry.axes]
    weight = gradient(maps, size, v, stride=geometry.stride, padding=padding, dilation=geometry.dilation)
    return weight.flatten(2).permute(1, 2, 0)


def _consumer_gradient(h: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
    """`weight_gradient` with a layer's own padding, explicit only where the gradient cannot express it."""
    if geometry.padding_mode == "zeros" and all(low == high for low, high in geometry.padding):
        return weight_gradient(h, v, geometry, tuple(low for low, _ in geometry.padding))
    return weight_gradient(pad(h, geometry), v, geometry)


def add_unfolded_sums(
    totals: Totals,
    problem: PairProblem,
    quantities: frozenset[str],
    x: Float[Tensor, "n c *size"],
    h: Float[Tensor, "n d *grid"],
    v: Float[Tensor, "n e *out"],
    scratch_bytes: int,
) -> None:
    """Add a batch to the sums, entries of the biases left out.

    Args:
        totals: sums so far, by name.
        quantities: names among S, S_full, N_raw, M, S2, P and patch_gram.
        x: input of the producer.
        h: input of the consumer.
        v: desired change of the consumer's output.
        scratch_bytes: bound on what the patches of one chunk may take. At least one sample is unfolded at once, in
            slabs of rows where the producer's grid is the consumer's and padding is zeros.
    """
    if "M" in quantities:
        totals.add("M", _consumer_gradient(h, v, problem.second).flatten(0, 1))
    if not quantities - {"M"}:
        return
    q = tap_multiplicities(problem.hidden_size, problem.second, dtype=x.dtype, device=x.device)
    samples, rows = _chunks(problem, quantities, x.element_size(), scratch_bytes)
    for start in range(0, x.shape[0], samples):
        chunk = slice(start, start + samples)
        for slab in _slabs(problem, rows):
            _add_slab(totals, problem, quantities, (x[chunk], h[chunk], v[chunk]), q, slab)
        if "S_full" in quantities:
            entries = problem.patch_entries * problem.second.taps
            totals.setdefault("S_full", torch.zeros(entries, entries, dtype=torch.float64, device=x.device))
            for slab in _output_slabs(problem, rows):
                _add_full(totals, problem, x[chunk], slab)


@dataclass(frozen=True)
class _Slab:
    """Rows [low, high) of the hidden grid and the output rows that read them, `new_outputs` on first seen here."""

    low: int
    high: int
    first_output: int
    end_output: int
    new_outputs: int


def _slabs(problem: PairProblem, rows: int) -> Iterator[_Slab]:
    """Disjoint rows of the hidden grid; output rows are seen by every slab that they read."""
    reach, step = problem.second.effective_size[0], problem.second.stride[0]
    top, size, outputs = problem.second.padding[0][0], problem.hidden_size[0], problem.output_size[0]
    seen = 0
    for low in range(0, size, rows):
        high = min(low + rows, size)
        first = min(seen, max(0, -((reach - 1 - low - top) // step)))
        end = outputs if high == size else min((high - 1 + top) // step + 1, outputs)
        yield _Slab(low, high, first, end, seen)
        seen = max(seen, end)


def _output_slabs(problem: PairProblem, rows: int) -> Iterator[_Slab]:
    """Disjoint output rows; rows of the hidden grid are seen by every slab that reads them."""
    reach, step = problem.second.effective_size[0], problem.second.stride[0]
    top, size, outputs = problem.second.padding[0][0], problem.hidden_size[0], problem.output_size[0]
    if rows >= size:
        yield _Slab(0, size, 0, outputs, 0)
        return
    count = max(1, rows // step)
    for first in range(0, outputs, count):
        end = min(first + count, outputs)
        low, high = max(0, step * first - top), min(size, step * (end - 1) + reach - top)
        if high > low:
            yield _Slab(low, high, first, end, first)


def _chunks(problem: PairProblem, quantities: frozenset[str], itemsize: int, scratch_bytes: int) -> tuple[int, int]:
    """Samples per chunk, and rows of the hidden grid per slab."""
    outputs = math.prod(problem.output_size)
    patches = problem.patch_entries * max(math.prod(problem.hidden_size), math.prod(problem.first_output_size))
    entries = 2 * patches if quantities & {"N_raw", "P", "S", "patch_gram"} else 0
    if quantities & {"S2", "P"}:
        entries += problem.consumer_entries * outputs
    if "S_full" in quantities:
        entries += patches + problem.patch_entries * problem.second.taps * outputs
    per_sample = max(1, entries * itemsize)
    rows = problem.hidden_size[0]
    divisible = problem.local and problem.first.padding_mode == problem.second.padding_mode == "zeros"
    if per_sample <= scratch_bytes or not divisible:
        return max(1, scratch_bytes // per_sample), rows
    slabs = math.ceil(per_sample / scratch_bytes)
    return 1, max(1, rows // slabs)


def _add_slab(
    totals: Totals,
    problem: PairProblem,
    quantities: frozenset[str],
    maps: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    slab: _Slab,
) -> None:
    x, h, v = maps
    outputs = slice(slab.first_output, slab.end_output)
    reads_outputs = slab.end_output > slab.first_output
    if quantities & {"S2", "P"} and reads_outputs:
        hp = _consumer_patches(problem, h, outputs)  # (n, d, *out)
        if "S2" in quantities and slab.new_outputs < slab.end_output:
            fresh = hp[:, :, slab.new_outputs - slab.first_output :]
            totals.add("S2", gram(fresh.transpose(0, 1).reshape(fresh.shape[1], -1)))
    if "S" in quantities and problem.local:
        totals.add("S", gram(_weighted_rows(problem, x, q, slab)))
        quantities -= {"S"}
    if not quantities & {"S", "N_raw", "P", "patch_gram"}:
        return
    u = _patches(problem, x, slab)  # (n, a, *hidden rows)
    if quantities & {"N_raw", "P"} and reads_outputs:
        padded = _pad_slab(problem, u, slab)
        unpadded = _without_padding(problem.second)
        if "N_raw" in quantities:
            totals.add("N_raw", weight_gradient(padded, v[:, :, outputs], unpadded))
        if "P" in quantities:
            totals.add("P", weight_gradient(padded, hp, unpadded))
        del padded
    if "patch_gram" in quantities:
        plain = u if problem.local else unfold(x, problem.first)
        totals.add("patch_gram", gram(plain.transpose(0, 1).reshape(plain.shape[1], -1)))
    if "S" in quantities:
        weighted = u * q[slab.low : slab.high].sqrt()
        del u
        totals.add("S", gram(weighted.transpose(0, 1).reshape(weighted.shape[1], -1)))


def _weighted_rows(problem: PairProblem, x: Tensor, q: Tensor, slab: _Slab) -> Float[Tensor, "a p"]:
    """√q·U of a slab as rows, written once."""
    first = problem.first
    view = _window_rows(x, first, slice(slab.low, slab.high))
    rows = view.permute(*range(1, 2 + first.axes), 0, *range(2 + first.axes, 2 + 2 * first.axes))
    weighted = torch.mul(rows, q[slab.low : slab.high].sqrt(), out=x.new_empty(rows.shape))
    return weighted.view(problem.patch_entries, -1)


def _add_full(totals: Totals, problem: PairProblem, x: Tensor, slab: _Slab) -> None:
    second = problem.second
    view = windows(
        _pad_slab(problem, _patches(problem, x, slab), slab), _without_padding(second)
    )  # (n, a, *taps, *out)
    order = (1, *range(2, 2 + second.axes), 0, *range(2 + second.axes, 2 + 2 * second.axes))
    totals.add("S_full", gram(view.permute(order).reshape(problem.patch_entries * second.taps, -1)))


def _without_padding(geometry: Geometry) -> Geometry:
    return replace(geometry, padding=((0, 0),) * geometry.axes, padding_mode="zeros", ceil_mode=False)


def _consumer_patches(problem: PairProblem, h: Tensor, outputs: slice) -> Float[Tensor, "n d *out"]:
    view = _window_rows(h, problem.second, outputs)
    return view.reshape(h.shape[0], problem.consumer_entries, *view.shape[2 + problem.second.axes :])


def _patches(problem: PairProblem, x: Tensor, slab: _Slab) -> Float[Tensor, "n a *rows"]:
    if not problem.local or slab.high - slab.low == problem.hidden_size[0]:
        return problem.features(x)
    view = _window_rows(x, problem.first, slice(slab.low, slab.high))
    return view.reshape(x.shape[0], problem.patch_entries, *view.shape[2 + problem.first.axes :])


def _window_rows(maps: Tensor, geometry: Geometry, rows: slice) -> Tensor:
    """Windows (n, c, *kernel, *output) of some rows of the output grid."""
    return windows(pad(maps, geometry), geometry)[(slice(None),) * (2 + geometry.axes) + (rows,)]


def _pad_slab(problem: PairProblem, u: Tensor, slab: _Slab) -> Tensor:
    """The slab's patches with zeros for the rows of other slabs, cropped or padded to what its outputs read."""
    second = problem.second
    if (slab.high - slab.low, slab.end_output - slab.first_output) == (problem.hidden_size[0], problem.output_size[0]):
        return pad(u, second)
    sides: list[int] = []
    for low, high in reversed(second.padding[1:]):
        sides += [low, high]
    step, top = second.stride[0], second.padding[0][0]
    above = slab.low - (step * slab.first_output - top)
    below = step * (slab.end_output - 1) + second.effective_size[0] - top - slab.high
    return F.pad(u, [*sides, above, below])
