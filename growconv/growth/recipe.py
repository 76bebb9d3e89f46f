"""Known weaknesses of a growth schedule, reported by `GrowthScheduler.explain` and at the start of a run."""

WIDEST = 2.0
"""Times as wide in one step that sped training up most reliably (Mallik et al. 2026, arXiv 2605.13405)."""

FALLEN = 0.95
"""Share of the highest learning rate so far below which the rate counts as falling."""


def too_wide(site: str, before: int, after: int) -> str | None:
    """What speaks against a step that widens a site more than twofold; None where it does not.

    Args:
        site: its name.
        before: channels before the step.
        after: channels after it.
    """
    if after <= WIDEST * before:
        return None
    times = f"{site}: {before} to {after} channels is {after / before:.3g} times as wide in one step"
    return f"{times}; above {WIDEST:g} growing was no faster than training the wide network from scratch"


def too_late(growth: float, decay: float) -> str | None:
    """What speaks against a last growth that comes when the learning rate falls already; None where it comes before.

    Args:
        growth: where the last growth comes, as a share of the run.
        decay: where the learning rate begins to fall, as a share of the run.
    """
    if growth < decay:
        return None
    return (
        f"the last growth comes at {growth:.0%} of the run, and the learning rate falls from {decay:.0%} on: new "
        "channels learn best in a long stretch of constant rate; grow earlier, or let the rate fall later "
        "(lr_schedule=trapezoid)"
    )


def fallen(rate: float, top: float) -> str | None:
    """What speaks against growing at a learning rate that has fallen; None where it has not.

    Args:
        rate: now.
        top: the highest so far.
    """
    if rate >= FALLEN * top:
        return None
    return (
        f"the learning rate has fallen to {rate / top:.0%} of its top before this growth: new channels learn best in a "
        "long stretch of constant rate; grow earlier, or let the rate fall later"
    )
