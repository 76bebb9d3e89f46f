"""Rules for operations on tensors: elementwise functions, concatenation, reductions."""

from collections.abc import Callable
from typing import Any

from torch import fx

from growconv.network import operations
from growconv.network.graph import TensorShape
from growconv.network.layouts import Layout, Size, Traced, flat
from growconv.network.shape_rules import ShapeRules, dims_of


class OperationRules(ShapeRules):
    """What a function or method does to the layouts of its tensors."""

    def _operation(self, node: fx.Node, args: tuple, kwargs: dict[str, Any], described: Any) -> Any:
        name = operations.operation_name(node)
        tensors = [item for item in flat((args, kwargs)) if isinstance(item, Traced)]
        if name == "getattr":
            return self._attribute(node, args, described)
        if name == "getitem":
            return self._item(node, args, described)
        if not tensors:
            return self._without_tensors(node, name, args, kwargs, described)
        if name in operations.SIZES:
            return self._size(name, tensors[0], args, kwargs, described)
        if not isinstance(described, TensorShape):
            return self._refuse(node, (args, kwargs), described, f"{_named(node, name)} is not followed")
        if name in ("to", "type_as"):
            tensors = tensors[:1]  # another tensor gives its dtype only
        if name in operations.ELEMENTWISE:
            return self._elementwise(node, name, tensors, described)
        if name == "layer_norm":
            normed = len(kwargs.get("normalized_shape", args[1] if len(args) > 1 else ()))
            return self._mixing(node, tensors[0], described, list(range(-normed, 0)), node.name)
        if len(tensors) == 1 or name in operations.CONCATENATIONS or name == "stack":
            handler = self._handlers().get(name)
            if handler is not None:
                return handler(node, tensors, args, kwargs, described)
        return self._refuse(node, (args, kwargs), described, f"{_named(node, name)} is not followed")

    def _without_tensors(self, node: fx.Node, name: str, args: tuple, kwargs: dict[str, Any], described: Any) -> Any:
        """Arithmetic on sizes, or a new tensor, whose axes follow the channels where their sizes are computed."""
        if not isinstance(described, TensorShape):
            return self._integer(name, args, described)
        given = args[0] if len(args) == 1 and isinstance(args[0], tuple) else args
        sizes = given[: len(described)] if name in operations.CREATIONS else ()
        axes: dict[int, Layout] = {
            axis: size.layout
            for axis, size in enumerate(sizes)
            if isinstance(size, Size) and size.layout and size.factor == 1
        }
        if not axes:
            self._block_all((args, kwargs), f"{_named(node, name)} makes a tensor of that size")
        return Traced(described, axes, f"the fixed tensor {node.name}")

    def _handlers(self) -> dict[str, Callable[..., Any]]:
        table: dict[str, Callable[..., Any]] = {
            "permute": lambda n, t, a, k, d: self._permute(t[0], dims_of(a[1:], k), d),
            "transpose": lambda n, t, a, k, d: self._transpose(t[0], a, k, d),
            "swapaxes": lambda n, t, a, k, d: self._transpose(t[0], a, k, d),
            "squeeze": lambda n, t, a, k, d: self._reshape(n, t[0], d, None),
            "unsqueeze": lambda n, t, a, k, d: self._unsqueeze(t[0], int(a[1] if len(a) > 1 else k["dim"]), d),
            "expand": lambda n, t, a, k, d: self._expand(n, t[0], a, d),
            "pad": lambda n, t, a, k, d: self._pad(n, t[0], a, k, d),
        }
        table |= dict.fromkeys(operations.GRID, lambda n, t, a, k, d: self._grid(n, t[0], d, t[0].shape[:2]))
        table |= dict.fromkeys(operations.VIEWS, lambda n, t, a, k, d: self._view(n, t[0], a, k, d))
        table |= dict.fromkeys(operations.REDUCTIONS, lambda n, t, a, k, d: self._reduce(n, t[0], a, k, d))
        table |= dict.fromkeys(
            operations.SOFTMAX,
            lambda n, t, a, k, d: self._mixing(n, t[0], d, dims_of(a[1:], k) or list(range(len(d))), n.name),
        )
        table |= dict.fromkeys(operations.CONCATENATIONS, lambda n, t, a, k, d: self._concatenate(n, a, k, d))
        table["stack"] = lambda n, t, a, k, d: self._stack(n, a, k, d)
        return table

    def _elementwise(self, node: fx.Node, name: str, tensors: list[Traced], described: TensorShape) -> Traced:
        axes: dict[int, Layout] = {}
        if name in operations.MULTIPLICATIVE:
            self._fill_with_ones(node)
        for axis in range(len(described)):
            layout: Layout | None = None
            for tensor in tensors:
                own = axis - len(described) + len(tensor.shape)
                if own < 0:
                    continue
                other = tensor.axes.get(own)
                if tensor.shape[own] == 1 and described[axis] != 1:
                    if other is not None:
                        self._block(other, f"its single channel is spread over several by {node.name}")
                    continue
                if other is None:
                    continue
                if layout is not None:
                    self._unify(layout, other, f"{_named(node, name)} combines differently composed channels")
                layout = layout or other
            if layout is None:
                continue
            for tensor in tensors:
                own = axis - len(described) + len(tensor.shape)
                if own >= 0 and own not in tensor.axes and tensor.shape[own] == described[axis] > 1:
                    self._block(layout, f"{_named(node, name)} combines it with {tensor.origin or 'a fixed tensor'}")
            axes[axis] = layout
        origin = next((tensor.origin for tensor in tensors if tensor.origin), "")
        return Traced(described, axes, origin)

    def _fill_with_ones(self, node: fx.Node) -> None:
        """A bare parameter that multiplies gets ones for new channels."""
        seen = list(node.all_input_nodes)
        while seen:
            source = seen.pop()
            if source.op == "get_attr":
                for binding in self.bindings.values():
                    if binding.role == "parameter" and binding.path == str(source.target):
                        binding.fill = 1.0
            elif source.op == "call_method" and len(source.all_input_nodes) == 1:
                seen += source.all_input_nodes

    def _concatenate(self, node: fx.Node, args: tuple, kwargs: dict[str, Any], described: TensorShape) -> Any:
        items = [item for item in (args[0] if args else kwargs["tensors"]) if isinstance(item, Traced)]
        dim = int(args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))) % len(described)
        axes: dict[int, Layout] = {}
        for axis in range(len(described)):
            followed = [item for item in items if axis in item.axes]
            if axis != dim:
                for item in followed[1:]:
                    self._unify(followed[0].axes[axis], item.axes[axis], f"{node.name} joins different channels")
                if followed and len(followed) < len(items):
                    self._block(followed[0].axes[axis], f"{node.name} joins it with tensors that are not followed")
                if followed:
                    axes[axis] = followed[0].axes[axis]
            elif followed:
                axes[axis] = tuple(segment for item in items for segment in self._axis(item, axis, item.shape[axis]))
        return Traced(described, axes, items[0].origin if items else "")

    def _stack(self, node: fx.Node, args: tuple, kwargs: dict[str, Any], described: TensorShape) -> Any:
        items = [item for item in (args[0] if args else kwargs["tensors"]) if isinstance(item, Traced)]
        dim = int(args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(described)
        lifted = [Traced(described, {a + (a >= dim): layout for a, layout in item.axes.items()}) for item in items]
        for item in lifted:
            item.shape = tuple(size for size in described)
        return self._elementwise(node, "stack", lifted, described)

    def _reduce(self, node: fx.Node, value: Traced, args: tuple, kwargs: dict[str, Any], described: TensorShape) -> Any:
        dims = dims_of(args[1:2], {key: kwargs[key] for key in ("dim", "axis") if key in kwargs})
        gone = {dim % len(value.shape) for dim in dims} or set(range(len(value.shape)))
        kept = len(described) == len(value.shape)
        axes = {}
        for axis, layout in value.axes.items():
            if axis in gone:
                self._block(layout, f"{node.name} reduces over the channels")
            else:
                axes[axis if kept else axis - sum(other < axis for other in gone)] = layout
        return Traced(described, axes, f"what {node.name} gives")

    def _mixing(self, node: fx.Node, value: Traced, described: Any, dims: list[int], name: str) -> Any:
        for dim in dims:
            layout = value.axes.get(dim % len(value.shape))
            if layout is not None:
                self._block(layout, f"{name} mixes all channels")
        return Traced(described, dict(value.axes), value.origin)

    def _grid(self, node: fx.Node, value: Traced, described: Any, kept: tuple[int, ...]) -> Any:
        """Pooling, padding, interpolation: the axes before the grid keep their layouts, the grid's have none."""
        if not isinstance(described, TensorShape):
            return self._refuse(node, value, described, f"read by {node.name}, which gives several tensors")
        for axis, layout in value.axes.items():
            if axis >= len(kept) or described[axis] != value.shape[axis]:
                self._block(layout, f"{node.name} works along the channel axis")
        axes = {a: layout for a, layout in value.axes.items() if a < len(kept) and described[a] == value.shape[a]}
        return Traced(described, axes, value.origin)


def _named(node: fx.Node, name: str) -> str:
    """The node's name, with that of its operation where it does not tell."""
    return node.name if name in node.name else f"{node.name} ({name})"
