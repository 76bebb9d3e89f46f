"""Growth records from a file, checked as plain values before any of them touches a model."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from growconv.errors import CheckpointError, SurgeryError
from growconv.growth.decision import Policy
from growconv.network import layers
from growconv.network.event import GrowthHistory, apply_edit, count_parameters
from growconv.network.model import found_at
from growconv.network.optimizer import refresh

Kind = TypeVar("Kind")

SETTABLE = frozenset(
    {
        "in_channels",
        "out_channels",
        "in_features",
        "out_features",
        "groups",
        "num_features",
        "num_channels",
        "num_groups",
        "num_parameters",
        "normalized_shape",
        "rank",
    }
)
"""Attributes of torch's and growconv's own layers that growing sets; of other modules, sizes that are there already."""

INSERTS = ("convolution", "residual")
BLOCKS = ("insert", "copy", "split", "merge")
"""Edits that put other modules in the place of old ones."""

MOST = 2**40
"""Entries of one tensor that no model has; what is too big for the machine's memory is torch's to say."""

_NUMBER, _OPTIONAL = (int, float), (int, float, type(None))
EVENT: dict[str, tuple[type, ...]] = {
    "site": (str,),
    "method": (str,),
    "channels": (int,),
    "width_before": (int,),
    "width_after": (int,),
    "amplitude": _NUMBER,
    "gains": (list, tuple),
    "reason": (str, type(None)),
    "edits": (list, tuple),
    "parameters_before": (int,),
    "parameters_after": (int,),
    "step": (int, type(None)),
    "seconds": _OPTIONAL,
    "predicted_decrease": _OPTIONAL,
    "realised_decrease": _OPTIONAL,
    "details": (dict,),
}
"""Fields of a growth event's record, with the types that JSON gives them."""


SLACK = 64
"""How many times the entries of all saved tensors one tensor may have had at a moment of its history (pruned back)."""


def most_entries(saved: Iterable[Tensor]) -> int:
    """Entries that a tensor may have had while a model grew to these tensors."""
    return SLACK * max(sum(tensor.numel() for tensor in saved), 2**16)


def history_from(records: Iterable[Mapping[str, Any]]) -> GrowthHistory:
    """The history that records of a file tell, each field compared with its type.

    Raises:
        CheckpointError: a record misses a field, or has one that no event has.
    """
    listed = list(records)
    for record in listed:
        check_event(record)
    return GrowthHistory.from_records(listed)


def rehearse(history: GrowthHistory, model: nn.Module, most: int = MOST) -> nn.Module:
    """Replay a history on a copy of the model, whose tensors have no memory wherever that can be.

    Args:
        history: from a file.
        model: as it was built at the start of the run; it is left as it is.
        most: entries that a tensor may have at any moment.

    Returns:
        The copy, with the shapes of the grown model.

    Raises:
        CheckpointError: the model is not the one that the history began with, or the history is forged or damaged.
    """
    fix = "build the model with the run's own settings, before any growth and before its optimizer"
    if not history.starts_from(model):
        raise CheckpointError(
            "The history began with another model.",
            expected=f"{history.events[0].parameters_before} parameters",
            got=f"{count_parameters(model)} parameters",
            where=type(model).__name__,
            fix=fix,
        )
    edits: list[Any] = [edit for event in history for edit in event.edits]
    kernels = any(isinstance(edit, Mapping) and edit.keys() & {"split", "merge"} for edit in edits)
    twin = _copied(model, {}) if kernels else without_data(model)  # new kernels are computed from those that are there
    try:
        for event in history:
            for edit in event.edits:
                _check_edit(twin, edit, most)
                apply_edit(twin, edit)
            if count_parameters(twin) > most or sum("copy" in edit for edit in event.edits) > 1:
                raise SurgeryError("it asks for more parameters than the saved tensors could fill", where=event.site)
        refresh(twin)
    except CheckpointError:
        raise
    except (SurgeryError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            "The history does not fit this model.", got=error, where=type(model).__name__, fix=fix
        ) from error
    check_counts(twin, edits)
    return twin


def check_event(record: object) -> None:
    """Compare the fields of one growth event with the types that they have; which fields there are, GrowthEvent knows.

    Raises:
        CheckpointError: names the field.
    """
    if not isinstance(record, Mapping):
        raise _refused("A growth event is no record.", got=type(record).__name__)
    for name, value in record.items():
        if name in EVENT and not _is(value, *EVENT[name]):
            raise _refused(f"A growth event has no such {name}.", got=_short(value))
    for gain in record.get("gains", ()):
        if not _is(gain, *_NUMBER):
            raise _refused("A gain of a growth event is no number.", got=_short(gain))


