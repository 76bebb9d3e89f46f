"""What a growth method is and is asked for, the registry of all of them, and `solve`, the one way to call them."""

import inspect
import pkgutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from growconv.errors import ArgumentTypeError, ArgumentValueError, GrowthError, SolverError, did_you_mean
from growconv.limits import require_limits
from growconv.network.event import shrink
from growconv.network.layout import ENTRY, IN, OUT
from growconv.network.model import copied, tensor_at
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import REFUSALS, GrowthSite, Site
from growconv.statistics.pair import PairStatistics

SOLVERS: dict[str, type["Solver"]] = {}
"""Every registered method by name; fill it through `register`."""


Channels = int | Literal["auto"]
"""A number of new channels, or "auto": as many as the samples can tell from noise."""


class LinearisationWarning(UserWarning):
    """A method that treats the activation as linear was asked for channels behind an activation that is not 0 at 0."""


GainUnit = Literal["energy", "score", "loss", "rank"]

SolverClass = TypeVar("SolverClass", bound="type[Solver]")


@dataclass(frozen=True, eq=False)
class Request:
    """The request for new channels at one site, with what is known about it.

    Attributes:
        site: the site; of a rank its layer alone (`Site.measured`), the rank being `subject.growth_site`.
        channels: how many; validated, a multiple of the site's granularity. "auto" only for a method that `counts`.
        statistics: statistics of the site; None if there are none, which never happens for a method with non-empty
            `reads`.
        generator: source of randomness; None: torch's global generator, unused by a deterministic method.
    """

    site: GrowthSite
    channels: Channels
    statistics: PairStatistics | None = None
    generator: torch.Generator | None = None

    @property
    def number(self) -> int:
        """`channels` as a number."""
        return cast(int, self.channels)

    @property
    def subject(self) -> PairStatistics:
        """`statistics`, for a method that reads them."""
        return cast(PairStatistics, self.statistics)


class Solver(ABC):
    """A growth method. Its dataclass fields are its hyperparameters.

    Attributes:
        name: set by `register`.
        serves: the kind of site: channels (GrowthSite), or ranks of factorized convolutions (RankSite).
        reads: statistics that the collector must fill ("S", "N", "N_raw", "S_full", "patch", "samples"; of ranks "M"
            and "S2"); empty for a method that looks at the weights alone. May be a property that depends on the
            hyperparameters.
        keep_samples: how many samples the collector should keep where `reads` contains "samples".
        keep_dtype: type in which a round that is short of memory keeps them; None: that of the statistics.
        gain_unit: unit of the channels' gains: "energy", captured energy in the unit of ‖v‖²/n; "score", the unit of
            the `score` that the proposal measured; "loss", comparable between sites, but not a share of a whole;
            "rank", no gains, but the `rank` of the old responses is measured; None: the method has no gains.
        linearises: treats the operations between producer and consumer as linear; `solve` warns where these are not 0
            at 0.
        function_preserving: the new channels change no output at any amplitude, so no line search is needed.
        needs_closed_form: serves only sites with closed-form statistics.
        counts: can choose the number of channels, "auto".

    Example:
        >>> growconv.solvers.get_solver("tiny").reads >= {"S", "N"}
        True
    """

    name: ClassVar[str] = ""
    serves: ClassVar[type[Site]] = GrowthSite
    reads: frozenset[str] = frozenset()
    keep_samples: int = 512
    keep_dtype: torch.dtype | None = None
    gain_unit: GainUnit | None = None
    linearises: bool = False
    function_preserving: bool = False
    needs_closed_form: bool = False
    counts: bool = True

    def __post_init__(self) -> None:
        """Check the hyperparameters that have limits."""
        require_limits(self, ArgumentValueError)

    def refusal(self, site: GrowthSite) -> str | None:
        """Why the method cannot serve a site, on which nothing is computed; None where it can."""
        if not self.needs_closed_form or not site.closed_form:
            return site.no_closed_form if self.needs_closed_form else None
        normed = any(route.norm for route in site.routes)
        if len(site.producers) > 1 and normed and "patch" in self.reads and "samples" not in self.reads:
            return "norm layers behind several producers take their moments from kept samples: signs=True"
        return None

    def caution(self, site: GrowthSite) -> str | None:
        """A warning about the method on a site that it can serve; None if there is none."""
        return None

    @abstractmethod
    def solve(self, request: Request) -> ChannelGrowth:
        """Weights of new channels for one site.

        Args:
            request: the site, the number of channels, the statistics and the source of randomness.

        Returns:
            Exactly as many channels as requested, or fewer, with the reason in the object.
        """


