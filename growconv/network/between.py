"""The model's own operations between the writers and the readers of a site, run for new channels only."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from growconv.errors import SiteError
from growconv.network import layers, operations
from growconv.network.graph import TensorShape, lookup, run_node

if TYPE_CHECKING:
    from growconv.network.site import GrowthSite

Calls = Tensor | tuple[Tensor, ...]
Moments = tuple[Tensor, Tensor]


class _Absent:
    """Stands for a tensor without channels of the site; concatenation drops it, everything else refuses it."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node


def run_between(
    site: "GrowthSite",
    new: Mapping[str, Calls],
    norms: Mapping[str, Moments],
    carried: Mapping[str, Tensor],
    measured: dict[str, Moments] | None,
    norm_scale: Tensor | None = None,
) -> dict[str, Calls]:
    """See GrowthSite.between."""
    spaces = site.spaces
    values: dict[fx.Node, Any] = {}
    calls = {path: list(value) if isinstance(value, tuple) else [value] for path, value in new.items()}
    for path in site.producers:
        count = len(spaces.bindings[(path, "writes", 0)].nodes)
        if len(calls.get(path, ())) != count:
            raise SiteError(
                "the values of new channels are needed from every writer",
                where=path,
                expected=f"{count} tensor{'s' if count > 1 else ''}",
                got=len(calls.get(path, ())),
            )
    batch = next(iter(calls.values()))[0].shape[0]
    result: dict[str, list[Tensor]] = {}
    first = next(iter(calls.values()))[0]
    module = site.model.get_submodule(next(iter(calls)))
    channels = first.shape[layers.channel_axis(module, first.dim())]
    step = NewStep(site, norms, carried, measured, first, channels, norm_scale)
    for node in region(site):
        path = str(node.target)
        if node.op == "call_module" and (path, "writes", 0) in spaces.bindings and path in calls:
            values[node] = calls[path].pop(0)
            if values[node].requires_grad or step.overwrites:
                values[node] = values[node].clone()
            continue
        args = lookup(node.args, Sources(site, values, batch))
        kwargs = lookup(node.kwargs, Sources(site, values, batch))
        if node.op == "call_module" and (path, "reads", 0) in spaces.bindings:
            read = next(item for item in (*args, *kwargs.values()) if isinstance(item, Tensor))
            result.setdefault(path, []).append(read)
        else:
            values[node] = step.run(node, args, kwargs)
    return {path: tensors[0] if len(tensors) == 1 else tuple(tensors) for path, tensors in result.items()}


class Sources(dict):
    """Values of nodes; those outside of the region are sizes from the trace, or absent tensors."""

    def __init__(self, site: "GrowthSite", values: dict[fx.Node, Any], batch: int) -> None:
        super().__init__(values)
        self.site = site
        self.batch = batch

    def __missing__(self, node: fx.Node) -> Any:
        described = self.site.spaces.graph.values.get(node)
        if isinstance(described, TensorShape):
            return getattr(node.target, "value", _Absent(node))  # constants of a recorded run are known
        return _with_batch(self.site.spaces.graph.values, node, self.batch)


def _with_batch(values: Mapping[fx.Node, Any], node: fx.Node, batch: int) -> Any:
    """A size from the trace, with the present number of samples in the place of the traced one."""
    described, name = values.get(node), operations.operation_name(node)
    if batch and name in ("size", "getattr") and isinstance(described, torch.Size):
        return torch.Size((batch, *described[1:]))
    if batch and name == "size" and isinstance(described, int):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return batch if dim == 0 else described
    if name == "getitem" and isinstance(described, (int, torch.Size)) and isinstance(node.args[0], fx.Node):
        return _with_batch(values, node.args[0], batch)[node.args[1]]
    return described


def region(site: "GrowthSite") -> list[fx.Node]:
    """The nodes between writers and readers, in order: tensors with channels of the site, and their sizes."""
    cached = getattr(site, "_region", None)
    if cached is not None:
        return cached
    spaces, space = site.spaces, site.space
    readers = set(site.consumers)
    needed: set[fx.Node] = set()
    stack = [call for path in readers for call in spaces.bindings[(path, "reads", 0)].nodes]
    ends = set(stack)
    writing = {call for path in site.producers for call in spaces.bindings[(path, "writes", 0)].nodes}
    inside: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        inside.add(node)
        if node in writing and node not in ends:
            continue
        for source in node.all_input_nodes:
            value = spaces.graph.values.get(source)
            carries = spaces.layout_at(source, space) is not None
            if carries or (not isinstance(value, TensorShape) and _depends(site, source)):
                stack.append(source)
    order = [node for node in spaces.graph.nodes if node in inside]
    site._region = order  # pyright: ignore[reportAttributeAccessIssue]
    return order


