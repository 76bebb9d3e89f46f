"""The methods on bare tensors: matrix or tensor alike, convolutions from the factors, bad input."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import growconv
from growconv.convolution.unfold import mask_tensor, unfold
from growconv.errors import ArgumentTypeError, ArgumentValueError, GeometryError
from growconv.solvers import exact, gradmax, tiny

A, B, C = 6, 4, 3
METHODS: dict[str, Callable[..., object]] = {
    "tiny": lambda S, N, *rest: tiny(S.view(A, B, A, B).diagonal(0, 1, 3).sum(-1), N, *rest),
    "exact": exact,
    "gradmax": lambda _, N, *rest: gradmax(N, *rest),
}


def moments(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(200, A * B, generator=generator, dtype=torch.float64)
    v = torch.randn(200, C, generator=generator, dtype=torch.float64)
    return X.mT @ X / 200, (X.mT @ v / 200).view(A, B, C)


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_is_taken_as_the_tensor_that_it_flattens(method: str) -> None:
    S, N = moments()
    tensor, matrix = METHODS[method](S, N, 3), METHODS[method](S, N.flatten(1), 3)
    torch.testing.assert_close(matrix.gains, tensor.gains)
    omega = [found.omega[0] if method == "exact" else found.omega for found in (tensor, matrix)]
    torch.testing.assert_close(omega[1].flatten(1), omega[0].flatten(1))
    if method != "gradmax":
        torch.testing.assert_close(matrix.alpha, tensor.alpha)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [2.0, "2", True, None, np.int64(2)])
def test_channels_that_are_no_integer(method: str, channels: object) -> None:
    with pytest.raises(TypeError, match="channels"):  # both ArgumentTypeError and, with types checked, TypeCheckError
        METHODS[method](*moments(), channels)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_says_what_to_do(method: str, dtype: torch.dtype) -> None:
    with pytest.raises(ArgumentTypeError, match="single or double precision") as error:
        METHODS[method](*(each.to(dtype) for each in moments()), 2)
    assert ".float()" in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda S, N: tiny(S[:A, :A], N, 0), "at least one channel"),
        (lambda S, N: exact(S, N, -1), "at least one channel"),
        (lambda S, N: tiny(S[:A], N), "S|square"),
        (lambda S, N: exact(S[:-1], N), "S_full|square"),
        (lambda S, N: tiny(S[:A, :A].float(), N), "different dtypes or devices"),
        (lambda S, N: tiny(S[:4, :4], N), "do not belong together"),
        (lambda S, N: exact(S, N[:, 1:]), "do not belong together"),
        (lambda S, N: exact(S[:-1, :-1], N.flatten(1)), "do not belong together"),
        (lambda S, N: exact(S, N.flatten(1)[:, :5]), "do not belong together"),
        (lambda S, N: gradmax(N[:, 0, 0]), "invalid shape"),
        (lambda S, N: gradmax(N * float("nan")), "not finite"),
    ],
)
def test_tensors_that_do_not_fit(call: Callable[[Tensor, Tensor], object], message: str) -> None:
    with pytest.raises((ArgumentValueError, TypeError), match=message):  # TypeError: jaxtyping's, in the typed run
        call(*moments())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_two_convolutions_compute_what_the_factors_say(bias: bool, flat: bool) -> None:
    """Referee: Σ_ab X_ab α_a ω_bc with X from unfolding and the mask tensor (the bias is read where a tap reads)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, 6, generator=generator, dtype=torch.float64)
    alpha = torch.randn(5, 3 * 6 + bias, generator=generator, dtype=torch.float64)
    omega = torch.randn(5, 6, 4, generator=generator, dtype=torch.float64)
    first, second = growconv.conv_pair(
        alpha, omega.flatten(1) if flat else omega, (3, 2, 3), (3, 2), {"padding": 1}, {"stride": 2, "padding": (1, 0)}
    )
    assert (type(first), type(second), first.bias is not None, second.bias) == (nn.Conv2d, nn.Conv2d, bias, None)
    patches = unfold(x, growconv.convolution.geometry.Geometry.of(first))
    if bias:
        patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
    mask = mask_tensor((8, 6), second, dtype=torch.float64)
    expected = torch.einsum("ial,mbl,ka,kbc->icm", patches, mask, alpha, omega)
    torch.testing.assert_close(second(first(x)).flatten(2), expected)


def test_the_pair_of_a_solved_problem_lowers_the_objective_as_promised() -> None:
    """J of the two convolutions, measured on the maps, is minus the sum of exact's gains."""
    torch.manual_seed(0)
    x, v = torch.randn(40, 2, 5, 5).double(), torch.randn(40, 3, 3, 3).double()
    first, second = nn.Conv2d(2, 1, 2).double(), nn.Conv2d(1, 3, 2).double()
    patches = unfold(x, growconv.convolution.geometry.Geometry.of(first))
    X = torch.einsum("ial,mbl->imab", patches, mask_tensor((4, 4), second, dtype=torch.float64)).flatten(2)
    S_full = torch.einsum("imx,imy->xy", X, X) / 40
    found = exact(S_full, torch.einsum("imx,icm->xc", X, v.flatten(2)).view(8, 4, 3) / 40, channels=2)
    grown = growconv.conv_pair(found.alpha, found.omega[0], (2, 2, 2), 2)
    added = grown[1](grown[0](x)).detach()
    objective = float((v - added).square().sum() - v.square().sum()) / 40
    assert objective == pytest.approx(-float(found.gains.sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("alpha", "omega", "shape"),
    [
        ((5, 11), (5, 4, 3), (3, 2, 2)),
        ((5, 12), (4, 4, 3), (3, 2, 2)),
        ((5, 12), (5, 3), (3, 2, 2)),
        ((5, 3), (5, 4), (3,)),
    ],
)
def test_factors_that_fit_no_kernels(alpha: tuple, omega: tuple, shape: tuple) -> None:
    with pytest.raises(GeometryError, match=r"conv_pair"):
        growconv.conv_pair(torch.randn(alpha), torch.randn(omega), shape, 2)