def register(name: str) -> Callable[[SolverClass], SolverClass]:
    """Class decorator that makes a `Solver` available by name, in this package or outside it.

    Raises:
        SolverError: the name already belongs to another class, or the class is no Solver.
    """

    def enter(solver: SolverClass) -> SolverClass:
        if not (inspect.isclass(solver) and issubclass(solver, Solver)):
            raise SolverError("only a subclass of Solver can be registered", got=solver, where=name)
        taken = SOLVERS.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (solver.__module__, solver.__qualname__):
            raise SolverError(
                "this solver name is taken", got=f"{taken.__module__}.{taken.__qualname__}", where=name, fix="rename"
            )
        solver.name = name
        SOLVERS[name] = solver
        REFUSALS[name] = lambda site: refusal_of(solver(), site)
        return solver

    return enter


def get_solver(method: "str | Solver", **hyperparameters: Any) -> Solver:
    """A solver by name, with its hyperparameters.

    Args:
        method: registered name; for a solver outside this package also the dotted path of its class, which is then
            imported. A Solver is returned as it is.
        **hyperparameters: fields of the solver's class; others keep their defaults.

    Raises:
        SolverError: an unknown name, or a hyperparameter that this solver does not have.
    """
    if isinstance(method, Solver):
        if hyperparameters:
            raise SolverError(
                "hyperparameters belong to the solver object that was passed",
                got=", ".join(hyperparameters),
                where=method.name,
                fix="set them when creating it",
            )
        return method
    if "." in method:
        method = _imported(method)
    if method not in SOLVERS:
        raise SolverError(
            "there is no such growth method",
            expected=f"one of {', '.join(sorted(SOLVERS))}",
            got=repr(method),
            where="method",
            fix=did_you_mean(method, SOLVERS, "'{}'"),
        )
    solver = SOLVERS[method]
    known = list(inspect.signature(solver).parameters)
    unknown = [key for key in hyperparameters if key not in known]
    if unknown:
        raise SolverError(
            f"this method has no hyperparameter {unknown[0]!r}",
            expected=", ".join(known) or "none",
            got=", ".join(unknown),
            where=method,
            fix=did_you_mean(unknown[0], known, "'{}'"),
        )
    return solver(**hyperparameters)


def _imported(path: str) -> str:
    """The name under which a solver outside this package is registered, by the dotted path of its class."""
    fix = "give module.Class of a class decorated with growconv.solvers.register, with its folder on PYTHONPATH"
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        raise SolverError("this growth method cannot be imported", got=str(error), where=path, fix=fix) from error
    if SOLVERS.get(getattr(found, "name", "")) is not found:
        raise SolverError("this is not a registered growth method", got=repr(found), where=path, fix=fix)
    return str(found.name)


