"""Putting channels into a running model and its optimizer: plan, validate, apply."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from growconv.errors import ArgumentTypeError, ArgumentValueError, SurgeryError
from growconv.network.graph import attribute, unwrapped
from growconv.network.growing import plan_growth
from growconv.network.optimizer import as_optimizers, check_optimizers, follow_ages, keep_identity, migrate
from growconv.network.plan import Plan
from growconv.network.proposal import ChannelGrowth
from growconv.network.removing import plan_removal
from growconv.network.site import GrowthSite
from growconv.network.tensors import Insertion, enlarge, without


@dataclass(frozen=True)
class GrowthEvent:
    """What one growth of one site did. JSON-able, and replayable on a fresh model by apply_edits.

    Attributes:
        site: name of the site.
        method: the solver's name; "shrink" for channels taken away, "insert_layer" for a new layer.
        channels: channels added (negative: taken away).
        width_before: the site's channels before.
        width_after: the site's channels after.
        amplitude: what the outgoing weights were multiplied by.
        gains: captured energy of each channel.
        reason: why the number of channels differs from the one asked for.
        edits: what was done, in order: insertions and removals of entries of named tensors, attributes set.
        parameters_before: number of parameters of the model before.
        parameters_after: number of parameters of the model after.
        step: training step; set by the scheduler.
        seconds: time of collecting, solving and surgery; set by the scheduler.
        predicted_decrease: first-order decrease of the mean loss at this amplitude.
        realised_decrease: measured decrease of the mean loss on the growth samples; set by the scheduler.
        details: "kernel_errors": for every factorized convolution, how far the kernels that its factors hold are from
            those proposed, relative.
    """

    site: str
    method: str
    channels: int
    width_before: int
    width_after: int
    amplitude: float
    gains: tuple[float, ...]
    reason: str | None
    edits: tuple[dict[str, Any], ...]
    parameters_before: int
    parameters_after: int
    step: int | None = None
    seconds: float | None = None
    predicted_decrease: float | None = None
    realised_decrease: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "gains": list(self.gains), "edits": [dict(edit) for edit in self.edits]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GrowthEvent":
        """The event that to_dict wrote down."""
        known = {each.name for each in fields(cls)}
        unknown = set(values) - known
        if unknown:
            raise ArgumentValueError("a growth event has unknown entries", got=", ".join(sorted(unknown)))
        return cls(**{**values, "gains": tuple(values["gains"]), "edits": tuple(values["edits"])})

    def __str__(self) -> str:
        """One line: site, widths, amplitude, parameters."""
        more = self.parameters_after - self.parameters_before
        note = f"; {self.reason}" if self.reason else ""
        return (
            f"{self.site}: {self.width_before} -> {self.width_after} channels by {self.method}, "
            f"amplitude {self.amplitude:.3g}, {more:+d} parameters{note}"
        )


def count_parameters(model: nn.Module) -> int:
    """Number of distinct parameter entries."""
    return sum(parameter.numel() for parameter in model.parameters())


def grow(
    model: nn.Module,
    site: GrowthSite,
    growth: ChannelGrowth,
    amplitude: float = 1.0,
    optimizer: Any = None,
) -> GrowthEvent:
    """Put new channels into a model, in place.

    Everything is checked before anything changes. New channels come after the site's old ones. Parameters are replaced
    by larger ones with the same requires_grad, dtype, device, memory format and hooks, in every module that has them
    and in the optimizer's groups; the optimizer's state for old entries stays, and new entries train as a new optimizer
    would train them (`network.entry_ages`).

    Args:
        model: the raw model of the site.
        site: where.
        growth: what, as a solver proposes it. A weight that several modules share gets what is proposed for the first.
            Where a neighbouring site grew since it was computed, its weights on the neighbour's new channels are zero.
        amplitude: multiplies the outgoing weights; 0 leaves the function as it is.
        optimizer: the optimizer (or a list of all optimizers) that trains the model; None where there is none yet.

    Returns:
        The event, with the edits that were made.

    Raises:
        SiteError: when the site does not belong to the model any more.
        SurgeryError: when the proposal does not fit, or the optimizer does not own the parameters.
    """
    model = unwrapped(model)
    if not isinstance(site, GrowthSite):
        raise ArgumentTypeError("a site is needed", expected="GrowthSite", got=type(site).__name__)
    if not isinstance(growth, ChannelGrowth):
        raise ArgumentTypeError("a proposal is needed", expected="ChannelGrowth", got=type(growth).__name__)
    site.check(model)
    amplitude = _finite(amplitude)
    optimizers = as_optimizers(optimizer)
    plan = plan_growth(site, growth, amplitude)
    check_optimizers(optimizers, _parameters(model, plan))
    registry = _registry(model)
    before, width = _count(registry), site.width
    _apply(model, plan, optimizers, registry)
    site.spaces.log.append((site.space, growth.channels))
    decrease = growth.expected_decrease
    return GrowthEvent(
        site=site.name,
        method=growth.method,
        channels=growth.channels,
        width_before=width,
        width_after=site.width,
        amplitude=amplitude,
        gains=tuple(growth.gains.tolist()),
        reason=growth.reason,
        edits=tuple(plan.edits()),
        parameters_before=before,
        parameters_after=_count(registry),
        predicted_decrease=None if decrease is None else decrease * amplitude,
        details=dict(plan.details),
    )


def shrink(model: nn.Module, site: GrowthSite, channels: Sequence[int], optimizer: Any = None) -> GrowthEvent:
    """Take channels out of a model, in place: the inverse of grow.

    Args:
        model: the raw model of the site.
        site: where.
        channels: indices of the channels to remove; whole groups where channels come in groups, and never all of them.
        optimizer: the optimizer (or a list) that trains the model; its state for the channels that stay is kept.

    Returns:
        The event, with a negative number of channels.
    """
    model = unwrapped(model)
    site.check(model)
    optimizers = as_optimizers(optimizer)
    plan = plan_removal(site, channels)
    check_optimizers(optimizers, _parameters(model, plan))
    registry = _registry(model)
    before, width = _count(registry), site.width
    _apply(model, plan, optimizers, registry)
    site.spaces.log.append((site.space, -len(set(channels))))
    return GrowthEvent(
        site=site.name,
        method="shrink",
        channels=-len(set(channels)),
        width_before=width,
        width_after=site.width,
        amplitude=0.0,
        gains=(),
        reason=None,
        edits=tuple(plan.edits()),
        parameters_before=before,
        parameters_after=_count(registry),
    )


def apply_edits(model: nn.Module, edits: Sequence[Mapping[str, Any]]) -> None:
    """Give a fresh model the shapes of a grown one; new entries are zero until its state is loaded.

    Args:
        model: a model as it was before the edits.
        edits: those of one or several events, in order.

    Raises:
        SurgeryError: for an edit that does not fit the model.
    """
    model = unwrapped(model)
    registry = _registry(model)
    for edit in edits:
        where = str(edit.get("module", ""))
        try:
            module = model.get_submodule(where)
            if "insert" in edit:
                from growconv.network.depth import replay_insertion  # it makes events of this module

                replay_insertion(model, edit)
                registry = _registry(model)
            elif "attribute" in edit:
                value = edit["value"]
                setattr(module, edit["attribute"], tuple(value) if isinstance(value, list) else value)
            elif "removed" in edit:
                old = _tensor(module, edit["tensor"])
                _replace(registry, old, without(old.detach(), edit["axis"], edit["removed"]), None)
            else:
                old = _tensor(module, edit["tensor"])
                insertion = Insertion(edit["axis"], edit["position"], edit["count"])
                _replace(registry, old, enlarge(old.detach(), [insertion], [None]), None)
        except (AttributeError, KeyError, IndexError, RuntimeError) as error:
            raise SurgeryError(
                f"an edit of the history does not fit this model: {error}",
                where=where,
                got=dict(edit),
                fix="replay the history on the model that it started from",
            ) from error


def _apply(model: nn.Module, plan: Plan, optimizers: Sequence[Any], registry: "Registry") -> None:
    """Carry out a validated plan: all new tensors are built first, then put in place."""
    built = []
    for change in plan.changes:
        old = change.tensor
        with torch.no_grad():
            data = change.resized(old.detach() if change.revised is None else change.revised.to(old))
            grad = None if old.grad is None else change.resized(old.grad, fill=False)
        built.append((change, old, data, grad))
    for change, old, data, grad in built:
        new = _replace(registry, old, data, grad)
        if isinstance(old, nn.Parameter) and isinstance(new, nn.Parameter):
            migrate(optimizers, old, new, change)
    follow_ages(optimizers)
    for path, replacement in plan.revised.items():
        with torch.no_grad():
            attribute(model, path).copy_(replacement)
    for path, name, value in plan.attributes:
        setattr(model.get_submodule(path), name, value)


def _tensor(module: nn.Module, name: str) -> Tensor:
    value = attribute(module, name)
    if not isinstance(value, Tensor):
        raise AttributeError(f"{type(module).__name__} has no tensor {name}")
    return value


Registry = dict[int, list[tuple[dict, str]]]


def _registry(model: nn.Module) -> Registry:
    """Where every parameter and buffer is registered, by identity."""
    found: Registry = {}
    for module in model.modules():
        for registered in (module._parameters, module._buffers):
            for name, value in registered.items():
                found.setdefault(id(value), []).append((registered, name))
    return found


def _count(registry: Registry) -> int:
    """Number of distinct parameter entries."""
    tensors = [places[0][0][places[0][1]] for places in registry.values()]
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter))


def _replace(registry: Registry, old: Tensor, data: Tensor, grad: Tensor | None) -> Tensor:
    """Put a new tensor wherever the old one is registered."""
    new = keep_identity(old, data, grad) if isinstance(old, nn.Parameter) else data
    for registered, name in registry[id(old)]:
        registered[name] = new
    registry[id(new)] = registry.pop(id(old))
    return new


def _parameters(model: nn.Module, plan: Plan) -> list[tuple[str, nn.Parameter]]:
    return [(change.path, change.tensor) for change in plan.changes if isinstance(change.tensor, nn.Parameter)]


def _finite(amplitude: Any) -> float:
    try:
        value = float(amplitude)
    except (TypeError, ValueError):
        raise ArgumentTypeError("the amplitude must be a number", got=type(amplitude).__name__) from None
    if value != value or value in (float("inf"), float("-inf")):
        raise ArgumentValueError("the amplitude must be finite", got=value)
    return value
