"""CP and Tucker decompositions of convolution kernels, by TensorLy under a local backend context.

TensorLy's process-wide backend is never touched, and no random state but the one made here is used, so the same kernel
gives the same factors.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.errors import ArgumentValueError


class ConvergenceWarning(UserWarning):
    """A decomposition was still improving, or broke down, when it stopped; its best result was kept."""


@dataclass(frozen=True)
class Fit:
    """How well a decomposition stands for its kernel.

    Attributes:
        error: ‖kernel − reconstruction‖ / ‖kernel‖ (0 for a kernel of zeros).
        iterations: sweeps over all factors.
        converged: the last sweep lowered the error by less than the tolerance.
    """

    error: float
    iterations: int
    converged: bool


def decompose_cp(
    kernel: Float[Tensor, "outputs inputs *taps"],
    rank: int,
    *,
    iterations: int = 1000,
    tolerance: float = 1e-5,
    where: str | None = None,
) -> tuple[tuple[Tensor, ...], Fit]:
    """Sum of `rank` rank-one terms next to a kernel: alternating least squares (Kolda & Bader 2009, figure 3.3).

    Args:
        kernel: (C2, C1, *kernel_size).
        rank: number of terms R.
        iterations: most sweeps over all factors.
        tolerance: stop once a sweep lowers the relative error by less than this share of it.
        where: module path or name for messages.

    Returns:
        One factor (size, R) per axis of the kernel, all of one norm per term, and the fit. W[o,i,*t] = Σ_r ∏ factors.
    """
    _require_finite(kernel, where)
    work = kernel.detach().double()
    start = _leading_vectors(work, rank)
    if not work.any():
        start[0].zero_()
        return tuple(factor.to(kernel.dtype) for factor in start), Fit(0.0, 0, True)
    search = _Search(start, iterations, tolerance)
    # Single precision is twice as fast, but measures an error by a difference of squares: it is blind below 1e-3.
    if kernel.dtype != torch.float64:
        search.run(work.float(), floor=1e-2)
    if not search.flat:
        search.run(work, floor=1e-12)
    factors = _balance([factor.double() for factor in search.best])
    fit = _fit("CP", work, cp_kernel(factors), search.iterations, search.flat, where)
    return tuple(factor.to(kernel.dtype) for factor in factors), fit


@dataclass
class _Search:
    """TensorLy's alternating least squares, with a relative stopping rule, keeping the best factors seen."""

    best: list[Tensor]
    limit: int
    tolerance: float
    lowest: float = float("inf")
    iterations: int = 0
    flat: bool = False

    def run(self, kernel: Tensor, floor: float) -> None:
        """Sweep until the error is flat or below `floor`, or the iterations are used up."""
        from tensorly.backend import BackendManager
        from tensorly.cp_tensor import CPTensor
        from tensorly.decomposition import parafac

        start: Any = (None, [factor.to(kernel.dtype) for factor in self.best])
        previous = float("inf")
        first = True  # TensorLy reports the start, too

        def after_sweep(terms: CPTensor, error: Tensor) -> bool:
            nonlocal previous, first
            value = float(error)
            self.iterations += not first
            if value <= self.lowest:  # false for NaN
                self.best, self.lowest = [factor.clone() for factor in terms[1]], value
            self.flat = not first and (value < 1e-12 or abs(previous - value) <= self.tolerance * value)
            previous, first = value, False
            return self.flat or value < floor

        left = self.limit - self.iterations
        if left < 1:
            return
        try:
            with BackendManager.backend_context("pytorch", local_threadsafe=True):
                # The callback decides when to stop; TensorLy measures the error only where a tolerance is set.
                parafac(kernel, self.best[0].shape[1], init=start, n_iter_max=left, tol=1e-300, callback=after_sweep)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            # collinear terms: the normal equations of one factor became singular
            self.flat = False


