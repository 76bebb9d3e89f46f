"""New entries of an old parameter train as a new optimizer would train them; old ones as if nothing had happened.

An optimizer counts the steps of a whole parameter. Where it corrects its averages by that count, entries that growth
adds at step t are treated as t steps old although their averages begin at zero: under Adam they train three to six
times too fast for some hundred steps. So the optimizer's state remembers when each row and column came (`born`, plain
numbers in the entry `AGES`), and hooks on that optimizer make up for it, in one of two ways.

**Averages by own age.** Adam (Kingma & Ba 2015, algorithm 1) divides m_t = β m_(t-1) + (1-β) g_t by 1-β^t. The quotient
is an average in which the newest gradient has the weight (1-β)/(1-β^t). Before a step, the averages of entries of age k
are set so that the step itself gives the newest gradient the weight of their own age, (1-β)/(1-β^k). The optimizer does
the rest: its ε, weight decay and fused kernels work as always, parameters are never touched, and the correction fades
by itself. The first 16 steps of an entry are exact; then every second, fourth, ... gradient gets the weight of those
since the last one that did, so that nearly all steps cost nothing. Adamax' and Muon's momentum and Adafactor's
variances (weight t^(-0.8); Shazeer & Stern 2018, section 7.2) follow the same rule. Optimizers of other authors with
Adam's state (step, exp_avg, exp_avg_sq and two betas) are treated as Adam.

**Twins.** What NAdam, RAdam, ASGD, Adagrad with lr_decay and SGD with dampening do at step t is no matter of their
averages alone. There a new optimizer of the same class steps a copy of the young entries, and its result is put in
their place. That is exact, and costs about a second step of the parameters' young part.

Adafactor and Muon use statistics of whole matrices, so that under them old entries do notice new neighbours, and new
ones share the matrix with old momentum; Adafactor's own decay of its rate, 1/√t, stays that of the parameter. AMSGrad
is exact, SparseAdam but for its ε. A CUDA graph of a step calls no hooks: capture it after they have left.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from inspect import signature
from itertools import count, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growconv.network.tensors import Change

AGES = "growconv_ages"
"""The entry of a parameter's optimizer state that says which rows and columns are young."""

SETTLED = 0.1
"""β^k at which an entry counts as old: the newest gradient then has within a tenth the weight that it has for good."""

EXACT = 16
"""Steps in which every gradient is weighted by age, a power of two; half as many in each doubling of the age after it.

So averages of squares are those of 16 gradients or more, and the root of one is 10 to 18 % off at random."""

_TWINS = (torch.optim.NAdam, torch.optim.RAdam, torch.optim.ASGD, torch.optim.Adagrad, torch.optim.SGD)
_MATRIX = {name: getattr(torch.optim, name, ()) for name in ("Muon", "Adafactor")}  # not in every torch
_batched: Any = torch  # its _foreach_ functions are private by name only

Young = tuple[dict[str, Any], nn.Parameter, dict[str, Any]]  # group, parameter, its state
Box = tuple[tuple[int, int, int], ...]  # (axis, start, length) of each axis of which a part is taken


@dataclass(frozen=True)
class Average:
    """How a state tensor averages gradients.

    Attributes:
        name: its name in the state.
        power: 1 for an average of gradients, 2 of their squares.
        own: weight of all gradients before the newest one at an age.
        shared: the same as the optimizer gives it at its count of steps.
        scale: what the optimizer divides the tensor by at its count of steps; 0 for a maximum of such tensors, which
            takes no gradients itself.
        until: age at which the difference no longer matters.
    """

    name: str
    power: int
    own: Callable[[int], float]
    shared: Callable[[int], float]
    scale: Callable[[int], float]
    until: float | int

    def coefficients(self, age: int, gap: int, now: int) -> tuple[float, float]:
        """(a, b) such that a · state + b · gradient^power before the step gives the right average after it.

        Args:
            age: that of the entries with this step; the last `gap` gradients count together.
            gap: steps since the last one that was corrected.
            now: the parameter's count with this step.
        """
        kept = math.prod(self.own(age - back) / self.shared(now - back) for back in range(gap))
        return kept, (1 - kept) * self.scale(now - 1)


