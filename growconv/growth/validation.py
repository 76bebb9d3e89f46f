"""Records of growth from a file, checked as plain values before any of them touches a model."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from growconv.errors import CheckpointError
from growconv.growth.decision import Policy

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
"""Attributes that growing sets; a replay sets no others."""

INSERTS = ("convolution", "residual")

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


def check_edits(
    shapes: Mapping[str, Sequence[int]], edits: Iterable[object], most: int = MOST
) -> dict[str, tuple[int, ...]]:
    """Follow the edits of a history on the shapes of a model's tensors, without the tensors.

    Args:
        shapes: shape of every parameter and buffer by its name; names of one shared tensor have one and the same list.
        edits: those of all events, in order.
        most: entries that a tensor may have at any moment.

    Returns:
        The shapes afterwards. Tensors of layers that an edit inserts are not among them.

    Raises:
        CheckpointError: names the first edit that growing could not have written for this model.
    """
    copies = {id(shape): list(shape) for shape in shapes.values()}
    now = {name: copies[id(shape)] for name, shape in shapes.items()}
    inserted: list[str] = []
    for edit in edits:
        if not isinstance(edit, Mapping) or not isinstance(edit.get("module"), str):
            raise _refused("An edit of the history names no module.", got=_short(edit))
        if "insert" in edit:
            now = _after_insertion(now, edit, most)
            inserted.append(f"{edit['module']}.inserted.")
        elif "attribute" in edit:
            _check_attribute(edit, most)
        else:
            name = f"{edit['module']}.{edit.get('tensor')}".removeprefix(".")
            if name not in now and not name.startswith(tuple(inserted)):
                raise _refused("An edit of the history is about a tensor that the model does not have.", edit)
            _resize(now.get(name), edit, most)
    return {name: tuple(shape) for name, shape in now.items()}


def _resize(shape: list[int] | None, edit: Mapping[str, Any], most: int) -> None:
    """One insertion or removal; the shape is None where the tensor belongs to an inserted layer."""
    axis = edit.get("axis")
    if not _is(axis, int) or not 0 <= axis < (8 if shape is None else len(shape)):
        raise _refused("An edit of the history is about an axis that the tensor does not have.", edit)
    size = None if shape is None else shape[axis]
    if "removed" in edit:
        removed = edit["removed"]
        whole = isinstance(removed, list | tuple) and all(_is(entry, int) and entry >= 0 for entry in removed)
        if not whole or len(set(removed)) != len(removed) or not removed:
            raise _refused("An edit of the history removes what is no list of entries.", edit)
        if size is not None and (max(removed) >= size or len(removed) >= size):
            raise _refused("An edit of the history removes more than there is.", edit, expected=f"of {size} entries")
        change = -len(removed)
    else:
        position, change = edit.get("position"), edit.get("count")
        if not _is(position, int) or not _is(change, int) or position < 0 or change < 1:
            raise _refused("An edit of the history inserts nothing anywhere.", edit)
        if size is not None and position > size:
            raise _refused("An edit of the history inserts behind the end.", edit, expected=f"at most {size}")
        entries = change if shape is None else math.prod(shape) // max(shape[axis], 1) * (shape[axis] + change)
        if entries > most:
            raise _refused(
                "An edit of the history asks for more than the saved tensors could fill.",
                edit,
                expected=f"at most {most} entries",
            )
    if shape is not None:
        shape[axis] += change


def _check_attribute(edit: Mapping[str, Any], most: int) -> None:
    value = edit.get("value")
    values = value if isinstance(value, list | tuple) else [value]
    if edit["attribute"] not in SETTABLE:
        raise _refused(
            "An edit of the history sets an attribute that growing never sets.",
            edit,
            expected=", ".join(sorted(SETTABLE)),
        )
    if not values or not all(_is(each, int) and 1 <= each <= most for each in values):
        raise _refused("An edit of the history sets a width that is none.", edit)


def _after_insertion(now: dict[str, list[int]], edit: Mapping[str, Any], most: int) -> dict[str, list[int]]:
    """Names after a new layer came in front of a module, which then stands beside it."""
    layer, path = edit["insert"], edit["module"]
    numbers = ("channels", "axes", "kernel_size")
    whole = isinstance(layer, Mapping) and set(layer) == {"kind", "activation", *numbers}
    if not whole or layer["kind"] not in INSERTS or not all(_is(layer[name], int) for name in numbers):
        raise _refused("An edit of the history inserts a layer of no known kind.", edit, expected=", ".join(INSERTS))
    channels, axes, taps = (layer[name] for name in numbers)
    if not 0 <= axes <= 3 or not 1 <= taps <= 255 or channels < 1 or channels**2 * taps**axes > most:
        raise _refused("An edit of the history inserts a layer of no possible size.", edit)
    if not path or not any(name.startswith(f"{path}.") for name in now):
        raise _refused("An edit of the history is about a module that the model does not have.", edit)
    return {
        f"{path}.reader{name.removeprefix(path)}" if name.startswith(f"{path}.") else name: shape
        for name, shape in now.items()
    }


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """Shapes by name as `check_edits` reads them."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    lists = {id(tensor): list(tensor.shape) for _, tensor in tensors}
    return {name: lists[id(tensor)] for name, tensor in tensors}


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
    try:
        return copy.deepcopy(model, kept)
    except Exception as error:  # whatever an attribute of the user's raises
        raise CheckpointError(
            "The model cannot be copied, so nothing can be tried on it before it changes.",
            where=type(model).__name__,
            got=f"{type(error).__name__}: {error}",
            fix="keep what cannot be copied (locks, files, generators) out of the model",
        ) from error


def check_counts(model: nn.Module, edits: Iterable[Mapping[str, Any]]) -> None:
    """Compare the attributes that edits set with the tensors that are there after all of them.

    Args:
        model: after the edits; its tensors need no data.
        edits: as in `check_edits`.

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
                "The history tells other widths than the tensors have.",
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


def _is(value: Any, *kinds: type[Kind]) -> TypeGuard[Kind]:
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
