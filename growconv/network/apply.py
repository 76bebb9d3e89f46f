"""Putting channels into a running model and its optimizer: plan, validate, apply."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, SupportsFloat

from torch import nn

from growconv.errors import ArgumentTypeError, ArgumentValueError
from growconv.network.event import GrowthEvent, Optimizers, carried_out, not_in_step
from growconv.network.model import unwrapped
from growconv.network.optimizer import as_optimizers, check_optimizers, exchange
from growconv.network.plan import Plan, plan_growth, plan_removal
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import Site


def grow(
    model: nn.Module, site: Site, growth: ChannelGrowth, amplitude: float | int = 1.0, optimizer: Optimizers = None
) -> GrowthEvent:
    """Add new channels to a model, in place; all or nothing.

    Everything is checked and built before anything changes, and an error or interrupt afterwards undoes it. New
    channels come after the site's old ones. Parameters are replaced by larger ones with the same requires_grad, dtype,
    device, memory format and hooks, in every module that has them and in the optimizer's groups; the optimizer's state
    for old entries stays, and new entries train as a new optimizer would train them (`network.entry_ages`).

    Args:
        model: the raw model of the site, or one with the same names.
        growth: the proposal of a solver. A weight that several modules share gets the values proposed for the first.
            If a neighbouring site has grown since, the weights on the neighbour's new channels are zero.
        amplitude: factor on the outgoing weights; 0 preserves the function.
        optimizer: the optimizer (or a list of all optimizers) that trains the model; None where there is none yet.

    Returns:
        The event, with the edits that were made; `event.apply_to` does the same to averages and teachers.

    Raises:
        SiteError: when the model has no such site (any more).
        SurgeryError: when the proposal does not fit, or the optimizer does not own the parameters.

    Example:
        >>> growth = growconv.solve(sites[0], "random", channels=2, model=model)
        >>> event = growconv.grow(model, sites[0], growth, amplitude=0, optimizer=optimizer)
        >>> event.width_before, event.width_after
        (4, 6)
    """
    return _grown(model, site, growth, amplitude, optimizer, trains=True)


def _grown(
    model: nn.Module, site: object, growth: object, amplitude: object, optimizer: object, trains: bool
) -> GrowthEvent:
    model = unwrapped(model)
    if not isinstance(growth, ChannelGrowth):
        raise ArgumentTypeError("a proposal is needed", expected="ChannelGrowth", got=type(growth).__name__)
    site = _site_of(site, model, trains)
    if not isinstance(amplitude, SupportsFloat):
        raise ArgumentTypeError("the amplitude must be a number", got=type(amplitude).__name__)
    amplitude, decrease = float(amplitude), growth.expected_decrease
    if not math.isfinite(amplitude):
        raise ArgumentValueError("the amplitude must be finite", got=amplitude)
    return _carried_out(
        site,
        plan_growth(site, growth, amplitude),
        optimizer,
        # a teacher's weights may be frozen
        partial(_grown, site=site, growth=growth, amplitude=amplitude, trains=False),
        method=growth.method,
        channels=growth.channels,
        amplitude=amplitude,
        gains=tuple(growth.gains.tolist()),
        reason=growth.reason,
        predicted_decrease=None if decrease is None else decrease * amplitude,
    )


def shrink(model: nn.Module, site: Site, channels: Sequence[int], optimizer: Optimizers = None) -> GrowthEvent:
    """Remove channels from a model, in place, all or nothing: the inverse of grow.

    Args:
        model: the raw model of the site, or one with the same names.
        channels: indices of the channels to remove; whole groups where channels come in groups, and never all of them.
        optimizer: the optimizer (or a list) that trains the model; its state for the channels that stay is kept.

    Returns:
        The event, with a negative number of channels.

    Raises:
        SiteError: when the model has no such site (any more).
        SurgeryError: for channels that cannot be removed, or an optimizer that does not own the parameters.

    Example:
        >>> growconv.shrink(model, sites[0], [0, 1], optimizer=optimizer).width_after
        2
    """
    site = _site_of(site, unwrapped(model), trains=False)
    return _carried_out(
        site,
        plan_removal(site, channels),
        optimizer,
        partial(shrink, site=site, channels=tuple(channels)),
        method="shrink",
        channels=-len(set(map(int, channels))),
        amplitude=0.0,
        gains=(),
        reason=None,
    )


def _carried_out(
    site: Site, plan: Plan, optimizer: object, again: Callable[..., GrowthEvent], channels: int, **told: Any
) -> GrowthEvent:
    """Do what is planned, all or nothing; `told` are the event's own entries, `again` does it to another model."""
    optimizers, width = as_optimizers(optimizer), site.width
    check_optimizers(optimizers, plan.parameters())

    def recipe(model: nn.Module, optimizer: Optimizers) -> GrowthEvent:
        found = _site_of(site, unwrapped(model), trains=False).width
        if found != width:
            raise not_in_step(site.name, f"{width} channels", found)
        return again(model=model, optimizer=optimizer)

    return carried_out(
        site.model,
        optimizers,
        partial(exchange, site.model, plan.changes, plan.attributes, optimizers),
        [change.tensor for change in plan.changes if not change.resizes],
        site=site.name,
        channels=channels,
        width_before=width,
        width_after=width + channels,
        edits=tuple(plan.edits()),
        recipe=recipe,
        **told,
    )


def _site_of(site: object, model: nn.Module, trains: bool) -> Site:
    if not isinstance(site, Site):
        raise ArgumentTypeError("a site is needed", expected="GrowthSite", got=type(site).__name__)
    site = site.of(model)
    site.check(trains=trains)
    return site
