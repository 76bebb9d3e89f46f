"""Seats: a new channel borrows the place of an old one to see what lies between producers and consumers.

What lies between treats all channels of a site alike. So the values that consumers read of new channels are had by
running the recorded operations once more, with the new channels' values in the entries of old ones, and reading those
entries where the consumers do. No operation sees another width, and none needs a rule. More new channels than old ones
take several goes. Where every operation treats channels one by one, they are run on the new channels alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from growconv.errors import SiteError
from growconv.network import layers, operations
from growconv.network.layout import ENTRY, GROUP_IN, GROUP_OUT, IN, OUT, Key
from growconv.network.site import GrowthSite
from growconv.network.tape import Operation, Ref, Rewritten, Step

Moments = tuple[Tensor, Tensor]
"""Mean and variance of each entry in front of a norm layer."""
Calls = Sequence[Tensor]
"""What a layer gives or is given, one tensor for each of its calls."""

_FILLED = ("zeros", "ones", "empty", "full")
_SIZED = operations.VIEWS | {"expand", "repeat", *_FILLED, *(f"new_{kind}" for kind in _FILLED)}


@dataclass(frozen=True)
class Inserted:
    """What surgery will insert for new channels between producers and consumers, as in a ChannelGrowth.

    Attributes:
        norms: per norm layer mean and variance in front of it, (entries,) or (K,); 0 and 1 where they are missing.
        norm_scale: (K,) factor on what comes out of norm layers.
        carried: per grouped convolution the filters of new groups; the identity tap where they are missing.
        copied: per new unit the old one whose entries it has everywhere in between, in the place of all the above; norm
            layers then work as in evaluation. None: new channels are no copies.
        instead: by name of an operation, what is computed in its place, from the same arguments.
    """

    norms: Mapping[str, Moments] = field(default_factory=dict)
    norm_scale: Tensor | None = None
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    copied: Tensor | None = None
    instead: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Region:
    """A site's part of a recorded forward pass: all that leads from its producers' outputs to its consumers' inputs.

    Attributes:
        site: the site; sizes are those of the recording, even if it has grown since.
        steps: operations, and calls of norm layers, grouped convolutions and consumers, in order.
        constants: values that do not depend on the producers, by number.
        created: those of them that operations in place write to, so that each run needs a copy.
        outputs: per producer the numbers of the outputs of its calls.
        shapes: of these outputs, by number.
        calls: how often each producer and consumer was called.
        bare: which of the constants are parameters or buffers: the axis along which they have entries for the channels
            and their positions, (units, entries of a unit); None where they have none.
        places: per axis (path, side) the positions of the channels, (units, entries of a unit).
        sizes: the length of these axes.
        narrow: whether every step treats channels one by one, so that it can be run on the new ones alone.
        samples: how many samples it is run on; None where the first axes of the outputs differ.
        recorded: how many the pass had.
    """

    site: GrowthSite
    steps: tuple[Step, ...]
    constants: dict[int, Tensor]
    created: frozenset[int]
    outputs: dict[str, tuple[int, ...]]
    shapes: dict[int, torch.Size]
    calls: Mapping[str, int]
    bare: dict[int, tuple[int, Tensor] | None]
    places: dict[Key, Tensor]
    sizes: dict[Key, int]
    narrow: bool
    samples: int | None
    recorded: int | None

    @property
    def units(self) -> int:
        """Old units: how many new ones have a seat at a time."""
        return len(next(iter(self.places.values())))

    def read(
        self, new: Mapping[str, Calls], inserted: Inserted | None = None, measured: dict[str, Moments] | None = None
    ) -> dict[str, tuple[Tensor, ...]]:
        """What the consumers read of new channels, differentiable in the values and in what is inserted.

        Args:
            new: per producer what it gives for K new channels, one tensor for each call, with K·ratio entries along the
                channel axis, channel by channel.
            inserted: what they find in between; None: norms as for values of mean 0 and variance 1, identity taps.
            measured: gets per norm layer the mean and variance (entries,) of what comes to it, in float64, and these
                are inserted there.

        Returns:
            Per consumer, one tensor for each call, with the entries of the new channels along its channel axis.

        Raises:
            SiteError: values of a producer or of a call are missing, or the channels are no whole units.
        """
        for path, numbers in self.outputs.items():
            if len(new.get(path, ())) != len(numbers):
                problem, got = "the values of new channels are needed from every producer", len(new.get(path, ()))
                raise SiteError(problem, where=path, expected=f"{len(numbers)} tensors", got=got)
        path = next(iter(self.outputs))
        entries, per_unit = new[path][0].shape[self._axis(path, new[path][0])], self.places[path, OUT].shape[1]
        count, rest = divmod(entries, per_unit)
        if rest or not count:
            expected = f"a multiple of {per_unit} entries of {path}"
            raise SiteError("new channels come in whole units", where=self.site.name, expected=expected, got=entries)
        at_once = count if self.narrow else self.units
        found, reads = None if measured is None else dict[str, list[Moments]](), []
        for start in range(0, count, at_once):
            units = range(start, min(start + at_once, count))
            reads.append(_Go(self, units, count, new, inserted or Inserted(), found).run())
        for name, moments in (found or {}).items():
            mean, variance = (torch.cat(parts) for parts in zip(*moments, strict=True))
            measured[name] = mean, variance  # pyright: ignore[reportOptionalSubscript]
        if len(reads) == 1:
            return reads[0]
        joined = {}
        for path in reads[0]:
            parts = zip(*(each[path] for each in reads), strict=True)
            joined[path] = tuple(torch.cat(part, self._axis(path, part[0])) for part in parts)
        return joined

    def _axis(self, path: str, tensor: Tensor) -> int:
        return layers.channel_axis(self.site.model.get_submodule(path), tensor.dim())

    # ------------------------------------------------------------------------------------------ new weights

    def produced(self, path: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What new filters of a producer give, with K·ratio entries along the channel axis, channel by channel.

        Args:
            x: what it is given.
            weight: (K·ratio, in/groups, *kernel), channel by channel.
            bias: (K·ratio,) or None.
        """
        layer = self.site.layer(path)
        if layer.groups == 1:
            return layer.apply(x, weight, bias)
        order = self.by_group(path, OUT, len(weight))
        given = layer.apply(x, weight[order], None if bias is None else bias[order], layer.groups)
        return given.index_select(layer.channel_axis(given.dim()), order.argsort())

    def consumed(self, path: str, read: Tensor, weight: Tensor) -> Tensor:
        """What a consumer adds to its output for new channels.

        Args:
            read: what it reads of them, as from `read`.
            weight: (out, K·ratio/groups, *kernel), every group of outputs with the columns of its own inputs.
        """
        layer = self.site.layer(path)
        if layer.groups > 1:
            axis = layer.channel_axis(read.dim())
            read = read.index_select(axis, self.by_group(path, IN, read.shape[axis]))
        return layer.apply(read, weight, None, layer.groups)

    def by_group(self, path: str, side: str, entries: int) -> Tensor:
        """The entries of new channels, channel by channel, in the order in which the groups of a layer have them."""
        groups = layers.groups_of(self.site.model.get_submodule(path))
        one = self.places[path, side][0] // (self.sizes[path, side] // groups)
        counts = [int((one == group).sum()) for group in range(groups)]
        if len(set(counts)) > 1:
            raise SiteError("the groups of this layer have unlike shares of the channels", where=path, got=counts)
        owner = one.repeat(entries // len(one))
        return owner.argsort(stable=True)

    # ------------------------------------------------------------------------------------------ some of the samples

    @cached_property
    def divisible(self) -> bool:
        """Whether the region can be run on some of its samples: tried once, on the first half of them."""
        several = self.samples is not None and self.samples > 1
        return self.samples != self.recorded or (several and (self.narrow or self._half_agrees()))

    def part(self, index: slice | Tensor) -> "Region":
        """The region for some of the samples; SiteError where the operations need all of them together."""
        if not self.divisible:
            raise SiteError(
                "what lies between the layers needs all samples of a batch together",
                where=self.site.name,
                fix="keep whole batches: several of them, to fit on some and check on others",
            )
        return self._cut(index)

    def _cut(self, index: slice | Tensor) -> "Region":
        count = self.samples or 0
        samples = len(torch.empty(count)[index])
        kept = {n: each if n in self.bare else some_of(each, index, count) for n, each in self.constants.items()}
        return replace(self, constants=kept, samples=samples)

    def _half_agrees(self) -> bool:
        """Whether half of the samples alone read what they read among all of them."""
        index, own = slice(0, (self.samples or 0) // 2), dict[str, list[Tensor]]()
        for path, numbers in self.outputs.items():
            seats, outputs = self.places[path, OUT].flatten(), [self.constants[number] for number in numbers]
            own[path] = [each.index_select(self._axis(path, each), seats) for each in outputs]
        try:
            with torch.no_grad():
                among = self.read(own)
                alone = self._cut(index).read({path: [each[index] for each in calls] for path, calls in own.items()})
        except (RuntimeError, IndexError, ValueError):
            return False
        pairs = [(a, b[index]) for path in among for a, b in zip(alone[path], among[path], strict=True)]
        return all(a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5) for a, b in pairs)


def some_of(tensor: Tensor, index: slice | Tensor, samples: int) -> Tensor:
    """The entries of some samples of a tensor that has all of them in front, one or several rows each, or none."""
    if tensor.dim() == 0 or not tensor.shape[0] or tensor.shape[0] % samples:
        return tensor
    return tensor.unflatten(0, (samples, -1))[index].flatten(0, 1)


@dataclass(eq=False)
class _Go:
    """One run of a region, on as many units of the new channels as have seats.

    Attributes:
        units: which units of the new channels.
        count: units of all new channels.
        new: the values of all, and `inserted` what they find in between, as for `Region.read`.
        measured: gets what is measured in front of norms, which is then inserted there; None: nothing is.
        env: values by number.
    """

    region: Region
    units: range
    count: int
    new: Mapping[str, Calls]
    inserted: Inserted
    measured: dict[str, list[Moments]] | None = None
    env: dict[int, Tensor] = field(default_factory=dict)

    def run(self) -> dict[str, tuple[Tensor, ...]]:
        """What the consumers read."""
        region, found = self.region, {path: [] for path, side in self.region.places if side == IN}
        for path, numbers in region.outputs.items():
            for number, value in zip(numbers, self.new[path], strict=True):
                self.env[number] = self._seat(path, number, value)
        for step in region.steps:
            if isinstance(step, Rewritten):
                self.env[step.outputs[0]] = self._value(step.inputs[0])
            elif isinstance(step, Operation):
                refs = (step.args, dict(step.kwargs))
                args, kwargs = tree_map(lambda leaf: self._value(leaf.value) if isinstance(leaf, Ref) else leaf, refs)
                made = [each for each in tree_leaves(self._computed(step, args, kwargs)) if isinstance(each, Tensor)]
                self.env |= zip(step.outputs, made, strict=True)
            elif step.path in found:
                read = self._value(step.inputs[0])
                if not region.narrow:
                    read = read.index_select(region._axis(step.path, read), self._seats(step.path, IN).flatten())
                    read = read if region._axis(step.path, read) else read.unsqueeze(0)  # it was given a single sample
                found[step.path].append(read)
            else:
                self.env[step.outputs[0]] = self._follow(step.path, self._value(step.inputs[0]))
        return {path: tuple(tensors) for path, tensors in found.items()}

    def _seats(self, path: str, side: str) -> Tensor:
        """The positions of this go's seats along an axis, (units, entries of a unit), channel by channel."""
        return self.region.places[path, side][: len(self.units)]

    def _of_go(self, value: Tensor, axis: int = 0) -> Tensor:
        """The share of this go of something with entries for all new channels."""
        size = value.shape[axis] // self.count
        return value.narrow(axis, self.units.start * size, len(self.units) * size)

    def _seat(self, path: str, number: int, value: Tensor) -> Tensor:
        """A producer's output with the new channels in their seats."""
        region = self.region
        own = self._of_go(value, region._axis(path, value))
        if region.narrow:
            return own.clone() if number in region.created else own
        whole = self._constant(number)
        own = own.squeeze(0) if own.dim() > whole.dim() else own
        return whole.index_copy(region._axis(path, own), self._seats(path, OUT).flatten(), own.to(whole))

    # ------------------------------------------------------------------------------------------ steps

    def _value(self, number: int) -> Tensor:
        if number not in self.env:
            constant = self._constant(number)
            self.env[number] = constant.clone() if number in self.region.created else constant
        return self.env[number]

    def _constant(self, number: int) -> Tensor:
        """A constant; a bare parameter's entries of new channels are the mean of the old ones, or copies."""
        value, copied, along = self.region.constants[number], self.inserted.copied, self.region.bare.get(number)
        if along is not None:
            axis, places = along
            slots = places[: len(self.units)].flatten()
            if copied is not None:
                new = value.index_select(axis, places[self._of_go(copied)].flatten())
            else:
                own = value.index_select(axis, places.flatten())
                one = own.mean(axis, keepdim=True) if own.is_floating_point() else value.narrow(axis, -1, 1)
                new = one.repeat_interleave(len(slots), axis)
            value = value.index_copy(axis, slots, new)
        return value.to(next(iter(self.new.values()))[0].dtype) if value.is_floating_point() else value

    def _computed(self, step: Operation, args: tuple, kwargs: dict[str, object]) -> Tensor | Sequence[Tensor]:
        name, region = step.name, self.region
        instead = self.inserted.instead.get(name.rstrip("_"))
        if instead is not None:
            found = instead(*args, **kwargs)
            return args[0].copy_(found) if step.writes else found
        to_float = getattr(kwargs.get("dtype"), "is_floating_point", True)
        if name == "_to_copy" and args[0].is_floating_point() and to_float:
            return args[0].clone()  # the precision of the model is not that of the statistics
        if region.narrow and name in operations.VIEWS:
            return args[0] if args[0].dim() == len(args[1]) else args[0].flatten(1)
        if name in operations.NORMALIZING:  # it writes to its running statistics
            kept = [each.clone() if isinstance(each, Tensor) else each for each in args[3:5]]
            args = (*args[:3], *kept, *args[5:])
        if name in _SIZED and region.samples != region.recorded:
            args = tuple(self._resized(each) if isinstance(each, list) else each for each in args)
        if torch.Tag.nondeterministic_seeded in step.func.tags:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(step.outputs[0])
                return step.func(*args, **kwargs)
        try:
            return step.func(*args, **kwargs)
        except RuntimeError:
            if name not in operations.VIEWS:
                raise
            return args[0].reshape(args[1])

    def _resized(self, sizes: list[int]) -> list[int]:
        """Recorded sizes for another number of samples."""
        before, now = self.region.recorded or 1, self.region.samples or 1
        if not sizes or sizes[0] % before or sizes[0] <= 0:
            return sizes
        return [sizes[0] // before * now, *sizes[1:]]

    # ------------------------------------------------------------------------------------------ layers in between

    def _follow(self, path: str, value: Tensor) -> Tensor:
        """A norm layer or grouped convolution: run on the new channels alone, which are then put in their seats.

        It is given the entries of a unit in the order in which they lie along its axis.
        """
        region, module = self.region, self.region.site.model.get_submodule(path)
        carries = layers.is_weighted(module)
        sides, axis = (GROUP_IN, GROUP_OUT) if carries else (ENTRY, ENTRY), region._axis(path, value)
        own = value
        if not region.narrow:
            own = value.index_select(axis, self._seats(path, sides[0]).sort(1).values.flatten())
        result = self._carried(path, own) if carries else self._normalised(path, own)
        if region.narrow:
            return result
        if carries:
            shape = list(result.shape)
            shape[axis] = region.places[path, GROUP_OUT].numel()
            value = result.new_zeros(shape)
        return value.index_copy(axis, self._seats(path, sides[1]).sort(1).values.flatten(), result.to(value))

    def _carried(self, path: str, value: Tensor) -> Tensor:
        layer, axis = self.region.site.layer(path), self.region._axis(path, value)
        groups = value.shape[axis] * layer.groups // layer.size(IN)  # growth leaves the inputs of a group alone
        bias, given = None, self.inserted.carried.get(path)
        if self.inserted.copied is not None:
            index, bias = self._copied(path, GROUP_OUT), layer.bias()
            filters, bias = layer.filters().detach()[index], None if bias is None else bias.detach()[index].to(value)
        else:
            entries = self._seats(path, GROUP_OUT).shape[1] * len(self.units)
            filters = layer.identity(entries) if given is None else self._of_go(given)
            filters = self._along(filters, path, GROUP_OUT)
        return layer.apply(value, filters.to(value), bias, groups)

    def _normalised(self, path: str, value: Tensor) -> Tensor:
        norm, inserted = layers.norm(self.region.site.model.get_submodule(path)), self.inserted
        entries = value.shape[self.region._axis(path, value)]
        if inserted.copied is not None:
            return norm.copied(value, self._copied(path, ENTRY))

        def along(each: Tensor) -> Tensor:
            """One value an entry of this go, from one a channel or one an entry of all new channels."""
            own = self._of_go(each)
            return self._along(own.repeat_interleave(entries // len(own)), path, ENTRY).to(value)

        moments, scale = (value.new_zeros(entries), value.new_ones(entries)), inserted.norm_scale
        if not norm.normalises:
            scale = None
        elif self.measured is not None:
            moments = norm.moments(value)
            back = tuple(self._along(each, path, ENTRY, back=True) for each in moments)
            self.measured.setdefault(path, []).append(back)  # pyright: ignore[reportArgumentType]
        elif path in inserted.norms:
            moments = tuple(along(each) for each in inserted.norms[path])
        mean, variance = (each.to(value) for each in moments)
        return norm.inserted(value, mean, variance, None if scale is None else along(scale))

    def _copied(self, path: str, side: str) -> Tensor:
        """The positions of the old entries that the new ones of this go copy, in the order that units have them in."""
        places, copied = self.region.places[path, side], self.inserted.copied
        return places[self._of_go(copied).to(places.device)].sort(1).values.flatten()  # pyright: ignore

    def _along(self, value: Tensor, path: str, side: str, back: bool = False) -> Tensor:
        """Entries channel by channel brought into the order in which a unit has them along a layer's axis, or back."""
        order = self.region.places[path, side][0].argsort().to(value.device)
        return value.unflatten(0, (-1, len(order)))[:, order.argsort() if back else order].flatten(0, 1)