def _check_edit(model: nn.Module, edit: object, most: int) -> None:
    """Refuse an edit that growing could not have written for a model as it is when the edit comes.

    Args:
        model: its tensors need no data; it is left as it is.
        edit: of a history.
        most: entries that a tensor may have.

    Raises:
        CheckpointError: names the edit.
    """
    if not isinstance(edit, Mapping) or not isinstance(edit.get("module"), str):
        raise _refused("An edit of the history names no module.", got=_short(edit))
    module = found_at(model, edit["module"])
    if not isinstance(module, nn.Module):
        raise _refused("An edit of the history is about a module that the model does not have.", edit)
    if "attribute" in edit:
        _check_attribute(module, edit, most)
    elif "tensor" in edit:
        tensor = layers.stored(module, str(edit["tensor"]))
        if tensor is None:
            raise _refused("An edit of the history is about a tensor that the model does not have.", edit)
        _check_resize(tensor.shape, edit, most)
    else:
        kind = next((each for each in BLOCKS if each in edit), None)
        if kind is None or set(edit) != {"module", kind}:
            raise _refused("An edit of the history does nothing that is known.", edit, expected=", ".join(BLOCKS))
        if kind == "insert":
            _check_insertion(edit, most)
        elif kind == "split":
            _check_split(edit, most)
        elif not (isinstance(edit[kind], str) or (kind == "copy" and edit[kind] is None)):
            raise _refused("An edit of the history names no layer.", edit)


def _check_resize(shape: Sequence[int], edit: Mapping[str, Any], most: int) -> None:
    """One insertion or removal."""
    axis = edit.get("axis")
    if not _is(axis, int) or not 0 <= axis < len(shape):
        raise _refused("An edit of the history is about an axis that the tensor does not have.", edit)
    size = shape[axis]
    if "removed" in edit:
        removed = edit["removed"]
        whole = isinstance(removed, list | tuple) and all(_is(entry, int) and entry >= 0 for entry in removed)
        if not whole or len(set(removed)) != len(removed) or not removed:
            raise _refused("An edit of the history removes what is no list of entries.", edit)
        if max(removed) >= size or len(removed) >= size:
            raise _refused("An edit of the history removes more than there is.", edit, expected=f"of {size} entries")
        return
    position, count = edit.get("position"), edit.get("count")
    if not _is(position, int) or not _is(count, int) or position < 0 or count < 1:
        raise _refused("An edit of the history inserts nothing anywhere.", edit)
    if position > size:
        raise _refused("An edit of the history inserts behind the end.", edit, expected=f"at most {size}")
    if math.prod(shape) // max(size, 1) * (size + count) > most:
        problem = "An edit of the history asks for more than the saved tensors could fill."
        raise _refused(problem, edit, expected=f"at most {most} entries")


def _check_attribute(module: nn.Module, edit: Mapping[str, Any], most: int) -> None:
    """A size of a layer, or one that a module's own code keeps."""
    value, name = edit.get("value"), edit["attribute"]
    values = value if isinstance(value, list | tuple) else [value]
    if not values or not all(_is(each, int) and 1 <= each <= most for each in values):
        raise _refused("An edit of the history sets a width that is none.", edit)
    if name in SETTABLE:
        return
    kept = vars(module).get(name)
    several = isinstance(kept, list | tuple) and len(kept) == len(values) and all(_is(each, int) for each in kept)
    if not isinstance(name, str) or name.startswith("__") or not (several or (_is(kept, int) and _is(value, int))):
        raise _refused(
            "An edit of the history sets an attribute that growing never sets.",
            edit,
            expected=f"{', '.join(sorted(SETTABLE))}, or a size that the module has",
        )


def _check_insertion(edit: Mapping[str, Any], most: int) -> None:
    layer, numbers = edit["insert"], ("channels", "axes", "kernel_size", "seed")
    whole = isinstance(layer, Mapping) and set(layer) == {"kind", "activation", *numbers}
    if not whole or layer["kind"] not in INSERTS or not all(_is(layer[name], int) for name in numbers):
        raise _refused("An edit of the history inserts a layer of no known kind.", edit, expected=", ".join(INSERTS))
    channels, axes, taps, seed = (layer[name] for name in numbers)
    fits = 0 <= axes <= 3 and 1 <= taps <= 255 and channels >= 1 and 0 <= seed < 2**31
    if not fits or channels**2 * taps**axes > most:
        raise _refused("An edit of the history inserts a layer of no possible size.", edit)


def _check_split(edit: Mapping[str, Any], most: int) -> None:
    values = edit["split"]
    whole = isinstance(values, Mapping) and set(values) == {"hidden", "first_size"}
    sizes = values["first_size"] if whole else None
    if not isinstance(sizes, list | tuple) or not all(_is(each, int) and 1 <= each <= 255 for each in sizes):
        raise _refused("An edit of the history splits a convolution into no sizes.", edit)
    if not _is(values["hidden"], int) or not 1 <= values["hidden"] <= min(most, 2**20):
        raise _refused("An edit of the history splits a convolution over no possible number of channels.", edit)


