"""What lies between the producers and consumers of a site, cut out of a recorded forward pass."""

from collections.abc import Mapping

import torch
from torch import Tensor

from growconv.errors import SiteError
from growconv.network import layers, operations
from growconv.network.layout import ENTRY, Key, Sizes
from growconv.network.model import tensor_at
from growconv.network.seats import Region
from growconv.network.site import GrowthSite
from growconv.network.tape import LayerCall, Operation, Step, Tape, hot_values


def is_plain(site: GrowthSite) -> bool:
    """Whether a region needs no values of its pass, by the site's routes: its steps are run on new channels alone."""
    if not site.routes or any(route.problem is not None or not route.narrow for route in site.routes):
        return False
    return _in_order(_places(site, sizes := site.sizes), sizes)


def region_of(tape: Tape, site: GrowthSite, sizes: Sizes | None = None) -> Region:
    """The part of a recording that lies between the producers and consumers of a site; it holds only what it needs.

    Args:
        sizes: the lengths of the axes, if they are known.

    Raises:
        SiteError: a consumer was called that reads nothing from the producers; the tape does not hold what is needed.
    """
    hot, made = hot_values(tape, site)
    steps, needed, inside, memories = list[Step](), set[int](), set[int](), set[int]()
    calls = dict.fromkeys((*site.producers, *site.consumers), 0)
    for step in reversed(tape.steps):
        path = step.path if isinstance(step, LayerCall) else None
        if path in site.consumers:
            if not hot.issuperset(step.inputs):
                raise SiteError("a call of this layer reads nothing of what the producers give", where=path)
            calls[path] += 1
        elif needed.isdisjoint(hot.intersection(step.outputs) - made):
            continue
        else:
            inside.update(step.outputs)
        steps.append(step)
        needed.update(step.inputs)
        if isinstance(step, Operation) and step.writes:
            memories.update(tape.values[number].storage for number in step.outputs)
    outputs, shapes = dict[str, tuple[int, ...]](), dict[int, torch.Size]()
    samples: set[int | None] = set()  # None: a layer was given a single sample
    for path in site.producers:
        if path in site.layout.dims:
            continue
        outputs[path] = tuple(call.outputs[0] for call in tape.calls[path])
        calls[path] = len(outputs[path])
        for number in outputs[path]:
            shapes[number] = shape = tape.values[number].tensor.shape
            batched = layers.channel_axis(site.model.get_submodule(path), len(shape)) > 0
            samples.add(shape[0] if batched else None)
    sizes = sizes or site.sizes
    places = _places(site, sizes)
    narrow = _in_order(places, sizes) and all(is_narrow(tape, step, hot, site) for step in steps)
    constants, bare, created = dict[int, Tensor](), dict[int, tuple[int, Tensor] | None](), set[int]()
    for number in (needed - inside) | made:
        if tape.values[number].storage in memories:
            created.add(number)
        if number not in made or not narrow:
            constants[number] = _constant(tape, number, site)
            if tape.values[number].source:
                bare[number] = _along(tape, number, site, sizes)
    recorded = samples.pop() if len(samples) == 1 else None
    steps, lengths = steps[::-1], {key: sizes(key) for key in places}
    return Region(
        site, tuple(steps), constants, frozenset(created), outputs, shapes, calls, bare, places, lengths, narrow,
        samples=recorded, recorded=recorded,
    )  # fmt: skip


def _constant(tape: Tape, number: int, site: GrowthSite) -> Tensor:
    """A value as a constant, at least in float32; parameters are copied, since they will be trained."""
    value = tape.values[number]
    tensor = value.tensor.detach()
    if tensor.device.type == "meta":
        raise SiteError(
            "what lies between the layers is not what it was when the site was found",
            where=site.name,
            fix="find the sites of the model as it is now: growconv.find_sites(model, example_input)",
        )
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor if value.source is None else tensor.clone()


def _along(tape: Tape, number: int, site: GrowthSite, sizes: Sizes) -> tuple[int, Tensor] | None:
    """The axis of a parameter or buffer that has entries of the site, and their positions; None where it has none."""
    path, tensor = str(tape.values[number].source), tape.values[number].tensor
    if path not in site.layout.dims or (path, ENTRY) not in site.axes:
        return None
    if tensor.shape != tensor_at(site.model, path).shape:
        return None
    places = torch.tensor(site.entries(path, ENTRY, sizes), device=tensor.device)
    return site.layout.dims[path], places.view(site.layout.units(site.space, sizes), -1)


def _places(site: GrowthSite, sizes: Sizes) -> dict[Key, Tensor]:
    """Per axis the positions of the channels, (units, entries of a unit), as they are now."""
    units = site.layout.units(site.space, sizes)
    found = {}
    for path, side in site.axes:
        if path in site.layout.dims:
            continue
        device = next(iter(site.model.get_submodule(path).parameters()), torch.empty(0)).device
        found[path, side] = torch.tensor(site.entries(path, side, sizes), device=device).view(units, -1)
    return found


def _in_order(places: Mapping[Key, Tensor], sizes: Sizes) -> bool:
    """Whether no axis holds anything else, and all channels lie one after the other."""
    return all(each.flatten().tolist() == list(range(sizes(key))) for key, each in places.items())


def is_narrow(tape: Tape, step: Step, hot: set[int], site: GrowthSite) -> bool:
    """Whether a step treats channels one by one and names no size of theirs.

    Args:
        hot: the values that have channels of the site.
    """
    if not isinstance(step, Operation):
        return isinstance(step, LayerCall)
    name, args, values = step.name, step.args, tape.values
    channels = [number for number in step.inputs if values[number].tensor.dim()]
    before, after = values[step.inputs[0]].tensor, values[step.outputs[0]].tensor
    if any(number not in hot or values[number].source for number in channels) or before.dim() == 0:
        return False
    if any(values[number].tensor.shape != before.shape for number in channels):
        return False
    if operations.is_pointwise(step.func) or name in ("clone", "_to_copy"):
        return after.shape == before.shape
    last = any(not site.layer(path).kernel_size for path in site.producers)
    if (last and before.dim() > 2) or len(channels) != 1:
        return False
    # on (n, channels, *grid): it changes only the grid, or joins it to the channels
    if name in operations.RESIZING:
        return before.dim() > 2 and after.shape[:2] == before.shape[:2]
    if name == "constant_pad_nd":
        return len(args[1]) <= 2 * (before.dim() - 2)
    if name in operations.VIEWS:
        return after.shape == before.shape or (after.dim() == 2 < before.dim() and after.shape[0] == before.shape[0])
    if name in _REDUCTIONS or name in ("squeeze", "unsqueeze"):
        given = args[1] if len(args) > 1 else None
        dims = [given] if isinstance(given, int) else given
        count = before.dim() + (name == "unsqueeze")
        return bool(dims) and all(dim % count > 1 for dim in dims) and not step.kwargs.get("dtype")
    return False


_REDUCTIONS = frozenset(["mean", "sum", "amax", "amin"])
