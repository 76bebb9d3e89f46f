"""The settings of a GrowthScheduler, read and checked before anything is trained."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import nn

from growconv.errors import ArgumentTypeError, GrowthWarning, ScheduleError
from growconv.growth.decision import Policy
from growconv.growth.when import Every, When
from growconv.limits import Limits
from growconv.network.event import Optimizers
from growconv.network.model import attribute
from growconv.network.optimizer import as_optimizers, check_optimizers
from growconv.network.site import REFUSALS, GrowthSite, Site
from growconv.solvers.base import SOLVERS, Solver, refusal_of, solver_of
from growconv.solvers.energy import require_known_gains

LIMITS = {
    "amplitude_cap": (Limits(above=0), "this is no cap of the amplitude"),
    "held_out": (Limits(above=0, below=1), "this is no share of the growth batches"),
    "optimizer_state": (Limits(choices=("carried", "fresh")), "the optimizer's state can be treated in two ways only"),
    "relative_error": (Limits(above=0), "an error must be positive"),
    "samples": (Limits(choices=("all", "auto")), "this is no number of samples"),
    "times": (Limits(least=1), "there is no such number of rounds"),
}
"""What settings of a schedule may be, and what is said of others."""


@dataclass(frozen=True)
class LeftOut:
    """A site that a schedule does not grow.

    Attributes:
        site: which.
        reason: why the method cannot serve it.
    """

    site: Site
    reason: str


def checked_sites(
    sites: Iterable[Site], model: nn.Module, solver: Solver
) -> tuple[tuple[Site, ...], tuple[LeftOut, ...]]:
    """The distinct sites that a method can serve, of this model, and those of `find_sites` that it cannot.

    Raises:
        ScheduleError: no site is left, one is listed twice, or the method cannot serve one that was made by hand.
        SiteError: a site that the model does not have.
    """
    found: dict[str, Site] = {}
    for site in sites:
        if not isinstance(site, Site):
            raise ArgumentTypeError("a site is needed", expected="GrowthSite", got=type(site).__name__, where="sites")
        if site.name in found:
            raise ScheduleError("a site is listed twice", where=site.name, fix="list it once")
        found[site.name] = site.of(model)
        found[site.name].check()
    if not found:
        fix = "see growconv.explain_sites(model, example_input)"
        raise ScheduleError("no sites to grow", expected="at least one", where="sites", fix=fix)
    refused = {name: refusal_of(solver_of(site, solver), site) for name, site in found.items()}
    left_out = tuple(LeftOut(found[name], reason) for name, reason in refused.items() if reason is not None)
    strict = next((each for each in left_out if each.site.by_hand), None)
    if strict is not None or len(left_out) == len(found):
        first = strict or left_out[0]
        raise ScheduleError(
            f"method {solver.name!r} cannot serve {'this site' if strict else 'any of these sites'}: {first.reason}",
            where=first.site.name,
            fix=_how_to_have(left_out),
        )
    if left_out:
        warnings.warn(_left_out(left_out, len(found), solver), GrowthWarning, stacklevel=3)
    return tuple(site for name, site in found.items() if refused[name] is None), left_out


def _left_out(left_out: Sequence[LeftOut], count: int, solver: Solver) -> str:
    """One line that counts the sites left out, says why, and how to have them."""
    reasons: dict[str, list[str]] = {}
    for each in left_out:
        reasons.setdefault(each.reason, []).append(each.site.name)
    told = [f"{names[0] if len(names) == 1 else len(names)}: {reason}" for reason, names in list(reasons.items())[:3]]
    more = f"; and {len(reasons) - 3} other reasons" if len(reasons) > 3 else ""
    return (
        f"{len(left_out)} of {count} sites are not grown, since method {solver.name!r} cannot serve them "
        f"({'; '.join(told)}{more}); scheduler.left_out lists them. {_how_to_have(left_out)}"
    )


def _how_to_have(left_out: Sequence[LeftOut]) -> str:
    """Which methods serve all of these sites."""
    able = [name for name in sorted(REFUSALS) if all(each.site.refusal(name) is None for each in left_out)]
    if not able:
        return "No one method serves all of them: site.refusal(method) says which serves one."
    return f"To have them, use method={' or '.join(repr(name) for name in able)}."


def check_owner(optimizer: Optimizers, sites: Sequence[Site]) -> None:
    """Refuse optimizers that do not train every layer that will get new channels."""
    weights = []
    for site in sites:
        for path in (*site.producers, *site.consumers):
            found = attribute(site.model, path)
            named = found.named_parameters() if isinstance(found, nn.Module) else [("", cast(nn.Parameter, found))]
            weights += [(path, each) for name, each in named if name != "bias"]
    check_optimizers(as_optimizers(optimizer), weights)


def check_gains(solver: Solver, policies: Iterable[Policy], sites: Sequence[Site]) -> None:
    """Refuse policies that compare gains where there are none that they can compare."""
    serving = [name for name in sorted(SOLVERS) if any(isinstance(site, SOLVERS[name].serves) for site in sites)]
    for policy in policies:
        if policy.compares and solver.gain_unit not in policy.compares:
            lack = "none" if solver.gain_unit in (None, "rank") else f"gains in another unit, {solver.gain_unit!r}"
            raise ScheduleError(
                f"this policy compares gains in the unit {' or '.join(map(repr, sorted(policy.compares)))}, and method "
                f"{solver.name!r} has {lack}",
                where=type(policy).__name__,
                expected=" or ".join(name for name in serving if SOLVERS[name].gain_unit in policy.compares),
                got=solver.name,
                fix="use another method, or a policy that compares no gains, such as where=all or where=round_robin",
            )
        ranks = next((site for site in sites if site.own_method is not None), None)
        if policy.compares and ranks is not None and solver.gain_unit != "energy":
            raise ScheduleError(
                f"this policy compares gains, and those of {solver.name!r} are not in the unit of this site's own",
                where=f"{type(policy).__name__}, {ranks.name}",
                expected="captured energies, as those of tiny, exact and functional",
                fix="leave out sites with a method of their own, or use a policy that compares no gains",
            )


def as_when(every: int | None, when: When | None) -> When | None:
    """One policy from the two ways to say when."""
    if every is not None and when is not None:
        raise ScheduleError("every and when both say when to grow", got=(every, when), fix="give one of them")
    if when is not None and not isinstance(when, When):
        raise ArgumentTypeError(
            "this does not say when to grow",
            expected="a When",
            got=type(when).__name__,
            where="when",
            fix="for example Every(500)",
        )
    return Every(every) if every is not None else when


def as_amplitude(amplitude: float | int | str) -> float | Literal["line_search"]:
    """A finite amplitude, or "line_search"."""
    if amplitude == "line_search":
        return "line_search"
    if isinstance(amplitude, int | float) and not isinstance(amplitude, bool) and math.isfinite(amplitude):
        return float(amplitude)
    raise ScheduleError(
        "this is no amplitude", expected='"line_search" or a finite number', got=amplitude, where="amplitude"
    )


def check_limits(**settings: object) -> None:
    """Refuse settings outside of LIMITS; None stands for no cap and no limit of the rounds."""
    for where, value in settings.items():
        limits, problem = LIMITS[where]
        if not limits.allow(value) or (value is None and where not in ("amplitude_cap", "times")):
            raise ScheduleError(problem, expected=limits, got=value, where=where)


def as_relative_error(samples: str, relative_error: float | int, solver: Solver, sites: Sequence[Site]) -> float | None:
    """How well gains must be known before collecting ends; None where all batches are read."""
    if samples == "all":
        return None
    require_known_gains(solver, [site for site in sites if isinstance(site, GrowthSite)])
    return float(relative_error)
