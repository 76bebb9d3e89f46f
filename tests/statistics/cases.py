"""Drawn pairs of convolutions and the sums of one path, for the tests of the statistics."""

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor

from growconv.convolution.geometry import Geometry
from growconv.errors import GeometryError
from growconv.statistics.constants import with_constants
from growconv.statistics.dense import dense_sums
from growconv.statistics.offset_path import OffsetPath
from growconv.statistics.problem import PairProblem
from growconv.statistics.sums import Totals
from growconv.statistics.unfolded import add_unfolded_sums

SUMS = frozenset({"S", "S_full", "N_raw", "M", "S2", "P", "patch_gram"})


@st.composite
def convolutions(draw, axes, largest, plain=False):
    """Numbers of a convolution: 1 to `largest` taps, even and rectangular too, padding up to the kernel."""
    kernel = tuple(draw(st.integers(1, largest)) for _ in range(axes))
    ones = (1,) * axes
    stride = ones if plain else tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in kernel)
    dilation = ones if plain else tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in kernel)
    padding = tuple((draw(st.integers(0, k)), draw(st.integers(0, k))) for k in kernel)
    return kernel, stride, dilation, padding


@st.composite
def pairs(draw, axes=(1, 2, 2, 2, 3), plain=False):
    """Numbers of a pair of convolutions on a drawn image, odd sizes included. `problem` makes them a PairProblem.

    Strategies must not run the package: its type checks draw random numbers, which hypothesis forbids inside of them.
    """
    chosen = draw(st.sampled_from(axes))
    largest = {1: 7, 2: draw(st.sampled_from([3, 3, 4, 5, 7])), 3: 2}[chosen]
    first = draw(convolutions(chosen, largest, plain))
    second = draw(convolutions(chosen, min(largest, 4), plain))
    if draw(st.booleans()):
        first, second = second, first
    size = tuple(draw(st.integers(1, {1: 20, 2: 11, 3: 6}[chosen])) for _ in range(chosen))
    channels = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    return first, second, size, channels, draw(st.booleans()), draw(st.booleans())


def problem_of(pair):
    """The PairProblem of drawn numbers; rejects the example where a kernel does not fit."""
    first, second = Geometry(*pair[0]), Geometry(*pair[1])
    try:
        hidden = first.output_size(pair[2])
        second.output_size(hidden)
    except GeometryError:
        reject()
    return PairProblem(first, second, (), pair[2], hidden, *pair[3:])


def tensors(problem, samples=3, dtype=torch.float64, seed=0):
    """Random x, h and v that fit a problem."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (problem.input_size, problem.hidden_size, problem.output_size)
    return [
        torch.randn(samples, c, *size, dtype=torch.float64, generator=generator).to(dtype)
        for c, size in zip(problem.channels, sizes, strict=True)
    ]


def statistics_of(problem, full_limit=400):
    """What can be compared in reasonable memory."""
    entries = (problem.patch_entries + 1) * problem.second.taps
    return SUMS if entries <= full_limit else SUMS - {"S_full"}


def dense(problem, names, x, h, v) -> dict[str, Tensor]:
    """The reference."""
    return dense_sums(problem, names | {"patch_mean"}, x, h, v)


def unfolded(problem, names, x, h, v, scratch=1 << 28) -> dict[str, Tensor]:
    """The unfold path, in two batches."""
    totals = Totals()
    for part in (slice(None, 1), slice(1, None)):
        add_unfolded_sums(totals, problem, names, x[part], h[part], v[part], scratch)
    return _finished(problem, dict(totals), x, h, v)


def by_offsets(problem, names, x, h, v, scratch=1 << 28) -> dict[str, Tensor]:
    """The offset path, in two batches."""
    path, totals = OffsetPath(problem, names, scratch), Totals()
    for part in (slice(None, 1), slice(1, None)):
        path.add(totals, x[part], h[part], v[part])
    return _finished(problem, path.expand(totals), x, h, v)


def _finished(problem, sums, x, h, v):
    maps = {name: tensor.double().sum(dim=0) for name, tensor in (("x", x), ("h", h), ("v", v))}
    return with_constants(problem, sums, maps, x.shape[0])


def assert_equal(found, expected, tolerance):
    """Every statistic is there, has its shape, and differs by less than `tolerance` of its largest entry."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == torch.float64, name
        scale = float(value.double().abs().max())
        error = float((found[name] - value.double()).abs().max())
        assert error <= tolerance * max(scale, 1e-300), f"{name}: {error / max(scale, 1e-300):.3g}"
