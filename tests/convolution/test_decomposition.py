"""CP and Tucker decompositions: as good as tensorly's, exact where they can be, and honest where they are not."""

import warnings

import pytest
import tensorly
import torch
from tensorly.decomposition import parafac

import growconv
from growconv.convolution import decomposition
from growconv.convolution.decomposition import ConvergenceWarning, decompose_cp, decompose_tucker


@pytest.mark.parametrize(("kind", "rank"), [(growconv.CPConv2d, 5), (growconv.TuckerConv2d, (4, 3))])
def test_kernels_of_low_rank_come_back(kind, rank):
    torch.manual_seed(1)
    conv = kind(8, 9, 3, stride=2, padding=1, dilation=1, rank=rank).to_conv()
    layer = kind.from_conv(conv, rank=rank)
    assert layer.fit.error < 1e-5
    assert layer.rank == rank
    x = torch.randn(2, 8, 9, 9)
    assert (layer(x) - conv(x)).abs().max() < 1e-4 * conv(x).abs().max()
    assert (layer.to_conv().weight - conv.weight).norm() < 1e-4 * conv.weight.norm()


def test_not_converged_says_so_and_keeps_the_best():
    torch.manual_seed(0)
    kernel = torch.randn(12, 10, 3, 3)
    with pytest.warns(ConvergenceWarning, match="not converged after 3 iterations"):
        factors, fit = decompose_cp(kernel, 40, iterations=3)
    assert not fit.converged
    assert fit.iterations == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, more = decompose_cp(kernel, 40, iterations=30)
    assert more.error < fit.error < 1
    again = torch.einsum("or,ir,hr,wr->oihw", *factors)
    assert float((again - kernel).norm() / kernel.norm()) == pytest.approx(fit.error, rel=1e-3)


@pytest.mark.parametrize(("shape", "rank"), [((8, 4, 3, 3), 12), ((16, 16, 3, 3), 20)])
def test_the_cp_fit_is_as_good_as_two_hundred_sweeps_of_tensorly(shape, rank):
    ours, theirs = [], []
    for seed in range(2):
        kernel = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        fit = decompose_cp(kernel, rank)[-1]
        assert fit.converged
        ours.append(fit.error)
        # TensorLy from our own start, so that no luck with local minima is measured.
        start = decomposition._leading_vectors(kernel, rank)
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            terms = parafac(kernel, rank, init=(None, start), n_iter_max=200, tol=1e-14)
            again = tensorly.cp_to_tensor(terms)
        theirs.append(float((again - kernel).norm() / kernel.norm()))
    assert max(mine / other for mine, other in zip(ours, theirs, strict=True)) < 1.001


def test_decompositions_leave_tensorly_alone_and_repeat():
    kernel = torch.randn(6, 5, 3)
    backend = tensorly.get_backend()
    numbers = torch.random.get_rng_state()
    first, _ = decompose_cp(kernel, 7, iterations=500)
    (core, outputs, inputs), _ = decompose_tucker(kernel, (3, 3))
    assert tensorly.get_backend() == backend
    assert torch.equal(torch.random.get_rng_state(), numbers)
    second, _ = decompose_cp(kernel, 7, iterations=500)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(outputs.T @ outputs, torch.eye(3))
    torch.testing.assert_close(inputs.T @ inputs, torch.eye(3))
    assert core.shape == (3, 3, 3)


@pytest.mark.parametrize("decompose", [lambda k: decompose_cp(k, 3), lambda k: decompose_tucker(k, (2, 2))])
def test_zero_kernels(decompose):
    _, fit = decompose(torch.zeros(4, 5, 3, 3))
    assert fit.error == 0
    assert fit.converged
