"""Growing and shrinking a model, and events: what was done, to be written down, replayed and applied to copies."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, SupportsFloat

from torch import Tensor, nn
from torch.optim import Optimizer

from growconv.errors import ArgumentTypeError, ArgumentValueError, CheckpointError, SurgeryError
from growconv.network import blocks
from growconv.network.model import attribute, unwrapped
from growconv.network.optimizer import Journal, as_optimizers, check_optimizers, exchange, refresh
from growconv.network.plan import Plan, plan_growth, plan_removal
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import Site
from growconv.network.tensors import Change, Insertion

FORMAT = 1

Edit = Mapping[str, Any]
"""One step of surgery as plain values: {"module", "tensor", "axis"} and "position" and "count" of new entries or those
"removed"; {"module", "attribute", "value"}; or {"module"} and what `blocks.apply_block_edit` does there."""

Optimizers = Optimizer | Sequence[Optimizer] | None
"""The optimizer that trains a model, all of them, or None where there is none yet."""


@dataclass(frozen=True)
class GrowthEvent:
    """What one growth of one site did. JSON-able, and replayable on a fresh model by apply_edits.

    Attributes:
        site: name of the site.
        method: the solver's name; "shrink" for channels taken away, "insert_layer", "insert_copy", "merge" and "split"
            for other layers than before.
        channels: channels added (negative: taken away).
        width_before: the site's channels before.
        width_after: the site's channels after.
        amplitude: what the outgoing weights were multiplied by.
        gains: captured energy of each channel.
        reason: why the number of channels differs from the one asked for.
        edits: what was done, in order.
        parameters_before: number of parameters of the model before.
        parameters_after: number of parameters of the model after.
        step: training step; set by the scheduler.
        seconds: time of collecting, solving and surgery; set by the scheduler.
        predicted_decrease: first-order decrease of the mean loss at this amplitude.
        realised_decrease: measured decrease of the mean loss on the growth samples; set by the scheduler.
        details: further numbers.
        recipe: how to do the same, including the values, to another model. It is not saved: neither JSON nor pickles
            nor copies contain it.

    Example:
        >>> twin = copy.deepcopy(model)
        >>> event = growconv.grow(model, sites[0], growconv.solve(sites[0], "random", channels=2, model=model))
        >>> event.apply_to(twin).width_after
        6
    """

    site: str
    method: str
    channels: int
    width_before: int
    width_after: int
    amplitude: float
    gains: tuple[float, ...]
    reason: str | None
    edits: tuple[Edit, ...]
    parameters_before: int
    parameters_after: int
    step: int | None = None
    seconds: float | None = None
    predicted_decrease: float | None = None
    realised_decrease: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    recipe: "Callable[[nn.Module, Optimizers], GrowthEvent] | None" = field(default=None, repr=False, compare=False)

    def apply_to(self, model: nn.Module, optimizer: Optimizers = None) -> "GrowthEvent":
        """Do the same to another model with the same names: an average (EMA, SWA), a teacher, a replica.

        New entries get the same values as in the model that grew; what comes from old entries (running statistics of
        copied channels, the mean for a bare parameter, the kernels of a merge or split) comes from the other model's
        own; a method that revises old weights puts in those of the model that grew. An event that was read from a file,
        unpickled or copied knows names and numbers only: channels that it puts in are zero, until weights are loaded.

        Args:
            model: a raw model as the grown one was before the event, with any weights.
            optimizer: the optimizer (or a list) that trains it, if any.

        Returns:
            The event of that model.

        Raises:
            SurgeryError: the model has other names or widths; nothing has changed then.
        """
        if self.recipe is not None:
            return self.recipe(model, optimizer)
        before = count_parameters(unwrapped(model))
        if before != self.parameters_before:
            raise not_in_step(self.site, f"{self.parameters_before} parameters", before)
        apply_edits(model, self.edits, optimizer)
        return replace(self, parameters_after=count_parameters(model))

    def _values(self) -> dict[str, object]:
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "recipe"}

    def __getstate__(self) -> dict[str, object]:
        return {**self._values(), "recipe": None}

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        lists = {"gains": list(self.gains), "edits": [dict(edit) for edit in self.edits], "details": dict(self.details)}
        return {**self._values(), **lists}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "GrowthEvent":
        """The event that to_dict wrote down; ArgumentValueError for entries that no event has."""
        unknown = set(values) - {each.name for each in fields(cls) if each.name != "recipe"}
        if unknown:
            raise ArgumentValueError("a growth event has unknown entries", got=", ".join(sorted(unknown)))
        return cls(**{**values, "gains": tuple(values["gains"]), "edits": tuple(values["edits"])})  # pyright: ignore

    def __str__(self) -> str:
        """One line: site, widths, what the held-out loss did (else the amplitude), parameters."""
        more = f"{self.parameters_after - self.parameters_before:+,} parameters"
        note = f"; {self.reason}" if self.reason else ""
        if not self.channels:
            return f"{self.site}: {self.method}, {more}{note}"
        losses = dict(self.details.get("losses", ()))
        effect = "silent at first" if self.amplitude == 0 else f"amplitude {self.amplitude:.3g}"
        if self.details.get("unchanged"):
            effect = "outputs unchanged"
        if self.amplitude != 0 and {0.0, self.amplitude} <= set(losses):
            effect = f"held-out loss {losses[0.0]:.4g} -> {losses[self.amplitude]:.4g}"
        widths = f"{self.width_before} -> {self.width_after} channels by {self.method}"
        return f"{self.site}: {widths}, {effect}, {more}{note}"


def not_in_step(site: str, expected: object, got: object) -> SurgeryError:
    """What is wrong with a model that an event cannot be applied to."""
    problem, fix = "this model is not as the other one was before the event", "apply every event to it, in order"
    return SurgeryError(problem, where=site, expected=expected, got=got, fix=fix)


def count_parameters(model: nn.Module) -> int:
    """Number of distinct parameter entries."""
    return sum(parameter.numel() for parameter in model.parameters())


def carried_out(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    change: Callable[[], None],
    values: Iterable[Tensor] = (),
    **told: Any,
) -> GrowthEvent:
    """Change a model, as a whole or not at all, and tell about it.

    Args:
        optimizers: all that train it.
        change: changes them.
        values: tensors whose entries it overwrites.
        **told: the event's own entries.
    """
    before, journal = count_parameters(model), Journal(model, optimizers, values)
    try:
        change()
        refresh(model)
        return GrowthEvent(parameters_before=before, parameters_after=count_parameters(model), **told)
    except BaseException:
        journal.restore()
        raise


def apply_edits(model: nn.Module, edits: Iterable[Edit], optimizer: Optimizers = None) -> None:
    """Give a fresh model the shapes of a grown one; new entries are zero until its state is loaded. All or nothing.

    Args:
        model: a model as it was before the edits.
        edits: those of one or several events, in order.
        optimizer: the optimizer (or a list) of the model; its groups and state follow.

    Raises:
        SurgeryError: for an edit that does not fit the model; nothing has changed then.

    Example:
        >>> fresh = copy.deepcopy(model)
        >>> event = growconv.shrink(model, sites[0], [0])
        >>> growconv.apply_edits(fresh, event.edits)
        >>> fresh[0].out_channels
        3
    """
    model, optimizers = unwrapped(model), as_optimizers(optimizer)
    journal = Journal(model, optimizers)
    try:
        for edit in edits:
            apply_edit(model, edit, optimizers)
        refresh(model)
    except BaseException as error:
        journal.restore()
        if not isinstance(error, AttributeError | LookupError | TypeError | RuntimeError):
            raise
        problem, where = f"an edit of the history does not fit this model: {error}", str(edit.get("module", ""))
        fix = "replay the history on the model that it started from"
        raise SurgeryError(problem, where=where, got=dict(edit), fix=fix) from error


def apply_edit(model: nn.Module, edit: Edit, optimizers: Sequence[Optimizer] = ()) -> None:
    """Do one edit; where it does not fit, the model may be left half changed."""
    where = str(edit["module"])
    if "attribute" in edit:
        module, name, value = model.get_submodule(where), str(edit["attribute"]), edit["value"]
        if isinstance(value, list) and isinstance(getattr(module, name), tuple):
            value = tuple(value)  # JSON knows none
        setattr(module, name, value)
    elif "tensor" in edit:
        path = f"{where}.{edit['tensor']}".lstrip(".")
        tensor = attribute(model, path)
        if not isinstance(tensor, Tensor):
            raise AttributeError(f"{path} is no tensor")
        axis = _integer(edit["axis"], tensor.dim() - 1)
        change = Change(path, tensor)
        if "removed" in edit:
            change.removed[axis] = tuple(_integer(at, tensor.shape[axis] - 1) for at in edit["removed"])
        else:
            position = _integer(edit["position"], tensor.shape[axis])
            change.insertions.append(Insertion(axis, position, _integer(edit["count"])))
        if isinstance(tensor, nn.Parameter):
            check_optimizers(optimizers, [(path, tensor)])
        exchange(model, [change], {}, optimizers)
    else:
        blocks.apply_block_edit(model, edit, optimizers)


def _integer(value: object, most: int | None = None) -> int:
    if not isinstance(value, int) or value < 0 or (most is not None and value > most):
        raise IndexError(f"{value!r} is no whole number from 0 to {'infinity' if most is None else most}")
    return value


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


@dataclass
class GrowthHistory:
    """The growth events of a run, in the order in which they were applied.

    Attributes:
        events: one per site and round; written down, they hold names and numbers, no tensors and no objects of a model.

    Example:
        >>> fresh, history = copy.deepcopy(model), growconv.GrowthHistory()
        >>> history.append(growconv.shrink(model, sites[0], [0]))
        >>> history.replay(fresh)[0].out_channels
        3
    """

    events: list[GrowthEvent] = field(default_factory=list)

    def append(self, event: GrowthEvent) -> None:
        """Add the newest event."""
        self.events.append(event)

    def __iter__(self) -> Iterator[GrowthEvent]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def __getitem__(self, index: int) -> GrowthEvent:
        return self.events[index]

    def widths(self, site: str) -> list[tuple[int | None, int]]:
        """The widths of a site over the run, by its name: (step, width after it) per event there."""
        return [(event.step, event.width_after) for event in self.events if event.site == site]

    def starts_from(self, model: nn.Module) -> bool:
        """Whether a model has the size that the first event found; True for an empty history."""
        return not self.events or count_parameters(model) == self.events[0].parameters_before

    def replay(self, model: nn.Module, optimizer: Optimizers = None) -> nn.Module:
        """Give a fresh small model the shapes of the grown one, in place; all or nothing.

        The new entries are zeros until weights are loaded. Returns the same model.

        Args:
            model: the model as it was built at the start of the run.
            optimizer: its optimizer (or a list), which then has its parameters in the order of the run.

        Raises:
            CheckpointError: the model is not the one that the history began with.
            SurgeryError: an event does not fit it. Nothing has changed then.
        """
        if not self.starts_from(model):
            raise CheckpointError(
                "the history began with another model",
                expected=f"{self.events[0].parameters_before} parameters",
                got=f"{count_parameters(model)} parameters",
                fix="build the model with the run's own settings, before any growth",
            )
        apply_edits(model, [edit for event in self.events for edit in event.edits], optimizer)
        return model

    def to_json(self) -> str:
        """The whole history as JSON text."""
        return json.dumps({"format": FORMAT, "events": [event.to_dict() for event in self.events]})

    @classmethod
    def from_json(cls, text: str) -> "GrowthHistory":
        """Read what `to_json` wrote; CheckpointError for a text that is no growth history."""
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError("a growth history has to be JSON", got=str(error)) from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            expected = f'{{"format": {FORMAT}, "events": [...]}}'
            raise CheckpointError("this is no kind of growth history that is known", expected=expected, got=text[:80])
        return cls.from_records(record["events"])

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, object]]) -> "GrowthHistory":
        """The history of the events' dictionaries, as the lines of a growth.jsonl; CheckpointError for other fields."""
        try:
            return cls([GrowthEvent.from_dict(record) for record in records])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError("a growth event that cannot be read", got=repr(error), fix="restore it") from error

    def __str__(self) -> str:
        return "\n".join(str(event) for event in self.events) or "nothing has grown yet"
