"""GrowthSite: one place where a model can grow. Data only: names, roles, and where the channels lie at any width."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar, TypeVar

from torch import nn

from growconv.convolution.geometry import Geometry
from growconv.errors import SiteError
from growconv.network import layers
from growconv.network.layout import ENTRY, GROUP_IN, GROUP_OUT, IN, OUT, Key, Layout, Sizes
from growconv.network.model import attribute, found_at, module_at, tensor_at, unwrapped
from growconv.network.proposal import ChannelGrowth


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
    """

    name: str
    path: str | None = None
    homogeneous: bool = False


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
        narrow: whether each step treats channels one by one, so that it can be run on new ones alone.
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
    narrow: bool = False
    behind: str | None = None
    at_zero: float = 0.0
    dead_at_zero: bool = False
    dead_above_zero: bool = False

    @property
    def norm(self) -> str | None:
        """Path of the norm layer that directly follows the producer; None where something else does."""
        first = self.steps[0] if self.steps else None
        return first.path if isinstance(first, Norm) else None


# ------------------------------------------------------------------------------------------ sites


REFUSALS: dict[str, Callable[["Site"], str | None]] = {}
"""Per growth method, what says why it cannot serve a site. Methods enter themselves when they are registered."""


Own = TypeVar("Own", bound="Site")