def solve(
    subject: PairStatistics | Site,
    method: "str | Solver" = "tiny",
    channels: Channels = 8,
    model: nn.Module | None = None,
    generator: torch.Generator | None = None,
    **hyperparameters: Any,
) -> ChannelGrowth:
    """The new channels of one site, or new terms of a rank.

    Args:
        subject: the site's PairStatistics, or the site itself for a method that reads no statistics.
        method: name of a registered solver, or a Solver.
        channels: how many, at least 1; rounded up to whole units where the site grows by several channels at a time.
            "auto" keeps those whose held-out gain is above its error bar.
        model: the model that the site belongs to; None: the one in which the site was found.
        generator: source of randomness for methods that draw random numbers.
        **hyperparameters: hyperparameters of the solver, if it is given by name.

    Returns:
        A proposal; `growconv.grow` puts it into the model.

    Raises:
        SolverError: an unknown method or hyperparameter, an impossible number of channels, missing statistics, or a
            proposal that is not finite.
        SiteError: a layer of the site is missing or has been replaced.

    Warns:
        LinearisationWarning: the method treats the activation as linear, but it is not 0 at 0.

    Example:
        >>> stats = growconv.collect_statistics(model, sites[0], batches, loss)[sites[0].name]
        >>> growconv.solve(stats, "tiny", channels=2, model=model, signs=False).channels
        2
    """
    solver = get_solver(method, **hyperparameters)
    statistics = subject if isinstance(subject, PairStatistics) else None
    site = statistics.growth_site if statistics is not None else subject
    if not isinstance(site, Site):
        raise ArgumentTypeError(
            "solve takes the statistics of a site, or a site",
            expected="PairStatistics, GrowthSite or RankSite",
            got=type(subject).__name__,
            where="solve",
        )
    site = site.of(model)
    site.check(trains=False)
    _require_served(solver, site, statistics)
    requested = _validated_channels(channels, site, solver)
    current = None if statistics is None else as_collected(statistics, site)
    there = site if current is None else current.growth_site
    growth = _stored_as(solver.solve(Request(there.measured, requested, current, generator)), there)
    note = linearisation_note(site.measured) if solver.linearises and growth.channels else None
    if note is not None:
        warnings.warn(f"{site.name}: {note}", LinearisationWarning, stacklevel=2)
    if requested != channels:
        reason = growth.reason or f"the site grows in whole groups of {site.granularity}"
        growth = replace(growth, requested=channels, reason=reason)
    return growth


def refusal_of(solver: Solver, site: Site) -> str | None:
    """Why a method, with the hyperparameters that it has, cannot serve a site; None where it can."""
    if not isinstance(site, solver.serves):
        return f"it is a {type(site).__name__}, and this method serves a {solver.serves.__name__}"
    if isinstance(site, GrowthSite) and site.copied and solver.name != "net2net":
        return "its channels depend on each other: only copies of all of them keep the function (net2net)"
    return solver.refusal(site.measured)


def solver_of(site: Site, solver: Solver) -> Solver:
    """The method that a schedule with this solver asks about a site: the site's own where it has one."""
    return solver if site.own_method is None else get_solver(site.own_method)


def _require_served(solver: Solver, site: Site, statistics: PairStatistics | None) -> None:
    """Refuse a site that the method cannot serve, or for which it would need statistics."""
    refused = refusal_of(solver, site)
    if refused is not None:
        serving = [name for name in sorted(SOLVERS) if site.refusal(name) is None]
        raise SolverError(
            f"the method {solver.name!r} cannot serve this site",
            got=refused,
            where=site.name,
            fix=f"use a method for which site.refusal(method) is None: {', '.join(serving) or 'none does'}",
        )
    if solver.reads and statistics is None:
        raise SolverError(
            f"the method {solver.name!r} needs statistics",
            expected=f"PairStatistics with {', '.join(sorted(solver.reads))}",
            got="a site",
            where=site.name,
            fix="collect them: growconv.collect_statistics(model, [site], batches, loss)",
        )


def require_count(solver: Solver, where: str, error: type[GrowthError]) -> None:
    """Refuse, with some error, "auto" channels of a method that cannot tell how many are worth having."""
    if not solver.counts:
        able = ", ".join(name for name in sorted(SOLVERS) if SOLVERS[name].counts)
        raise error(
            f"the method {solver.name!r} has no measure by which to choose a number of channels",
            expected="an integer of at least 1",
            got="'auto'",
            where=where,
            fix=f"give a number, or use one of {able}",
        )


