"""What a model's forward passes gave the layers of its sites, until the gradients come."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from growconv.errors import StatisticsError
from growconv.network.seats import Region
from growconv.network.site import GrowthSite
from growconv.statistics.held import Shelf
from growconv.statistics.problem import batched
from growconv.statistics.samples import KeptBatch, KeptPass


@dataclass(eq=False)
class Pass:
    """One forward pass of the model.

    Attributes:
        loss: what it belongs to.
        number: its place among the passes of the loss.
        inputs: per layer what each of its calls was given; None once nobody waits for it any more.
        waiting: per layer and call how often that is still to be asked for.
        shapes: per consumer the shapes of its outputs.
        samples: per consumer how many samples its first call had.
        regions: per site what lies between its layers.
        kept: per site what is to be kept of it.
        copies: of inputs, by the memory that they were in; layers that are given the same one share its copy.
        left_out: sites at which something was not finite.
        complete: per site, layers and call whether all of these layers had been called when that was first asked.
    """

    loss: "Loss"
    number: int
    inputs: dict[str, list[Tensor | None]] = field(default_factory=dict)
    waiting: dict[str, list[int]] = field(default_factory=dict)
    shapes: dict[str, list[torch.Size]] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    regions: dict[str, Region] = field(default_factory=dict)
    kept: "dict[str, KeptCalls]" = field(default_factory=dict)
    copies: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    complete: dict[tuple[str, tuple[str, ...], int], bool] = field(default_factory=dict)

    def has_all(self, site: str, paths: tuple[str, ...], index: int) -> bool:
        """Whether all of some layers of a site have been called so often; the same answer each time."""
        known = all(len(self.inputs.get(path, ())) > index for path in paths)
        return self.complete.setdefault((site, paths, index), known)

    def take(self, path: str, index: int) -> Tensor | None:
        """What a call was given; it is let go with the last one who asks."""
        calls = self.inputs.get(path, [])
        if index >= len(calls):
            return None
        found = calls[index]
        self.waiting[path][index] -= 1
        if self.waiting[path][index] <= 0:
            calls[index] = None
        return found


@dataclass(eq=False)
class Loss:
    """All forward passes of one loss.

    Attributes:
        passes: in order.
        samples: per consumer how many samples its first call had, which the loss is taken to be a mean or sum over.
        counted: sites, consumers and passes whose samples have been counted.
        differentiated: whether a gradient has arrived.
        told: whether a loop has said that here a loss begins.
        ready: whether it has said that the loss is computed, so that gradients may come.
        number: which of all losses it is; the same in a second pass over the same batches.
    """

    passes: list[Pass] = field(default_factory=list)
    samples: dict[str, int] = field(default_factory=dict)
    counted: set[tuple[str, str, int]] = field(default_factory=set)
    differentiated: bool = False
    told: bool = False
    ready: bool = False
    number: int | None = None

    def new_pass(self) -> Pass:
        """Begin a further forward pass."""
        self.passes.append(Pass(self, len(self.passes)))
        return self.passes[-1]


@dataclass(eq=False)
class KeptCalls:
    """Copies of what one pass gave the layers of one site, and the gradients that have arrived."""

    x: dict[str, list[Tensor]]
    h: dict[str, list[Tensor]]
    v: dict[str, dict[int, Tensor]] = field(default_factory=dict)


def copied_calls(
    each: Pass, site: GrowthSite, model: nn.Module, shelf: Shelf, dtype: torch.dtype | None
) -> KeptCalls | None:
    """What the layers of a site were given, copied with the first gradient; None where it is not to be kept.

    Args:
        dtype: of the copies; None: float32, or float64 of that.
    """
    if site.name not in each.regions:
        return None
    if site.name not in each.kept:
        calls = each.regions[site.name].calls  # checkpointing calls layers once more on the way back
        x, h = (
            {
                path: [
                    _copied(path, given, model, shelf, each, dtype)
                    for given in each.inputs.get(path, [])[: calls[path]]
                ]
                for path in paths
            }
            for paths in (site.producers, site.consumers)
        )
        each.kept[site.name] = KeptCalls(x, h)
    return each.kept[site.name]


def _copied(
    path: str, tensor: Tensor | None, model: nn.Module, shelf: Shelf, each: Pass, dtype: torch.dtype | None
) -> Tensor:
    """A copy of a layer's input, one for all layers that are given the same memory in a pass."""
    if tensor is None:
        raise StatisticsError("an input of this layer has already been freed", where=path)
    tensor = batched(tensor, model.get_submodule(path))
    exact = tensor.dtype if tensor.dtype == torch.float64 else torch.float32
    dtype = dtype or exact
    key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    if key not in each.copies:
        each.copies[key] = shelf.copy(tensor, dtype)
    return each.copies[key]


def kept_batch(loss: Loss, site: GrowthSite, model: nn.Module, separate: bool) -> KeptBatch | None:
    """The passes of a loss whose gradients have come; None where there are none to keep.

    Args:
        site: whose samples.
        separate: whether every pass has samples of its own.
    """
    passes = []
    for each in loss.passes:
        kept = each.kept.get(site.name)
        if kept is None or site.name in each.left_out:
            continue
        v = {path: tuple(_gradients(kept, each, path, model)) for path in site.consumers}
        x, h = ({path: tuple(calls) for path, calls in maps.items()} for maps in (kept.x, kept.h))
        passes.append(KeptPass(x, h, v, each.regions[site.name]))
    if not passes:
        return None
    counts = [max(each.samples.values()) for each in loss.passes] if separate else list(loss.samples.values())
    return KeptBatch(sum(counts) if separate else max(counts), tuple(passes))


def _gradients(kept: KeptCalls, each: Pass, path: str, model: nn.Module) -> Iterator[Tensor]:
    """V of every call of a consumer; zeros where the loss does not depend on it."""
    found = kept.v.get(path, {})
    for index, shape in enumerate(each.shapes.get(path, [])[: len(kept.h[path])]):
        like = kept.h[path][index]
        yield found[index] if index in found else batched(like.new_zeros(shape), model.get_submodule(path))
