"""What a policy may read, what it returns, and how it is saved."""

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from growconv.errors import CheckpointError, ScheduleError
from growconv.growth.cost import ModelCost
from growconv.limits import require_limits
from growconv.network.event import count_parameters
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import Site

Batch = tuple[Any, Any]
"""What the model is given (a tensor, a tuple of positional or a mapping of keyword arguments), and the targets."""

Loss = Callable[[Any, Any], Tensor]
"""loss(output, targets), a scalar averaged over the batch."""


@dataclass(frozen=True)
class Decision:
    """A policy's answer: yes or no, and why."""

    yes: bool
    reason: str

    def __bool__(self) -> bool:
        return self.yes

    def __str__(self) -> str:
        return f"{'yes' if self.yes else 'no'}: {self.reason}"


@dataclass(frozen=True)
class Situation:
    """The state of the run when a policy is asked.

    Attributes:
        step: optimizer steps done.
        metrics: the numbers that the loop reported with this step; "epoch" counts finished epochs.
        model: the current model.
        sites: the sites of the schedule.
        initial_widths: width of each site (by name) when the schedule began, in channels.
        visits: how often each site (by name) has been a candidate of a growth round.
        rounds: growth rounds so far, including those that added nothing.
        last_step: step of the last round; None before the first.
        last_epoch: "epoch" of the last round; None before the first, or if the loop reports none.
        last_pruning: step of the last pruning; None before the first.
        seconds: wall-clock seconds of the run so far, including resumed parts.
        cost: the model's cost meter; None before the first growth batch was seen.
    """

    step: int
    metrics: Mapping[str, float | int]
    model: nn.Module
    sites: tuple[Site, ...]
    initial_widths: Mapping[str, int]
    visits: Mapping[str, int] = field(default_factory=dict)
    rounds: int = 0
    last_step: int | None = None
    last_epoch: int | None = None
    last_pruning: int | None = None
    seconds: float | int = 0.0
    cost: ModelCost | None = None

    @property
    def parameters(self) -> int:
        """Trainable and frozen parameters of the model now."""
        return count_parameters(self.model)

    @property
    def flops(self) -> int | None:
        """FLOPs (2 × MACs) of one sample's forward pass now; None while no sample was seen."""
        return None if self.cost is None else self.cost.flops()


@dataclass(frozen=True)
class Proposal:
    """New channels that a solver proposes for one site, with their cost.

    Attributes:
        site: the site.
        growth: the channels.
        gradient_energy: ‖v‖²/n over the site's consumers, the unit of the gains; None for methods without statistics.
        parameters_per_channel: parameters that one channel adds.
        flops_per_channel: FLOPs (2 × MACs, forward, one sample) that one channel adds.
        samples: number of samples in the statistics; None for methods without statistics.
        slopes: (K,) descending, comparable across layers: squared norms of the first gradient that new incoming
            weights would get with outgoing weights of norm 1; None if no policy asked for them.
        decrease: how much the channels alone lower the held-out loss; None if no policy asked for it.
    """

    site: Site
    growth: ChannelGrowth
    gradient_energy: float | int | None
    parameters_per_channel: float | int
    flops_per_channel: float | int
    samples: int | None = None
    slopes: Tensor | None = None
    decrease: float | int | None = None

    @property
    def gain(self) -> float:
        """Captured energy of all the channels, in the unit of ‖v‖²/n."""
        return float(self.growth.gains.sum())

    @property
    def relative_gain(self) -> float:
        """Share of ‖v‖²/n that the channels capture, or SENN's Δη′/η: independent of the scale of the loss."""
        whole = self.growth.measured.get("score", self.gradient_energy)
        if whole is None:
            raise ScheduleError(
                f"method {self.growth.method!r} uses no statistics, so its channels have no gain",
                where=self.site.name,
                fix="use a method with gains (tiny, exact, functional, senn) with this policy",
            )
        return self.gain / whole if whole > 0 else 0.0


class Policy(ABC):  # noqa: B024 (its subclasses say what is abstract)
    """A small dataclass of hyperparameters; fields with init=False are its state.

    The state holds numbers, strings, booleans, None and lists of them, so that it is JSON and a run resumes exactly;
    under the names of fields that hold policies it has theirs.

    Attributes:
        personal: the policy reads the clock or reported metrics, which may differ between processes.
        compares: units of gains (`Solver.gain_unit`) that the policy can compare; empty: it does not use gains.
    """

    personal: ClassVar[bool] = False
    compares: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Check the hyperparameters that have limits."""
        require_limits(self, ScheduleError)

    def state_dict(self) -> dict[str, object]:
        """The policy's state as JSON-able values."""
        state: dict[str, object] = {}
        for entry in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, entry.name)
            inside = [each.state_dict() for each in _policies_in(value)]
            if inside or not entry.init:
                state[entry.name] = value if not inside else inside if isinstance(value, list) else inside[0]
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore a state, also after a round trip through JSON; a CheckpointError for that of another policy."""
        expected = Policy.state_dict(self).keys()
        given: dict[str, list[Any]] = {
            name: value if isinstance(value, list) else [value] for name, value in state.items()
        }
        inside = {name: _policies_in(getattr(self, name)) for name in expected}
        if state.keys() != expected or any(
            len(own) != len(given[name]) or not all(isinstance(each, Mapping) for each in given[name])
            for name, own in inside.items()
            if own
        ):
            raise CheckpointError(
                "the saved state belongs to another policy",
                expected=sorted(expected),
                got=sorted(state),
                where=type(self).__name__,
                fix="resume with the policies that the run was started with",
            )
        for name, value in state.items():
            if not inside[name]:
                setattr(self, name, value)
            for policy, saved in zip(inside[name], given[name], strict=False):
                policy.load_state_dict(saved)


def _policies_in(value: object) -> list[Policy]:
    """The policies that a field holds: itself one, or a list of them."""
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, Policy)]
