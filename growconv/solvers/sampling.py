"""How many samples are enough: collect until the gains are known."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from growconv.errors import ArgumentValueError, SolverError, StatisticsError
from growconv.network.site import GrowthSite
from growconv.solvers.base import Solver, get_solver
from growconv.solvers.counting import held_out_gains
from growconv.solvers.request import Channels, Request
from growconv.statistics import PairStatistics, collect_statistics

Found = dict[str, PairStatistics]


def collect_until_known(
    model: nn.Module,
    asked: Mapping[GrowthSite, Channels],
    batches: Iterable[tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor],
    method: str | Solver = "tiny",
    relative_error: float = 0.1,
    keep_samples: int = 512,
    **options: Any,
) -> Found:
    """Statistics of as many batches as it takes to know the gains to within a relative error (samples="auto").

    See `until_known` for the rounds, `gains_known` for the criterion.

    Args:
        model: the model that the sites belong to.
        asked: number of channels that will be requested from the solver, by site.
        batches: (input, target) pairs, read only as far as needed.
        loss: loss(output, target), a mean over samples.
        method: the solver whose gains are to be known; it must work on statistics of pairs.
        relative_error: standard error of the summed gains over their sum, at every site.
        keep_samples: how many samples to keep per site; half of them judge what the others propose.
        **options: options of `collect_statistics`.

    Returns:
        Statistics by site name; `samples` says how many it took.

    Raises:
        ArgumentValueError: a relative error that is not positive.
        SolverError: a site or a method without such statistics.
        StatisticsError: no batches.
    """
    if not relative_error > 0:
        raise ArgumentValueError(
            "the relative error must be positive", expected="> 0", got=relative_error, where="relative_error"
        )
    solver = get_solver(method)
    require_known_gains(solver, asked)
    settings = {"quantities": solver.reads | {"samples"}, "keep_samples": keep_samples, **options}
    return until_known(
        lambda part: collect_statistics(model, asked, part, loss, **settings),
        batches,
        lambda found: gains_known(found, asked, solver, relative_error, model),
    )


def require_known_gains(solver: Solver, sites: Iterable[GrowthSite]) -> None:
    """Refuse what has no gains that more samples would make known.

    Raises:
        SolverError: a method without statistics of pairs, or a site without closed form.
    """
    if solver.gain_unit != "energy":
        raise SolverError(
            "this method has no gains to estimate from samples",
            expected="a method on the statistics of pairs, such as tiny, exact or functional",
            got=solver.name,
            where='samples="auto"',
        )
    for site in sites:
        if not site.closed_form:
            raise SolverError(
                'samples="auto" judges gains on the statistics of one producer and its consumers',
                got=site.no_closed_form,
                where=site.name,
                fix="give a number of samples for this site",
            )


def until_known(
    collect: Callable[[list[Any]], Found], batches: Iterable[tuple[Any, Any]], known: Callable[[Found], bool]
) -> Found:
    """Collect from 1, 2, 4, 8, … batches until the answer is known or there are no more.

    Every round starts anew, since statistics that took a second pass cannot be added up; all rounds together read at
    most twice the batches of the last.

    Args:
        collect: statistics of a list of batches.
        batches: read only as far as needed.
        known: whether these statistics are enough.

    Raises:
        StatisticsError: no batches.
    """
    source, used = iter(batches), []
    found: Found = {}
    while fresh := list(islice(source, max(1, len(used)))):
        used += fresh
        found = collect(used)
        if known(found):
            break
    if not used:
        raise StatisticsError("there were no batches", fix="pass at least one (input, target) pair")
    return found


def gains_known(
    statistics: Found,
    asked: Mapping[GrowthSite, Channels],
    solver: Solver,
    relative_error: float,
    model: nn.Module,
    generator: torch.Generator | None = None,
) -> bool:
    """Whether the sum of the gains is known to a relative error at every site.

    Half of the kept samples are taken out of the statistics; what the solver proposes from the rest is measured on
    them, through the real activation. Their spread gives the error of an average over all samples.

    Args:
        statistics: by name of the site, with kept samples.
        asked: how many channels to propose, by site; "auto" stands for 8.
        relative_error: standard error over sum.
        model: the model that the sites belong to.
        generator: randomness of the solver.
    """
    for site, channels in asked.items():
        subject = statistics[site.name]
        count = site.growable_channels(8) if channels == "auto" else site.growable_channels(channels)
        if subject.samples_kept is None or len(subject.samples_kept) < 4:
            return False
        proposal, measured = held_out_gains(solver.solve, Request(site.of(model), count, subject, generator))
        if proposal.channels and measured.relative_error * (measured.samples / subject.samples) ** 0.5 > relative_error:
            return False
    return True
