"""GrowthSite: one place where a model can grow, and how all of them are found."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from growconv.errors import SiteError
from growconv.network import layers, parametrized
from growconv.network.between import run_between
from growconv.network.graph import Graph, attribute, trace
from growconv.network.layouts import Binding, Space
from growconv.network.routes import Depthwise, Other, Pool, Route, find_routes
from growconv.network.spaces import Spaces


class GrowthSite:
    """All layers that write, carry or read one set of channels.

    A site names modules by path and stays true while channels are added, to itself or to its neighbours.

    Attributes:
        name: "conv1 -> conv2"; several writers or readers are joined, long lists shortened.
        kind: "pair" (one writer, one reader), "fan" (several readers), "stream" (several writers tied by additions or
            gating), "concatenation" (readers see the channels at an offset), "depthwise" or "grouped" (a grouped
            convolution in between grows along), "linear" (a linear layer writes or reads), "transposed".
        model: the model that grows.
        producers: paths of the layers that write the channels, in forward order.
        followers: paths of the norms, grouped convolutions and bare parameters with an entry for each channel.
        consumers: paths of the layers that read the channels.
        granularity: channels come in multiples of this number (whole groups).
        routes: the steps in between, one route per producer and consumer.
        closed_form: None where the closed-form statistics apply, otherwise why not.
    """

    def __init__(self, spaces: Spaces, space: Space) -> None:
        self.spaces = spaces
        self.space = space.root()
        self.model = spaces.model
        self.granularity = self.space.granularity
        bindings = spaces.bindings_of(self.space)
        order = {path: index for index, (path, role, _) in enumerate(spaces.bindings) if role == "writes"}
        self.producers = tuple(sorted(self.space.writers, key=order.__getitem__))
        self.consumers = tuple(dict.fromkeys(b.path for b in bindings if b.role == "reads"))
        self.followers = tuple(dict.fromkeys(b.path for b in bindings if b.role not in ("reads", "writes")))
        self.name = f"{_joined(self.producers, ' + ')} -> {_joined(self.consumers, ', ')}"
        self.kind = self._kind(bindings)
        self._modules = {b.path: self._member(b) for b in bindings}
        self._routes: tuple[Route, ...] | None = None

    @property
    def width(self) -> int:
        """Hidden channels now."""
        return self.spaces.width(self.space)

    @property
    def routes(self) -> tuple[Route, ...]:
        """The steps in between, one route per producer and consumer."""
        if self._routes is None:
            self._routes = find_routes(self.spaces, self.space, self.producers, self.consumers)
        return self._routes

    @property
    def bindings(self) -> list[Binding]:
        """The part that every module and bare parameter plays for these channels."""
        return self.spaces.bindings_of(self.space)

    @property
    def closed_form(self) -> str | None:
        """None where the closed-form statistics apply, otherwise one line why not."""
        if len(self.producers) > 1:
            return f"{len(self.producers)} layers write the channels"
        for path in (*self.producers, *self.consumers):
            module = self.model.get_submodule(path)
            if layers.is_transposed(module):
                return f"{path} is a transposed convolution"
            for role in ("writes", "reads"):
                binding = self.spaces.bindings.get((path, role, 0))
                own = [s for s in (binding.layout if binding else ()) if s.space is self.space]
                if len(own) > 1:
                    return f"{path} reads the channels {len(own)} times"
                if own and role == "writes" and binding and len(binding.layout) > 1:
                    return f"{path} writes other channels too"
        for route in self.routes:
            if route.problem:
                return route.problem
            for step in route.steps:
                if isinstance(step, Other):
                    return f"the step {step.name} between {route.producer} and {route.consumer} has no closed form"
                if isinstance(step, Pool) and step.geometry.ceil_mode:
                    return "a pooling with ceil_mode lies in between"
                if isinstance(step, Depthwise) and self.granularity > 1:
                    return f"{step.path} is grouped, so new channels come in groups"
        return None

    def ratio(self, consumer: str) -> int:
        """Entries along the consumer's input axis for each channel: H·W behind a flattened (K, H, W) map, else 1."""
        layout = self.spaces.bindings[(consumer, "reads", 0)].layout
        return int(sum((s.ratio for s in layout if s.space.root() is self.space), Fraction(0)))

    def span(self, consumer: str) -> tuple[int, int]:
        """First entry and one past the last entry of the site's channels along the consumer's input axis, now."""
        spans = self.spans(consumer, "reads")
        if len(spans) != 1:
            raise SiteError(f"this layer reads the site's channels {len(spans)} times", where=consumer)
        return spans[0]

    def entries(self, path: str, role: str = "reads") -> list[int]:
        """The entries of the site's channels along an axis of a layer, now, channel by channel."""
        spans, width = self.spans(path, role), self.width
        return [
            start + channel * ((end - start) // width) + entry
            for channel in range(width)
            for start, end in spans
            for entry in range((end - start) // width)
        ]

    def spans(self, path: str, role: str) -> list[tuple[int, int]]:
        """Where the site's channels lie along an axis of a layer, now.

        Args:
            path: module path of a producer, follower or consumer.
            role: "writes", "reads", "carries" or "norm".

        Returns:
            First entry and one past the last, once for every time that the channels lie there (most often once). A
            producer has other channels too where something else takes its channels in pieces.
        """
        found, start = [], 0
        for segment in self.spaces.bindings[(path, role, 0)].layout:
            width = int(self.spaces.width(segment.space) * segment.ratio)
            if segment.space.root() is self.space:
                found.append((start, start + width))
            start += width
        return found

    def between(
        self,
        new: dict[str, Tensor | tuple[Tensor, ...]],
        norms: dict[str, tuple[Tensor, Tensor]] | None = None,
        carried: dict[str, Tensor] | None = None,
        measured: dict[str, tuple[Tensor, Tensor]] | None = None,
        norm_scale: Tensor | None = None,
    ) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """Run the model's own operations between writers and readers for new channels only.

        Args:
            new: per producer the (n, K, *hidden) values that its new channels would have (channels last for a linear
                layer on a grid); a tuple with one tensor per call for a layer that is called several times.
            norms: per norm layer, mean and variance (K,) for its transparent insertion, as in ChannelGrowth.norms;
                missing: mean 0 and variance 1.
            carried: per grouped convolution in between its new kernels; missing: the identity tap.
            measured: filled with the mean and variance (K,) of the new channels before each BatchNorm or InstanceNorm,
                which are then used for its insertion instead of `norms`.
            norm_scale: (K,) factor on what comes out of each norm layer with weights, as in ChannelGrowth.norm_scale.

        Returns:
            Per consumer what it would read of the new channels; a tuple for one that is called several times. Dropout
            is off; BatchNorm uses its running values. Differentiable.
        """
        return run_between(self, new, norms or {}, carried or {}, measured, norm_scale)

    def parameters_for(self, channels: int) -> int:
        """Parameters that `channels` new channels would add to the model."""
        from growconv.network.growing import plan_size  # it plans with sites

        return plan_size(self, channels)

    def growable_channels(self, channels: int) -> int:
        """The next number of channels that whole groups allow, at least `channels`."""
        return -(-channels // self.granularity) * self.granularity

    def check(self, model: nn.Module) -> None:
        """Check that the site still belongs to a model.

        Raises:
            SiteError: for another model, a module replaced since the site was found, or a frozen weight.
        """
        if model is not self.model:
            raise SiteError(
                "this site belongs to another model",
                where=self.name,
                fix="find the sites of the model that is to grow: growconv.find_sites(model, example_input)",
            )
        for path, module in self._modules.items():
            try:
                current = attribute(model, path)
            except AttributeError:
                current = None
            if isinstance(module, nn.Module) and current is not module:
                raise SiteError(
                    "the module was replaced after the site was found",
                    where=path,
                    expected=type(module).__name__,
                    got="nothing" if current is None else f"another {type(current).__name__}",
                    fix="find the sites again: growconv.find_sites(model, example_input)",
                )
        frozen = frozen_weight(self)
        if frozen:
            raise SiteError(frozen, where=self.name, fix="set requires_grad=True on it, or choose another site")

    def _member(self, binding: Binding) -> Any:
        return None if binding.role == "parameter" else self.model.get_submodule(binding.path)

    def _kind(self, bindings: list[Binding]) -> str:
        modules = [self.model.get_submodule(path) for path in (*self.producers, *self.consumers)]
        carried = [self.model.get_submodule(b.path) for b in bindings if b.role == "carries"]
        if len(self.producers) > 1:
            return "stream"
        if any(len(b.layout) > 1 for b in bindings if b.role == "reads"):
            return "concatenation"
        if carried:
            return "depthwise" if self.granularity == 1 else "grouped"
        if any(layers.is_transposed(module) for module in modules):
            return "transposed"
        if len(self.consumers) > 1:
            return "fan"
        return "linear" if any(isinstance(module, nn.Linear) for module in modules) else "pair"

    def __repr__(self) -> str:
        """One line: name, kind and width."""
        return f"GrowthSite({self.name!r}, kind={self.kind!r}, width={self.width})"

    def __str__(self) -> str:
        """Producers, followers and consumers with their widths."""
        lines = [f"{self.name}  ({self.kind}, {self.width} channels)"]
        for label, paths in (
            ("written by", self.producers),
            ("carried by", self.followers),
            ("read by", self.consumers),
        ):
            lines += [f"  {label} {path}  {_described(self.model, path)}" for path in paths]
        if self.granularity > 1:
            lines.append(f"  channels come in multiples of {self.granularity}")
        if self.closed_form:
            lines.append(f"  no closed form: {self.closed_form}")
        return "\n".join(lines)


def frozen_weight(site: GrowthSite) -> str | None:
    """The first frozen weight that new channels would need, said in one line; None where all can train."""
    for path in (*site.producers, *site.consumers):
        module = site.model.get_submodule(path)
        parameters = [p for name, p in module.named_parameters() if "weight" in name]
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            return f"the weight of {path} is frozen (requires_grad=False)"
    return None


class Analysis:
    """Everything that one look at a model tells: its graph, its channel spaces, the sites and what keeps the others.

    Args:
        graph: the traced model.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.spaces = Spaces(graph)
        self.sites: list[GrowthSite] = []
        self.reasons: dict[Space, str] = {}
        self.site_of: dict[Space, GrowthSite] = {}
        for space in self.spaces.spaces():  # in the order of their first writers
            reason = self._reason(space)
            if reason is None:
                site = GrowthSite(self.spaces, space)
                reason = frozen_weight(site)
                if reason is None:
                    self.sites.append(site)
                    self.site_of[space] = site
                    continue
            self.reasons[space] = reason

    def _reason(self, space: Space) -> str | None:
        if space.reasons:
            return space.reasons[0]
        bindings = self.spaces.bindings_of(space)
        if not any(binding.role == "reads" for binding in bindings):
            return "no convolution or linear layer reads its channels"
        for binding in bindings:
            own = [segment for segment in binding.layout if segment.space is space]
            repeatable = binding.role in ("reads", "norm", "carries")
            if len(own) > 1 and (not repeatable or any(s.ratio.denominator > 1 for s in own)):
                return f"its channels come twice into {binding.path}"
            if binding.role != "parameter":
                module = self.spaces.model.get_submodule(binding.path)
                problem = layers.problem(module)
                if binding.role == "carries" and parametrized.stored_weight(module) is not None:
                    problem = "its weight is normalized, and it carries channels in groups"
                if problem:
                    return f"{binding.path}: {problem}"
            if any((s.ratio * space.granularity).denominator != 1 for s in binding.layout if s.space.root() is space):
                space.granularity *= max((s.ratio * space.granularity).denominator for s in binding.layout)
        return None


def find_sites(model: nn.Module, example_input: Any) -> tuple[GrowthSite, ...]:
    """Find every place where a model can grow.

    Args:
        model: a plain, raw nn.Module on any device; nothing of it is changed.
        example_input: what its forward takes: a tensor, a tuple of arguments or a mapping of keyword arguments. Its
            size is the one that flattened layers are made for; a batch of one is enough.

    Returns:
        The sites in forward order; explain_sites says why other layers are none.

    Raises:
        ArgumentTypeError: for a compiled or data-parallel wrapper, or something that is no model.
        TraceError: when the model does not run on the example.
    """
    return tuple(Analysis(trace(model, example_input)).sites)


def _joined(paths: Sequence[str], separator: str) -> str:
    if len(paths) <= 3:
        return separator.join(paths)
    return f"{paths[0]}{separator}{len(paths) - 1} more"


def _described(model: nn.Module, path: str) -> str:
    member = attribute(model, path)
    if isinstance(member, nn.Module):
        return f"{type(member).__name__}({member.extra_repr()})"
    return f"parameter {tuple(member.shape)}"
