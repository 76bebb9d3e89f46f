"""Channel spaces: which layers write, carry or read one set of channels.

Every tensor of the data flow gets, per axis, a layout: the segments (space, ratio) that lie along that axis, `ratio`
entries for each channel of the space. A convolution or linear layer writes a space of its own; adding or multiplying
two tensors makes their spaces one; concatenation chains layouts; flattening a (K, H, W) map multiplies the ratio by
H·W; a grouped convolution carries its input's space to its output in whole groups. What cannot be followed blocks the
spaces it touches, with the reason.
"""

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from growconv.network import layers
from growconv.network.graph import Graph, TensorShape, attribute, is_assertion
from growconv.network.layouts import Binding, Layout, Segment, Space, Traced, flat, resolved
from growconv.network.module_rules import ModuleRules


class Spaces(ModuleRules):
    """Channel spaces of a traced model.

    Args:
        graph: the model's data flow.

    Attributes:
        bindings: by module path, role and axis, the part that each module plays.
        values: per node what is known of its value.
        blocked_layers: layers that are called in a way that is not followed, with the reason.
        log: changes since the model was traced, as (space, channels added).
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self._counted: list[tuple[Space, int]] = []
        self._totals: dict[int, int] = {}
        self.log: list[tuple[Space, int]] = []
        for node in graph.nodes:
            self.values[node] = self._node(node)
        self._tie_shared_parameters()
        self._settle()

    def spaces(self) -> list[Space]:
        """The distinct spaces that some layer writes, in forward order."""
        written = [binding for binding in self.bindings.values() if binding.role == "writes"]
        return list(dict.fromkeys(segment.space for binding in written for segment in binding.layout))

    def bindings_of(self, space: Space) -> list[Binding]:
        """The modules and parameters with channels of a space, in forward order."""
        return self._members.get(id(space.root()), [])

    def width(self, space: Space) -> int:
        """Channels of a space now: those of its first writer, or by the growths so far where it is a piece."""
        root = space.root()
        if root.writers and len(self.bindings[(root.writers[0], "writes", 0)].layout) == 1:
            return layers.output_width(self.model.get_submodule(root.writers[0]))
        return root.width + self._added().get(id(root), 0)

    def _added(self) -> dict[int, int]:
        """Channels added to each space by the log, which others may append to or cut back."""
        done = len(self._counted)
        if done > len(self.log) or (done and self._counted[-1] is not self.log[done - 1]):
            self._counted, self._totals, done = [], {}, 0
        for entry in self.log[done:]:
            self._totals[id(entry[0])] = self._totals.get(id(entry[0]), 0) + entry[1]
            self._counted.append(entry)
        return self._totals

    def axis_layouts(self, module: str, tensor: str) -> dict[int, Layout]:
        """The layouts of the followed axes of one tensor of a module (of the model, for a bare parameter's path)."""
        found: dict[int, Layout] = {}
        for binding in self.bindings.values():
            if binding.path == module and binding.role in _SLOTS:
                for slot in _SLOTS[binding.role](self.model.get_submodule(module)):
                    if slot.name == tensor:
                        found[slot.axis] = binding.layout
            elif binding.role == "parameter" and binding.path == (f"{module}.{tensor}" if module else tensor):
                found[binding.axis] = binding.layout
        return found

    def layout_at(self, node: fx.Node, space: Space) -> int | None:
        """The axis of a node's tensor that holds channels of a space, or None."""
        value = self.values.get(node)
        if isinstance(value, tuple):  # such as the values and indices of a pooling
            value = next((item for item in value if isinstance(item, Traced)), None)
        if not isinstance(value, Traced):
            return None
        root = space.root()
        return next((a for a, layout in value.axes.items() if any(s.space.root() is root for s in layout)), None)

    def _node(self, node: fx.Node) -> Any:
        described = self.graph.values.get(node)
        if node.op == "placeholder":
            return self._opaque(described, f"the model's input {node.target}")
        if node.op == "get_attr":
            return self._parameter(node, described)
        args, kwargs = self._lookup(node.args), self._lookup(node.kwargs)
        if node.op == "output":
            self._block_all((args, kwargs), "it is the model's output")
            return None
        if is_assertion(node):
            return None
        if node.op == "call_module":
            return self._module(node, args, kwargs, described)
        return self._operation(node, args, kwargs, described)

    def _parameter(self, node: fx.Node, described: Any) -> Any:
        path = str(node.target)
        if not isinstance(described, TensorShape):
            return described
        axes: dict[int, Layout] = {}
        for axis, size in enumerate(described):
            if size > 1:
                layout = (Segment(Space(size)),)
                binding = self._bind(path, "parameter", layout, node, axis)
                axes[axis] = binding.layout
        return Traced(described, axes, origin=f"the parameter {path}")

    def _settle(self) -> None:
        """Replace every layout by its final one, and index the bindings by space."""
        self._members: dict[int, list[Binding]] = {}
        for binding in self.bindings.values():
            binding.layout = resolved(binding.layout)
            for space in dict.fromkeys(segment.space for segment in binding.layout):
                self._members.setdefault(id(space), []).append(binding)
        for value in flat(list(self.values.values())):
            if isinstance(value, Traced):
                value.axes = {axis: resolved(layout) for axis, layout in value.axes.items()}
        for binding in self.bindings.values():
            module = self.model.get_submodule(binding.path) if binding.role in ("carries", "norm") else None
            if binding.role == "carries" and module is not None:
                self._keep_groups(binding, layers.group_granularity(module)[0])
            elif isinstance(module, nn.GroupNorm):
                self._keep_groups(binding, module.num_channels // module.num_groups)

    def _keep_groups(self, binding: Binding, per_group: int) -> None:
        """Groups that the final layout cuts through, or that would mix the same channels twice, cannot grow."""
        spaces = [segment.space for segment in binding.layout]
        for segment in binding.layout:
            if segment.entries % per_group:
                segment.space.block(f"a group of {binding.path} spans channels of several layers")
            if per_group > 1 and spaces.count(segment.space) > 1:
                segment.space.block(f"its channels come twice into the groups of {binding.path}")

    def _tie_shared_parameters(self) -> None:
        """One Parameter registered in several modules is one weight: what it writes and reads is the same."""
        seen: dict[tuple[int, int], tuple[str, Layout]] = {}
        for binding in list(self.bindings.values()):
            for parameter, axis in self._axes_of(binding):
                other = seen.setdefault((id(parameter), axis), (binding.path, binding.layout))
                if other[0] != binding.path:
                    self._unify(other[1], binding.layout, f"{other[0]} and {binding.path} share a weight")

    def _axes_of(self, binding: Binding) -> Iterator[tuple[Any, int]]:
        if binding.role == "parameter":
            yield attribute(self.model, binding.path), binding.axis
            return
        module = self.model.get_submodule(binding.path)
        parametrized = hasattr(module, "parametrizations")
        for slot in _SLOTS[binding.role](module) if binding.role in _SLOTS else []:
            if slot.name in module._parameters and not (parametrized and slot.name == "weight"):
                yield module._parameters[slot.name], slot.axis


_SLOTS = {"writes": layers.writing_slots, "reads": layers.reading_slots, "norm": layers.norm_slots}