def averages(optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]) -> list[Average]:
    """The averages of a parameter's state that weight gradients by the count of steps; none where a twin is needed."""

    def corrected(name: str, power: int, beta: float) -> Average:
        def sum_of_weights(age: int) -> float:
            return 1 - beta**age

        def before(age: int) -> float:
            return beta * sum_of_weights(age - 1) / sum_of_weights(age)

        return Average(name, power, before, before, sum_of_weights, _until(beta))

    if isinstance(optimizer, _TWINS):
        return []
    if isinstance(optimizer, _MATRIX["Adafactor"]):
        power = float(group["beta2_decay"])

        def before(age: int) -> float:
            return 1 - age**power

        until = (SETTLED**2) ** (1 / power) if power else 0
        names = [name for name in ("row_var", "col_var", "variance") if name in state]
        return [Average(name, 2, before, before, lambda age: 1, until) for name in names]
    if isinstance(optimizer, _MATRIX["Muon"]):
        beta = float(group["momentum"])  # not corrected by Muon, which looks at proportions only
        return [replace(corrected("momentum_buffer", 1, beta), shared=lambda age: beta, scale=lambda age: 1)]
    betas = group.get("betas")
    known = {"step", "exp_avg"} <= set(state) and ("exp_avg_sq" in state or isinstance(optimizer, torch.optim.Adamax))
    if not known or not isinstance(betas, (tuple, list)) or len(betas) != 2:
        return []
    first, second = map(float, betas)
    found = [corrected("exp_avg", 1, first)]
    if "exp_avg_sq" in state:
        found.append(corrected("exp_avg_sq", 2, second))
    if "max_exp_avg_sq" in state:  # AMSGrad's maximum is divided by 1-β^t only afterwards
        found.append(replace(corrected("max_exp_avg_sq", 2, second), scale=lambda age: 0))
    return found


def _until(beta: float) -> int:
    return max(EXACT, math.ceil(math.log(SETTLED) / math.log(beta))) if 0 < beta < 1 else 0


def steps_young(optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], born: int) -> float | int:
    """For how many steps the optimizer has to treat entries that came at its step `born` differently; 0 for never."""
    if isinstance(optimizer, (torch.optim.NAdam, torch.optim.RAdam)):
        return max(map(_until, map(float, group["betas"])))
    if isinstance(optimizer, torch.optim.SGD):  # a new momentum's first gradient is not dampened
        return 1 if group["momentum"] and group["dampening"] else 0
    # lr / (1 + rate · t)^power: old where the quotient of the rates at both ages is within 5 %
    if isinstance(optimizer, torch.optim.ASGD):
        rate, power = float(group["lambd"]) * float(group["lr"]), float(group["alpha"])
    elif isinstance(optimizer, torch.optim.Adagrad):
        rate, power = float(group["lr_decay"]), 1.0
    else:
        return max((each.until for each in averages(optimizer, group, state)), default=0)
    return max(0.0, born / (1.05 ** (1 / power) - 1) - 1 / rate) if rate and power else 0


def ages_after(
    optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any], change: Change
) -> dict[str, Any] | None:
    """The record of ages of a resized parameter.

    Args:
        optimizer: what trains it.
        group: the parameter's group.
        state: its state before.
        change: what was put in and taken out along which axis.

    Returns:
        {"born": per axis None or the parameter's count of steps at which each entry came, "twins": per birth the
        numbers in the state of its twin, "now": the count of steps, where the state has none}: plain values that every
        way of saving an optimizer keeps. None where no entry needs a correction.
    """
    before, now, shape = state.get(AGES, {}), _count(state), change.tensor.shape
    new = now if now and steps_young(optimizer, group, state, now) else 0
    born: list[list[int] | None] = []
    for axis, size in enumerate(shape):
        known = torch.tensor(before["born"][axis] if before and before["born"][axis] else [0] * size) + 1
        along = [other == axis for other in range(len(shape))]
        came = change.resized(known.view([-1 if own else 1 for own in along]), fill=False, axes=along).flatten()
        came = torch.where(came == 0, new, came - 1).tolist()
        born.append(came if any(came) else None)
    if not any(born):
        return None
    clock = {} if "step" in state else {"now": now}
    return {"born": born, "twins": dict(before.get("twins", {})), **clock}


def _count(state: Mapping[str, Any]) -> int:
    """Steps that a parameter has taken; from the first growth on where the optimizer does not count them."""
    return int(state["step"]) if "step" in state else state.get(AGES, {}).get("now", 1)


