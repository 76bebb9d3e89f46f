"""Learning rates after growth: old and new entries of one parameter train at different rates, with any optimizer."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growconv.errors import ScheduleError
from growconv.growth.decision import Policy
from growconv.limits import limited
from growconv.network import layers
from growconv.network.event import GrowthEvent, GrowthHistory
from growconv.network.layout import IN, OUT
from growconv.network.model import attribute


class LearningRate(Policy):
    """Scales what each optimizer step does to the entries of grown parameters, stage by stage.

    Stage 0 is what the model began with, stage k what the k-th growth step added; an entry where new rows and new
    columns meet belongs to the later one. The update itself is scaled, p ← p_before + rate · (p_after − p_before),
    which multiplies the learning rate for every optimizer, momentum, weight decay and adaptive state included.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
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
        self.grown(max((stage for stage, _ in staged(history)), default=0))

    def _remember(self, optimizer: Optimizer, arguments: object, keywords: object) -> None:
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._before = {}
        for parameter, stages in self._stages.items():
            if id(parameter) in owned and parameter.grad is not None:
                rates = self.rates(parameter, stages)
                if rates is not None:
                    self._before[parameter] = (parameter.detach().clone(), rates.to(parameter))

    def _scale(self, counts: bool, optimizer: Optimizer, arguments: object, keywords: object) -> None:
        with torch.no_grad():
            for parameter, (before, rates) in self._before.items():
                parameter.copy_(torch.lerp(before, parameter, rates.expand_as(parameter)))
        self._before = {}
        if counts:
            self.stepped()


@dataclass
class WarmUp(LearningRate):
    """After every growth, the rate of the new entries rises linearly from one value to another, and stays there.

    A peak above 1 lets new entries catch up with old ones: 1.25 to 1.3 within 0.4 % of the run in Yu et al. 2026
    (SPARKLING, arXiv 2602.02472), where doing the same for all parameters was worse.

    Attributes:
        steps: optimizer steps until new entries train at the peak rate.
        start: rate of their first step, as a fraction of the current learning rate.
        peak: rate that they reach and keep, as a fraction of the current learning rate.
        everything: after every growth, the rates of old entries and ungrown parameters rise with those of the new ones.
    """

    steps: int = limited(above=0)
    start: float | int = limited(0.0, least=0)
    peak: float | int = limited(1.0, above=0)
    everything: bool = False
    taken: int = field(default=0, init=False)
    born: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start > self.peak:
            raise ScheduleError(
                "the start of a warm-up must not exceed its peak",
                expected=f"0 to {self.peak:g}",
                got=self.start,
                where="WarmUp.start",
            )

    def rates(self, parameter: nn.Parameter, stages: Tensor) -> Tensor | None:
        """The ramp's value for each entry's age."""
        ages = [(self.taken - born + 1) / (self.steps + 1) for born in self.born]
        ramp = [self.start + (self.peak - self.start) * min(1.0, age) for age in ages]
        ramp = [ramp[-1] if self.everything and ramp else 1.0, *ramp]
        if min(ramp) == max(ramp) == 1.0:
            return None
        return torch.tensor(ramp, dtype=torch.float64, device=parameter.device)[stages]

    def follow(self, model: nn.Module, history: GrowthHistory) -> None:
        """With `everything`, parameters that have not grown count as old."""
        super().follow(model, history)
        if self.everything and self.born:
            old = {each: torch.zeros((), dtype=torch.long, device=each.device) for each in model.parameters()}
            self._stages = old | self._stages

    def stepped(self) -> None:
        """Count."""
        self.taken += 1

    def grown(self, count: int) -> None:
        """Note when the newest stage was born."""
        self.born = [*self.born, *[self.taken] * (count - len(self.born))]


