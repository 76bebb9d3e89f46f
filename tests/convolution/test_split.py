"""Splitting kernels: composites come apart exactly, most kernels do not, enough hidden channels always do."""

import pytest
import torch
from torch import nn

import growconv
from growconv.errors import ArgumentValueError, GeometryError
from growconv.network.find import find_sites


def kernels(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    ("first", "second", "settings"),
    [
        ((6, 5, 3, 5), (7, 6, 5, 3), {}),
        ((2, 3, 3, 3), (4, 2, 3, 3), {}),
        ((8, 16, 3, 3), (16, 8, 3, 3), {}),
        ((1, 1, 3, 3), (1, 1, 3, 3), {}),
        ((3, 4, 3), (5, 3, 2), {}),
        ((2, 2, 2, 2, 2), (3, 2, 2, 1, 2), {}),
        ((3, 2, 3, 3), (2, 3, 3, 2), {"first_stride": (2, 1), "first_dilation": (1, 2), "second_dilation": 2}),
    ],
)
def test_composites_come_apart(first, second, settings):
    one, two = kernels(first, second)
    kernel = growconv.compose_kernels(one, two, **settings)
    split = growconv.split_kernel(kernel, first[0], first[2:], **settings)
    assert split.residual <= 1e-8
    assert split.first.shape == first
    assert split.second.shape == second
    again = growconv.compose_kernels(split.first, split.second, **settings)
    assert float((again - kernel).norm() / kernel.norm()) <= 1e-8
    ratio = split.first.flatten(1).norm(dim=1) / split.second.transpose(0, 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(ratio, torch.ones_like(ratio))


def test_most_kernels_do_not_split():
    """A 3×3 kernel is a polynomial in two variables; the determinant below vanishes on all products of two 2×2 ones.

    x² + y² − 1 (times any factor in one variable) is irreducible, so no pair of one-channel kernels makes it.
    """
    circle = torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)[None, None]
    residuals = [growconv.split_kernel(circle, hidden, 2).residual for hidden in (1, 2, 3, 4)]
    assert residuals[0] > 0.1
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 1e-12  # four hidden channels hold the whole 2×2 patch
    (kernel,) = kernels((4, 3, 5, 5))
    assert growconv.split_kernel(kernel, 2, 3).residual > 0.3


def test_split_is_the_best_one_with_one_hidden_channel_and_no_overlap():
    """With a 1×1 second kernel the best split is the truncated SVD, whose residual is known."""
    (kernel,) = kernels((6, 4, 3, 3))
    values = torch.linalg.svdvals(kernel.flatten(1))
    for hidden in (1, 3):
        expected = float(values[hidden:].norm() / values.norm())
        assert growconv.split_kernel(kernel, hidden, 3).residual == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("hidden", [27, 18])
def test_enough_hidden_channels_split_any_kernel(hidden):
    shape = (4, 3, 5, 5) if hidden == 27 else (2, 9, 5, 5)
    (kernel,) = kernels(shape)
    assert growconv.split_kernel(kernel, hidden, 3).residual < 1e-14


def test_zero_and_single_precision():
    split = growconv.split_kernel(torch.zeros(2, 2, 3, 3), 2, 2)
    assert split.residual == 0
    assert split.first.shape == (2, 2, 2, 2)
    one, two = kernels((2, 2, 2, 2), (2, 2, 2, 2))
    split = growconv.split_kernel(growconv.compose_kernels(one, two).float(), 2, 2)
    assert split.first.dtype == torch.float32
    assert 0 < split.residual < 1e-6


@pytest.mark.parametrize(
    ("hidden", "size", "error", "words"),
    [
        (0, 3, ArgumentValueError, "1 to 27"),
        (28, 3, ArgumentValueError, "1 to 27"),
        (True, 3, ArgumentValueError, "hidden"),
        (2, 6, GeometryError, "second kernel"),
        (2, (3, 3, 3), GeometryError, "first_size"),
    ],
)
def test_impossible_splits(hidden, size, error, words):
    with pytest.raises(error, match=words):
        growconv.split_kernel(torch.randn(4, 3, 5, 5), hidden, size)


def test_not_finite():
    with pytest.raises(ArgumentValueError, match="finite"):
        growconv.split_kernel(torch.full((2, 2, 3, 3), float("nan")), 1, 2)


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 4, 5, padding=2)
    ).double()


def test_merge_and_split_preserve_the_function_and_keep_the_optimizer_whole():
    net, x = model(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    net(x).sum().backward()
    optimizer.step()
    before = net(x)
    merged = growconv.merge_pair(net, find_sites(net, x)[0], optimizer=optimizer)
    assert merged.details["exact"]
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-12)
    split = growconv.split_conv(net, "0", 5, optimizer=optimizer)
    assert split.details["exact"]
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-12)
    assert {id(p) for p in net.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    assert "0.0 -> 0.1" in [site.name for site in find_sites(net, x)]
    net(x).sum().backward()
    optimizer.step()
    assert "exact" in str(split)


def test_an_inexact_split_says_so():
    net = model()
    split = growconv.split_conv(net, "3", 2)
    assert not split.details["exact"]
    assert split.details["residual"] > 0.1


def test_merge_refuses_what_is_no_pair():
    net, x = model(), torch.randn(1, 3, 12, 12, dtype=torch.float64)
    sites = find_sites(net, x)
    with pytest.raises(growconv.GrowthError, match="Activation lies in between"):
        growconv.merge_pair(net, sites[1])
    other = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 6, 3, padding=1)).double()
    site = find_sites(other, x)[0]
    with pytest.raises(growconv.GrowthError, match="borders=True"):
        growconv.merge_pair(other, site)
    before = other(x)
    merged = growconv.merge_pair(other, site, borders=True)
    assert not merged.details["exact"]
    torch.testing.assert_close(other(x)[..., 1:-1, 1:-1], before[..., 1:-1, 1:-1])
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(growconv.GrowthError, match="does not own"):
        growconv.merge_pair(net, sites[0], optimizer=stranger)
    assert isinstance(net[1], nn.Conv2d)


@pytest.mark.parametrize("name", ["", "2", "nowhere"])
def test_split_refuses_other_layers(name):
    with pytest.raises(growconv.GrowthError):
        growconv.split_conv(model(), name, 2)


def test_split_refuses_shared_parameters():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    net[1].weight = net[0].weight
    with pytest.raises(growconv.GrowthError, match="shared"):
        growconv.split_conv(net, "0", 2)
