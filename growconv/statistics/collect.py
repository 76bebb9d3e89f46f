"""collect_statistics: run batches through a model and come back with statistics, the model unchanged."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from growconv.errors import ArgumentTypeError, StatisticsError
from growconv.network import layers
from growconv.network.model import example_arguments, undisturbed
from growconv.network.site import Site
from growconv.statistics.collector import Average, StatisticsCollector
from growconv.statistics.pair import PairStatistics


def collect_statistics(
    model: nn.Module,
    sites: Site | Iterable[object],
    batches: Iterable[object],
    loss: Callable[[Any, Any], Tensor],
    *,
    run: Callable[[Callable[[], None]], None] = lambda each_pass: each_pass(),
    average: Average | None = None,
    **options: Any,
) -> dict[str, PairStatistics]:
    """Statistics of some batches, with a second pass over those that N cannot do without.

    Norm layers keep their mode and buffers, dropout is off, and the parameters' gradients stay as they are.

    Args:
        model: the model that the sites belong to.
        sites: where to collect.
        batches: (input, target) pairs; the input is a tensor, or a tuple of positional or a mapping of keyword
            arguments of the model. A tensor alone is an input without a target. An iterator is read into a list, since
            it may be needed twice.
        loss: loss(model(input), target), a scalar; it may run the model again, and all its forward passes count.
        run: calls each pass over the batches; several processes wait for each other there.
        average: see `StatisticsCollector.second_pass`.
        **options: options of StatisticsCollector.

    Returns:
        Statistics by site name.

    Raises:
        ArgumentTypeError: for batches of any other form.
        StatisticsError: inside torch.inference_mode(); for no batches, or a loss that is no scalar, not
            finite, or does not depend on the parameters.

    Example:
        >>> stats = growconv.collect_statistics(model, sites[0], batches, loss)[sites[0].name]
        >>> stats.S.shape, stats.N.shape
        (torch.Size([10, 10]), torch.Size([10, 9, 6]))
    """
    if torch.is_inference_mode_enabled():
        raise StatisticsError(
            "statistics need gradients, which inference mode never records",
            expected="a call outside of torch.inference_mode()",
            got="torch.inference_mode()",
            fix="leave the context, or use torch.no_grad() instead: gradients are switched on here",
        )
    batches = list(batches) if isinstance(batches, Iterator) else batches
    collector = StatisticsCollector(model, sites, **options)
    with undisturbed(model):
        for module in model.modules():
            if layers.is_dropout(module):
                module.eval()
        own = {parameter for layer in collector.layers for parameter in layer.parameters()}
        for parameter in model.parameters():
            if parameter.is_leaf and parameter not in own:
                parameter.requires_grad_(False)  # what lies in front of the sites is not held for the way back
        with collector:
            run(lambda: _run(collector, batches, loss))
        if collector.needs_second_pass:
            with collector.second_pass(average):
                run(lambda: _run(collector, batches, loss, collector.misses))
    return collector.finished()


def _run(
    collector: StatisticsCollector,
    batches: Iterable[object],
    loss: Callable[..., Tensor],
    wanted: Callable[[int], bool] = lambda number: True,
) -> None:
    count = 0
    for count, batch in enumerate(batches, start=1):
        if not wanted(count):
            continue
        x, y = _pair(batch, count)
        collector.next_loss(number=count)
        with torch.enable_grad():
            arguments, keywords = example_arguments(x)
            value = loss(collector.model(*arguments, **keywords), y)
        _check(value, count, collector.nonfinite)
        collector.loss_computed()
        if collector.outputs:
            torch.autograd.grad(value, collector.outputs, allow_unused=True)
        del value  # with all that its graph holds before the first of these outputs
    if not count:
        raise StatisticsError("the statistics have zero samples", got="no batches", fix="pass at least one batch")


def _pair(batch: object, number: int) -> tuple[Any, Any]:
    """Input and target of a batch; a tensor alone, or in a tuple of one, has no target."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, list | tuple) and len(batch) in (1, 2):
        return (batch[0], batch[1]) if len(batch) == 2 else (batch[0], None)
    got = f"a sequence of {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__
    if isinstance(batch, Mapping):
        got = f"a mapping with {', '.join(map(str, batch))}"
    raise ArgumentTypeError(
        "a batch must give the model's input and the loss's target",
        expected="(input, target), where the input is a tensor, a tuple of arguments or a mapping of keyword arguments",
        got=got,
        where=f"batch {number}",
        fix="convert it, for example ((b['image'], b['label']) for b in batches)",
    )


def _check(value: object, batch: int, nonfinite: str) -> None:
    where = f"batch {batch}"
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise StatisticsError("the loss must be one number", where=where, got=got, fix="reduce it with mean() or sum()")
    if not value.requires_grad:
        raise StatisticsError(
            "the loss does not depend on the sites",
            where=where,
            expected="a loss computed from the model's output, with gradients enabled",
            fix="take the site out of torch.no_grad(); a checkpoint around it needs use_reentrant=False",
        )
    if nonfinite == "error" and not math.isfinite(value.item()):
        raise StatisticsError(
            "the loss is not finite",
            where=where,
            got=value.item(),
            fix="lower the learning rate, or collect with nonfinite='skip'",
        )