def boxes(born: Sequence[Sequence[int] | None]) -> Iterator[tuple[int, Box]]:
    """The parts of a tensor whose entries came at the same step after the beginning, and that step.

    An entry where a new row meets a new column is as young as the younger of the two.
    """
    found: list[tuple[int, Box]] = [(0, ())]
    for axis, came in enumerate(born):
        if not came:
            continue
        finer: list[tuple[int, Box]] = []
        for birth, box in found:
            start = 0
            for latest, run in groupby(max(each, birth) for each in came):
                length = len(list(run))
                part = ((axis, start, length),) if length < len(came) else ()
                finer.append((latest, box + part))
                start += length
        found = finer
    return ((birth, box) for birth, box in found if birth)


def cut(tensor: Tensor, box: Box) -> Tensor:
    """A view of a part."""
    for part in box:
        tensor = tensor.narrow(*part)
    return tensor


def gap_at(age: int) -> int:
    """How many steps apart the gradients are that are weighted by age, at an age."""
    return 1 if age < EXACT else 2 ** (age.bit_length() - EXACT.bit_length() + 1)


@dataclass
class _Batch:
    """Young entries of several parameters that are corrected alike: of one group, age and kind of average."""

    group: dict[str, Any]
    state: dict[str, Any]  # of the first parameter
    now: int  # its count of steps
    due: int  # that of the next step whose gradient is weighted by age
    born: int
    names: list[str]
    reduced: tuple[int, ...]  # axes that the averages leave out
    cells: list[tuple[nn.Parameter, Box]] = field(default_factory=list)
    views: dict[str, list[Tensor]] = field(default_factory=dict)  # by name, one a cell
    seen: list[tuple[dict[str, Any], str, Tensor]] = field(default_factory=list)  # the tensors that the views are of


@dataclass
class _Twin:
    """A copy of some young entries of one parameter, for a new optimizer of the same class to step."""

    group: dict[str, Any]
    parameter: nn.Parameter
    box: Box
    born: str
    copy: nn.Parameter
    state: dict[str, Any]


class AgeHooks:
    """What an optimizer with young entries does before and after a step; one object an optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._twinned = isinstance(optimizer, _TWINS)
        self.forget()
        self._handles = [optimizer.register_step_pre_hook(self.before), optimizer.register_step_post_hook(self.after)]
        hooks: Any = optimizer._optimizer_step_post_hooks  # hooks of others shall see a step that is whole
        hooks.move_to_end(self._handles[1].id, last=False)

    def forget(self) -> None:
        """Look at the optimizer's state anew at the next step."""
        self._state: Any = None
        self._all: list[Young] = []
        self._given: list[bool] = []  # which of them have a gradient
        self._young: list[Young] = []  # those
        self._clocks: list[dict[str, Any]] = []  # ages of those whose steps the optimizer does not count
        self._batches: list[_Batch] = []
        self._twins: list[_Twin] = []
        self._left = 0.0  # steps until the first of the young is old

    def before(self, optimizer: Optimizer, arguments: tuple, keywords: dict) -> tuple[tuple, dict] | None:
        """Prepare the young entries, with the gradients that a closure computes where there is one."""
        closure: Any = keywords.get("closure", (*arguments, None)[1])
        if closure is None:
            self._prepare(optimizer)
            return None

        def prepared() -> Any:
            loss = closure()
            self._prepare(optimizer)
            return loss

        if "closure" in keywords:
            return arguments, {**keywords, "closure": prepared}
        return (arguments[0], prepared, *arguments[2:]), keywords

    def _prepare(self, optimizer: Optimizer) -> None:
        found = getattr(optimizer, "found_inf", None)
        self._skipped = found is not None and bool(found)  # then a fused optimizer will do nothing
        if self._skipped:
            return
        given = [parameter.grad is not None for _, parameter, _ in self._all]
        known = self._state is optimizer.state and given == self._given
        known = known and all(optimizer.state.get(parameter) is state for _, parameter, state in self._all[:1])
        due = [batch for batch in self._batches if batch.now + 1 >= batch.due]
        if not known or any(state.get(name) is not tensor for batch in due for state, name, tensor in batch.seen):
            self._look(optimizer)
            due = [batch for batch in self._batches if batch.now + 1 >= batch.due]
        if due or self._twinned:
            with torch.no_grad():
                for batch in due:
                    _weight_by_age(optimizer, batch)
                self._twins = _make_twins(self._young) if self._twinned else []

    def _look(self, optimizer: Optimizer) -> None:
        """Find the young entries."""
        self.forget()
        self._state = optimizer.state
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if AGES in optimizer.state.get(parameter, ()):
                    self._all.append((group, parameter, optimizer.state[parameter]))
        self._given = [parameter.grad is not None for _, parameter, _ in self._all]
        self._young = [each for each, given in zip(self._all, self._given, strict=True) if given]
        self._batches = _batches(optimizer, self._young)
        self._clocks = [state[AGES] for _, _, state in self._young if "now" in state[AGES]]
        alike = {(id(group), *state, _newest(state), _count(state)): (group, state) for group, _, state in self._young}
        self._left = min((_steps_left(optimizer, *each) for each in alike.values()), default=math.inf)

    def after(self, optimizer: Optimizer, arguments: tuple, keywords: dict) -> None:
        """Put the twins' results in, count the step, and leave when all entries are old."""
        if self._skipped:
            return
        if self._twins:
            _step_twins(optimizer, self._twins)
        for ages in self._clocks:
            ages["now"] += 1
        for batch in self._batches:
            batch.now += 1
        self._left -= 1
        if self._left > 0 and self._all:
            return
        for group, _, state in self._young:
            if _steps_left(optimizer, group, state) <= 0:
                del state[AGES]
        self.forget()
        if not any(AGES in state for state in optimizer.state.values()):
            for handle in self._handles:
                handle.remove()


