"""Proof by running: nothing else reads a site's channels, and new channels at amplitude 0 change nothing.

Nothing else reads them: one pass records what every consumer is given; another disturbs the channels at every producer
and hands each consumer what the first one recorded. The model's output must be the same to the bit. New channels: all
sites of a copy grow by a few units whose outgoing weights are zero; the output must be the same up to rounding.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from growconv.errors import GrowthError
from growconv.network import layers, operations
from growconv.network.layout import IN, OUT
from growconv.network.model import copied, module_at, one_run, same_chance, tensors_in
from growconv.network.new_entries import NewEntries, require_finite
from growconv.network.optimizer import Journal, exchange, refresh
from growconv.network.plan import Growing, Plan, plan_entries, plan_growth, together
from growconv.network.proposal import ChannelGrowth
from growconv.network.rehearsal import MORE_UNITS, Example
from growconv.network.site import GrowthSite, Site

SEEN = "something reads these channels that cannot be followed, such as NumPy, a scripted module or torch.vmap"
SEEN_TOGETHER = "its channels depend on each other, and what is made of all of them is read beside its layers"
CHANGED = "new channels at amplitude 0 change the output"
ROUNDING = 1e-4
"""Change of the output, relative to its largest entry, that float32 may make; beyond it float64 decides."""
EXACT = 1e-7
"""The same in float64."""

Sites = Mapping[int, GrowthSite]


class Proof:
    """Runs of a copy of a model that its sites have to pass.

    Args:
        model: a copy that may be run and changed.
        examples: how it is run.
        sites: by number of their space.
    """

    def __init__(self, model: nn.Module, examples: Sequence[Example], sites: Sites) -> None:
        self.model = model
        self.examples = examples
        self.sites = {number: site.of(model) for number, site in sites.items()}
        self._given: dict[str, Tensor] = {}  # per consumer what its first call was given
        self._exact: dict[Example, list[Tensor]] = {}  # outputs in float64, where they were asked for
        sizes = next(iter(self.sites.values())).sizes if sites else None  # all are sites of one model
        self._entries = {
            (number, side): {path: site.entries(path, side, sizes) for path in paths}
            for number, site in self.sites.items()
            for side, paths in ((OUT, site.producers), (IN, site.consumers))
        }

    def failures(self) -> dict[int, str]:
        """The sites that fail, and why."""
        before: dict[Example, list[Tensor]] = {}
        for example in self.examples:
            found = self._watched(example, before)
            if found:
                return found
        return self._altered() or self._grown(before)

    # ------------------------------------------------------------------------------------------ nothing else reads

    def _watched(self, example: Example, outputs: dict[Example, list[Tensor]]) -> dict[int, str]:
        """The sites whose channels something else reads; the outputs of the undisturbed run are added to `outputs`."""
        recorded: dict[str, list[Tensor]] = {}
        try:
            before = outputs[example] = self._run(example, recorded, ())
            self._given |= {path: calls[0] for path, calls in recorded.items() if calls}
        except Exception:
            if example.training:
                return {}  # a batch of one in front of a batch norm, mostly
            raise

        def seen(part: Sequence[int]) -> bool:
            try:
                after = self._run(example, recorded, part)
                return not _equal(after, before) and not _equal(after, self._run(example, recorded, part, still=True))
            except Exception:
                return True

        return {n: SEEN_TOGETHER if self.sites[n].copied else SEEN for n in _search(seen, list(self.sites))}

    def _run(
        self, example: Example, recorded: dict[str, list[Tensor]], disturbed: Sequence[int], still: bool = False
    ) -> list[Tensor]:
        """The outputs; recorded or, where sites are disturbed, with their consumers given what was recorded.

        With `still` nothing is disturbed, but all else is as if it were: the same kernels run on the same layouts.
        """
        read, written = (self._gathered(disturbed, side) for side in (IN, OUT))
        hooks = {path: _hand(entries, iter(recorded.get(path, ()))) for path, entries in read.items()}
        if not disturbed:
            consumers = {path for site in self.sites.values() for path in site.consumers}
            hooks = {path: _record(recorded.setdefault(path, [])) for path in consumers}
        with ExitStack() as stack:
            for path, hook in hooks.items():
                stack.enter_context(module_at(self.model, path).register_forward_pre_hook(hook, with_kwargs=True))
            for path, entries in written.items():
                stack.enter_context(module_at(self.model, path).register_forward_hook(_disturb(entries, still)))
            return self._outputs(self.model, example)

    def _gathered(self, numbers: Iterable[int], side: str) -> dict[str, Tensor]:
        """Per layer the entries along one side of some sites."""
        found: dict[str, list[int]] = {}
        for number in numbers:
            for path, entries in self._entries[number, side].items():
                found.setdefault(path, []).extend(entries)
        return {path: torch.tensor(entries) for path, entries in found.items()}

    def _outputs(self, model: nn.Module, example: Example) -> list[Tensor]:
        """A run with random operations held still."""
        model.train(example.training)
        same_chance()
        with one_run(model, example.arguments) as (given, named):
            with torch.no_grad(), _Still():
                output = model(*given, **named)
            return [tensor.detach().clone() for tensor in tensors_in(output)]

    # ------------------------------------------------------------------------------------------ new channels

    def _altered(self) -> dict[int, str]:
        """The sites with a consumer whose own forward makes something else of its weights once it has more of them.

        The run of the grown model shows it too, but would have to be repeated to tell which of many sites it is.
        """
        found: dict[int, str] = {}
        for number, site in self.sites.items():
            for path in () if site.copied else site.consumers:
                layer = site.layer(path)
                if layer.plain or len(layer.slots(IN)) > 1 or path not in self._given:  # a mask comes with its entries
                    continue
                x, filters, bias = self._given[path], layer.filters(), layer.bias()
                axis = layer.channel_axis(x.dim())
                parts = x.unflatten(axis, (layer.groups, -1))
                wider = torch.cat([parts, parts.narrow(axis + 1, 0, 1)], axis + 1).flatten(axis, axis + 1)
                columns = torch.cat([filters, torch.zeros_like(filters[:, :1])], 1)
                try:
                    with torch.no_grad():
                        same = _close([layer.apply(wider, columns, bias)], [layer.apply(x, filters, bias)], ROUNDING)
                except Exception:
                    continue  # the grown model tells what it does not take
                if not same:
                    found[number] = f"{CHANGED}: {path} makes something else of its weights once it has more"
        return found

    def _grown(self, before: Mapping[Example, list[Tensor]]) -> dict[int, str]:
        """The sites whose new channels change what the model gives; `before` is what it gave."""
        numbers = list(self.sites)
        more = {number: MORE_UNITS[place % len(MORE_UNITS)] for place, number in enumerate(numbers)}
        more |= {number: 1 for number, site in self.sites.items() if site.copied}  # twice as wide is dear enough
        reasons: dict[tuple[int, ...], str] = {}

        def fails(part: Sequence[int]) -> bool:
            reason = self._try(part, more, before)
            if reason is not None:
                reasons[tuple(part)] = reason
            return reason is not None

        return {number: reasons.get((number,), "new channels change the output") for number in _search(fails, numbers)}

    def _try(self, part: Sequence[int], more: Mapping[int, int], before: Mapping[Example, list[Tensor]]) -> str | None:
        """Why some sites cannot grow together; None where they can."""
        doubtful: dict[Example, list[Tensor]] = {}
        differs = f"{CHANGED}: the code makes something of all channels or of their number"
        undo = Journal(self.model)
        try:
            self._grow(part, more, undo)
            for example, old in before.items():
                try:
                    new = self._outputs(self.model, example)
                except Exception as error:
                    line = (str(error).splitlines() or [""])[0][:160]
                    return f"the grown model does not run: {type(error).__name__}: {line}"
                pairs = [(a, b) for a, b in zip(new, old, strict=False) if a.shape == b.shape]
                if not all(torch.equal(a.isfinite(), b.isfinite()) for a, b in pairs):
                    return "new channels with filters drawn at random make the output infinite or not a number"
                if not _close(new, old, ROUNDING):  # float64 tells a real difference from one of rounding
                    exact = self._in_double(example)
                    if exact is None or (example in self._exact and not _close(exact, self._exact[example], EXACT)):
                        return differs
                    doubtful[example] = exact
        except GrowthError as error:
            return f"{error.problem}" + (f" ({error.where})" if error.where else "")
        finally:
            undo.restore()
            refresh(self.model)
        for example, exact in doubtful.items():
            if example not in self._exact:
                self._exact[example] = self._in_double(example) or []
            if not _close(exact, self._exact[example], EXACT):
                return differs
        return None

    def _grow(self, part: Sequence[int], more: Mapping[int, int], undo: Journal) -> None:
        """Let some sites of the copy grow; `undo` is told of values that are overwritten."""
        sites = [(self.sites[number], more[number] * self.sites[number].granularity) for number in part]
        silent = [(site, channels) for site, channels in sites if not site.copied]
        if silent:
            self._carry_out(_silent_plan(silent), undo)
        for site, channels in sites:
            if site.copied:  # these give old weights new values
                self._carry_out(plan_growth(site, copied_growth(site, channels)), undo)
        refresh(self.model)

    def _carry_out(self, plan: Plan, undo: Journal) -> None:
        undo.keep(change.tensor for change in plan.changes if not change.resizes)
        exchange(self.model, plan.changes, plan.attributes, ())

    def _in_double(self, example: Example) -> list[Tensor] | None:
        """What the copy gives in float64; None where it is in float64 already, or does not run in it."""
        if all(parameter.dtype is torch.float64 for parameter in self.model.parameters()):
            return None
        try:
            exact = Example(tree_map(_exact, example.arguments), example.training)
            return self._outputs(copied(self.model).double(), exact)
        except Exception:
            return None


TINY = 1e-2
"""A parameter whose entries are all below this share of a usual size, 1 or one over the root of the fan-in, hides what
it multiplies, as one that starts at zero."""

CHANCE = 2**-16
"""Share of zeros that weights drawn at random stay far below."""


@contextmanager
def awake(model: nn.Module) -> Iterator[None]:
    """Inside, other values stand for the zero or tiny ones of parameters, which silence a branch of the model."""
    draw, before = torch.Generator().manual_seed(0), []
    for parameter in model.parameters():
        own = parameter.detach()
        if not own.is_floating_point() or own.numel() == 0:
            continue
        usual = own[0].numel() ** -0.5 if own.dim() > 1 else 1.0
        tiny = float(torch.linalg.vector_norm(own, math.inf)) < TINY * usual
        if tiny or own.numel() - int(own.count_nonzero()) > CHANCE * own.numel():
            values = torch.rand(own.shape, generator=draw) + 0.5
            if own.dim() > 1:
                values = torch.randn(own.shape, generator=draw) * usual
            before.append((own, own.clone()))
            own.copy_(values if tiny else torch.where(own == 0, values.to(own), own))
    refresh(model)
    try:
        yield
    finally:
        for values, old in before:
            values.copy_(old)
        refresh(model)


def silent_growth(site: GrowthSite, channels: int) -> ChannelGrowth:
    """New channels with filters drawn at the size of the old ones and no outgoing weights.

    Args:
        channels: a multiple of its granularity.
    """
    draw = torch.Generator().manual_seed(0)
    new = {path: _drawn(site, path, site.new_entries(path, OUT, channels), draw) for path in site.producers}
    biases = {path: own["bias"] for path, own in new.items() if "bias" in own}
    outgoing = {}
    for path in site.consumers:
        layer = site.layer(path)
        outgoing[path] = layer.filters().new_zeros(layer.shape(IN, site.new_entries(path, IN, channels)))
    incoming = {path: own["weight"] for path, own in new.items()}
    return ChannelGrowth(
        site.name, "silent", incoming, outgoing, torch.zeros(channels), incoming_bias=biases, requested=channels
    )


def _drawn(site: Site, path: str, entries: int, draw: torch.Generator) -> dict[str, Tensor]:
    """New filters of a producer at the size of its old ones, and their bias."""
    layer, bias = site.layer(path), site.layer(path).bias()
    filters = layer.filters().detach()
    noise = torch.randn(layer.shape(OUT, entries), generator=draw, dtype=torch.float64)
    weight = noise.to(filters) * filters.square().mean().sqrt()
    require_finite(weight, f"incoming weights of {path}", site)
    return {"weight": weight} | ({} if bias is None else {"bias": bias.detach().new_zeros(entries)})


def _silent_plan(growing: Growing) -> Plan:
    """What `silent_growth` makes of several sites at once: an axis on which many of them lie is drawn as a whole."""
    draw, sizes = torch.Generator().manual_seed(0), growing[0][0].sizes

    def values(path: str, side: str, own: Growing) -> Mapping[str, Tensor]:
        if side == IN:
            return {}
        if side == OUT:
            return _drawn(own[0][0], path, sum(site.new_entries(path, OUT, more) for site, more in own), draw)
        empty = ((site, ChannelGrowth(site.name, "silent", {}, {}, torch.zeros(more))) for site, more in own)
        return together([NewEntries(site, growth, 1.0, sizes)(path, side) for site, growth in empty])

    return plan_entries(growing, values, sizes)


def copied_growth(site: GrowthSite, channels: int) -> ChannelGrowth:
    """Copies of all channels, whose consumers share their weights among the copies (Chen et al. 2016, "Net2Net").

    Args:
        channels: a multiple of its granularity.
    """
    times = channels // site.width
    incoming, biases, outgoing, revised = {}, {}, {}, {}
    for path in site.producers:
        layer, entries = layers.weighted(module_at(site.model, path)), site.entries(path, OUT)
        incoming[path] = torch.cat([layer.filters().detach()[entries]] * times)
        bias = layer.bias()
        if bias is not None:
            biases[path] = torch.cat([bias.detach()[entries]] * times)
    for path in site.consumers:
        layer, entries = layers.weighted(module_at(site.model, path)), site.entries(path)
        filters, index = layer.filters().detach(), torch.tensor(entries, device=layer.filters().device)
        shared = filters.index_select(1, index) / (times + 1)
        outgoing[path] = torch.cat([shared] * times, dim=1)
        revised[f"{path}.weight"] = layer.as_stored(filters.index_copy(1, index, shared))
    return ChannelGrowth(
        site.name,
        "copies",
        incoming,
        outgoing,
        torch.zeros(channels),
        incoming_bias=biases,
        requested=channels,
        revised=revised,
        copied_from=torch.arange(site.width).repeat(times),
    )


_STILL = dict.fromkeys(["bernoulli", "bernoulli_", "geometric_", "log_normal_"], 1.0)
_STILL |= dict.fromkeys(["rand", "rand_like", "uniform_", "exponential_"], 0.5)
_STILL |= dict.fromkeys(["randn", "randn_like", "normal_", "cauchy_"], 0.0)


class _Still(TorchDispatchMode):
    """Random operations give their mean, so that runs at different widths can be compared."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True imports torch._dynamo, for seconds

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        """Run an operation, a random one without chance."""
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = operations.name_of(func)
        if name == "native_dropout":
            return args[0] * 1.0, torch.ones_like(args[0], dtype=torch.bool)
        if name.startswith("rrelu_with_noise"):
            return func(*args[:4], False)  # with the mean slope
        output = func(*args, **kwargs)
        if name in ("normal", "poisson", "_standard_gamma"):
            mean = args[0]
            return mean.expand(output.shape).clone() if isinstance(mean, Tensor) else output.fill_(mean)
        return output.fill_(_STILL[name]) if name in _STILL else output