def _stored_as(growth: ChannelGrowth, site: Site) -> ChannelGrowth:
    """The proposal in the precision of the layers, with the widths that it belongs to; refused if it is not finite."""
    stored: list[dict[str, Tensor]] = []
    for given in (growth.incoming, growth.incoming_bias, growth.outgoing, growth.entries):
        stored.append({})
        for path, weight in given.items():
            finite = torch.isfinite(weight)
            if not bool(finite.all()):
                raise SolverError(
                    f"{growth.method} proposed weights that are not finite",
                    got=f"{int((~finite).sum())} such entries",
                    where=f"{growth.site}, {path}",
                    fix="check the statistics: growth.gains and stats.S should be finite and of moderate size",
                )
            bare = path in site.layout.dims
            stored[-1][path] = weight.to(tensor_at(site.model, path) if bare else site.layer(path).filters())
    names = ("incoming", "incoming_bias", "outgoing", "entries")
    return replace(growth, units=growth.units or site.units, **dict(zip(names, stored, strict=True)))


def linearisation_note(site: GrowthSite) -> str | None:
    """What the methods that take the activation as linear mean where it is not 0 at 0; None where it is."""
    offset = max((route.at_zero for route in site.routes), key=abs, default=0.0)
    if abs(offset) < 1e-12:
        return None
    return (
        f"what lies between producer and consumer is {offset:.3g} at 0: the closed-form methods see its linear part "
        f"only, so that a new channel also adds the constant {offset:.3g}·Σω, which their gains leave out; "
        "method='functional' sees it"
    )


def _validated_channels(channels: Channels, site: Site, solver: Solver) -> Channels:
    if channels == "auto":
        require_count(solver, site.name, SolverError)
        return channels
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise SolverError(
            "this number of new channels is invalid",
            expected='an integer of at least 1, or "auto"',
            got=repr(channels),
            where=site.name,
        )
    return site.growable_channels(channels)


def as_collected(statistics: PairStatistics, site: Site) -> PairStatistics:
    """The same statistics on a model of the widths at which they were collected.

    Where neighbours of the site, or the site itself, have grown since, that is a copy of the model without the channels
    that have come: what is solved there says in `ChannelGrowth.units` what it belongs to, and surgery fills the new
    neighbours' entries with zeros.

    Raises:
        SolverError: channels have been taken away since, so that the statistics speak of what is no more.
    """
    if not isinstance(site, GrowthSite):  # M and S2 of its layer are the same at any rank
        return replace(statistics, growth_site=site)
    now, then = site.units, statistics.units
    changed = {space: (then[space], now[space]) for space in now if then.get(space, now[space]) != now[space]}
    if not changed and statistics.growth_site.model is site.model:
        return statistics
    if changed:
        site = site.of(copied(site.model))
    for space, (before, after) in changed.items():
        keys = site.layout.keys(space)
        roles = {side: tuple(path for path, own in keys if own == side) for side in (OUT, IN, ENTRY)}
        name = " + ".join(roles[OUT])
        if after < before:
            raise SolverError(
                "channels have been taken away since these statistics were collected",
                where=site.name,
                expected=f"at least {before} units of {name}",
                got=after,
                fix="collect them again: growconv.collect_statistics(model, [site], batches, loss)",
            )
        layers = {"producers": roles[OUT], "consumers": roles[IN], "followers": roles[ENTRY]}
        neighbour = replace(site, space=space, name=name, routes=(), **layers)
        size = neighbour.granularity
        shrink(site.model, neighbour, range(before * size, after * size))
    kept = statistics.samples_kept
    return replace(statistics, growth_site=site, samples_kept=None if kept is None else kept.of(site))
