"""What can be collected, and the checks of what was asked for."""

from collections.abc import Iterable

from growconv.errors import ArgumentValueError, StatisticsError
from growconv.network.site import GrowthSite

QUANTITIES: dict[str, frozenset[str]] = {
    "S": frozenset({"S"}),
    "N": frozenset({"N_raw", "M", "S2", "P"}),
    "N_raw": frozenset({"N_raw"}),
    "M": frozenset({"M"}),
    "S2": frozenset({"S2"}),
    "P": frozenset({"P"}),
    "update": frozenset({"M", "S2"}),
    "S_full": frozenset({"S_full"}),
    "patch": frozenset({"patch_gram"}),
    "samples": frozenset(),
}
"""What a solver may read, and the sums that it takes."""

PATHS = ("auto", "dense", "unfold", "offset")
SCRATCH_BYTES = 256 * 2**20


def checked_quantities(quantities: Iterable[str] | None, full: bool, keep_samples: int) -> frozenset[str]:
    """The quantities to collect, after refusing impossible ones.

    Args:
        quantities: names out of QUANTITIES; None for S and N.
        full: whether S_full is wanted as well.
        keep_samples: how many samples are to be kept.

    Raises:
        ArgumentValueError: for an unknown name, or samples to keep without a number of them.
    """
    if keep_samples < 0:
        raise ArgumentValueError("keep_samples must not be negative", got=keep_samples)
    if isinstance(quantities, str):
        quantities = (quantities,)
    wanted = frozenset({"S", "N"} if quantities is None else quantities) | ({"S_full"} if full else frozenset())
    unknown = wanted - QUANTITIES.keys()
    if unknown:
        raise ArgumentValueError("unknown quantities", expected=", ".join(QUANTITIES), got=", ".join(sorted(unknown)))
    if "samples" in wanted and not keep_samples:
        raise ArgumentValueError("samples are to be kept, but keep_samples is 0", fix="pass keep_samples=512 or so")
    return wanted


def require_closed_form(site: GrowthSite) -> None:
    """Refuse a site that has no statistics of its own.

    Args:
        site: the site.

    Raises:
        StatisticsError: with the reason.
    """
    reason = site.no_closed_form
    if reason:
        raise StatisticsError(
            "this site has no closed-form statistics",
            got=reason,
            where=site.name,
            fix="collect quantities=('samples',) only, for methods such as functional",
        )
