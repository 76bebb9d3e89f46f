"""Growth records from a file, checked as plain values before any of them touches a model."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn

from growconv.errors import CheckpointError, SurgeryError
from growconv.growth.decision import Policy
from growconv.network.event import GrowthHistory, apply_edit, count_parameters
from growconv.network.model import attribute, copied, found_at
from growconv.network.optimizer import refresh

Kind = TypeVar("Kind")

SETTABLE = (
    *("in_channels", "out_channels", "in_features", "out_features", "groups", "rank"),
    *("num_features", "num_channels", "num_groups", "num_parameters", "normalized_shape"),
)
"""Attributes of torch's and growconv's own layers that growing sets; of other modules, sizes that are there already."""

SLACK = 64
"""How many times the entries of all saved tensors one tensor may have had at a moment of its history (pruned back)."""

_NUMBER, _TEXT, _LIST, _NONE = (int, float), (str,), (list, tuple), (type(None),)
EVENT: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("site", "method"), _TEXT),
    **dict.fromkeys(("channels", "width_before", "width_after", "parameters_before", "parameters_after"), (int,)),
    **dict.fromkeys(("seconds", "predicted_decrease", "realised_decrease"), _NUMBER + _NONE),
    **dict.fromkeys(("gains", "edits"), _LIST),
    "amplitude": _NUMBER,
    "reason": _TEXT + _NONE,
    "step": (int, *_NONE),
    "details": (dict,),
}
"""Fields of a growth event's record, with the types that JSON gives them."""


def most_entries(saved: Iterable[Tensor]) -> int:
    """Entries that a tensor may have had while a model grew to these tensors."""
    return SLACK * max(sum(tensor.numel() for tensor in saved), 2**16)


def history_from(records: Iterable[Mapping[str, Any]]) -> GrowthHistory:
    """The history in records of a file; a CheckpointError where a field is missing, strange or of another type."""
    listed = list(records)
    for record in listed:
        if not isinstance(record, Mapping):
            raise _refused("A growth event is no record.", type(record).__name__)
        wrong = next((name for name, value in record.items() if name in EVENT and not _is(value, *EVENT[name])), None)
        if wrong is not None or not all(_is(gain, *_NUMBER) for gain in record.get("gains", ())):
            raise _refused(f"A growth event has no such {wrong or 'gains'}.", record[wrong or "gains"])
    return GrowthHistory.from_records(listed)


def rehearse(history: GrowthHistory, model: nn.Module, saved: Iterable[Tensor]) -> nn.Module:
    """Replay a history on a copy of the model, whose tensors have no memory wherever that can be.

    Args:
        history: from a file.
        model: as it was built at the start of the run; it is left as it is.
        saved: tensors of the grown model, which say how large one may ever have been.

    Returns:
        The copy, with the shapes of the grown model.

    Raises:
        CheckpointError: the model is not the one that the history began with, or the history is forged or damaged.
    """
    most = most_entries(saved)
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
    twin = copied(model) if kernels else hollow(model)  # new kernels are computed from those that are there
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
    except (SurgeryError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            "The history does not fit this model.", got=error, where=type(model).__name__, fix=fix
        ) from error
    _check_counts(twin, edits)
    return twin


def _check_edit(model: nn.Module, edit: Mapping[str, Any], most: int) -> None:
    """Refuse an edit that would take more than the saved tensors could, or set what growing never sets.

    What else does not fit the model as it is then, `apply_edit` refuses.
    """
    if "attribute" in edit:
        _check_attribute(model.get_submodule(edit["module"]), edit, most)
        return
    entries = 0
    if "count" in edit:
        shape = cast(Tensor, attribute(model, f"{edit['module']}.{edit['tensor']}".lstrip("."))).shape
        entries = shape.numel() // max(shape[edit["axis"]], 1) * (shape[edit["axis"]] + edit["count"])
    elif "insert" in edit:
        layer = edit["insert"]
        if layer["kind"] not in ("convolution", "residual") or not 0 <= layer["axes"] <= 3:
            raise _refused("An edit of the history inserts a layer of no known kind.", edit)
        entries = layer["channels"] ** 2 * layer["kernel_size"] ** layer["axes"]
    if entries > most:
        raise _refused("An edit of the history asks for more than the saved tensors could fill.", edit)