@dataclass
class WidthRates(LearningRate):
    """Rates that follow the width, so that one learning rate works for all widths (μP).

    From Yang et al. 2022 (Tensor Programs V, arXiv 2203.03466), table 8, with widths relative to those at the start:
    under Adam the rate of a weight falls with its fan-in; under SGD it rises with the fan-out and falls with the
    fan-in, so that a weight that grows on both sides keeps its rate. All entries of a weight have the same rate.

    Attributes:
        rule: "adam" (for adaptive optimizers) or "sgd".
    """

    rule: str = limited("adam", choices=("adam", "sgd"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self._axes: dict[nn.Parameter, tuple[int | None, int | None]] = {}

    def follow(self, model: nn.Module, history: GrowthHistory) -> None:
        """Also find the input and output axes of each layer's tensors."""
        super().follow(model, history)
        self._axes = {}
        for module in model.modules():
            if not layers.is_weighted(module):
                continue
            adapter = layers.weighted(module)
            axes = [{slot.name: slot.axis for slot in adapter.slots(side)} for side in (OUT, IN)]
            for name, parameter in module.named_parameters():
                self._axes[parameter] = (axes[0].get(name), axes[1].get(name))

    def rates(self, parameter: nn.Parameter, stages: Tensor) -> Tensor | None:
        """One number for the whole parameter."""
        rows, columns = (_growth_along(stages, axis) for axis in self._axes.get(parameter, (None, None)))
        rate = (rows if self.rule == "sgd" else 1.0) / columns
        return None if rate == 1.0 else torch.tensor(rate, dtype=torch.float64, device=parameter.device)


@dataclass
class StageRates(LearningRate):
    """η_k = η_0 · f(W_k) / f(W_0) for the entries W_k of a weight that stage k added, as in Variance Transfer.

    f is the root mean square of the entries, which makes blocks of different sizes comparable, or the Frobenius norm of
    the paper's section 3.2. It is computed anew at every step, and balances how far old and young entries move relative
    to their own size. Vectors (biases, norm layers) keep the full rate.

    Attributes:
        lowest: smallest ratio, so that entries which start at zero can learn.
        highest: largest ratio.
        size: f, "rms" or, as in the paper, "frobenius".
    """

    lowest: float | int = limited(0.1, above=0)
    highest: float | int = limited(10.0, above=0)
    size: str = limited("rms", choices=("rms", "frobenius"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.highest < self.lowest:
            raise ScheduleError("the highest rate is below the lowest", got=self, where="StageRates")

    def rates(self, parameter: nn.Parameter, stages: Tensor) -> Tensor | None:
        """The ratio of each entry's stage to stage 0."""
        if parameter.dim() < 2:
            return None
        square = parameter.detach().double().square()
        count = int(stages.max()) + 1
        index = stages.expand_as(parameter).flatten()
        sums = square.new_zeros(count).index_add_(0, index, square.flatten())
        entries = torch.bincount(index, minlength=count).clamp(min=1)
        size = (sums / entries if self.size == "rms" else sums).sqrt()
        if not bool(size[0] > 0):
            return None
        ratio = (size / size[0]).clamp(self.lowest, self.highest)
        ratio[0] = 1.0
        return ratio[stages]


def _growth_along(stages: Tensor, axis: int | None) -> float:
    """Entries along an axis now, relative to those that were there at the start."""
    if axis is None or stages.shape[axis] == 1:
        return 1.0
    born = stages.movedim(axis, 0).flatten(1).amin(1) if stages.dim() > 1 else stages
    return len(born) / int((born == 0).sum())


def stages_of(model: nn.Module, history: GrowthHistory) -> dict[nn.Parameter, Tensor]:
    """The stage of every entry of every parameter that has grown, as integers that broadcast to it."""
    edits: dict[tuple[str, int], list[tuple[int, Mapping[str, Any]]]] = {}
    for stage, event in staged(history):
        for edit in cast(Sequence[Mapping[str, Any]], event.edits):
            if "copy" in edit:  # what is inside the block lies one level deeper now
                inside, moved = f"{edit['module']}.", f"{edit['module']}.original."
                edits = {
                    (path.replace(inside, moved, 1) if path.startswith(inside) else path, axis): changes
                    for (path, axis), changes in edits.items()
                }
            elif "tensor" in edit:
                path = f"{edit['module']}.{edit['tensor']}".removeprefix(".")
                edits.setdefault((path, edit["axis"]), []).append((stage, edit))
    found: dict[nn.Parameter, Tensor] = {}
    for (path, axis), changes in edits.items():
        parameter = attribute(model, path)
        if not isinstance(parameter, nn.Parameter):
            continue
        added = sum(edit.get("count", 0) - len(edit.get("removed", ())) for _, edit in changes)
        births = np.zeros(parameter.shape[axis] - added, dtype=np.int64)
        for born, edit in changes:
            if "removed" in edit:
                births = np.delete(births, edit["removed"])
            else:
                births = np.insert(births, edit["position"], [born] * edit["count"])
        shape = [1] * parameter.dim()
        shape[axis] = len(births)
        stages = torch.tensor(births, device=parameter.device).view(shape)
        found[parameter] = torch.maximum(found[parameter], stages) if parameter in found else stages
    return found


def staged(history: GrowthHistory) -> list[tuple[int, GrowthEvent]]:
    """The events with their stages: all of a step that added something belong to one."""
    found: list[tuple[int, GrowthEvent]] = []
    stage = 0
    for _, events in groupby(history, key=lambda event: event.step):
        together = list(events)
        stage += any(event.channels > 0 for event in together)
        found += [(stage, event) for event in together]
    return found
