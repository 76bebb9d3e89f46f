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
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

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
        {"axes": per axis None or a step per entry, "left": steps until all count as old}, plain numbers so that every
        way of saving an optimizer keeps them; None where nothing young needs a correction.
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
    return {"axes": axes, "left": left} if left and any(axes) else None


def follow_births() -> None:
    """Correct the steps of every torch optimizer that has young entries, from now on."""
    global _following
    if _following is None:
        _following = (
            register_optimizer_step_pre_hook(_remember),
            register_optimizer_step_post_hook(_correct),
        )


_following: Any = None
_before: dict[int, list[tuple[Tensor, Tensor, Any]]] = {}


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
    with torch.no_grad():
        for parameter, before, betas in _before.pop(id(optimizer), ()):
            state = optimizer.state[parameter]
            if parameter.grad is None:
                continue
            factor = _factor(state, betas, parameter)
            parameter.copy_(torch.lerp(before, parameter, factor.to(parameter).expand_as(parameter)))
            state[BORN]["left"] -= 1
            if state[BORN]["left"] <= 0:
                del state[BORN]


def _factor(state: Mapping[str, Any], betas: Any, parameter: Tensor) -> Tensor:
    """What the updates of the last step are multiplied with, broadcastable to the parameter."""
    now = torch.as_tensor(state["step"]).double().to(parameter.device)
    born = now.new_zeros([1] * parameter.dim())
    for axis, steps in enumerate(state[BORN]["axes"]):
        if steps is not None:
            shape = [len(steps) if axis == other else 1 for other in range(parameter.dim())]
            born = torch.maximum(born, now.new_tensor(steps).view(shape))
    first, second = betas
    age = now - born
    return ((1 - second**age) / (1 - second**now)).sqrt() * (1 - first**now) / (1 - first**age)
