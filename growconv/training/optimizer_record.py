"""An optimizer's state in a checkpoint: as a JSON-able record and tensors, and checked before it is loaded."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from growconv.errors import CheckpointError
from growconv.network.entry_ages import AGES


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The optimizer's state_dict as a JSON-able record and its tensors."""
    tensors = {
        f"optimizer/{index}/{key}": value
        for index, values in state["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    plain = {
        str(index): {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        for index, values in state["state"].items()
    }
    return {"state": plain, "param_groups": state["param_groups"]}, tensors


def join(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state_dict that `split` took apart; any error where the record is damaged."""
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in record["state"].items()}
    for name, tensor in tensors.items():
        index, key = name.split("/", 1)
        state[int(index)][key] = tensor
    return {"state": state, "param_groups": record["param_groups"]}


def with_tuples(saved: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """JSON knows no tuples: options that are tuples in the optimizer (betas) become tuples again."""
    groups = [
        {key: tuple(value) if isinstance(own.get(key), tuple) else value for key, value in group.items()}
        for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {"state": saved["state"], "param_groups": groups}


def check(saved: Mapping[str, Any], optimizer: Optimizer, where: str) -> None:
    """Refuse a state of `join` that does not fit an optimizer, whose parameters have the saved shapes already."""
    groups, own = saved["param_groups"], optimizer.param_groups
    numbers = [_members(group) for group in groups] if isinstance(groups, list) else []
    if [len(each) for each in numbers] != [len(group["params"]) for group in own]:
        raise CheckpointError(
            "the optimizer's groups differ from the saved ones",
            where=where,
            expected=f"groups of {[len(each) for each in numbers]} parameters",
            got=[len(group["params"]) for group in own],
            fix="build the optimizer as the run did",
        )
    order = [number for each in numbers for number in each]
    if sorted(order) != list(range(len(order))):
        raise _damaged("The optimizer's groups do not count their parameters.", where, order[:20])
    shapes = dict(zip(order, (tuple(each.shape) for group in own for each in group["params"]), strict=True))
    needed: dict[int, set[str]] = {}
    for members, group, options in zip(numbers, own, with_tuples(saved, optimizer)["param_groups"], strict=True):
        needed |= dict.fromkeys(members, _probe(optimizer, group, options, where))
    for number, values in saved["state"].items():
        if number not in shapes:
            raise _damaged("The optimizer's state is of a parameter that no group has.", where, number)
        if values and not needed[number] <= set(values):
            problem = f"The optimizer's state of parameter {number} lacks what {type(optimizer).__name__} needs."
            raise _damaged(problem, where, sorted(values), sorted(needed[number]))
        shape = shapes[number]
        for key, value in values.items():
            if not (_ages_fit(value, shape) if key == AGES else _fits(value, shape)):
                got = tuple(value.shape) if isinstance(value, Tensor) else repr(value)[:100]
                raise _damaged(f"The optimizer's {key} of parameter {number} does not fit.", where, got, shape)


def _members(group: object) -> list[int]:
    members = group.get("params") if isinstance(group, Mapping) else None
    return members if isinstance(members, list) and all(type(each) is int for each in members) else []


def _probe(optimizer: Optimizer, own: Mapping[str, Any], saved: Mapping[str, Any], where: str) -> set[str]:
    """Names of the state that a step with the saved options makes; empty where it is no matter of single parameters."""
    for key, value in own.items():
        if key != "params" and isinstance(value, int | float) and not _is_option(saved.get(key, value), value):
            raise _damaged(f"The optimizer's option {key} is of another kind.", where, saved.get(key), value)
    if isinstance(optimizer, LBFGS) or not own["params"]:
        return set()
    try:
        return _state_after_a_step(optimizer, own, saved)
    except Exception as error:
        try:
            _state_after_a_step(optimizer, own, own)
        except Exception:  # optimizers of the user's with other arguments, gradients that must be sparse
            return set()
        name = type(optimizer).__name__
        raise _damaged(f"{name} refuses the saved options.", where, f"{type(error).__name__}: {error}") from error


def _state_after_a_step(optimizer: Optimizer, own: Mapping[str, Any], options: Mapping[str, Any]) -> set[str]:
    """Build the same optimizer over one parameter of one entry, with these options, and let it take a step."""
    like = own["params"][0]
    parameter = torch.nn.Parameter(torch.zeros([1] * like.dim(), device=like.device))
    parameter.grad = torch.zeros_like(parameter)
    options = {key: value for key, value in options.items() if key != "params"}
    known = inspect.signature(type(optimizer)).parameters
    build: Any = type(optimizer)
    probe = build([parameter], **{key: value for key, value in options.items() if key in known})
    probe.load_state_dict({"state": {}, "param_groups": [{**options, "params": [0]}]})
    probe.step()
    return {str(key) for key in probe.state[parameter]}


def _is_option(saved: object, own: object) -> bool:
    if isinstance(own, bool):
        return isinstance(saved, bool | None)
    return isinstance(saved, int | float) and not isinstance(saved, bool) and not math.isnan(saved)


def _fits(value: object, shape: tuple[int, ...]) -> bool:
    """A number, or a tensor of one entry or of the parameter's shape (some axes of length 1)."""
    if isinstance(value, Tensor):
        alike = value.dim() == len(shape) and all(mine in (1, theirs) for mine, theirs in zip(value.shape, shape))  # noqa: B905
        return value.numel() == 1 or alike
    return value is None or isinstance(value, int | float)


def _ages_fit(value: object, shape: tuple[int, ...]) -> bool:
    """The record of when the entries of each axis came, and of their twins (network.entry_ages)."""
    if not isinstance(value, Mapping) or not {"born", "twins"} <= set(value) <= {"born", "twins", "now"}:
        return False
    born, twins = value["born"], value["twins"]
    if not isinstance(born, list) or len(born) != len(shape) or not isinstance(twins, Mapping):
        return False
    numbers = [value.get("now", 0)]
    for size, births in zip(shape, born, strict=True):
        if births is not None and (not isinstance(births, list) or len(births) != size):
            return False
        numbers += births or []
    for birth, state in twins.items():
        if not isinstance(birth, str) or not birth.isdigit() or not isinstance(state, Mapping):
            return False
        if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in state.values()):
            return False
    return any(born) and all(type(each) is int and each >= 0 for each in numbers)


def _damaged(problem: str, where: str, got: object, expected: object = None) -> CheckpointError:
    return CheckpointError(
        problem, where=where, expected=expected, got=got, fix="restore the file, or build the optimizer as the run did"
    )
