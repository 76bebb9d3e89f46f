"""Ranks of factorized kernels: what a user may ask for, and the integers that result."""

import math
from operator import index

from growconv.errors import ArgumentTypeError, ArgumentValueError

Rank = int | float | str | tuple[int, ...] | list[int]


def cp_rank(shape: tuple[int, ...], rank: Rank = "same", where: str | None = None) -> int:
    """Number of rank-one terms of a CP kernel.

    Args:
        shape: of the full kernel (C2, C1, *kernel_size).
        rank: a number of terms; a float for a share of the full kernel's parameters; "same" for (at most) as many
            parameters as the full kernel has.
        where: module path or name for error messages.

    Returns:
        A number from 1 to the bound ∏ shape / max(shape), above which no kernel of this shape needs another term.
    """
    bound = math.prod(shape) // max(shape)
    share = _share(rank, where)
    if share is not None:
        terms = max(1, int(share * math.prod(shape) / sum(shape)))
        if terms > bound:
            raise ArgumentValueError(
                "this share of the parameters gives more terms than any kernel of this shape needs",
                expected=f"at most {bound * sum(shape) / math.prod(shape):.3g}, that is {bound} terms",
                got=rank,
                where=where,
            )
        return terms
    if isinstance(rank, (tuple, list)):
        if len(rank) != 1:
            raise ArgumentValueError(
                "a CP kernel has one rank", expected="an integer, a share or 'same'", got=rank, where=where
            )
        rank = rank[0]
    return _checked(rank, bound, f"CP rank of a kernel {tuple(shape)}", where)


def tucker_ranks(shape: tuple[int, ...], rank: Rank = "same", where: str | None = None) -> tuple[int, int]:
    """Ranks (output, input) of a Tucker kernel.

    Args:
        shape: of the full kernel (C2, C1, *kernel_size).
        rank: one integer for both, a pair (output rank, input rank), a float for a share of the full kernel's
            parameters, or "same" for (at most) as many parameters. A share keeps output rank / C2 = input rank / C1.
        where: module path or name for error messages.

    Returns:
        The pair, each at least 1 and at most its bound: min(C2, C1·taps) and min(C1, C2·taps).
    """
    outputs, inputs, taps = shape[0], shape[1], math.prod(shape[2:])
    bounds = (min(outputs, inputs * taps), min(inputs, outputs * taps))
    share = _share(rank, where)
    if share is not None:
        # r2 = ρ·C2 and r1 = ρ·C1 give ρ·(C2² + C1²) + ρ²·C2·C1·taps parameters.
        linear, square = outputs**2 + inputs**2, outputs * inputs * taps
        scale = (math.sqrt(linear**2 + 4 * square**2 * share) - linear) / (2 * square)
        if scale > 1:
            raise ArgumentValueError(
                "this share of the parameters gives ranks above the number of channels",
                expected=f"at most {(linear + square) / square:.3g}",
                got=rank,
                where=where,
            )
        ranks = tuple(
            max(1, min(bound, int(scale * size))) for bound, size in zip(bounds, (outputs, inputs), strict=True)
        )
        return ranks[0], ranks[1]
    if isinstance(rank, (tuple, list)):
        if len(rank) != 2:
            raise ArgumentValueError(
                "a Tucker kernel has two ranks",
                expected="(output rank, input rank); the kernel's own axes stay whole in the core",
                got=rank,
                where=where,
            )
        pair = tuple(rank)
    else:
        pair = (rank, rank)
    return (
        _checked(pair[0], bounds[0], f"output rank of a Tucker kernel {tuple(shape)}", where),
        _checked(pair[1], bounds[1], f"input rank of a Tucker kernel {tuple(shape)}", where),
    )


def _share(rank: Rank, where: str | None) -> float | None:
    """The share of parameters that a float or "same" stands for; None for integers."""
    if rank == "same":
        return 1.0
    if isinstance(rank, str):
        raise ArgumentValueError(
            "this is not a rank",
            expected="an integer, a share of the parameters or 'same'",
            got=repr(rank),
            where=where,
        )
    if not isinstance(rank, float):
        return None
    if not (math.isfinite(rank) and rank > 0):
        raise ArgumentValueError(
            "a share of the parameters must be positive", expected="e.g. 0.25", got=rank, where=where
        )
    return rank


def _checked(rank: object, bound: int, what: str, where: str | None) -> int:
    try:
        if isinstance(rank, bool):
            raise TypeError
        number = index(rank)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise ArgumentTypeError(
            f"the {what} is not an integer", expected="an integer, a share or 'same'", got=repr(rank), where=where
        ) from None
    if not 1 <= number <= bound:
        raise ArgumentValueError(f"the {what} is out of bounds", expected=f"1 to {bound}", got=number, where=where)
    return number
