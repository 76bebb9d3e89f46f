"""Linear algebra of the solvers. Pure tensor functions: they know nothing of layers."""

from growconv.linalg.bilinear import BilinearFit, BilinearMetric, DenseMetric, bilinear_least_squares
from growconv.linalg.search import Point, QuasiNewton, conjugate_gradients, descending, eliminated, solve_blocks
from growconv.linalg.spectral import (
    RANK_TOLERANCE,
    Whitening,
    fix_signs,
    leading_svd,
    require_finite,
    shrink,
    solve_psd,
    whiten,
)

__all__ = [
    "RANK_TOLERANCE",
    "BilinearFit",
    "BilinearMetric",
    "DenseMetric",
    "Point",
    "QuasiNewton",
    "Whitening",
    "bilinear_least_squares",
    "conjugate_gradients",
    "descending",
    "eliminated",
    "fix_signs",
    "leading_svd",
    "require_finite",
    "shrink",
    "solve_blocks",
    "solve_psd",
    "whiten",
]