def _disturb(entries: Tensor, still: bool) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    """Other values everywhere, in no way that a norm, a softmax or the place of the largest would leave out."""

    def hook(module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        axis = layers.channel_axis(module, output.dim())
        index, whole = entries.to(output.device), len(entries) == output.shape[axis]
        chosen = output if whole else output.index_select(axis, index)
        changed = chosen.clone() if still else chosen.roll(1).add_(chosen, alpha=1.37).add_(0.31)  # over all axes
        return changed if whole else output.clone().index_copy_(axis, index, changed)

    return hook


def _record(recorded: list[Tensor]) -> Callable[[nn.Module, tuple, dict], None]:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        recorded.append(tensors_in([args, kwargs])[0].detach().clone())

    return hook


def _hand(entries: Tensor, recorded: Iterator[Tensor]) -> Callable[[nn.Module, tuple, dict], tuple | None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        known, given = next(recorded, None), tensors_in([args, kwargs])[0]
        if known is None or known.shape != given.shape:
            return None
        axis = layers.channel_axis(module, given.dim())
        changed = known.clone()
        if len(entries) < known.shape[axis]:
            index = entries.to(given.device)
            changed = given.clone().index_copy_(axis, index, known.index_select(axis, index))
        if args and args[0] is given:
            return (changed, *args[1:]), kwargs
        return args, {name: changed if value is given else value for name, value in kwargs.items()}

    return hook


def _search(fails: Callable[[Sequence[int]], bool], numbers: Sequence[int]) -> list[int]:
    """Those of some numbers that fail, by halving."""
    if not numbers or not fails(numbers):
        return []
    if len(numbers) == 1:
        return list(numbers)
    half = len(numbers) // 2
    return (_search(fails, numbers[:half]) + _search(fails, numbers[half:])) or list(numbers)


def _equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)
    )


def _close(first: Sequence[Tensor], second: Sequence[Tensor], share: float) -> bool:
    def near(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:
            return False
        if not a.numel() or not b.is_floating_point():
            return torch.equal(a, b)
        size = float(b.nan_to_num(posinf=0, neginf=0).abs().max())
        return float((a - b).nan_to_num().abs().max()) <= share * max(size, 1e-30)

    return len(first) == len(second) and all(near(a, b) for a, b in zip(first, second, strict=True))


def _exact(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
