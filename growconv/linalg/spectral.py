"""Whitening, pseudo-inverse solves and leading singular triplets.

Pure tensor functions. They know nothing of layers; every threshold is relative to the largest eigen- or singular value,
so that no result depends on the scale of the loss or of the inputs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.errors import ArgumentValueError

RANK_TOLERANCE = 1e-6
"""Eigenvalues below this share of the largest count as zero: sums collected in float32 are only right to about 1e-7."""
EXACT_SIZE = 256
"""Rows up to which an eigendecomposition costs little enough to solve with."""
ENOUGH = 1e-8
"""Share of what a solution explains that a further step would have to be able to add."""
SOUND = 1000.0
"""The smallest squared pivot, in units of the ridge, above which a matrix counts as far from singular."""
BLOCK = 24
"""Columns of a Lanczos block."""


def require_finite(**tensors: Tensor) -> None:
    """Refuse tensors with an infinite or undefined entry, by name."""
    for name, tensor in tensors.items():
        # One reduction instead of a mask: a finite sum needs finite entries; the mask settles sums that overflow.
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ArgumentValueError(
                "the matrix has entries that are not finite",
                got=f"{bad} of {tensor.numel()} entries infinite or undefined",
                where=name,
                fix="look for an overflow in the forward or backward pass that filled it",
            )


@dataclass(frozen=True, eq=False)
class Whitening:
    """A factor F of a positive semi-definite matrix G with Fᵀ G F = 1 on the directions that G supports.

    Attributes:
        factor: lower Cholesky factor L (a, a) with F = L⁻ᵀ where `triangular`; else F itself (a, r).
        triangular: which of the two it is.
        rank: number of directions kept, r. It is a where the Cholesky factor served.
    """

    factor: Tensor
    triangular: bool
    rank: int

    def whiten(self, matrix: Float[Tensor, "a n"]) -> Float[Tensor, "r n"]:
        """Fᵀ·matrix; its singular values are those of G^(-1/2)·matrix."""
        if self.triangular:
            return torch.linalg.solve_triangular(self.factor, matrix, upper=False)
        return self.factor.mT @ matrix

    def unwhiten(self, matrix: Float[Tensor, "r n"]) -> Float[Tensor, "a n"]:
        """F·matrix: left singular vectors back to the coordinates of G."""
        if self.triangular:
            return torch.linalg.solve_triangular(self.factor.mT, matrix, upper=True)
        return self.factor @ matrix

    def embed(self, matrix: Float[Tensor, "a n"]) -> Float[Tensor, "r n"]:
        """F⁺·matrix, the inverse of `unwhiten` on the directions that G supports."""
        if self.triangular:
            return self.factor.mT @ matrix
        return torch.linalg.lstsq(self.factor, matrix).solution


def whiten(gram: Float[Tensor, "a a"], rank_tolerance: float = RANK_TOLERANCE) -> Whitening:
    """Factor F of a Gram matrix G with Fᵀ G F = 1.

    A Cholesky factor, with a jitter of the rounding error's size relative to the largest eigenvalue. Where the smallest
    eigenvalue (by inverse iteration on that factor, so for the price of a few triangular solves) is below
    `rank_tolerance` times the largest, a truncated eigendecomposition in float64 takes over.

    Args:
        gram: symmetric positive semi-definite G (a, a).
        rank_tolerance: share of the largest eigenvalue below which a direction counts as unsupported.

    Returns:
        The factor, of the matrix's own dtype; rank 0 for the zero matrix.

    Raises:
        ArgumentValueError: entries that are not finite, or a matrix with a clearly negative eigenvalue.
    """
    require_finite(gram=gram)
    size = gram.shape[0]
    gram = (gram + gram.mT).div_(2)
    largest = _largest_growth(gram, 8)
    if largest <= 0.0:
        return Whitening(gram.new_zeros(size, 0), triangular=False, rank=0)
    jitter = 4 * torch.finfo(gram.dtype).eps * largest
    gram.diagonal().add_(jitter)  # in place: a copy of a large matrix costs as much as its factor
    factor, failed = torch.linalg.cholesky_ex(gram)
    gram.diagonal().sub_(jitter)
    if not bool(failed) and _largest_growth(factor, 4, inverse=True) * rank_tolerance * largest < 1:
        return Whitening(factor, triangular=True, rank=size)
    values, vectors = torch.linalg.eigh(gram.double())
    if float(values[0]) < -1e-3 * float(values[-1]):
        raise ArgumentValueError(
            "a Gram matrix must have no negative eigenvalues",
            expected="a positive semi-definite matrix",
            got=f"eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}",
            where="gram",
        )
    kept = values > rank_tolerance * values[-1]
    factor = (vectors[:, kept] * values[kept].rsqrt()).to(gram.dtype)
    return Whitening(factor, triangular=False, rank=int(kept.sum()))


def _probe(size: int, columns: int, like: Tensor, seed: int = 0) -> Tensor:
    """Random start vectors that are the same on every device and in every run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, columns, generator=generator, dtype=torch.float64).to(like)