def decompose_tucker(
    kernel: Float[Tensor, "outputs inputs *taps"],
    ranks: tuple[int, int],
    *,
    iterations: int = 100,
    tolerance: float = 1e-4,
    where: str | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], Fit]:
    """Tucker-2 decomposition of a kernel: higher-order orthogonal iteration on both channel axes (Kim et al. 2016).

    The kernel's own axes stay whole: they are short, and the core is convolved over them anyway.

    Args:
        kernel: (C2, C1, *kernel_size).
        ranks: (output rank r2, input rank r1).
        iterations: most sweeps over both factors.
        tolerance: stop once a sweep changes the relative error by less than this.
        where: module path or name for messages.

    Returns:
        Core (r2, r1, *kernel_size), output factor (C2, r2) and input factor (C1, r1), orthonormal both, and the fit.
    """
    from tensorly.backend import BackendManager
    from tensorly.decomposition import partial_tucker

    _require_finite(kernel, where)
    work = kernel.detach().double()
    if not work.any():
        core = work.new_zeros(ranks + tuple(work.shape[2:]))
        outputs, inputs = (torch.eye(work.shape[axis], ranks[axis]).to(kernel) for axis in (0, 1))
        return (core.to(kernel.dtype), outputs, inputs), Fit(0.0, 0, True)
    with BackendManager.backend_context("pytorch", local_threadsafe=True):
        (core, (outputs, inputs)), errors = partial_tucker(
            work, rank=list(ranks), modes=[0, 1], n_iter_max=iterations, tol=tolerance, random_state=0
        )
    # Fewer sweeps than allowed means that TensorLy's own test stopped them.
    change = abs(float(errors[-1]) - float(errors[-2])) if len(errors) > 1 else float("inf")
    fit = _fit("Tucker", work, tucker_kernel(core, outputs, inputs), len(errors), change < tolerance, where)
    return (core.to(kernel.dtype), outputs.to(kernel.dtype), inputs.to(kernel.dtype)), fit


def cp_kernel(factors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Full kernel (C2, C1, *kernel_size) of CP factors (size, R): of outputs, of inputs, then one per axis.

    W[o,i,*t] = Σ_r out[o,r]·in[i,r]·∏ axis[t,r], by one matrix product.
    """
    columns = factors[1]
    for factor in factors[2:]:
        columns = (columns.unsqueeze(1) * factor).flatten(0, 1)
    sizes = [factor.shape[0] for factor in factors]
    return (factors[0] @ columns.T).reshape(sizes)


def tucker_kernel(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """Full kernel (C2, C1, *kernel_size) of a Tucker core (r2, r1, *kernel_size), outputs (C2, r2) and inputs (C1, r1).

    W[o,i,*t] = Σ_pq out[o,p]·in[i,q]·core[p,q,*t].
    """
    half = inputs @ core.flatten(2)  # (r2, C1, taps)
    return (outputs @ half.flatten(1)).reshape(outputs.shape[0], inputs.shape[0], *core.shape[2:])


def _leading_vectors(kernel: Tensor, rank: int) -> list[Tensor]:
    """Leading left singular vectors of every unfolding, filled up with the same random columns every time."""
    generator = torch.Generator().manual_seed(0)
    factors = []
    for axis, size in enumerate(kernel.shape):
        unfolded = kernel.movedim(axis, 0).flatten(1)
        vectors = torch.linalg.eigh(unfolded @ unfolded.T)[1].flip(1)[:, :rank]
        signs = torch.where(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
        extra = torch.randn(size, rank - vectors.shape[1], generator=generator, dtype=torch.float64)
        factors.append(torch.cat([vectors * signs, extra.to(kernel)], dim=1))
    return factors


def _balance(factors: list[Tensor]) -> list[Tensor]:
    """Give the vectors of a term equal norms: no factor is tiny or huge, and a learning rate means the same to all."""
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    least = torch.finfo(norms.dtype).tiny
    common = norms.clamp_min(least).log().mean(0).exp()
    scale = torch.where((norms == 0).any(0), torch.ones_like(norms), common / norms.clamp_min(least))
    return [factor * row for factor, row in zip(factors, scale, strict=True)]


def _require_finite(kernel: Tensor, where: str | None) -> None:
    if not bool(torch.isfinite(kernel).all()):
        raise ArgumentValueError(
            "a kernel with values that are not finite cannot be decomposed",
            got=f"{int((~torch.isfinite(kernel)).sum())} such values in a kernel {tuple(kernel.shape)}",
            where=where,
            fix="look for the training step that made them",
        )


def _fit(name: str, kernel: Tensor, again: Tensor, iterations: int, converged: bool, where: str | None) -> Fit:
    """How well a decomposition stands for a kernel, with a warning where it could be better."""
    fit = Fit(float((kernel - again).norm() / kernel.norm()), iterations, converged)
    if not converged:
        warnings.warn(
            f"{where or 'kernel'}: the {name} decomposition had not converged after {iterations} iterations. "
            f"Its best result, of relative error {fit.error:.3g}, is kept; ask for more iterations or another rank.",
            ConvergenceWarning,
            stacklevel=4,
        )
    return fit