class Site(ABC):
    """What every place that can grow has in common: data about where its channels lie, and arithmetic on it.

    Attributes:
        own_method: name of the method that serves it, whichever serves the others; None where it has none of its own.
            For the others see GrowthSite; a bare parameter may produce and consume too.
    """

    model: nn.Module
    name: str
    kind: str
    producers: tuple[str, ...]
    followers: tuple[str, ...]
    consumers: tuple[str, ...]
    layout: Layout
    space: int
    by_hand: bool = False
    own_method: ClassVar[str | None] = None

    def of(self: Own, model: nn.Module | None) -> Own:
        """The same site of another model with the same names; this one for None or its own model."""
        model = self.model if model is None else unwrapped(model)
        return self if model is self.model else self._in(model)

    @abstractmethod
    def _in(self: Own, model: nn.Module) -> Own:
        """The same site of another model."""

    @abstractmethod
    def check(self, *, trains: bool = True) -> None:
        """Check that the model still has this site, with trainable weights if `trains`; SiteError if not."""

    @property
    @abstractmethod
    def measured(self) -> "GrowthSite":
        """The layers that statistics are of: producers by what they read, consumers by what they read and give."""

    def refusal(self, method: str) -> str | None:
        """Why a growth method, a registered name, cannot serve this site; None where it can.

        Raises:
            SiteError: there is no such method.
        """
        importlib.import_module("growconv.solvers")  # where the methods enter themselves
        if method not in REFUSALS:
            raise SiteError("no such growth method", expected=", ".join(sorted(REFUSALS)), got=repr(method))
        return REFUSALS[method](self)

    @property
    def closed_form(self) -> bool:
        """Whether the closed-form statistics (S, N, ...) apply; `no_closed_form` says why not."""
        return self.no_closed_form is None

    @property
    def no_closed_form(self) -> str | None:
        """Why the closed-form statistics do not apply; None where they do."""
        return None

    @property
    @abstractmethod
    def multiplications(self) -> dict[str, float]:
        """Multiply-adds that one more channel costs, now, by layer: at each location where it applies its kernel."""

    @property
    def room(self) -> int | None:
        """Channels that it can still get; None where there is no limit."""
        return None

    def cap(self, growth: ChannelGrowth) -> float | None:
        """The amplitude that makes the strongest new channel as strong as the mean old one; None: others can tell."""
        return None

    @property
    def sizes(self) -> Sizes:
        """The length of every axis of the layout, now."""
        return sizes_of(self.model, self.layout)

    @property
    def width(self) -> int:
        """Channels now."""
        return self.layout.units(self.space, self.sizes) * self.granularity

    @property
    def granularity(self) -> int:
        """New channels come in multiples of this number: whole groups, one per shuffled block."""
        return self.layout.channels[self.space]

    @property
    def units(self) -> dict[int, int]:
        """Units now of every channel space on an axis of a producer or consumer: what weights are made for."""
        sizes, found = self.sizes, {}
        for path in (*self.producers, *self.consumers):
            for side in (OUT, IN, ENTRY):
                found |= self.layout.units_along((path, side), sizes)
        return found

    @property
    def axes(self) -> list[Key]:
        """Every axis that the channels lie on: (path, side)."""
        return self.layout.keys(self.space)

    def layer(self, path: str) -> layers.Weighted:
        """What knows a convolution or linear layer of the site's model."""
        return layers.weighted(module_at(self.model, path))

    def adapter(self, path: str) -> layers.Adapter:
        """What knows a layer or bare tensor of the site's model."""
        if path in self.layout.dims:
            return layers.Bare(tensor_at(self.model, path), self.layout.dims[path])
        return layers.adapter(module_at(self.model, path))

    def ratio(self, path: str, side: str = IN) -> Fraction:
        """Entries of one channel along an axis of a layer: H·W behind a flattened (K, H, W) map, mostly 1."""
        return self.layout.ratio((path, side), self.space)

    def entries(self, path: str, side: str = IN, sizes: Sizes | None = None) -> list[int]:
        """The positions of the channels along an axis of a layer, now, channel by channel; `sizes` if known."""
        return self.layout.entries((path, side), self.space, sizes or self.sizes)

    def new_entries(self, path: str, side: str, channels: int) -> int:
        """Entries of so many new channels, whole units of them, along an axis of a layer."""
        return channels // self.granularity * self.layout.per_unit((path, side), self.space)

    def growable_channels(self, channels: int) -> int:
        """The next number of channels that whole units allow, at least `channels`."""
        return -(-channels // self.granularity) * self.granularity


@dataclass(frozen=True, eq=False)
class GrowthSite(Site):
    """All layers that produce, carry or consume one set of channels.

    A site holds names, no sizes: widths and positions are read from the modules when they are needed. So it
    stays valid while it or its neighbours grow, it can be copied and pickled, alone or with its model, and it works for
    every model with the same names.

    Attributes:
        model: the model that the site was found in.
        name: "conv1 -> conv2"; several producers or consumers are joined, long lists shortened.
        kind: "pair" (one producer, one consumer), "fan" (several consumers), "stream" (several producers tied by
            additions or gates), "concatenation" (a consumer has other channels too), "depthwise" or "grouped" (a
            grouped convolution in between grows along), "linear" (a linear layer produces or consumes), "transposed".
        producers: paths of the layers that write the channels, in forward order.
        followers: paths of the norms, grouped convolutions and bare parameters with entries for the channels.
        consumers: paths of the layers that read the channels.
        routes: the steps between each producer and consumer, for the methods that need them.
        calls: how often each producer and consumer is called in one forward pass.
        layout: where the channels of all sites of the model lie.
        space: which of the layout's spaces this site is.
        copied: the channels depend on each other (a norm over all of them), so that only copies of all of them, any
            number of times, preserve the function.
        by_hand: the user named its layers (`growconv.site`), so a method that cannot serve it is an error.

    Example:
        >>> sites[0].producers, sites[0].consumers, sites[0].width
        (('0',), ('2',), 4)
        >>> sites[0].refusal("tiny") is None
        True
    """

    model: nn.Module
    name: str
    kind: str
    producers: tuple[str, ...]
    followers: tuple[str, ...]
    consumers: tuple[str, ...]
    routes: tuple[Route, ...]
    calls: dict[str, int] = field(repr=False)
    layout: Layout = field(repr=False)
    space: int = field(repr=False)
    copied: bool = False
    by_hand: bool = field(default=False, repr=False)

    def _in(self, model: nn.Module) -> "GrowthSite":
        return replace(self, model=model)

    @property
    def measured(self) -> "GrowthSite":
        """The site itself."""
        return self

    @property
    def alone(self) -> bool:
        """Whether no axis of a producer or consumer holds other channels too."""
        return all(len(self.layout.axes[key]) == 1 for key in self.axes if key[1] in (OUT, IN))

    @property
    def multiplications(self) -> dict[str, float]:
        """Multiply-adds that one more channel costs, now, by layer: at each location where it applies its kernel."""
        found: dict[str, float] = {}
        for path, side in self.axes:
            module = attribute(self.model, path)
            if isinstance(module, nn.Module) and layers.is_weighted(module) and side in (OUT, IN, GROUP_OUT):
                entries = float(self.ratio(path, side)) / layers.size(module, side)
                found[path] = found.get(path, 0.0) + entries * layers.weighted(module).multiplications()
        return found

    @property
    def no_closed_form(self) -> str | None:
        """Why the closed-form statistics do not apply; None where they do."""
        for path, side in self.axes:
            if side not in (OUT, IN):
                continue
            module = module_at(self.model, path)
            if layers.is_transposed(module):
                return f"{path} is a transposed convolution"
            if layers.groups_of(module) > 1:
                return f"{path} is a grouped convolution"
            own = [run for run in self.layout.axes[path, side] if run.space == self.space]
            if len(own) > 1 or own[0].outer > 1 or own[0].slots != tuple(range(own[0].inner)):
                return f"the channels do not lie one after the other in {path}"
            if side == OUT and (self.ratio(path, OUT) != 1 or len(self.layout.axes[path, side]) > 1):
                return f"{path} produces several entries for a channel, or other channels too"
        if len(self.producers) > 1 and any(self.calls.get(p) != 1 for p in (*self.producers, *self.consumers)):
            return "several layers produce the channels, and some are called several times"
        missing = set(self.consumers) - {route.consumer for route in self.routes}
        if missing:
            return f"nobody saw what lies between the producers and {min(missing)}"
        for route in self.routes:
            if route.problem:
                return route.problem
            for step in route.steps:
                if isinstance(step, Other):
                    return f"{step.name} between {route.producer} and {route.consumer} has no closed form"
                if isinstance(step, Pool) and step.geometry.ceil_mode:
                    return "a pooling with ceil_mode lies in between"
                if isinstance(step, Depthwise) and self.ratio(step.path, GROUP_IN) != self.ratio(step.path, GROUP_OUT):
                    return f"{step.path} gives several outputs for each of its inputs"
                if isinstance(step, Depthwise) and self.granularity > 1:
                    return f"{step.path} is grouped, so new channels come in groups"
        return None

    def check(self, sizes: Sizes | None = None, *, trains: bool = True) -> None:
        """Check that the model has this site: its layers by name and kind, their sizes, and weights that can train.

        Args:
            sizes: the lengths of the model's axes, if they are known.
            trains: whether the weights that new channels need must be trainable.

        Raises:
            SiteError: naming the layer that is missing or another, or the frozen weight.
        """
        for path, side in self.axes:
            found = found_at(self.model, path)
            if found is None or (path not in self.layout.dims and not layers.has_side(found, side)):
                raise SiteError(
                    "the model has no such layer any more",
                    where=path,
                    expected="a layer as it was when the site was found",
                    got="nothing" if found is None else type(found).__name__,
                    fix="find the sites again: growconv.find_sites(model, example_input)",
                )
        sizes = sizes or self.sizes
        for key in self.axes:
            expected = self.layout.length_now(key, sizes)
            if expected != sizes(key):
                raise SiteError(
                    "the layer does not have the width that the other layers of the site have",
                    where=key[0],
                    expected=f"{expected} entries on its side {key[1]!r}",
                    got=sizes(key),
                    fix="find the sites again: growconv.find_sites(model, example_input)",
                )
        for path in (*self.producers, *self.consumers) if trains else ():
            trained = [p.requires_grad for n, p in module_at(self.model, path).named_parameters() if "weight" in n]
            if trained and not any(trained):
                raise SiteError(
                    f"the weight of {path} is frozen (requires_grad=False)",
                    where=self.name,
                    fix="set requires_grad=True on it, or choose another site",
                )

    def __repr__(self) -> str:
        """One line: name, kind and width."""
        return f"GrowthSite({self.name!r}, kind={self.kind!r}, width={self.width})"

    def __str__(self) -> str:
        """Producers, followers and consumers with their widths."""
        lines = [f"{self.name}  ({self.kind}, {self.width} channels)"]
        roles = {"produced": self.producers, "followed": self.followers, "consumed": self.consumers}
        for role, paths in roles.items():
            lines += [f"  {role} by {path}  {layers.described(attribute(self.model, path))}" for path in paths]
        if self.granularity > 1:
            lines.append(f"  channels come in multiples of {self.granularity}")
        if not self.closed_form:
            lines.append(f"  no closed form: {self.no_closed_form}")
        return "\n".join(lines)


def sizes_of(model: nn.Module, layout: Layout) -> Sizes:
    """The length of every axis of a layout in a model; each is looked up once, so ask anew after a change."""

    def length(key: Key) -> int:
        path, side = key
        if side == ENTRY and path in layout.dims:
            return int(tensor_at(model, path).shape[layout.dims[path]])
        return layers.size(module_at(model, path), side)

    return Sizes(length)
