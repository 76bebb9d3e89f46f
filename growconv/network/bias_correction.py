"""Adam's bias correction for new entries of an old parameter.

Adam divides its moments by 1 - β^t, where t counts the steps of the whole parameter. Entries that growth adds at step t
have moments that start at zero: corrected as if they were t steps old, the second moment is far too small beside the
first, and they train three to six times too fast for a few hundred steps (β = 0.9 and 0.999). So each entry's update is
multiplied with what its own age makes of the correction (Kingma and Ba, "Adam", 2015, algorithm 1)::

    sqrt((1 - β2^k) / (1 - β2^t)) · (1 - β1^t) / (1 - β1^k),    k: steps since the entry came

With that new entries train as a new optimizer would train them, and old ones as if nothing had happened. Exact for Adam
and AdamW, except that their ε and weight decay are scaled along; NAdam and RAdam, whose schedules also depend on t, get
the same factor. Optimizers whose update does not depend on t need none of this.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

BORN = "growconv_born"
"""The entry of a parameter's optimizer state that says at which of its steps which rows and columns came."""

CLOSE = 1e-3
"""Distance of the factor from 1 at which an entry counts as old."""


def births(
    state: Mapping[str, Any], betas: Any, shape: torch.Size, resize: Callable[[Tensor, tuple[bool, ...]], Tensor]
) -> dict[str, Any] | None:
    """When each row and column of a resized parameter came.

    Args:
        state: the optimizer's state of the parameter, before.
        betas: the β of its group; None where it has none.
        shape: the parameter's shape, before.
        resize: how a tensor of that shape becomes one of the new shape, with zeros for new entries; told which axes the
            tensor has in full.

    Returns:
        {"axes": per axis None or a step per entry, "now": steps taken, "left": steps until all count as old}, plain
        values so that every way of saving an optimizer keeps them; None where nothing young needs a correction.
    """
    if not {"step", "exp_avg", "exp_avg_sq"} <= set(state) or not isinstance(betas, (tuple, list)) or len(betas) != 2:
        return None
    now = float(state["step"])
    before = state.get(BORN) or {"axes": [None] * len(shape), "left": 0}
    axes: list[list[float] | None] = []
    left = before["left"]
    for axis, size in enumerate(shape):
        # one more than the step, so that zeros are the new entries
        known = torch.ones(size, dtype=torch.float64) + torch.tensor(before["axes"][axis] or 0.0, dtype=torch.float64)
        along = tuple(other == axis for other in range(len(shape)))
        after = resize(known.view([size if own else 1 for own in along]), along).flatten()
        new = after == 0
        if bool(new.any()) and now > 0:
            left = max(left, _steps_until_old(betas))
        born = torch.where(new, torch.tensor(now, dtype=torch.float64), after - 1)
        axes.append(born.tolist() if bool((born > 0).any()) else None)
    return {"axes": axes, "now": now, "left": left} if left and any(axes) else None


def follow_births() -> None:
    """Correct the steps of every torch optimizer that has young entries, from now on."""
    global _following
    if _following is None:
        _following = (register_optimizer_step_pre_hook(_remember), register_optimizer_step_post_hook(_correct))


_following: Any = None
_before: dict[int, list[tuple[Tensor, Tensor, Any]]] = {}
_stages: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _steps_until_old(betas: Any) -> int:
    return max(math.ceil(math.log(2 * CLOSE) / math.log(beta)) for beta in (*map(float, betas), 0.5) if 0 < beta < 1)


def _remember(optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
    young = [
        (parameter, parameter.detach().clone(), group["betas"])
        for group in optimizer.param_groups
        for parameter in group["params"]
        if BORN in optimizer.state.get(parameter, ())
    ]
    _before.pop(id(optimizer), None)  # of a step that failed
    if young:
        _before[id(optimizer)] = young


def _correct(optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
    known: dict[Any, Tensor] = {}  # most parameters share their births, and so the transfer to the device
    with torch.no_grad():
        for parameter, before, betas in _before.pop(id(optimizer), ()):
            if parameter.grad is None:
                continue
            record = optimizer.state[parameter][BORN]
            record["now"] += 1
            steps, index = _births_of(parameter, record["axes"])
            first, second = map(float, betas)
            key = (record["now"], steps, first, second, parameter.dtype, parameter.device)
            if key not in known:
                factors = [_factor(record["now"], born, first, second) for born in steps]
                known[key] = torch.tensor(factors, dtype=parameter.dtype, device=parameter.device)
            parameter.copy_(before.lerp_(parameter, known[key][index].expand_as(parameter)))
            record["left"] -= 1
            if record["left"] <= 0:
                del optimizer.state[parameter][BORN]


def _births_of(parameter: Tensor, axes: Sequence[Sequence[float] | None]) -> tuple[tuple[float, ...], Tensor]:
    """The different births, and which of them each entry has, broadcastable to the parameter."""
    cached = _stages.get(parameter)
    if cached is None or cached[0] is not axes:
        born = torch.zeros([1] * parameter.dim(), dtype=torch.float64)
        for axis, steps in enumerate(axes):
            if steps is not None:
                shape = [-1 if axis == other else 1 for other in range(parameter.dim())]
                born = torch.maximum(born, torch.tensor(steps, dtype=torch.float64).view(shape))
        different, index = born.unique(return_inverse=True)
        cached = _stages[parameter] = (axes, tuple(different.tolist()), index.to(parameter.device))
    return cached[1], cached[2]


def _factor(now: float, born: float, first: float, second: float) -> float:
    """What the update of an entry is multiplied with."""
    age = now - born
    return math.sqrt((1 - second**age) / (1 - second**now)) * (1 - first**now) / (1 - first**age)
