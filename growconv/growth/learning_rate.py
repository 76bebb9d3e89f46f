"""Learning rates after growth: old and new entries of one parameter train at different rates, with any optimizer."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growconv.errors import ScheduleError
from growconv.growth.decision import Policy
from growconv.growth.when import require_positive
from growconv.network.event import GrowthHistory
from growconv.network.model import attribute


class LearningRate(Policy):
    """Scales what each optimizer step does to the entries of grown parameters, stage by stage.

    Stage 0 is what the model began with, stage k what the k-th growth step added; an entry where new rows and new
    columns meet belongs to the later one. The update itself is scaled, p ← p_before + rate · (p_after − p_before),
    which multiplies the learning rate for every optimizer, momentum, weight decay and adaptive state included.
    """

    def __post_init__(self) -> None:
        self._stages: dict[nn.Parameter, Tensor] = {}
        self._before: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def rates(self, parameter: nn.Parameter, stages: Tensor) -> Tensor | None:
        """Rate of each entry, broadcastable to the parameter; None where all are 1."""

    def stepped(self) -> None:
        """Called after every step of the first optimizer."""

    def grown(self, count: int) -> None:
        """Called after a growth round; `count` stages have been added so far."""

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Follow the steps of the optimizers from now on; those that are followed already are left alone."""
        for index, optimizer in enumerate(optimizers):
            hooks = optimizer._optimizer_step_pre_hooks.values()
            if not any(getattr(hook, "__self__", None) is self for hook in hooks):
                optimizer.register_step_pre_hook(self._remember)
                optimizer.register_step_post_hook(partial(self._scale, index == 0))

    def follow(self, model: nn.Module, history: GrowthHistory) -> None:
        """Look up which entries of which parameters were added when."""
        self._stages = stages_of(model, history)
        self.grown(len(growth_steps(history)))

    def _remember(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._before = {}
        for parameter, stages in self._stages.items():
            if id(parameter) in owned and parameter.grad is not None:
                rates = self.rates(parameter, stages)
                if rates is not None:
                    self._before[parameter] = (parameter.detach().clone(), rates.to(parameter))

    def _scale(self, counts: bool, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        with torch.no_grad():
            for parameter, (before, rates) in self._before.items():
                parameter.copy_(torch.lerp(before, parameter, rates.expand_as(parameter)))
        self._before = {}
        if counts:
            self.stepped()


@dataclass
class WarmUp(LearningRate):
    """New entries start at a small rate and reach the full one linearly, after every growth anew.

    Attributes:
        steps: optimizer steps until new entries train at the full rate.
        start: rate of their first step, as a fraction of the learning rate.
    """

    steps: int
    start: float | int = 0.0
    taken: int = field(default=0, init=False)
    born: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "steps", self.steps)
        if not 0 <= self.start <= 1:
            raise ScheduleError(
                "a fraction of the learning rate", expected="0 to 1", got=self.start, where="WarmUp.start"
            )

    def rates(self, parameter: nn.Parameter, stages: Tensor) -> Tensor | None:
        """The ramp's value for each entry's age."""
        ages = [(self.taken - born + 1) / (self.steps + 1) for born in self.born]
        ramp = [1.0, *(self.start + (1 - self.start) * min(1.0, age) for age in ages)]
        if min(ramp) == 1.0:
            return None
        return torch.tensor(ramp, dtype=torch.float64, device=parameter.device)[stages]

    def stepped(self) -> None:
        """Count."""
        self.taken += 1

    def grown(self, count: int) -> None:
        """Note when the newest stage was born."""
        self.born = [*self.born, *[self.taken] * (count - len(self.born))]


@dataclass
class StageRates(LearningRate):
    """η_k = η_0 · f(W_k) / f(W_0) for the entries W_k of a weight that stage k added, as in Variance Transfer.

    f is the root mean square of the entries, so that blocks of different sizes compare. It is taken anew at every step,
    and balances how far old and young entries move relative to their own size. Vectors (biases, norm layers) keep the
    full rate.

    Attributes:
        lowest: smallest ratio, so that entries which start at zero can learn.
        highest: largest ratio.
    """

    lowest: float | int = 0.1
    highest: float | int = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "lowest", self.lowest)
        if self.highest < self.lowest:
            raise ScheduleError("the highest rate lies below the lowest", got=self, where="StageRates")

    def rates(self, parameter: nn.Parameter, stages: Tensor) -> Tensor | None:
        """The ratio of each entry's stage to stage 0."""
        if parameter.dim() < 2:
            return None
        square = parameter.detach().double().square()
        count = int(stages.max()) + 1
        index = stages.expand_as(parameter).flatten()
        sums = square.new_zeros(count).index_add_(0, index, square.flatten())
        sizes = torch.bincount(index, minlength=count).clamp(min=1)
        size = (sums / sizes).sqrt()
        if not bool(size[0] > 0):
            return None
        ratio = (size / size[0]).clamp(self.lowest, self.highest)
        ratio[0] = 1.0
        return ratio[stages]


def growth_steps(history: GrowthHistory) -> list[int | None]:
    """The training steps at which something was added, one per stage."""
    return [
        step for step, events in groupby(history, key=lambda event: event.step) if any(e.channels > 0 for e in events)
    ]


def stages_of(model: nn.Module, history: GrowthHistory) -> dict[nn.Parameter, Tensor]:
    """The stage of every entry of every parameter that has grown.

    Args:
        model: the model with its present shapes.
        history: how it came to them.

    Returns:
        Per parameter an integer tensor that broadcasts to it.
    """
    edits: dict[tuple[str, int], list[tuple[int, Mapping[str, Any]]]] = {}
    stage = 0
    for _, events in groupby(history, key=lambda event: event.step):
        listed = list(events)
        stage += any(event.channels > 0 for event in listed)
        for event in listed:
            for edit in cast(Sequence[Mapping[str, Any]], event.edits):
                if "tensor" in edit:
                    path = f"{edit['module']}.{edit['tensor']}".removeprefix(".")
                    edits.setdefault((path, edit["axis"]), []).append((stage, edit))
    found: dict[nn.Parameter, Tensor] = {}
    for (path, axis), changes in edits.items():
        parameter = attribute(model, path)
        if not isinstance(parameter, nn.Parameter):
            continue
        added = sum(edit.get("count", 0) - len(edit.get("removed", ())) for _, edit in changes)
        births = [0] * (parameter.shape[axis] - added)
        for born, edit in changes:
            if "removed" in edit:
                gone = set(edit["removed"])
                births = [birth for entry, birth in enumerate(births) if entry not in gone]
            else:
                births[edit["position"] : edit["position"]] = [born] * edit["count"]
        shape = [1] * parameter.dim()
        shape[axis] = len(births)
        stages = torch.tensor(births, device=parameter.device).view(shape)
        found[parameter] = torch.maximum(found[parameter], stages) if parameter in found else stages
    return found
