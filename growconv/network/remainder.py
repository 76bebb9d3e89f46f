"""Remainder: what lies downstream of a site's readers, run again and again with changed reader outputs.

Everything that does not depend on the readers is computed once per batch. The search for an amplitude then costs a
fraction of a forward pass for each candidate.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from growconv.errors import SiteError
from growconv.network import layers, operations
from growconv.network.between import NewStep, Sources, overwrites, region
from growconv.network.graph import example_arguments, lookup, run_node
from growconv.network.proposal import ChannelGrowth
from growconv.network.rank_site import RankSite
from growconv.network.site import GrowthSite

Calls = Tensor | tuple[Tensor, ...]


class Remainder:
    """The part of a model behind a site's readers, for one batch.

    Dropout is off; norm layers are in the mode that the model is in, and their buffers are left alone. A model whose
    graph cannot be executed runs as a whole each time, with hooks on its readers.

    Args:
        site: the site.
        batch: the model's input: a tensor, a tuple of arguments or a mapping of keyword arguments.

    Attributes:
        producer_inputs: per producer what it reads on this batch (a tuple for one called several times); only producers
            that do not themselves depend on a reader.
        reader_inputs: per consumer what it reads, likewise.
        partial: True when only what depends on the readers is run again.
    """

    def __init__(self, site: GrowthSite, batch: Any) -> None:
        self.site = site
        self.model = site.model
        self.arguments = example_arguments(batch)
        self.producer_inputs: dict[str, Calls] = {}
        self.reader_inputs: dict[str, Calls] = {}
        self.partial = site.spaces.graph.executable
        self._cached: dict[fx.Node, Any] = {}
        self._inputs: dict[tuple[str, str], list[Tensor]] = {}
        if self.partial:
            self._split()
            with quiet(self.model), torch.no_grad():
                self._first_pass()
        else:
            with quiet(self.model), torch.no_grad():
                self._whole({}, listen=True)
        for (role, path), tensors in self._inputs.items():
            target = self.producer_inputs if role == "producer" else self.reader_inputs
            target[path] = tensors[0] if len(tensors) == 1 else tuple(tensors)

    def run(self, deltas: Mapping[str, Calls] | None = None) -> Any:
        """The model's output when something is added to its readers' outputs.

        Args:
            deltas: per consumer what is added to its output; a tuple for one that is called several times; missing:
                nothing.

        Returns:
            What the model returns. Differentiable with respect to the deltas.
        """
        given = {path: list(d) if isinstance(d, tuple) else [d] for path, d in (deltas or {}).items()}
        unknown = set(given) - set(self.site.consumers)
        if unknown:
            raise SiteError(
                "a change was given for a layer that does not read the site's channels",
                expected=", ".join(self.site.consumers),
                got=", ".join(sorted(unknown)),
                where=self.site.name,
            )
        with quiet(self.model):
            return self._downstream(given) if self.partial else self._whole(given)

    def grown(self, growth: ChannelGrowth, amplitude: float | Tensor = 1.0) -> Any:
        """The output that the model would have with the new channels in place, without changing it.

        Unlike run(added_outputs(...)) it is exact for streams too, where writers read what readers have changed.

        Args:
            growth: the proposal; its tensors may require gradients.
            amplitude: multiplies the outgoing weights.

        Returns:
            What the grown model returns. Differentiable with respect to the growth's weights and the amplitude.
        """
        if not self.partial or growth.revised or growth.copied_from is not None:
            raise SiteError(
                "this growth cannot be tried out without making it",
                where=self.site.name,
                got="a model whose graph cannot be executed"
                if not self.partial
                else "old weights that change, or copies",
                fix="grow a copy of the model, or grow with amplitude 0",
            )
        with quiet(self.model):
            return self._downstream({}, _NewChannels(self, growth, amplitude))

    def _split(self) -> None:
        """Sort the nodes into those that depend on a reader and those that do not."""
        spaces = self.site.spaces
        calls = {path: spaces.bindings[(path, "reads", 0)].nodes for path in self.site.consumers}
        self._readers = {node: (path, index) for path, nodes in calls.items() for index, node in enumerate(nodes)}
        after: set[fx.Node] = set()
        for node in spaces.graph.nodes:
            if any(source in after or source in self._readers for source in node.all_input_nodes):
                after.add(node)
        self._after = [node for node in spaces.graph.nodes if node in after or node.op == "output"]
        self._before = [node for node in spaces.graph.nodes if node not in after and node.op != "output"]
        members = self._members = set(self._after)
        self._kept = {source for node in self._after for source in node.all_input_nodes if source not in members}
        self._kept |= {node for node in self._readers if node not in members}
        self._region = region(self.site)
        self._inside = set(self._region)
        self._kept |= {source for node in self._region for source in node.all_input_nodes if source not in members}
        self._last: dict[fx.Node, list[fx.Node]] = {}
        last = {source: node for node in self._before for source in node.all_input_nodes}
        for source, node in last.items():
            if source not in self._kept:
                self._last.setdefault(node, []).append(source)
        self._free: dict[fx.Node, list[fx.Node]] = {}
        last = {source: node for node in self._after for source in node.all_input_nodes}
        for source, node in last.items():
            self._free.setdefault(node, []).append(source)

    def _first_pass(self) -> None:
        args, kwargs = self.arguments
        positional = iter(args)
        values: dict[fx.Node, Any] = {}
        writers = {
            node for path in self.site.producers for node in self.site.spaces.bindings[(path, "writes", 0)].nodes
        }
        for node in self._before:
            if node.op == "placeholder":
                name = str(node.target)
                default = node.args[0] if node.args else None
                values[node] = kwargs[name] if name in kwargs else next(positional, default)
                continue
            inputs = lookup(node.args, values)
            if node in writers:
                self._inputs.setdefault(("producer", str(node.target)), []).append(inputs[0])
            if node in self._readers:
                self._inputs.setdefault(("consumer", str(node.target)), []).append(inputs[0])
            values[node] = self._run(node, inputs, lookup(node.kwargs, values))
            for source in self._last.get(node, ()):
                values.pop(source, None)
        self._cached = {node: value for node, value in values.items() if node in self._kept}

    def _downstream(self, deltas: dict[str, list[Tensor]], new: "_NewChannels | None" = None) -> Any:
        values = dict(self._cached)
        if new is not None:
            for node in self._region:
                if node not in self._members:
                    new.step(node, values)
        for node in self._readers:
            if node in values:
                values[node] = self._changed(node, values[node], deltas, fresh=False)
                if new is not None:
                    values[node] = new.changed(node, values[node])
        for node in self._after:
            args = lookup(node.args, values)
            if node.op == "output":
                return args[0]
            if new is not None and node in self._inside:
                new.step(node, values)
            if node.all_input_nodes and node.all_input_nodes[0] in self._cached and overwrites(self.model, node):
                args = tuple(item.clone() if isinstance(item, Tensor) else item for item in args)
            values[node] = self._run(node, args, lookup(node.kwargs, values))
            if node in self._readers:
                values[node] = self._changed(node, values[node], deltas, fresh=True)
                if new is not None:
                    values[node] = new.changed(node, values[node])
            for source in self._free.get(node, ()):
                values.pop(source, None)
        raise SiteError("the model's graph has no output", where=self.site.name)

    def _changed(self, node: fx.Node, value: Tensor, deltas: dict[str, list[Tensor]], fresh: bool) -> Tensor:
        path, call = self._readers[node]
        if path in deltas:
            return value + deltas[path][call].to(value.dtype)
        return value if fresh else value.clone()  # what follows may overwrite it

    def _run(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        if node.op == "call_module":
            if isinstance(self.model.get_submodule(str(node.target)), layers.DROPOUTS):
                return args[0]
        elif operations.operation_name(node) in operations.DROPOUT_FUNCTIONS:
            return args[0]
        return run_node(self.model, node, args, kwargs)

    def _whole(self, deltas: dict[str, list[Tensor]], listen: bool = False) -> Any:
        """A whole forward pass with hooks on the readers."""
        counts = dict.fromkeys(self.site.consumers, 0)
        handles = []

        def add(path: str) -> Any:
            def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
                call = counts[path]
                counts[path] += 1
                return output + deltas[path][call].to(output.dtype) if path in deltas else None

            return hook

        def hear(role: str, path: str) -> Any:
            def hook(module: nn.Module, args: tuple) -> None:
                self._inputs.setdefault((role, path), []).append(args[0].detach())

            return hook

        for path in self.site.consumers:
            handles.append(self.model.get_submodule(path).register_forward_hook(add(path)))
        if listen:
            for role, paths in (("producer", self.site.producers), ("consumer", self.site.consumers)):
                for path in paths:
                    handles.append(self.model.get_submodule(path).register_forward_pre_hook(hear(role, path)))
        dropped = [m for m in self.model.modules() if isinstance(m, layers.DROPOUTS) and m.training]
        try:
            for module in dropped:
                module.training = False
            args, kwargs = self.arguments
            return self.model(*args, **kwargs)
        finally:
            for module in dropped:
                module.training = True
            for handle in handles:
                handle.remove()


class _NewChannels:
    """New channels that run along with the model: their values node by node, and what they add to the readers."""

    def __init__(self, remainder: Remainder, growth: ChannelGrowth, amplitude: float | Tensor) -> None:
        self.remainder = remainder
        self.site = remainder.site
        self.growth = growth
        self.amplitude = amplitude
        self.values: dict[fx.Node, Any] = {}
        self.added: dict[fx.Node, Tensor] = {}
        self.calls = dict.fromkeys(self.site.producers, 0)
        like = next(iter(growth.incoming.values()))
        self.run = NewStep(self.site, growth.norms, growth.carried, None, like, growth.channels, growth.norm_scale)

    def step(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        """Compute a node of the region for the new channels; `values` are those of the model itself."""
        path = str(node.target)
        module = self.site.model.get_submodule(path) if node.op == "call_module" else None
        bindings = self.site.spaces.bindings
        if module is not None and (path, "reads", 0) in bindings and path in self.site.consumers:
            read = next(self.values[source] for source in node.all_input_nodes if source in self.values)
            weight = self.growth.outgoing[path]
            self.added[node] = apply_columns(module, read, weight.to(read)) * self.amplitude
        if module is not None and (path, "writes", 0) in bindings and path in self.site.producers:
            if node in self.remainder._members:
                x = lookup(node.args, values)[0]
            else:
                x = self.remainder._inputs["producer", path][self.calls[path]]
                self.calls[path] += 1
            weight, bias = self.growth.incoming[path], self.growth.incoming_bias.get(path)
            value = apply_filters(module, x, weight.to(x), None if bias is None else bias.to(x))
            self.values[node] = value.clone() if self.run.overwrites else value
        elif node not in self.added:
            joined = operations.operation_name(node) in operations.CONCATENATIONS
            sources = Sources(self.site, self.values if joined else {**values, **self.values}, 0)
            self.values[node] = self.run.run(node, lookup(node.args, sources), lookup(node.kwargs, sources))

    def changed(self, node: fx.Node, value: Tensor) -> Tensor:
        """A reader's output with what the new channels add to it."""
        return value + self.added.pop(node).to(value.dtype) if node in self.added else value


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Run a model in its own mode without changing a buffer: batch norms in training mode use batch statistics only."""
    silenced = []
    saved: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, (*layers.BATCH_NORMS, *layers.INSTANCE_NORMS)):
            if module.training and module.track_running_stats:
                silenced.append(module)
        elif module.training:
            saved += [(buffer, buffer.clone()) for buffer in module._buffers.values() if buffer is not None]
    try:
        for module in silenced:
            module.track_running_stats = False
        yield
    finally:
        for module in silenced:
            module.track_running_stats = True
        with torch.no_grad():
            for buffer, old in saved:
                buffer.copy_(old)


def apply_filters(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a producer's new filters compute on its input.

    Args:
        module: the layer that gets the filters; gives stride, padding and dilation.
        x: its input.
        weight: (K, in, *kernel), also for a transposed convolution; (K, in) for a linear layer.
        bias: (K,) or None.
    """
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    weight = weight.transpose(0, 1) if layers.is_transposed(module) else weight
    return layers.convolve(module, x, weight, bias)


