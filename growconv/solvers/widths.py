"""Statistics that are older than the model: the site at the widths at which they were collected."""

from dataclasses import replace

from growconv.errors import SolverError
from growconv.network.apply import shrink
from growconv.network.layout import ENTRY, IN, OUT
from growconv.network.model import copied
from growconv.network.site import GrowthSite
from growconv.statistics.pair import PairStatistics


def as_collected(statistics: PairStatistics, site: GrowthSite) -> PairStatistics:
    """The same statistics on a model of the widths at which they were collected.

    Where neighbours of the site, or the site itself, have grown since, that is a copy of the model without the channels
    that have come: what is solved there says in `ChannelGrowth.units` what it belongs to, and surgery fills the new
    neighbours' entries with zeros.

    Args:
        statistics: of the site.
        site: the site of the model as it is now.

    Raises:
        SolverError: channels have been taken away since, so that the statistics speak of what is no more.
    """
    now, then = site.units, statistics.units
    changed = {space: (then[space], now[space]) for space in now if then.get(space, now[space]) != now[space]}
    if not changed:
        return statistics if statistics.growth_site.model is site.model else _of(statistics, site)
    for space, (before, after) in changed.items():
        if after < before:
            raise SolverError(
                "channels have been taken away since these statistics were collected",
                where=site.name,
                expected=f"at least {before} units of {_name(site, space)}",
                got=after,
                fix="collect them again: growconv.collect_statistics(model, [site], batches, loss)",
            )
    narrow = site.of(copied(site.model))
    for space, (before, after) in changed.items():
        one = _site_of(narrow, space)
        shrink(narrow.model, one, range(before * one.granularity, after * one.granularity))
    return _of(statistics, narrow)


def _of(statistics: PairStatistics, site: GrowthSite) -> PairStatistics:
    """The same statistics with the site of another model of the same names and widths."""
    kept = statistics.samples_kept
    return replace(statistics, growth_site=site, samples_kept=None if kept is None else kept.of(site))


def _site_of(site: GrowthSite, space: int) -> GrowthSite:
    """What can be said of another space of the same layout."""
    keys = site.layout.keys(space)
    roles = {role: tuple(path for path, side in keys if side == role) for role in (OUT, IN, ENTRY)}
    return replace(
        site, space=space, name=_name(site, space), routes=(), producers=roles[OUT], consumers=roles[IN],
        followers=roles[ENTRY],
    )  # fmt: skip


def _name(site: GrowthSite, space: int) -> str:
    return " + ".join(path for path, side in site.layout.keys(space) if side == OUT)
