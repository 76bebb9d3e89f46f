"""StatisticsCollector: hooks on a model in its own training loop that fill PairStatistics."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from growconv.errors import ArgumentTypeError, ArgumentValueError, SiteError, StatisticsError
from growconv.network.between import is_plain, region_of
from growconv.network.model import tensors_in, unwrapped
from growconv.network.site import Site
from growconv.network.tape import Tape
from growconv.statistics.accumulator import OF_PRODUCERS, PATHS, QUANTITIES, SCRATCH_BYTES
from growconv.statistics.held import Shelf
from growconv.statistics.measurement import Measurement
from growconv.statistics.pair import PairStatistics, Updates, best_updates
from growconv.statistics.passes import Loss, Pass, copied_calls, kept_batch
from growconv.statistics.problem import batched
from growconv.statistics.site_measurement import SiteMeasurement, Wanted
from growconv.statistics.sums import full_precision, is_exact

_CHOICES = {"reduction": ("mean", "sum"), "path": PATHS, "nonfinite": ("error", "skip")}

Average = Callable[[dict[str, PairStatistics]], dict[str, PairStatistics]]


@runtime_checkable
class Scaler(Protocol):
    """What tells a loss scale, as torch.amp.GradScaler."""

    def get_scale(self) -> float:
        """The factor that losses are multiplied by now."""
        ...


class StatisticsCollector:
    """Context manager that collects statistics while the model runs forward and backward.

    Calls are paired in order: the j-th call of a producer belongs to the j-th call of its consumer. Forward passes
    without gradients are not counted. Leaving the context removes every hook and frees cached tensors, also after an
    exception; the statistics remain.

    Args:
        model: the model that the sites belong to, not compiled or wrapped.
        sites: where to collect; all sites of one model. Of a rank, M and S2 are collected as far as asked for, and no
            samples.
        reduction: how the loss reduces over samples: with "mean" gradients are multiplied by the batch size, so that v
            is −∂(Σ_i loss_i)/∂z either way.
        full: also collect S_full.
        keep_samples: for how many samples to keep the tensors, per site.
        keep_dtype: type in which they wait until everything is collected, such as torch.bfloat16 for less memory; None:
            float32, or float64 where the model has it.
        quantities: what to collect, out of S, N (the correlation with v after projecting off the existing weights),
            N_raw, M, S2, P, update, S_full, patch (mean and second moment of the producer's patches; for sites without
            a closed form allowed only together with samples, and then left out) and samples; None for S and N. A
            solver's `reads` can be passed.
        path: "auto" chooses the cheapest path for each statistic and shape; "dense", "unfold" and "offset" force one.
        scratch_bytes: bound on temporary memory, and on P and S_full of a consumer (256 MiB). P and S_full that would
            be larger are left out (None).
        hold_bytes: how much of the batches' x, h and v all consumers together may hold for N, beyond kept samples.
            Batches beyond that take a second pass, see `second_pass`. None: as `scratch_bytes`; beyond that N uses P,
            which costs about as much as everything else together, and the second pass only if P does not fit either.
            0 holds nothing, which several processes need, since they share W*.
        updates: W* of consumers (`best_updates`), for those where it is known from another pass over the same batches:
            their N is summed at once, and takes no second pass.
        moments_every: of how many losses one gives the second moments S, S_full, S2 and those of patches, which settle
            long before the correlations with v do and are the larger part of the cost. 1: all do.
        loss_scale: factor that the loss was multiplied by before backward(): a number, or a GradScaler.
        nonfinite: "error" raises an error if an activation or gradient is infinite or NaN, "skip" leaves the batch out.

    Raises:
        ArgumentTypeError, ArgumentValueError: for invalid options.
        SiteError: for a site of another model.
        StatisticsError: for a site without closed-form statistics, if more than kept samples are requested.

    Example:
        >>> with growconv.StatisticsCollector(model, sites[0]) as collector:
        ...     for x, y in batches:
        ...         loss(model(x), y).backward()
        >>> collector.statistics[sites[0].name].samples
        16
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Site | Iterable[object],
        *,
        reduction: str = "mean",
        full: bool = False,
        keep_samples: int = 0,
        keep_dtype: torch.dtype | None = None,
        quantities: Iterable[str] | None = None,
        path: str = "auto",
        scratch_bytes: int = SCRATCH_BYTES,
        hold_bytes: int | None = None,
        updates: Updates | None = None,
        moments_every: int = 1,
        loss_scale: float | Scaler = 1.0,
        nonfinite: str = "error",
    ) -> None:
        self.model = unwrapped(model)
        self.sites = tuple(map(self._checked, (sites,) if isinstance(sites, Site) else sites))
        self.quantities = _checked_quantities(quantities, full, keep_samples)
        for label, value in {"reduction": reduction, "path": path, "nonfinite": nonfinite}.items():
            if value not in _CHOICES[label]:
                expected = " or ".join(_CHOICES[label])
                raise ArgumentValueError(f"there is no such {label}", expected=expected, got=repr(value))
        _require_at_least(1, scratch_bytes=scratch_bytes, moments_every=moments_every)
        _require_at_least(0, hold_bytes=hold_bytes)
        self.reduction = reduction
        self.hold_bytes = hold_bytes
        self.loss_scale = loss_scale
        self.nonfinite = nonfinite
        self.wanted = Wanted(
            self.quantities, path, keep_samples, keep_dtype, scratch_bytes, moments_every, dict(updates or {})
        )
        self._first: dict[str, Measurement] = {}  # per consumer, where M and S2 are summed, whatever the site
        groups: dict[object, list[Site]] = {}
        for each in self.sites:
            groups.setdefault(each if each.measured.producers else each.measured.consumers, []).append(each)
        self._collected = [SiteMeasurement.of(each, self.wanted, self._first) for each in groups.values()]
        self._handles: list[RemovableHandle] = []
        self._loss = Loss()
        self._pass: Pass | None = None
        self._tape: Tape | None = None
        self._outputs: list[GradientEdge] = []
        self._shelf = Shelf()
        self._finished: dict[str, PairStatistics] | None = None
        self._second = self._complete = False
        self._losses = 0
        self._due: Callable[[Tensor | None], None] | None = None  # what waits for the gradient of a consumer's weight
        self._pairs = [(collected, each) for collected in self._collected for each in collected.consumers.values()]
        self._measurements = [consumer for _, consumer in self._pairs]
        self._consumed: dict[str, list[tuple[SiteMeasurement, Measurement]]] = {}
        self._waiting: dict[str, int] = {}  # per layer how often a call's input is asked for
        for collected in self._collected:
            self._expect(collected)

    # ---------------------------------------------------------------------------------------------- context

    def __enter__(self) -> "StatisticsCollector":
        """Put the hooks in place."""
        if self._handles:
            raise StatisticsError("this collector is already collecting", fix="enter it once at a time")
        if self._complete and not self._second:
            raise StatisticsError("this collector has made its second pass", fix="collect further batches with another")
        self._handles.append(self.model.register_forward_pre_hook(self._begin))
        self._handles.append(self.model.register_forward_hook(self._stop_tape, always_call=True))
        self._handles.append(self.model.register_forward_hook(self._end))
        for path in self._waiting:
            layer = self.model.get_submodule(path)
            self._handles.append(layer.register_forward_hook(partial(self._called, path), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks and free what was cached."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.next_loss(told=False)
        self._outputs.clear()

    @contextmanager
    def second_pass(self, average: Average | None = None) -> Iterator["StatisticsCollector"]:
        """Collect N from v⊥ = v − W*·Hp, if P was too large to hold.

        Run the same batches through the model inside this context, with the same weights. Nothing can be collected
        after that.

        Args:
            average: maps the statistics of the first pass to those whose W* is projected off: with several processes,
                their average over all of them. None: those of this process.

        Raises:
            StatisticsError: no second pass is needed, or the first has seen no samples.
        """
        if not self.needs_second_pass:
            raise StatisticsError("no second pass is needed", fix="read collector.statistics")
        own = self.finished()
        updates = best_updates(own if average is None else average(own))
        for collected, consumer in self._pairs:
            consumer.begin_second_pass(updates.get((collected.site.name, consumer.path)))
        self._second, self._losses = True, 0
        try:
            with self:
                yield self
            for collected in self._collected:
                found = own[collected.site.name].consumers
                for consumer, statistics in zip(collected.consumers.values(), found, strict=True):
                    consumer.end_second_pass(statistics)
        except BaseException:
            for consumer in self._measurements:
                consumer.projected = None
            raise
        finally:
            self._second = False

    def misses(self, loss: int) -> bool:
        """Whether a second pass is to see what belongs to a loss; see `next_loss`."""
        return any(consumer.misses(loss) for consumer in self._measurements)

    @property
    def needs_second_pass(self) -> bool:
        """Whether N of some consumer waits for a second pass over the same batches."""
        return any(consumer.waits_for_second_pass for consumer in self._measurements)

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The layers of the sites that are measured."""
        return tuple(map(self.model.get_submodule, self._waiting))

    @property
    def outputs(self) -> tuple[GradientEdge, ...]:
        """The consumers' outputs of the current loss in the autograd graph, for torch.autograd.grad."""
        return tuple(self._outputs)

    # ---------------------------------------------------------------------------------------------- results

    @property
    def statistics(self) -> dict[str, PairStatistics]:
        """Averages over the samples seen so far, by name of the site.

        Raises:
            StatisticsError: for a site that no sample or no gradient has reached.
        """
        self._measure_due()
        if self._loss.differentiated:
            self.next_loss(told=False)
        if self._finished is None:
            self._finished = self._build(last=False)
        return self._finished

    def finished(self) -> dict[str, PairStatistics]:
        """The same once nothing more is collected: what they were summed up in is let go."""
        self._complete = True
        if self._finished is None:
            self._finished = self._build(last=True)
        return self._finished

    def explain(self) -> str:
        """How each statistic is computed, and why: one line each, below its site and consumer."""
        return "\n".join(line for collected in self._collected for line in collected.explain(self._first))

    def _build(self, last: bool) -> dict[str, PairStatistics]:
        wide = cache(Tensor.float)  # sites that share a tensor share what becomes of it
        own: dict[str, dict[str, Tensor]] = {}  # per consumer M and S2, which are the same at every site
        result: dict[str, PairStatistics] = {}
        for collected in self._collected:
            result |= collected.statistics(own, wide, last)
        return result

    # ---------------------------------------------------------------------------------------------- set-up

    def _checked(self, site: object) -> Site:
        if not isinstance(site, Site):
            raise ArgumentTypeError("a site is needed", expected="growconv.GrowthSite", got=type(site).__name__)
        if site.model is not self.model:
            raise SiteError(
                "this site belongs to another model",
                where=site.name,
                fix="find the sites of the model that is collected on: growconv.find_sites(model, example_input)",
            )
        return site

    # ---------------------------------------------------------------------------------------------- hooks

    def _expect(self, collected: SiteMeasurement) -> None:
        """Note which layers' calls a site asks for."""
        for path, consumer in collected.consumers.items():
            self._consumed.setdefault(path, []).append((collected, consumer))
            self._waiting[path] = self._waiting.get(path, 0) + 1
        for path in collected.site.producers:
            self._waiting[path] = self._waiting.get(path, 0) + len(collected.consumers)

    def next_loss(self, told: bool = True, number: int | None = None) -> None:
        """Count everything that runs from here on as part of a new loss.

        A loop that knows where a loss begins calls this there. Otherwise the first forward pass after a backward pass
        begins one.

        Args:
            told: whether the caller knows this, rather than guesses it.
            number: which of all losses it is, for a second pass that leaves some of them out; None: they are counted.
        """
        self._measure_due()
        loss, self._loss, self._pass = self._loss, Loss(told=told, number=number), None
        self._outputs = []
        for collected in self._collected:
            missing = self.wanted.keep_samples - collected.samples_kept
            if missing <= 0:
                continue
            batch = kept_batch(loss, collected.site, self.model, self.reduction == "sum" and not loss.told)
            if batch is not None:
                divided = batch.samples > missing and batch.divisible
                collected.kept.append(batch.part(slice(0, missing)) if divided else batch)
        loss.passes.clear()  # each knows its loss, and such a circle would keep its tensors for long

    def loss_computed(self) -> None:
        """Say that the loss is computed: gradients between `next_loss` and this call would be part of it."""
        self._loss.ready = True

    def _begin(self, _model: nn.Module, _args: tuple) -> None:
        if not self._measures():
            return
        if self._loss.differentiated:
            self.next_loss(told=False)
        self._pass = self._loss.new_pass()
        wanted = [] if self._second else [each.site for each in self._collected if each.wants_samples]
        if wanted:
            self._tape = Tape(self.model, holds=not all(map(is_plain, wanted)))
            self._tape.__enter__()

    def _stop_tape(self, *_: object) -> None:
        if self._tape is not None:
            self._tape.__exit__(None, None, None)

    def _end(self, _model: nn.Module, _args: tuple, _output: object) -> None:
        tape, self._tape, each = self._tape, None, self._pass
        if not self._measures() or each is None:
            return
        for collected in self._collected:
            called = any(each.inputs.get(path) for path in collected.site.consumers)
            if tape is not None and called and collected.wants_samples:
                with torch.no_grad():
                    each.regions[collected.site.name] = region_of(tape, collected.site)
            if any(consumer.sums_maps for consumer in collected.consumers.values()):
                self._check_pairs(collected, each)

    def _measures(self) -> bool:
        return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    def _check_pairs(self, collected: SiteMeasurement, each: Pass) -> None:
        for path in collected.consumers:
            read = len(each.inputs.get(path, ()))
            for producer in collected.site.producers:
                given = len(each.inputs.get(producer, ()))
                if read and given != read:
                    raise StatisticsError(
                        "producer and consumer were called a different number of times",
                        where=collected.site.name,
                        got=f"{producer} {given} times, {path} {read} times",
                        fix="leave this site out: its calls cannot be paired; or collect quantities=('samples',) only",
                    )

    def _called(
        self, path: str, module: nn.Module, args: tuple, kwargs: dict[str, object], output: Tensor
    ) -> Tensor | None:
        if not self._measures():
            return None
        tensor = tensors_in([args, kwargs])[0].detach()
        if not next(module.parameters()).requires_grad:
            tensor = tensor.clone()  # autograd does not guard it against operations in place
        if tensor.shape[0] == 0:
            raise StatisticsError(
                "an empty batch cannot be measured", where=path, got=f"an input of shape {tuple(tensor.shape)}"
            )
        each = self._pass
        if each is None:  # a layer that is called outside of the model's own forward
            each = self._pass = self._loss.new_pass()
        calls = each.inputs.setdefault(path, [])
        index = len(calls)
        calls.append(tensor)
        each.waiting.setdefault(path, []).append(self._waiting[path])
        if path not in self._consumed:
            return None
        each.shapes.setdefault(path, []).append(output.shape)
        count = batched(output, module).shape[0]
        each.samples.setdefault(path, count)
        each.loss.samples.setdefault(path, count)
        replaced = None
        if not output.requires_grad:
            output = replaced = output.detach().requires_grad_().clone()  # nothing before this layer trains
        done = False
        # autograd computes M anyway, as the gradient of the weight, where a loop calls backward()
        computes = not each.loss.told and not self._second and self.wanted.path == "auto"
        computes = computes and _differentiates_weight(output, module)

        def measure(gradient: Tensor, weight: Tensor | None) -> None:
            with full_precision(gradient.device):
                for collected, consumer in self._consumed[path]:
                    self._measure(collected, consumer, module, each, (gradient, weight), index)

        def backward(gradient: Tensor) -> None:
            nonlocal done
            if done or torch.is_grad_enabled() or (each.loss.told and not each.loss.ready):
                raise StatisticsError(
                    "the loss was propagated back twice, or a gradient is part of the loss itself",
                    where=path,
                    fix="add the losses up and call backward() once, or run the model again; losses with a gradient "
                    "penalty, or that call backward() themselves, cannot be measured",
                )
            done = each.loss.differentiated = True
            self._measure_due()
            if computes:
                self._due = partial(measure, gradient.detach())
            else:
                measure(gradient.detach(), None)

        output.register_hook(backward)
        if computes and output.grad_fn is not None:
            output.grad_fn.register_hook(lambda gradients, _: self._measure_due(gradients[1]))
        self._outputs.append(get_gradient_edge(output))  # stays right when the output is overwritten in place
        return replaced

    # ---------------------------------------------------------------------------------------------- one call

    def _measure_due(self, weight: Tensor | None = None) -> None:
        """Measure the call that waits for the gradient of its layer's weight; without it, where it does not come."""
        due, self._due = self._due, None
        if due is not None:
            due(weight if weight is not None and is_exact(weight) else None)

    def _measure(
        self,
        collected: SiteMeasurement,
        consumer: Measurement,
        module: nn.Module,
        each: Pass,
        gradients: tuple[Tensor, Tensor | None],
        index: int,
    ) -> None:
        """Add what one call of a consumer tells, once its gradient has come, and that of its weight if it will."""
        gradient, weight = gradients
        if not self._second:
            self._finished = None
        site, loss, keep_dtype = collected.site, each.loss, self.wanted.keep_dtype
        if loss.number is None:
            loss.number, self._losses = self._losses, self._losses + 1
        kept = copied_calls(each, site, self.model, self._shelf, keep_dtype)
        h, *inputs = (each.take(path, index) for path in (consumer.path, *site.producers))
        if h is None or (self._second and consumer.projected is None):
            return
        own = kept if keep_dtype is None and kept is not None and index < len(kept.h[consumer.path]) else None
        exact = torch.float64 if torch.float64 in (h.dtype, gradient.dtype) else torch.float32
        h = (batched(h, module) if own is None else own.h[consumer.path][index]).to(exact)
        v = batched(gradient, module).to(exact)
        scale = -(loss.samples[consumer.path] if self.reduction == "mean" else 1) / self._scale()
        v = v * scale if own is None else torch.mul(v, scale, out=self._shelf.empty(v, exact))
        x: dict[str, Tensor] = {}
        for path, found in zip(site.producers, inputs, strict=True) if consumer.sums_maps else ():
            if found is None:
                raise StatisticsError(
                    "the consumer was called more often than the producer, or before it",
                    where=site.name,
                    got=f"call {index + 1} of {consumer.path}, {len(each.inputs.get(path, ()))} calls of {path}",
                    fix="leave this site out: its calls cannot be paired",
                )
            found = batched(found, self.model.get_submodule(path)) if own is None else own.x[path][index]
            x[path] = found.to(exact)
        if not self._finite(collected, consumer, each, x, h, v):
            return
        if kept is not None:
            copied = v if keep_dtype is None else self._shelf.copy(v, keep_dtype)
            kept.v.setdefault(consumer.path, {})[index] = copied
        count = self._new_samples(site.name, consumer.path, each)
        if not consumer.sums_maps:
            consumer.sums.count(v, count)
            return
        M = None if weight is None else weight.to(exact).flatten(1).mT * scale
        for part, batch in enumerate(collected.batches(consumer.path, x, (h, v), count, own is not None)):
            if M is not None and batch.h is h and len(M) == h.shape[1] * batch.problem.second.taps:
                batch = replace(batch, M=M)
            if consumer.apart is not None and not each.has_all(site.name, collected.sharing(consumer.path), index):
                batch = replace(batch, left_out=OF_PRODUCERS)
            place = (loss.number, each.number, index, part)
            if self._second:
                if place in consumer.missed:
                    consumer.add_projected(batch)
                continue
            held = sum(each.held_bytes for each in self._measurements)
            room = self.wanted.scratch_bytes if self.hold_bytes is None else self.hold_bytes
            fits = room > 0 and held + batch.extra <= room
            consumer.add(place, batch, fits, self.hold_bytes is None, self._shelf)

    def _new_samples(self, site: str, path: str, each: Pass) -> int:
        """How many samples a call adds.

        Those of the loss, once; those of every pass where nobody said what is one loss and it is a sum.
        """
        separate = self.reduction == "sum" and not each.loss.told
        key = (site, path, each.number if separate else 0)
        if key in each.loss.counted:
            return 0
        each.loss.counted.add(key)
        return each.samples[path] if separate else each.loss.samples[path]

    def _scale(self) -> float:
        value = float(self.loss_scale if isinstance(self.loss_scale, int | float) else self.loss_scale.get_scale())
        if not (math.isfinite(value) and value > 0):
            raise ArgumentValueError("loss_scale must be a positive number", got=value)
        return value

    def _finite(
        self, collected: SiteMeasurement, consumer: Measurement, each: Pass, x: dict[str, Tensor], h: Tensor, v: Tensor
    ) -> bool:
        named = [(f"the input of {path}", tensor) for path, tensor in x.items()]
        named += [(f"the input of {consumer.path}", h), (f"the gradient at the output of {consumer.path}", v)]
        bad = [name for name, tensor in named if not math.isfinite(tensor.sum())]
        if not bad:
            return True
        if self.nonfinite == "skip":
            collected.skipped += 1
            each.left_out.add(collected.site.name)
            return False
        raise StatisticsError(
            "not finite: " + ", ".join(bad),
            where=collected.site.name,
            fix="lower the learning rate, pass the GradScaler as loss_scale, or collect with nonfinite='skip'",
        )


def _differentiates_weight(output: Tensor, module: nn.Module) -> bool:
    """Whether autograd's way back through a layer's output gives the gradient of the layer's own weight next to it."""
    node = output.grad_fn
    if node is None or node.name() != "ConvolutionBackward0":
        return False
    return getattr(node.next_functions[1][0], "variable", None) is module._parameters.get("weight", module)


def _require_at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ArgumentValueError(f"{name} must be at least {least}", got=value)


def _checked_quantities(quantities: Iterable[str] | None, full: bool, keep_samples: int) -> frozenset[str]:
    if keep_samples < 0:
        raise ArgumentValueError("keep_samples must not be negative", got=keep_samples)
    if isinstance(quantities, str):
        quantities = (quantities,)
    wanted = frozenset({"S", "N"} if quantities is None else quantities) | ({"S_full"} if full else frozenset())
    unknown = wanted - QUANTITIES.keys()
    if unknown:
        raise ArgumentValueError(
            "there are no such quantities", expected=", ".join(QUANTITIES), got=", ".join(sorted(unknown))
        )
    if "samples" in wanted and not keep_samples:
        raise ArgumentValueError("samples are to be kept, but keep_samples is 0", fix="pass keep_samples=512 or so")
    return wanted