def _largest_growth(matrix: Tensor, iterations: int, inverse: bool = False) -> float:
    """How much a Gram matrix, or the inverse of one given by its Cholesky factor, lengthens a vector at most.

    By power iteration with a few vectors: a lower bound, right to a few percent, which is all a threshold needs.
    """
    vectors = _probe(len(matrix), min(4, len(matrix)), matrix).mT.contiguous()  # rows: a fifth of the time of columns
    size = 0.0
    for _ in range(iterations):
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        vectors = torch.cholesky_solve(vectors.mT, matrix).mT if inverse else vectors @ matrix
        size = float(vectors.norm(dim=1).max())
        if size == 0.0:
            break
    return size


def solve_psd(
    gram: Float[Tensor, "a a"], right: Float[Tensor, "a n"], rank_tolerance: float = RANK_TOLERANCE
) -> Float[Tensor, "a n"]:
    """G⁺·right for a positive semi-definite G, with directions below the relative threshold left out.

    Above EXACT_SIZE an iterated Tikhonov solution, which needs no eigenvectors: the factor of G + τ·1, τ being the
    threshold, with what is left solved for again. As (G + τ·1)·x is the right-hand side, that is τ·x, and takes no
    product with G. A direction of eigenvalue λ keeps at most 1 − (τ/(λ + τ))³ of its part: all of it well above,
    nothing well below. The factor is in float32; where G is far from singular, a residual in float64 makes up for its
    rounding, which else costs about 1e-10 of what the solution explains.

    Args:
        gram: G (a, a).
        right: right-hand sides (a, n) in the range of G, as products with what G was summed from are.
        rank_tolerance: share of the largest eigenvalue below which a direction counts as unsupported.

    Returns:
        The least-squares solution of least norm; zeros where G is zero.
    """
    require_finite(right=right)
    if gram.shape[0] <= EXACT_SIZE:
        whitening = whiten(gram, rank_tolerance)
        return whitening.unwhiten(whitening.whiten(right))
    require_finite(gram=gram)
    unit = float(gram.diagonal().abs().max())
    if unit <= 0.0:
        return torch.zeros_like(right)
    factor, ridge = _ridged_factor(gram, unit, rank_tolerance)
    size = float(right.norm())
    if size == 0.0:
        return torch.zeros_like(right)
    rows = torch.div(right.mT, size, out=factor.new_empty(right.mT.shape))  # rows: solved for faster than columns

    def solved(rows: Tensor) -> Tensor:
        step = torch.linalg.solve_triangular(factor.mT, rows, upper=True, left=False)
        return torch.linalg.solve_triangular(factor, step, upper=False, left=False)

    rest, share = solved(rows), ridge
    explained, solution = float(rest.flatten().dot(rows.flatten())), rest.to(right.dtype)
    if float(factor.diagonal().min()) ** 2 > SOUND * ridge:
        rest = torch.addmm(right.mT, solution, gram, beta=1 / size, alpha=-1 / unit).to(factor.dtype)
        share = 1.0
    for _ in range(2):  # share·rest is what is left
        rest = solved(rest)
        solution.add_(rest, alpha=share)
        if ridge * (share * float(rest.norm())) ** 2 <= ENOUGH * explained:  # at most that much is still to come
            break
        share *= ridge
    return solution.mul_(size / unit).mT