def apply_columns(module: nn.Module, h: Tensor, weight: Tensor) -> Tensor:
    """What a reader adds to its output for new channels (n, K·ratio, *grid), with weights (out, K·ratio, *kernel)."""
    return apply_filters(module, h, weight, None)


def added_outputs(site: GrowthSite, growth: ChannelGrowth, producer_inputs: Mapping[str, Calls]) -> dict[str, Calls]:
    """What new channels at amplitude 1 add to each consumer's output.

    Args:
        site: the site.
        growth: the proposal.
        producer_inputs: per producer what it reads, as in Remainder.producer_inputs.

    Returns:
        Per consumer δz, shaped like its output; a tuple for one that is called several times.
    """
    if isinstance(site, RankSite):
        inputs = producer_inputs[site.path]
        many = isinstance(inputs, tuple)
        return {site.path: tuple(site.added(growth, x) for x in inputs) if many else site.added(growth, inputs)}
    new: dict[str, Calls] = {}
    for path in site.producers:
        module, inputs = site.model.get_submodule(path), producer_inputs[path]
        calls = inputs if isinstance(inputs, tuple) else (inputs,)
        weight, bias = growth.incoming[path], growth.incoming_bias.get(path)
        outputs = tuple(apply_filters(module, x, weight.to(x), None if bias is None else bias.to(x)) for x in calls)
        new[path] = outputs if isinstance(inputs, tuple) else outputs[0]
    result: dict[str, Calls] = {}
    for path, read in site.between(new, growth.norms, growth.carried, norm_scale=growth.norm_scale).items():
        module = site.model.get_submodule(path)
        weight = growth.outgoing[path]
        if isinstance(read, tuple):
            result[path] = tuple(apply_columns(module, h, weight.to(h)) for h in read)
        else:
            result[path] = apply_columns(module, read, weight.to(read))
    return result