def follow_ages(optimizers: Iterable[Any], changed: bool = True) -> None:
    """From now on, treat new entries by their age in all optimizers that have any; others are left alone.

    `grow` and `load_checkpoint` call this. A copied or unpickled optimizer has no hooks (torch drops them), nor has a
    new one after `load_state_dict`: pass it here, or give it to a GrowthScheduler. Otherwise new entries
    are treated like old ones.

    Args:
        optimizers: the optimizers; those that are followed already stay so.
        changed: whether parameters or their state may have been replaced since the last step.

    Example:
        >>> growconv.follow_ages([copy.deepcopy(optimizer)])
    """
    for each in optimizers:
        wrapped = getattr(each, "optimizer", None)  # Accelerate and Lightning wrap the one that steps
        inner = wrapped if isinstance(wrapped, Optimizer) else each
        if not isinstance(inner, Optimizer):
            continue
        hooks = [getattr(hook, "__self__", None) for hook in inner._optimizer_step_pre_hooks.values()]
        mine = next((hook for hook in hooks if isinstance(hook, AgeHooks)), None)
        if mine is None and any(AGES in state for state in inner.state.values()):
            AgeHooks(inner)
        elif mine is not None and changed:
            mine.forget()


def _steps_left(optimizer: Optimizer, group: dict[str, Any], state: dict[str, Any]) -> float | int:
    newest = _newest(state)
    return newest + steps_young(optimizer, group, state, newest) - _count(state)


def _newest(state: dict[str, Any]) -> int:
    return max(max(came) for came in state[AGES]["born"] if came)


def _batches(optimizer: Optimizer, young: Iterable[Young]) -> list[_Batch]:
    found: dict[tuple, _Batch] = {}
    known: dict[tuple, list[str]] = {}  # averages by group and what the state holds
    parts = cache(lambda *born: list(boxes(born)))  # most parameters share theirs with others
    for group, parameter, state in young:
        now, kinds, sort = _count(state), dict[tuple[int, ...], list[str]](), (id(group), *state)
        if sort not in known:
            known[sort] = [each.name for each in averages(optimizer, group, state)]
        for name in known[sort]:
            shape = state[name].shape
            if len(shape) == parameter.dim():
                reduced = tuple(axis for axis, size in enumerate(parameter.shape) if shape[axis] != size)
                kinds.setdefault(reduced, []).append(name)
        born = [came and tuple(came) for came in state[AGES]["born"]]
        for reduced, names in kinds.items():
            own = (*sort, now, *names, reduced, parameter.dtype, parameter.device)
            for birth, box in parts(*(None if axis in reduced else came for axis, came in enumerate(born))):
                views = [_real(cut(state[name], box)) for name in names]
                # contiguous ones go in one launch on a GPU
                key = (*own, birth, *(view.is_contiguous() for view in views if not view.is_cpu))
                if key not in found:
                    due = birth + next(age for age in count(now + 1 - birth) if age % _gap(optimizer, age) == 0)
                    found[key] = _Batch(group, state, now, due, birth, names, reduced, views={n: [] for n in names})
                found[key].cells.append((parameter, box))
                for name, view in zip(names, views, strict=True):
                    found[key].views[name].append(view)
                    found[key].seen.append((state, name, state[name]))
    return list(found.values())