def _ridged_factor(gram: Tensor, unit: float, tolerance: float) -> tuple[Tensor, float]:
    """Cholesky factor of G/unit + τ·1 and τ, in float32 where that is enough."""
    for dtype in (torch.float32, torch.float64):
        scaled = torch.div(gram, unit, out=torch.empty_like(gram, dtype=dtype))
        ridge = tolerance * _largest_growth(scaled, 3)
        scaled.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if not bool(failed):
            return factor, ridge
    raise ArgumentValueError(
        "a Gram matrix must have no negative eigenvalues",
        expected="a positive semi-definite matrix",
        got="one that has no Cholesky factor with a ridge",
        where="gram",
    )


def fix_signs(left: Float[Tensor, "k n"], right: Float[Tensor, "k m"]) -> tuple[Tensor, Tensor]:
    """Flip pairs of rows so that the same statistics give the same channels everywhere.

    The first entry of a left row that comes within a hundredth of its largest magnitude is made positive: rounding does
    not change which one that is, as it would among equal magnitudes. An all-zero left row is judged by its right row.
    """

    def leading(rows: Tensor) -> Tensor:
        magnitude = rows.abs()
        near = magnitude >= 0.99 * magnitude.amax(dim=1, keepdim=True)
        return rows.gather(1, near.to(torch.uint8).argmax(dim=1, keepdim=True)).sign()

    signs = leading(left)
    signs = torch.where(signs == 0, leading(right), signs)
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return left * signs, right * signs