def _check_attribute(module: nn.Module, edit: Mapping[str, Any], most: int) -> None:
    """A size of a layer, or one that a module's own code keeps."""
    value, name = edit["value"], edit["attribute"]
    values = value if isinstance(value, list | tuple) else [value]
    if not values or not all(_is(each, int) and 1 <= each <= most for each in values):
        raise _refused("An edit of the history sets a width that is none.", edit)
    if name in SETTABLE:
        return
    kept = vars(module).get(name)
    several = isinstance(kept, list | tuple) and len(kept) == len(values) and all(_is(each, int) for each in kept)
    if not isinstance(name, str) or name.startswith("__") or not (several or (_is(kept, int) and _is(value, int))):
        raise _refused("An edit of the history sets an attribute that growing never sets.", edit)


def hollow(model: nn.Module) -> nn.Module:
    """A copy of a model to try on what is to be done: its tensors have shapes but no memory."""
    empty: dict[int, Tensor] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor):
                like = torch.empty_like(tensor, device="meta", requires_grad=False)
                trained = isinstance(tensor, nn.Parameter)
                empty.setdefault(id(tensor), nn.Parameter(like, tensor.requires_grad) if trained else like)
    return copied(model, empty)


def _check_counts(model: nn.Module, edits: Iterable[Mapping[str, Any]]) -> None:
    """Compare the attributes that edits have set with the tensors that are there after all of them."""
    for path in dict.fromkeys(edit["module"] for edit in edits if "attribute" in edit):
        module = found_at(model, path)
        if not isinstance(module, nn.Module):
            continue  # a layer inserted later stands there now
        told, there = vars(module), _there(module)
        wrong = {name: size for name, size in there.items() if told.get(name, size) != size}
        if wrong:
            raise CheckpointError(
                "The history gives other widths than the tensors have.",
                where=path,
                expected=wrong,
                got={name: told[name] for name in wrong},
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


def check_schedule(state: object, policies: Mapping[str, Policy]) -> None:
    """Refuse the saved state of a GrowthScheduler where it is not what one has, down to each policy's; change none."""

    def count(value: object) -> bool:
        return _is(value, *_NUMBER) and 0 <= value < math.inf

    def counts(value: object) -> bool:
        return isinstance(value, Mapping) and all(map(count, value.values()))

    checks: dict[str, Callable[[object], bool]] = {
        **dict.fromkeys(("rounds", "seconds", "flops_spent"), count),
        **dict.fromkeys(("last_step", "last_epoch", "last_pruning"), lambda value: value is None or count(value)),
        **dict.fromkeys(("initial_widths", "widths", "visits", "spent"), counts),
        "policies": lambda value: isinstance(value, Mapping),
        "history": lambda value: isinstance(value, list | tuple),
    }
    if not isinstance(state, Mapping):
        raise _refused("The saved schedule is no record.", type(state).__name__)
    for name, good in checks.items():
        if name not in state or not good(state[name]):
            raise _refused(f"The saved schedule has no such {name}.", state.get(name, "nothing"))
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
        raise _refused(f"The saved state of the policy {name} cannot be taken.", error) from error
    if not alike:
        raise _refused(f"The saved state of the policy {name} is of another kind.", saved)


def _alike(own: object, saved: object) -> bool:
    """Whether two states are built alike; None stands for a number not known yet."""
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        return own.keys() == saved.keys() and all(_alike(own[key], saved[key]) for key in own)
    if isinstance(own, list | tuple) and isinstance(saved, list | tuple):
        return all(isinstance(each, (*_NUMBER, *_NONE, *_TEXT, bool, Mapping)) for each in saved)
    if isinstance(own, bool | str):
        return type(own) is type(saved)
    return _is(saved, *_NUMBER, *_NONE)


def _is(value: object, *kinds: type[Kind]) -> TypeGuard[Kind]:
    """Whether a value of JSON is of a kind; true and false are no numbers."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _refused(problem: str, got: object) -> CheckpointError:
    try:
        shown = repr(got)[:200]
    except ValueError:  # a number of thousands of digits
        shown = f"a {type(got).__name__}"
    fix = "restore the file; it is damaged, or was not written by growconv for this model"
    return CheckpointError(problem, where="growth history", got=shown, fix=fix)