def _gap(optimizer: Optimizer, age: int) -> int:
    """As `gap_at`; moments of rows without gradient do not fade under SparseAdam."""
    return 1 if isinstance(optimizer, torch.optim.SparseAdam) else gap_at(age)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _weight_by_age(optimizer: Optimizer, batch: _Batch) -> None:
    """Set averages so that the coming step gives the newest gradient the weight of the entries' age."""
    now = batch.now + 1
    age = now - batch.born
    batch.due = now + _gap(optimizer, age)
    rules: list[tuple[Average, Tensor | None, float]] = []
    for each in averages(optimizer, batch.group, batch.state):
        if each.name in batch.names and age <= each.until:
            keep, add = each.coefficients(age, _gap(optimizer, age - 1), now)
            whole = each.power == 1 and math.isclose(keep + add, 1, rel_tol=1e-15)
            # a number would be wrapped in a tensor, one of another type converted, once for every view
            precision = torch.promote_types(batch.views[each.name][0].dtype, torch.float32)
            rules.append((each, None if whole else torch.tensor(keep, dtype=precision), add))
    gradients = _gradients(optimizer, batch) if rules else []
    for each, keep, add in rules:
        views = batch.views[each.name]
        if keep is None:
            _batched._foreach_lerp_(views, gradients, add)
            continue
        _batched._foreach_mul_(views, keep)
        if batch.reduced:
            squares = [part.square().mean(batch.reduced, keepdim=True) for part in gradients]
            _batched._foreach_add_(views, squares, alpha=add)
        elif each.power == 2:
            _batched._foreach_addcmul_(views, gradients, gradients, value=add)
        else:
            _batched._foreach_add_(views, gradients, alpha=add)


def _gradients(optimizer: Optimizer, batch: _Batch) -> list[Tensor]:
    """What the optimizer will take for the gradient of each cell: unscaled, signed, with coupled weight decay."""
    given: list[tuple[Any, Box]] = [(parameter.grad, box) for parameter, box in batch.cells]
    found = [cut(grad.to_dense() if grad.is_sparse else grad, box) for grad, box in given]
    if found[0].is_complex():
        found = [torch.view_as_real(part) for part in found]
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        found = [each / scale.to(each.device) for each in found]
    if batch.group.get("maximize"):
        found = list(_batched._foreach_neg(found))
    decay = batch.group.get("weight_decay", 0)
    coupled = isinstance(optimizer, (torch.optim.Adam, torch.optim.Adamax))
    if decay and coupled and not batch.group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)):
        values = [_real(cut(parameter, box)) for parameter, box in batch.cells]
        found = list(_batched._foreach_add(found, values, alpha=float(decay)))
    return found


def _make_twins(young: Iterable[Young]) -> list[_Twin]:
    twins = []
    for group, parameter, state in young:
        for birth, box in boxes(state[AGES]["born"]):
            own: dict[str, Any] = {}
            begun = str(birth) in state[AGES]["twins"]  # else it begins with this step
            numbers = state[AGES]["twins"].get(str(birth), {})
            for name, value in state.items() if begun else ():
                if name in numbers:
                    own[name] = torch.full_like(value, numbers[name])
                elif isinstance(value, Tensor):
                    own[name] = cut(value, box).clone()
            twins.append(_Twin(group, parameter, box, str(birth), nn.Parameter(cut(parameter, box).clone()), own))
    return twins


@torch.no_grad()
def _step_twins(optimizer: Optimizer, twins: Sequence[_Twin]) -> None:
    """Step the twins as new optimizers and put their values and state in the young entries' place."""
    kind: Any = next(each for each in type(optimizer).__mro__ if each in _TWINS)
    names = signature(kind).parameters
    for group in optimizer.param_groups:
        own = [twin for twin in twins if twin.group is group]
        if not own:
            continue
        options = {name: value for name, value in group.items() if name in names and name != "params"}
        fresh = kind([twin.copy for twin in own], **options)
        for twin in own:
            gradient: Any = twin.parameter.grad
            twin.copy.grad = cut(gradient, twin.box).clone()
            if twin.state:
                fresh.state[twin.copy] = twin.state
        kind.step(fresh)
        for twin in own:
            state, numbers = optimizer.state[twin.parameter], {}
            cut(twin.parameter, twin.box).copy_(twin.copy)
            for name, value in fresh.state[twin.copy].items():
                if value.dim():
                    cut(state[name], twin.box).copy_(value)
                else:
                    numbers[name] = float(value)
            state[AGES]["twins"][twin.born] = numbers