def leading_svd(
    matrix: Float[Tensor, "a n"], rank: int, tolerance: float = 1e-6
) -> tuple[Float[Tensor, "a k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    """Leading singular triplets.

    A few triplets of a large matrix take a block Krylov iteration, which runs until every triplet's residual ‖Mv − σu‖
    is below `tolerance`·σ₁. All else, and what the iteration does not resolve, takes the eigenvectors of M·Mᵀ in
    float64, as accurate down to σ = 1e-4·σ₁; smaller singular values take the full decomposition.

    Args:
        matrix: M (a, n).
        rank: number of triplets; cut to what the shape allows.
        tolerance: residual relative to the largest singular value. 1e-6 keeps a singular vector right to 1e-3 where its
            neighbours' singular values differ by a thousandth of the largest.

    Returns:
        U (a, k), σ (k,) descending, Vᵀ (k, n); signs as `fix_signs` sets them.
    """
    require_finite(matrix=matrix)
    rank = min(rank, *matrix.shape)
    tolerance = max(tolerance, 50 * torch.finfo(matrix.dtype).eps)
    left, values, right = (
        _krylov_svd(matrix, rank, tolerance) or _gram_svd(matrix, rank) or torch.linalg.svd(matrix, full_matrices=False)
    )
    left, right = fix_signs(left[:, :rank].mT, right[:rank])
    return left.mT, values[:rank], right


def _krylov_svd(matrix: Tensor, count: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Block Lanczos in float32, refined in the matrix's own precision; None where it does not pay or not converge."""
    longest, scale = 4 * count + 8 * BLOCK, float(matrix.abs().max())
    if max(384, 2 * longest) > min(matrix.shape) or scale == 0:
        return None
    basis = _lanczos((matrix / scale).float(), count, longest)
    return None if basis is None else _refine(matrix, basis, count, tolerance)


def _gram_svd(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """From the eigenvectors of M·Mᵀ or Mᵀ·M; None where a singular value is too small for its square to tell."""
    if matrix.shape[0] > matrix.shape[1]:
        found = _gram_svd(matrix.mT, count)
        return None if found is None else (found[2].mT, found[1], found[0].mT)
    exact = matrix.double()
    squares, vectors = torch.linalg.eigh(exact @ exact.mT)
    squares, left = squares[-count:].flip(0), vectors[:, -count:].flip(1)
    if not bool(squares[-1] > 1e-8 * squares[0]):
        return None
    values = squares.sqrt()
    right = (left.mT @ exact) / values[:, None]
    return left.to(matrix), values.to(matrix), right.to(matrix)


def _lanczos(matrix: Tensor, count: int, longest: int) -> Tensor | None:
    """Block Lanczos on M·Mᵀ with full reorthogonalisation and thick restarts (Wu & Simon 2000), to about 4e-6.

    Narrow blocks, since convergence depends on the degree of the polynomial: the width of the basis over the block.
    Gives the 2·count leading Ritz vectors (a, ·), or None after more products than the full decomposition is worth.
    """
    rows, columns = matrix.shape
    kept, width = 2 * count, 0
    basis, image, back = (matrix.new_empty(size, longest) for size in (rows, columns, rows))
    step = torch.linalg.qr(matrix @ _probe(columns, BLOCK, matrix))[0]
    for products in range(1, 4 * min(rows, columns) // BLOCK):
        pulled = matrix.mT @ step
        pushed = matrix @ pulled
        for store, block in ((basis, step), (image, pulled), (back, pushed)):
            store[:, width : width + BLOCK] = block
        width += BLOCK
        full = width + BLOCK > longest
        if full or (width >= kept and products % 4 == 0):
            squares, rotation = torch.linalg.eigh(image[:, :width].mT @ image[:, :width])
            values, lead = squares[-count:].clamp_min(0).sqrt(), rotation[:, -count:]
            # M·Mᵀu − σ²u, over σ₁: the residual ‖Mv − σu‖ times σ/σ₁, and defined where σ is rounding error.
            residual = (back[:, :width] @ lead - basis[:, :width] @ (lead * values.square())).norm(dim=0).max()
            ritz = rotation[:, -kept:]
            if float(residual) <= 4e-6 * float(values[-1]) ** 2:
                return basis[:, :width] @ ritz
            step = _orthonormal_to(basis[:, :width], pushed)
            if full:
                for store in (basis, image, back):
                    store[:, :kept] = store[:, :width] @ ritz
                width = kept
        else:
            step = _orthonormal_to(basis[:, :width], pushed)
    return None


def _refine(matrix: Tensor, basis: Tensor, count: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Rayleigh-Ritz on a basis (a, ·) and the residuals it leaves, until these are small; None where they stay."""
    kept = basis.shape[1]
    basis = torch.linalg.qr(basis.to(matrix))[0]
    image = matrix.mT @ basis
    for _ in range(10):
        squares, rotation = torch.linalg.eigh(image.mT @ image)
        basis, image = basis @ rotation[:, -kept:], image @ rotation[:, -kept:]
        values = squares[-count:].clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
        if float(values[0]) <= tolerance * float(values[-1]):
            return None  # directions of rounding error have no right partner; the full decomposition gives them one
        left, right = basis[:, -count:], image[:, -count:] / values
        residual = matrix @ right - left * values
        if float(residual.norm(dim=0).max()) <= tolerance * float(values[-1]):
            return left.flip(1), values.flip(0), right.flip(1).mT
        step = _orthonormal_to(basis, residual)
        basis, image = torch.cat([basis, step], 1), torch.cat([image, matrix.mT @ step], 1)
    return None


def _orthonormal_to(basis: Tensor, block: Tensor) -> Tensor:
    """Orthonormal columns spanning what `block` adds to `basis`; projected twice, which is enough."""
    for _ in range(2):
        block = block - basis @ (basis.mT @ block)
        block = torch.linalg.qr(block)[0]
    return block


def shrink(
    gram: Float[Tensor, "a a"], amount: float | Literal["auto"], samples: int
) -> tuple[Float[Tensor, "a a"], float]:
    """(1 − ρ)·G + ρ·(tr G / a)·1: a Gram matrix that few samples filled, pulled towards a multiple of the identity.

    Args:
        gram: G (a, a).
        amount: ρ between 0 and 1, or "auto" for the oracle-approximating value of Chen et al. 2010 (equation 23), which
            tends to 0 as the samples grow.
        samples: how many independent samples filled G; read by "auto" only.

    Returns:
        The shrunk matrix and ρ.

    Raises:
        ArgumentValueError: ρ outside [0, 1].
    """
    size, trace = gram.shape[0], float(gram.diagonal().sum())
    if amount == "auto":
        squares = float(gram.square().sum())
        spread = (samples + 1 - 2 / size) * (squares - trace**2 / size)
        amount = min(1.0, ((1 - 2 / size) * squares + trace**2) / spread) if spread > 0 else 1.0
    if not 0 <= amount <= 1:
        raise ArgumentValueError(
            "shrinkage must be a weight", expected='0 to 1, or "auto"', got=amount, where="shrinkage"
        )
    if amount == 0:
        return gram, 0.0
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    return (1 - amount) * gram + amount * trace / size * identity, amount
