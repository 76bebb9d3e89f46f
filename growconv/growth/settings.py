"""The settings of a GrowthScheduler, read and checked before anything is trained."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import nn

from growconv.errors import ArgumentTypeError, ScheduleError, SurgeryError
from growconv.growth.decision import Policy
from growconv.growth.when import Every, When
from growconv.network.optimizer import as_optimizers
from growconv.network.rank_site import RankSite
from growconv.network.site import GrowthSite
from growconv.solvers.base import Solver
from growconv.solvers.sampling import require_known_gains

CLOSED_FORM = frozenset({"S", "N", "N_raw", "S_full"})
"""Quantities that only sites with closed-form statistics have."""


def checked_sites(sites: Iterable[GrowthSite], model: nn.Module, solver: Solver) -> tuple[GrowthSite, ...]:
    """The sites, if all of them are distinct, of this model and within the method's reach.

    Raises:
        ScheduleError: naming the first that is not.
    """
    found = tuple(sites)
    if not found:
        raise ScheduleError(
            "no sites to grow", expected="at least one", where="sites", fix="see growconv.explain_sites"
        )
    names: set[str] = set()
    for site in found:
        if not isinstance(site, GrowthSite):
            raise ArgumentTypeError("a site is needed", expected="GrowthSite", got=type(site).__name__, where="sites")
        if site.model is not model:
            raise ScheduleError(
                "the site belongs to another model", where=site.name, fix="find the sites of the model that is trained"
            )
        if site.name in names:
            raise ScheduleError("a site is listed twice", where=site.name, fix="list it once")
        if solver.reads & CLOSED_FORM and site.closed_form is not None:
            raise ScheduleError(
                f"method {solver.name!r} needs closed-form statistics, and this site has none: {site.closed_form}",
                where=site.name,
                fix="pass [site for site in sites if site.closed_form is None], or use a method without statistics",
            )
        names.add(site.name)
    return found


def check_owner(optimizer: Any, sites: Sequence[GrowthSite]) -> None:
    """Check that the optimizers train every layer that will get new channels.

    Raises:
        SurgeryError: naming the first weight that none of them owns.
    """
    optimizers = as_optimizers(optimizer)
    owned = {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]}
    for site in sites:
        for path in (*site.producers, *site.consumers):
            weights = [each for name, each in site.model.get_submodule(path).named_parameters() if name != "bias"]
            if optimizers and any(each.requires_grad and id(each) not in owned for each in weights):
                raise SurgeryError(
                    "the optimizer does not own this layer's weight, so it would never train the new channels",
                    where=path,
                    fix="build the optimizer from model.parameters(), or pass all optimizers as a list",
                )


def check_gains(solver: Solver, policies: Iterable[Policy]) -> None:
    """Check that policies which compare gains have some to compare.

    Raises:
        ScheduleError: naming the policy.
    """
    for policy in policies:
        if policy.compares_gains and not solver.reads:
            raise ScheduleError(
                f"this policy compares gains, and method {solver.name!r}, which reads no statistics, has none",
                where=type(policy).__name__,
                fix="use where=all or where=round_robin, or a method with gains such as tiny",
            )


def as_when(every: int | None, when: When | None) -> When | None:
    """One policy from the two ways to say when.

    Raises:
        ScheduleError: both were given.
    """
    if every is not None and when is not None:
        raise ScheduleError("every and when both say when to grow", got=(every, when), fix="give one of them")
    if when is not None and not isinstance(when, When):
        raise ArgumentTypeError("a When is needed", got=type(when).__name__, where="when", fix="for example Every(500)")
    return Every(every) if every is not None else when


def as_amplitude(amplitude: float | int | str) -> float | Literal["line_search"]:
    """A finite amplitude, or "line_search".

    Raises:
        ScheduleError: neither.
    """
    if amplitude == "line_search":
        return "line_search"
    if isinstance(amplitude, int | float) and not isinstance(amplitude, bool) and math.isfinite(amplitude):
        return float(amplitude)
    raise ScheduleError(
        "unknown amplitude", expected='"line_search" or a finite number', got=amplitude, where="amplitude"
    )


def as_share(value: float | int, where: str) -> float:
    """A share strictly between 0 and 1.

    Raises:
        ScheduleError: anything else.
    """
    if not 0 < value < 1:
        raise ScheduleError("a share of the growth batches", expected="above 0, below 1", got=value, where=where)
    return float(value)


def as_optimizer_state(value: str) -> str:
    """What becomes of the optimizer's state: "carried" or "fresh".

    Raises:
        ScheduleError: anything else.
    """
    if value not in ("carried", "fresh"):
        raise ScheduleError(
            "unknown treatment of the optimizer's state",
            expected='"carried" or "fresh"',
            got=value,
            where="optimizer_state",
        )
    return value


def as_relative_error(
    samples: str, relative_error: float | int, solver: Solver, sites: Sequence[GrowthSite]
) -> float | None:
    """How well gains must be known before collecting ends; None where all batches are read.

    Raises:
        ScheduleError: an unknown word or an error that is not positive.
        SolverError: the method or a site has no gains that more samples would make known.
    """
    if samples not in ("all", "auto"):
        raise ScheduleError("unknown number of samples", expected='"all" or "auto"', got=samples, where="samples")
    if not (isinstance(relative_error, int | float) and relative_error > 0):
        raise ScheduleError("an error must be positive", expected="> 0", got=relative_error, where="relative_error")
    if samples == "all":
        return None
    require_known_gains(solver, [site for site in sites if not isinstance(site, RankSite)])
    return float(relative_error)


def checked_batches(batches: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Growth batches as a list of (inputs, targets) pairs.

    Raises:
        ScheduleError: there are none.
        ArgumentTypeError: one of them is no pair.
    """
    data = list(batches)
    if not data:
        raise ScheduleError("no growth batches", expected="at least one (inputs, targets) pair", where="grow")
    for index, batch in enumerate(data):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ArgumentTypeError(
                "a growth batch is a pair",
                expected="(inputs, targets)",
                got=type(batch).__name__,
                where=f"growth batch {index}",
                fix="where the model computes its own loss: ({'name': value}, None) and loss=lambda out, _: out.loss",
            )
    return [(inputs, targets) for inputs, targets in data]
