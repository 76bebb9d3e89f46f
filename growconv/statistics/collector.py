"""StatisticsCollector: hooks on a model in its own training loop that fill PairStatistics."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from growconv.convolution.factorized import FactorizedConv
from growconv.convolution.geometry import Geometry
from growconv.errors import ArgumentTypeError, ArgumentValueError, SiteError, StatisticsError
from growconv.network.graph import unwrapped
from growconv.network.routes import Route
from growconv.network.site import GrowthSite
from growconv.statistics.accumulator import ReaderSums
from growconv.statistics.options import PATHS, QUANTITIES, SCRATCH_BYTES, checked_quantities, require_closed_form
from growconv.statistics.pair import KeptSamples, PairStatistics, ReaderStatistics
from growconv.statistics.precision import full_precision
from growconv.statistics.problem import PairProblem, batched, pair_problem
from growconv.statistics.totals import entries_text

Average = Callable[[dict[str, PairStatistics]], dict[str, PairStatistics]]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, FactorizedConv)


@dataclass
class _Call:
    """One call of a layer in the forward pass: its input, and how many readers still wait for it."""

    tensor: Tensor | None
    waiting: int

    def take(self) -> Tensor | None:
        tensor = self.tensor
        self.waiting -= 1
        if self.waiting <= 0:
            self.tensor = None
        return tensor


@dataclass
class _Reader:
    """One reader of one site."""

    path: str
    route: Route
    sums: ReaderSums
    projected: ReaderSums | None = None
    second_pass: str | None = None


@dataclass
class _Site:
    """One site and what has been kept of its samples."""

    site: GrowthSite
    readers: dict[str, _Reader]
    kept: dict[str, dict[str, list[Tensor]]] = field(default_factory=lambda: {"x": {}, "h": {}, "v": {}})
    skipped: int = 0


class StatisticsCollector:
    """Context manager that collects statistics while the model runs forward and backward.

    Calls are paired in order: the j-th call of a writer belongs to the j-th call of its reader. Forward passes without
    gradients are not counted. Leaving the context removes every hook and frees what was cached, also after an
    exception; the statistics stay.

    Args:
        model: the model that the sites belong to, not compiled or wrapped.
        sites: where to collect; all sites of one model.
        reduction: how the loss reduces over samples: with "mean" gradients are multiplied by the batch size, so that v
            is −∂(Σ_i loss_i)/∂z either way.
        full: also collect S_full.
        keep_samples: how many samples' tensors to keep per site.
        quantities: what to collect, out of S, N (v projected off the existing weights), N_raw, M, S2, P, update,
            S_full, patch (mean and second moment of the writer's patches) and samples; None for S and N. A solver's
            `reads` fits.
        path: "auto" takes the cheapest way for each statistic and shape; "dense", "unfold" and "offset" force one.
        scratch_bytes: bound on temporary memory, and on P and S_full (256 MiB). Where P would be larger, N needs a
            second pass over the same batches, see `second_pass`; where S_full would be, it is kept as a product.
        loss_scale: factor that the loss was multiplied by before backward(): a number, or a GradScaler.
        nonfinite: "error" raises when an activation or gradient is infinite or NaN, "skip" leaves the batch out.

    Raises:
        ArgumentTypeError, ArgumentValueError: for impossible options.
        SiteError: for a site of another model.
        StatisticsError: for a site without closed-form statistics, when more than kept samples are asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: GrowthSite | Iterable[Any],
        *,
        reduction: str = "mean",
        full: bool = False,
        keep_samples: int = 0,
        quantities: Iterable[str] | None = None,
        path: str = "auto",
        scratch_bytes: int = SCRATCH_BYTES,
        loss_scale: Any = 1.0,
        nonfinite: str = "error",
    ) -> None:
        self.model = unwrapped(model)
        self.sites = (sites,) if isinstance(sites, GrowthSite) else tuple(sites)
        self.quantities = checked_quantities(quantities, full, keep_samples)
        for label, value, allowed in (
            ("reduction", reduction, ("mean", "sum")),
            ("path", path, PATHS),
            ("nonfinite", nonfinite, ("error", "skip")),
        ):
            if value not in allowed:
                raise ArgumentValueError(f"unknown {label}", expected=" or ".join(allowed), got=repr(value))
        if scratch_bytes < 1:
            raise ArgumentValueError("scratch_bytes must be positive", got=scratch_bytes)
        self.reduction = reduction
        self.keep_samples = keep_samples
        self.path = path
        self.scratch_bytes = scratch_bytes
        self.loss_scale = loss_scale
        self.nonfinite = nonfinite
        self._collected = [self._prepare(site) for site in self.sites]
        self._handles: list[RemovableHandle] = []
        self._calls: dict[str, list[_Call]] = {}
        self._outputs: list[GradientEdge] = []
        self._finished: dict[str, PairStatistics] | None = None
        self._second = False
        self._projections: dict[tuple[str, str], ReaderStatistics] = {}
        self._read = self._readers_by_path()
        self._waiting = self._writers_by_path()

    # ---------------------------------------------------------------------------------------------- context

    def __enter__(self) -> "StatisticsCollector":
        """Put the hooks in place."""
        if self._handles:
            raise StatisticsError("this collector is already collecting", fix="enter it once at a time")
        self._handles.append(self.model.register_forward_pre_hook(self._begin))
        self._handles.append(self.model.register_forward_hook(self._end, always_call=False))
        for path in dict.fromkeys([*self._waiting, *self._read]):
            layer = self.model.get_submodule(path)
            hook = self._hook_of(path)
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks and free what was cached."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()
        self._outputs.clear()

    @contextmanager
    def second_pass(self, average: Average | None = None) -> Iterator["StatisticsCollector"]:
        """Collect N from v⊥ = v − W*·Hp, where P was too large to hold.

        Run the same batches through the model inside this context, with the same weights.

        Args:
            average: from the statistics of the first pass to those whose W* is projected off: with several processes,
                the average over all of them. None: this process's own.

        Raises:
            StatisticsError: where no second pass is needed, or the first has seen no samples.
        """
        if not self.needs_second_pass:
            raise StatisticsError("no second pass is needed", fix="read collector.statistics")
        own = self.statistics
        self._projections = {
            (name, reader.consumer): reader
            for name, stats in (own if average is None else average(own)).items()
            for reader in stats.readers
        }
        waiting = [reader for reader in self._all_readers() if reader.second_pass is not None]
        for reader in waiting:
            reader.projected = ReaderSums(reader.sums.where, frozenset({"N_raw"}), self.path, self.scratch_bytes)
        self._second = True
        try:
            with self:
                yield self
            for collected in self._collected:
                for statistics in own[collected.site.name].readers:
                    _enter_projection(collected.readers[statistics.consumer], statistics)
        except BaseException:
            for reader in waiting:
                reader.projected = None
            raise
        finally:
            self._second = False
            self._projections = {}

    @property
    def needs_second_pass(self) -> bool:
        """Whether N of some reader waits for a second pass over the same batches."""
        return any(reader.second_pass is not None and reader.projected is None for reader in self._all_readers())

    @property
    def outputs(self) -> tuple[GradientEdge, ...]:
        """Where the readers' outputs of the latest forward pass stand in the graph, for torch.autograd.grad."""
        return tuple(self._outputs)

    # ---------------------------------------------------------------------------------------------- results

    @property
    def statistics(self) -> dict[str, PairStatistics]:
        """Averages over the samples seen so far, by name of the site.

        Raises:
            StatisticsError: for a site that no sample or no gradient has reached.
        """
        if self._finished is None:
            self._finished = self._build()
        return self._finished

    def explain(self) -> str:
        """How each statistic is computed, and why so: a line each, below its site and reader."""
        lines = []
        for reader in self._all_readers():
            lines.append(reader.sums.where)
            lines += [f"  {line}" for line in reader.sums.describe()]
            lines += [f"  {reader.second_pass}"] if reader.second_pass else []
        return "\n".join(lines)

    def _build(self) -> dict[str, PairStatistics]:
        result = {}
        for collected in self._collected:
            site = collected.site
            readers: list[ReaderStatistics] = []
            patches: dict[str, Tensor] = {}
            for reader in collected.readers.values():
                statistics, found = self._reader_statistics(reader)
                patches = patches or found
                readers.append(statistics)
            writer: Any = self.model.get_submodule(site.producers[0])
            result[site.name] = PairStatistics(
                site=site.name,
                growth_site=site,
                producer=site.producers[0],
                samples=max(reader.samples for reader in readers),
                readers=tuple(readers),
                incoming_shape=tuple(writer.weight.shape[1:]),
                incoming_bias=writer.bias is not None,
                patch_mean=patches.get("patch_mean"),
                patch_gram=patches.get("patch_gram"),
                samples_kept=self._kept(collected, readers),
                skipped_batches=collected.skipped,
                notes=tuple(r.second_pass for r in collected.readers.values() if r.second_pass),
            )
        return result

    def _reader_statistics(self, reader: _Reader) -> tuple[ReaderStatistics, dict[str, Tensor]]:
        with full_precision(torch.device("cpu")):
            averages = reader.sums.averages()
        layer: Any = self.model.get_submodule(reader.path)
        pending = None
        if reader.second_pass is not None:
            pending = f"{reader.second_pass}: run the batches again inside `with collector.second_pass():`"
        patches = {name: averages.pop(name) for name in ("patch_mean", "patch_gram") if name in averages}
        statistics = ReaderStatistics(
            consumer=reader.path,
            samples=reader.sums.samples,
            outgoing_shape=tuple(layer.weight.shape),
            bias=layer.bias is not None,
            geometry=None if isinstance(layer, nn.Linear) else _geometry(layer),
            moments=averages,
            gradient_energy=reader.sums.energy / reader.sums.samples,
            pending=pending,
            full_product=reader.sums.full_product(),
        )
        _enter_projection(reader, statistics)
        return statistics, patches

    def _kept(self, collected: _Site, readers: list[ReaderStatistics]) -> KeptSamples | None:
        if not self.keep_samples:
            return None
        joined = {
            kind: {path: torch.cat(parts)[: self.keep_samples] for path, parts in tensors.items()}
            for kind, tensors in collected.kept.items()
        }
        return KeptSamples(joined["x"], joined["h"], joined["v"], {reader.consumer: reader for reader in readers})

    # ---------------------------------------------------------------------------------------------- set-up

    def _prepare(self, site: Any) -> _Site:
        if not isinstance(site, GrowthSite):
            raise ArgumentTypeError("a site is needed", expected="growconv.GrowthSite", got=type(site).__name__)
        if site.model is not self.model:
            raise SiteError(
                "this site belongs to another model",
                where=site.name,
                fix="find the sites of the model that is collected on: growconv.find_sites(model, example_input)",
            )
        wanted = frozenset().union(*(QUANTITIES[name] for name in self.quantities))
        if wanted:
            require_closed_form(site)
        routes = {route.consumer: route for route in site.routes}
        readers = {
            path: _Reader(path, routes[path], ReaderSums(_where(site, path), wanted, self.path, self.scratch_bytes))
            for path in site.consumers
        }
        return _Site(site, readers)

    def _all_readers(self) -> Iterator[_Reader]:
        for collected in self._collected:
            yield from collected.readers.values()

    def _readers_by_path(self) -> dict[str, list[tuple[_Site, _Reader]]]:
        result: dict[str, list[tuple[_Site, _Reader]]] = {}
        for collected in self._collected:
            for path, reader in collected.readers.items():
                result.setdefault(path, []).append((collected, reader))
        return result

    def _writers_by_path(self) -> dict[str, int]:
        """How many readers wait for the input of each writer."""
        result: dict[str, int] = {}
        for collected in self._collected:
            for path in collected.site.producers:
                result[path] = result.get(path, 0) + len(collected.readers)
        return result

    # ---------------------------------------------------------------------------------------------- hooks

    def _begin(self, _model: nn.Module, _args: Any) -> None:
        if torch.is_grad_enabled():
            self._calls = {}
            self._outputs = []

    def _end(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        for collected in self._collected:
            for path in collected.readers:
                read = len(self._calls.get(path, ()))
                for producer in collected.site.producers:
                    written = len(self._calls.get(producer, ()))
                    if read and written != read:
                        raise StatisticsError(
                            "writer and reader were called a different number of times",
                            where=collected.site.name,
                            got=f"{producer} {written} times, {path} {read} times",
                            fix="leave this site out: its calls cannot be paired",
                        )

    def _hook_of(self, path: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            return self._called(path, module, args, kwargs, output)

        return hook

    def _called(
        self, path: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        source: Tensor = next(item for item in (*args, *kwargs.values()) if isinstance(item, Tensor))
        tensor = source.detach()
        if not next(module.parameters()).requires_grad:
            tensor = tensor.clone()  # autograd does not guard it against operations in place
        if tensor.shape[0] == 0:
            raise StatisticsError(
                "an empty batch cannot be measured", where=path, got=f"an input of shape {tuple(tensor.shape)}"
            )
        calls = self._calls.setdefault(path, [])
        index = len(calls)
        calls.append(_Call(tensor, self._waiting.get(path, 0)))
        if path not in self._waiting:
            calls[-1].tensor = None
        if path not in self._read:
            return None
        replaced = None
        if not output.requires_grad:
            output = replaced = output.detach().requires_grad_().clone()  # nothing before this layer trains
        calls_so_far = self._calls
        # in a stream a reader may run before the last writer: its inputs are looked up once the forward pass is over
        jobs = [
            (
                collected,
                reader,
                None
                if len(collected.site.producers) > 1
                else self._inputs_of(collected.site, path, index, calls_so_far),
            )
            for collected, reader in self._read[path]
        ]
        done = False

        def backward(gradient: Tensor) -> None:
            nonlocal done
            if done:
                raise StatisticsError(
                    "the loss was propagated back twice through one forward pass",
                    where=path,
                    fix="add the losses up and call backward() once, or run the model again",
                )
            done = True
            with full_precision(gradient.device):
                for collected, reader, found in jobs:
                    inputs = found or self._inputs_of(collected.site, path, index, calls_so_far)
                    self._measure(collected, reader, module, inputs, tensor, gradient.detach(), index)

        output.register_hook(backward)
        self._outputs.append(get_gradient_edge(output))  # stays right when the output is overwritten in place
        return replaced

    def _inputs_of(
        self, site: GrowthSite, reader: str, index: int, calls_so_far: dict[str, list[_Call]]
    ) -> dict[str, Tensor]:
        inputs = {}
        for producer in site.producers:
            calls = calls_so_far.get(producer, [])
            tensor = calls[index].take() if index < len(calls) else None
            if tensor is None:
                raise StatisticsError(
                    "the reader was called more often than the writer, or before it",
                    where=site.name,
                    got=f"call {index + 1} of {reader}, {len(calls)} calls of {producer}",
                    fix="leave this site out: its calls cannot be paired",
                )
            inputs[producer] = tensor
        return inputs

    # ---------------------------------------------------------------------------------------------- one batch

    def _measure(
        self,
        collected: _Site,
        reader: _Reader,
        module: nn.Module,
        inputs: dict[str, Tensor],
        h: Tensor,
        gradient: Tensor,
        index: int,
    ) -> None:
        if not self._second:
            self._finished = None
        sums = reader.projected if self._second else reader.sums
        if sums is None:
            return
        exact = torch.float64 if torch.float64 in (h.dtype, gradient.dtype) else torch.float32
        x = {path: batched(t, self.model.get_submodule(path)).to(exact) for path, t in inputs.items()}
        h, v = batched(h, module).to(exact), batched(gradient, module).to(exact)
        v = v * (-(v.shape[0] if self.reduction == "mean" else 1) / self._scale())
        if not self._finite(collected, reader, x, h, v):
            return
        if self._second:
            v = v - self._projections[collected.site.name, reader.path].apply_update(h)
        elif index == 0 and self.keep_samples:
            self._keep(collected, reader, x, h, v)
        if not sums.quantities:
            sums.count(v, index == 0)
            return
        writer = self.model.get_submodule(collected.site.producers[0])
        problem, *maps = pair_problem(reader.route, writer, module, x[collected.site.producers[0]], h, v)
        self._plan_projection(reader, problem)
        sums.add(problem, *maps, counts=index == 0)

    def _scale(self) -> float:
        scale = self.loss_scale
        value = float(scale.get_scale()) if hasattr(scale, "get_scale") else float(scale)
        if not (math.isfinite(value) and value > 0):
            raise ArgumentValueError("loss_scale must be a positive number", got=value)
        return value

    def _finite(self, collected: _Site, reader: _Reader, x: dict[str, Tensor], h: Tensor, v: Tensor) -> bool:
        named = [(f"the input of {path}", tensor) for path, tensor in x.items()]
        named += [(f"the input of {reader.path}", h), (f"the gradient at the output of {reader.path}", v)]
        bad = [name for name, tensor in named if not bool(torch.isfinite(tensor.sum(dim=0)).all())]
        if not bad:
            return True
        if self.nonfinite == "skip":
            collected.skipped += 1
            return False
        raise StatisticsError(
            "not finite: " + ", ".join(bad),
            where=collected.site.name,
            fix="lower the learning rate, pass the GradScaler as loss_scale, or collect with nonfinite='skip'",
        )

    def _keep(self, collected: _Site, reader: _Reader, x: dict[str, Tensor], h: Tensor, v: Tensor) -> None:
        kept = collected.kept
        for kind, path, tensor in (("h", reader.path, h), ("v", reader.path, v)):
            self._append(kept[kind], path, tensor)
        if reader.path == next(iter(collected.readers)):
            for path, tensor in x.items():
                self._append(kept["x"], path, tensor)

    def _append(self, store: dict[str, list[Tensor]], path: str, tensor: Tensor) -> None:
        parts = store.setdefault(path, [])
        missing = self.keep_samples - sum(part.shape[0] for part in parts)
        if missing > 0 and (not parts or parts[0].shape[1:] == tensor.shape[1:]):
            parts.append(tensor[:missing].clone())

    def _plan_projection(self, reader: _Reader, problem: PairProblem) -> None:
        """Give P up in favour of a second pass where it does not fit."""
        needless = "P" in reader.sums.quantities and "P" not in self.quantities
        if needless and 8 * problem.projection_entries > self.scratch_bytes:
            reader.sums.quantities -= {"P"}
            reader.second_pass = (
                f"P would have {entries_text(problem.projection_entries)}, more than scratch_bytes: "
                "N comes from a second pass over the same batches"
            )


def _enter_projection(reader: _Reader, statistics: ReaderStatistics) -> None:
    """Give a reader's statistics the N that a second pass has found, if there was one."""
    if reader.projected is None:
        return
    with full_precision(torch.device("cpu")):
        projected = reader.projected.averages()["N_raw"]
        statistics.moments["N"] = projected
        statistics.moments["N_energy"] = projected.new_tensor(reader.projected.energy / reader.projected.samples)
    statistics.pending = None


def _where(site: GrowthSite, reader: str) -> str:
    return site.name if len(site.consumers) == 1 else f"{site.name}, reader {reader}"


def _geometry(layer: nn.Module) -> Geometry | None:
    return Geometry.of(layer) if isinstance(layer, _CONVOLUTIONS) else None
