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
from growconv.convolution.unfold import pad, tap_multiplicities, windows
from growconv.statistics.problem import PairProblem
from growconv.statistics.sums import Totals

_WEIGHT_GRADIENTS: dict[int, Callable[..., Tensor]] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}

CHUNK_BYTES = 2**25
"""What the patches of a chunk take, however much scratch there is, unless they would have fewer than four times as many
columns as rows: then adding up the products would cost too much beside them."""

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
        enough = max(CHUNK_BYTES // per_sample, 4 * problem.patch_entries // outputs)
        return max(1, min(scratch_bytes // per_sample, enough)), rows
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
    first, second = problem.first, problem.second
    rows = slice(slab.low, slab.high)
    if "S2" in quantities and slab.new_outputs < slab.end_output:
        own = _window_rows(_samples_last(h, second), second, slice(slab.new_outputs, slab.end_output))
        totals.add("S2", gram(own.reshape(problem.consumer_entries, -1)))
    if "patch_gram" in quantities:
        own = _window_rows(_samples_last(x, first), first, rows if problem.local else slice(None))
        totals.add("patch_gram", gram(own.reshape(problem.patch_entries, -1)))
    if "S" in quantities:
        totals.add("S", gram(_weighted_patches(problem, x, q[rows].sqrt(), rows)))
    seen = _seen_from_inputs(second) if problem.local else None
    if "N_raw" in quantities and seen is not None:
        totals.add("N_raw", _correlation(problem, x, v, seen, rows))
        quantities -= {"N_raw"}
    if quantities & {"N_raw", "P"} and slab.end_output > slab.first_output:
        outputs, unpadded = slice(slab.first_output, slab.end_output), _without_padding(second)
        padded = _padded_slab(problem, x, slab)
        if "N_raw" in quantities:
            totals.add("N_raw", weight_gradient(padded, v[:, :, outputs], unpadded))
        if "P" in quantities:
            totals.add("P", weight_gradient(padded, _patch_maps(h, second, outputs), unpadded))


def _samples_last(maps: Float[Tensor, "n c *size"], geometry: Geometry) -> Float[Tensor, "c *padded n"]:
    """Padded maps with the samples side by side, so that windows are copied in long runs."""
    padded = pad(maps, geometry)
    return padded.flatten(1).T.contiguous().view(*padded.shape[1:], len(padded))


def _window_rows(
    maps: Float[Tensor, "c *padded n"], geometry: Geometry, rows: slice
) -> Float[Tensor, "c *kernel_and_output n"]:
    """View of windows of some rows of the output grid."""
    view, axes = maps, geometry.axes
    for axis in range(axes):
        view = view.unfold(1 + axis, geometry.effective_size[axis], geometry.stride[axis])
        view = view[..., :: geometry.dilation[axis]]
    view = view.permute(0, *range(2 + axes, 2 + 2 * axes), *range(1, 2 + axes))
    return view[(slice(None),) * (1 + axes) + (rows,)]


def _weighted_patches(problem: PairProblem, x: Tensor, weights: Tensor, rows: slice) -> Float[Tensor, "a p"]:
    """√q·U of some rows of the hidden grid, written once."""
    if problem.local:
        view = _window_rows(_samples_last(x, problem.first), problem.first, rows)
        weighted = torch.mul(view, weights.unsqueeze(-1), out=x.new_empty(view.shape))
    else:
        weighted = (problem.features(x) * weights).transpose(0, 1)
    return weighted.reshape(problem.patch_entries, -1)


def _seen_from_inputs(geometry: Geometry) -> Geometry | None:
    """The windows of the output that each input location gives to, in the reverse order of taps; None for no such."""
    reach = [size - 1 for size in geometry.effective_size]
    if geometry.padding_mode != "zeros" or set(geometry.stride) != {1}:
        return None
    sides = tuple((size - low, size - high) for size, (low, high) in zip(reach, geometry.padding, strict=True))
    return replace(geometry, padding=sides) if min(map(min, sides)) >= 0 else None


def _correlation(problem: PairProblem, x: Tensor, v: Tensor, seen: Geometry, rows: slice) -> Float[Tensor, "a b c"]:
    """N_raw of some rows of the hidden grid: their patches times the windows of v that they give to."""
    first = problem.first
    patches = _window_rows(_samples_last(x, first), first, rows).reshape(problem.patch_entries, -1)
    given = _window_rows(_samples_last(v, seen), seen, rows).reshape(v.shape[1] * seen.taps, -1)
    return (patches @ given.T).view(-1, v.shape[1], seen.taps).flip(2).mT


def _add_full(totals: Totals, problem: PairProblem, x: Tensor, slab: _Slab) -> None:
    second = problem.second
    view = windows(_padded_slab(problem, x, slab), _without_padding(second))  # (n, a, *taps, *out)
    order = (1, *range(2, 2 + second.axes), 0, *range(2 + second.axes, 2 + 2 * second.axes))
    totals.add("S_full", gram(view.permute(order).reshape(problem.patch_entries * second.taps, -1)))


def _without_padding(geometry: Geometry) -> Geometry:
    return replace(geometry, padding=((0, 0),) * geometry.axes, padding_mode="zeros", ceil_mode=False)


def _patch_maps(maps: Tensor, geometry: Geometry, rows: slice) -> Float[Tensor, "n a *rows"]:
    """Patches of some rows of the output grid."""
    view = windows(pad(maps, geometry), geometry)[(slice(None),) * (2 + geometry.axes) + (rows,)]
    return view.reshape(len(maps), -1, *view.shape[2 + geometry.axes :])


def _padded_slab(problem: PairProblem, x: Tensor, slab: _Slab) -> Float[Tensor, "n a *padded"]:
    """The slab's patches with zeros for the rows of other slabs, cropped or padded to what its outputs read."""
    second, rows = problem.second, slice(slab.low, slab.high)
    u = _patch_maps(x, problem.first, rows) if problem.local else problem.features(x)
    if (slab.high - slab.low, slab.end_output - slab.first_output) == (problem.hidden_size[0], problem.output_size[0]):
        return pad(u, second)
    sides: list[int] = []
    for low, high in reversed(second.padding[1:]):
        sides += [low, high]
    step, top = second.stride[0], second.padding[0][0]
    above = slab.low - (step * slab.first_output - top)
    below = step * (slab.end_output - 1) + second.effective_size[0] - top - slab.high
    return F.pad(u, [*sides, above, below])