def _depends(site: "GrowthSite", node: fx.Node) -> bool:
    """True when a size or tuple is computed from a tensor with channels of the site."""
    return any(
        site.spaces.layout_at(source, site.space) is not None
        or (not isinstance(site.spaces.graph.values.get(source), TensorShape) and _depends(site, source))
        for source in node.all_input_nodes
    )


class NewStep:
    """Runs one node for the new channels."""

    def __init__(
        self,
        site: "GrowthSite",
        norms: Mapping[str, Moments],
        carried: Mapping[str, Tensor],
        measured: dict[str, Moments] | None,
        like: Tensor,
        channels: int,
        norm_scale: Tensor | None = None,
    ) -> None:
        self.site = site
        self.norms = norms
        self.carried = carried
        self.measured = measured
        self.like = like
        self.channels = channels
        self.norm_scale = norm_scale
        self.overwrites = any(overwrites(site.model, node) for node in region(site))

    def run(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a node gives for the new channels, its arguments restricted to them."""
        if node.op == "get_attr":
            return self._parameter(node)
        name = operations.operation_name(node) if node.op != "call_module" else ""
        if name in operations.CONCATENATIONS:
            parts = [item for item in (args[0] if args else kwargs["tensors"]) if isinstance(item, Tensor)]
            return self._concatenated(node, parts, args, kwargs)
        if name == "pad" and self.site.spaces.layout_at(node, self.site.space) is not None:
            return self._padded(node, args, kwargs)
        absent = next((item for item in (*args, *kwargs.values()) if isinstance(item, _Absent)), None)
        if absent is not None:
            raise SiteError(
                f"new channels meet {absent.node.name}, which does not belong to them",
                where=self.site.name,
                fix="choose a method that needs no samples of this site",
            )
        if name in operations.DROPOUT_FUNCTIONS:
            return args[0]
        if name == "getitem" and isinstance(args[0], Tensor):
            return args[0][self._kept(node, args[0], args[1])]
        if node.op != "call_module":
            return run_node(self.site.model, node, args, kwargs)
        path = str(node.target)
        module = self.site.model.get_submodule(path)
        x = next(item for item in (*args, *kwargs.values()) if isinstance(item, Tensor))
        if isinstance(module, layers.DROPOUTS):
            return x
        if isinstance(module, layers.NORMS):
            return self._norm(path, module, x)
        if isinstance(module, nn.PReLU):
            slope = module.weight.detach().mean().to(x)  # values may be kept in a higher precision than the model's
            return F.prelu(x, slope.expand(x.shape[1]) if module.num_parameters > 1 else slope[None])
        if layers.is_convolution(module):
            return self._carry(path, module, x)
        return module(*args, **kwargs)

    def _concatenated(self, node: fx.Node, parts: list[Tensor], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Only the site's own channels; where they come several times, all entries of the first channel come first."""
        dim = int(args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))) % parts[0].dim()
        if len(parts) == 1:
            return parts[0]
        if dim != self.site.spaces.layout_at(node, self.site.space):
            return torch.cat(parts, dim)
        return torch.cat([part.unflatten(dim, (self.channels, -1)) for part in parts], dim + 1).flatten(dim, dim + 1)

    def _kept(self, node: fx.Node, x: Tensor, index: Any) -> tuple:
        """An index that takes all new channels: a slice of the channel axis is one of old channels."""
        items = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in items:
            at = items.index(Ellipsis)
            missing = x.dim() - sum(item is not None for item in items) + 1
            items[at : at + 1] = [slice(None)] * missing
        axis = self.site.spaces.layout_at(node.all_input_nodes[0], self.site.space)
        source = -1
        for position, item in enumerate(items):
            source += item is not None
            if source == axis and item is not None and item != slice(None):
                if x.shape[source] != self.channels:
                    raise SiteError("channels that come several times are sliced", where=node.name)
                items[position] = slice(None)
        return tuple(items)

    def _padded(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Padding of the grid; what is padded to the channel axis are no channels of the site."""
        x, sides = args[0], list(args[1] if len(args) > 1 else kwargs["pad"])
        axis = self.site.spaces.layout_at(node, self.site.space)
        first = 2 * (x.dim() - 1 - int(axis or 0))
        sides[first : first + 2] = [0] * len(sides[first : first + 2])
        rest = {key: value for key, value in kwargs.items() if key not in ("input", "pad")}
        return F.pad(x, sides, *args[2:], **rest)

    def _norm(self, path: str, module: nn.Module, x: Tensor) -> Tensor:
        """A norm layer with transparent parameters: the identity on a channel with the given mean and variance."""
        if self.measured is not None and not isinstance(module, nn.GroupNorm):
            dims = [axis for axis in range(x.dim()) if axis != 1]
            detached = x.detach().double()
            self.measured[path] = (detached.mean(dims), detached.var(dims, unbiased=False))
        source = self.measured if self.measured is not None and path in self.measured else self.norms
        mean, variance = source.get(path, (x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])))
        repeats = x.shape[1] // mean.shape[0]  # entries a channel
        mean, variance = (moment.to(x).repeat_interleave(repeats) for moment in (mean, variance))
        eps = getattr(module, "eps", 1e-5)
        affine = getattr(module, "weight", None) is not None
        scale = 1.0 if self.norm_scale is None else self.norm_scale.to(x).repeat_interleave(repeats)
        weight, bias = ((variance + eps).sqrt() * scale, mean * scale) if affine else (None, None)
        if isinstance(module, nn.GroupNorm):
            per_group = module.num_channels // module.num_groups
            return F.group_norm(x, x.shape[1] // per_group, weight, bias, eps)
        if isinstance(module, layers.INSTANCE_NORMS) and not module.track_running_stats:
            return F.instance_norm(x, None, None, weight, bias, True, 0.0, eps)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    def _carry(self, path: str, module: nn.Module, x: Tensor) -> Tensor:
        kernel = self.carried.get(path)
        kernel = identity_kernels(module, x.shape[1]) if kernel is None else kernel
        per_group, ratio = layers.group_granularity(module)
        groups = x.shape[1] // per_group
        times = x.shape[1] * (1 if layers.is_transposed(module) else ratio) // kernel.shape[0]
        if times > 1:  # channels that come several times get the same kernels each time
            kernel = kernel.unflatten(0, (self.channels, -1)).repeat_interleave(int(times), 0).flatten(0, 1)
        return layers.convolve(module, x, kernel.to(x), None, groups)

    def _parameter(self, node: fx.Node) -> Tensor:
        """New entries of a bare parameter that has the channels along one axis."""
        binding = next(b for b in self.site.bindings if b.role == "parameter" and b.path == str(node.target))
        shape = list(self.site.spaces.graph.values[node])
        shape[binding.axis] = self._channels(binding.layout)
        return self.like.new_full(shape, binding.fill)

    def _channels(self, layout: Any) -> int:
        ratio = sum(s.ratio for s in layout if s.space.root() is self.site.space)
        return int(ratio * self.channels)


def identity_kernels(module: nn.Module, channels: int) -> Tensor:
    """Kernels (K·ratio, in/groups, *kernel) of new groups of a grouped convolution that copy their input.

    Output j of a group reads input j modulo the group's inputs, at the kernel's centre tap.
    """
    per_group, ratio = layers.group_granularity(module)
    out_per_group = int(per_group * ratio)
    weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    size: tuple[int, ...] = tuple(weight.shape[2:])
    center = tuple((taps - 1) // 2 for taps in size)
    groups = channels // per_group
    if layers.is_transposed(module):
        kernels = weight.new_zeros(channels, out_per_group, *size)
        for channel in range(channels):
            kernels[(channel, channel % per_group % out_per_group, *center)] = 1
        return kernels.detach()
    kernels = weight.new_zeros(groups * out_per_group, per_group, *size)
    for output in range(groups * out_per_group):
        kernels[(output, output % out_per_group % per_group, *center)] = 1
    return kernels.detach()


def overwrites(model: nn.Module, node: fx.Node) -> bool:
    """True for a node that writes its result over its input."""
    if node.op == "call_module":
        return getattr(model.get_submodule(str(node.target)), "inplace", False)
    return operations.is_inplace(node)
