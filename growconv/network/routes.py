"""The way from a producer of channels to a consumer, step by step: data only (`network.steps` reads it off a run)."""

from dataclasses import dataclass, field

from growconv.convolution.geometry import Geometry


@dataclass(frozen=True)
class Norm:
    """A norm layer."""

    path: str


@dataclass(frozen=True)
class Activation:
    """An elementwise function of one tensor; "composite …" for several operations, as in x·sigmoid(x).

    Attributes:
        name: of the operation: "relu", "silu"; "prelu" for a layer with a slope a channel.
        path: of the module that it runs in, where that is a module of its own.
        homogeneous: whether f(sx) = s·f(x) for every s > 0.
        alone: whether it is one operation that reads no other tensor, such as a slope that all channels share.
    """

    name: str
    path: str | None = None
    homogeneous: bool = False
    alone: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Pool:
    """Average or max pooling with a window; `counts_padding` says whether an average takes its padding in as zeros."""

    geometry: Geometry
    average: bool
    counts_padding: bool = False


@dataclass(frozen=True)
class AdaptivePool:
    """Pooling to a fixed grid."""

    output_size: tuple[int, ...]
    average: bool


@dataclass(frozen=True)
class Depthwise:
    """A depthwise or grouped convolution."""

    path: str
    geometry: Geometry


@dataclass(frozen=True)
class Flatten:
    """The grid joins the channel axis: `grid` entries for each channel."""

    grid: tuple[int, ...]


@dataclass(frozen=True)
class Other:
    """A step that no closed form knows: padding, interpolation, a change of axes, a joint with another stream."""

    name: str


Step = Norm | Activation | Pool | AdaptivePool | Depthwise | Flatten | Other


@dataclass(frozen=True)
class Route:
    """The steps from one producer to one consumer.

    Attributes:
        producer: module path of the layer that produces the channels.
        consumer: module path of the layer that consumes them.
        steps: what lies between, in forward order.
        problem: why the steps are no plain chain; None where they are.
        behind: path of the norm layer that alone takes what the consumer gives, and takes nothing else; None: no such.
        at_zero: what the consumer reads of a new channel of zeros, the entry farthest from 0; like the following looked
            at where the site has a closed form.
        dead_at_zero: whether what it reads does not change with a channel that is 0 everywhere.
        dead_above_zero: the same for one a little above 0.
    """

    producer: str
    consumer: str
    steps: tuple[Step, ...]
    problem: str | None = None
    behind: str | None = None
    at_zero: float = 0.0
    dead_at_zero: bool = False
    dead_above_zero: bool = False

    @property
    def norm(self) -> str | None:
        """Path of the norm layer that directly follows the producer; None where something else does."""
        first = self.steps[0] if self.steps else None
        return first.path if isinstance(first, Norm) else None

    @property
    def local(self) -> bool:
        """True when no step changes the grid: only norms and elementwise functions."""
        return self.problem is None and all(isinstance(step, (Norm, Activation)) for step in self.steps)