def without_data(model: nn.Module) -> nn.Module:
    """A copy of a model whose tensors have shapes but no memory, to try on what is to be done.

    Raises:
        CheckpointError: the model cannot be copied.
    """
    kept: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor) and id(tensor) not in kept:
                empty = torch.empty_like(tensor, device="meta", requires_grad=False)
                whole = isinstance(tensor, nn.Parameter)
                kept[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if whole else empty
    return _copied(model, kept)


def _copied(model: nn.Module, kept: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, kept)
    except Exception as error:  # whatever an attribute of the user's raises
        raise CheckpointError(
            "The model cannot be copied, so the change cannot be tried on a copy first.",
            where=type(model).__name__,
            got=f"{type(error).__name__}: {error}",
            fix="keep what cannot be copied (locks, files, generators) out of the model",
        ) from error


def check_counts(model: nn.Module, edits: Iterable[Mapping[str, Any]]) -> None:
    """Compare the attributes that edits set with the tensors that are there after all of them.

    Args:
        model: after the edits; its tensors need no data.
        edits: all of them, in order.

    Raises:
        CheckpointError: names the module.
    """
    for path in dict.fromkeys(edit["module"] for edit in edits if "attribute" in edit):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue  # a layer inserted later stands there now
        told, there = vars(module), _there(module)
        wrong = {name: (there[name], told[name]) for name in there if name in told and told[name] != there[name]}
        if wrong:
            raise CheckpointError(
                "The history gives other widths than the tensors have.",
                where=path,
                expected={name: pair[0] for name, pair in wrong.items()},
                got={name: pair[1] for name, pair in wrong.items()},
            )


def _there(module: nn.Module) -> dict[str, int]:
    """Widths as the tensors of a plain layer tell them; empty for other modules."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.dim():
        return {}
    if weight.dim() == 1:
        return dict.fromkeys(("num_features", "num_channels", "num_parameters"), len(weight))
    groups = getattr(module, "groups", 1)
    first, second = (1, 0) if getattr(module, "transposed", False) else (0, 1)
    outputs = weight.shape[first] * (groups if first else 1)
    inputs = weight.shape[second] * (groups if second else 1)
    return {"out_features": outputs, "in_features": inputs, "out_channels": outputs, "in_channels": inputs}


def check_schedule(state: object, phases: Sequence[str], policies: Mapping[str, Policy]) -> None:
    """Compare the saved state of a GrowthScheduler with what one has, down to the state of each policy.

    Args:
        state: what a file holds.
        phases: the phases whose seconds it counts.
        policies: those of the scheduler that is to take the state; they are left as they are.

    Raises:
        CheckpointError: names the entry.
    """
    count, clock, last = (
        (lambda v: _is(v, int) and v >= 0),
        (lambda v: _is(v, *_NUMBER) and 0 <= v < math.inf),
        (int, type(None)),
    )
    widths = lambda v: isinstance(v, Mapping) and all(map(count, v.values()))  # noqa: E731
    checks = {
        "initial_widths": widths,
        "widths": widths,
        "visits": widths,
        "rounds": count,
        "last_step": lambda v: _is(v, *last),
        "last_epoch": lambda v: _is(v, *last),
        "last_pruning": lambda v: _is(v, *last),
        "seconds": clock,
        "spent": lambda v: isinstance(v, Mapping) and all(clock(v.get(phase)) for phase in phases),
        "flops_spent": clock,
        "policies": lambda v: isinstance(v, Mapping),
        "history": lambda v: isinstance(v, list | tuple),
    }
    if not isinstance(state, Mapping):
        raise _refused("The saved schedule is no record.", got=type(state).__name__)
    for name, good in checks.items():
        if name not in state or not good(state[name]):
            raise _refused(f"The saved schedule has no such {name}.", got=_short(state.get(name, "nothing")))
    for name, policy in policies.items():
        if name in state["policies"]:
            _check_policy(name, policy, state["policies"][name])


def _check_policy(name: str, policy: Policy, saved: object) -> None:
    """Try a state on a copy: it has to be taken, and to be of the kind that the policy has."""
    twin = copy.deepcopy(policy)
    try:
        twin.load_state_dict(saved)  # pyright: ignore[reportArgumentType]
        alike = _alike(policy.state_dict(), twin.state_dict())
    except CheckpointError:
        raise
    except Exception as error:  # a policy of the user's may raise anything
        raise _refused(f"The saved state of the policy {name} cannot be taken.", got=error) from error
    if not alike:
        raise _refused(f"The saved state of the policy {name} is of another kind.", got=_short(saved))


def _alike(own: object, saved: object) -> bool:
    """Whether two states are built alike; None stands for a number not known yet."""
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        return own.keys() == saved.keys() and all(_alike(own[key], saved[key]) for key in own)
    if isinstance(own, list | tuple) and isinstance(saved, list | tuple):
        return all(isinstance(each, (*_OPTIONAL, str, bool, Mapping)) for each in saved)
    if isinstance(own, bool | str):
        return type(own) is type(saved)
    return _is(saved, *_OPTIONAL)


def _is(value: object, *kinds: type[Kind]) -> TypeGuard[Kind]:
    """Whether a value of JSON is of a kind; true and false are no numbers."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _short(value: object) -> str:
    try:
        return repr(value)[:200]
    except ValueError:  # a number of thousands of digits
        return f"a {type(value).__name__}"


def _refused(problem: str, edit: object = None, *, got: object = None, expected: object = None) -> CheckpointError:
    return CheckpointError(
        problem,
        where="growth history",
        expected=expected,
        got=_short(edit) if got is None else got,
        fix="restore the file; it is damaged, or was not written by growconv for this model",
    )
