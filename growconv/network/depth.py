"""Other layers than before: a new one in front, a copied block behind, two convolutions for one, one for two.

All of it is surgery like any other: checked before anything changes, as a whole or not at all, an event that replays
and that averages and teachers can follow. Find the sites again afterwards.
"""

import copy
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from growconv.convolution.geometry import Geometry, PerAxis, per_axis
from growconv.errors import ArgumentTypeError, ArgumentValueError, SiteError, SurgeryError
from growconv.network import blocks, layers
from growconv.network.event import Edit, GrowthEvent, Optimizers, carried_out
from growconv.network.layout import IN
from growconv.network.model import example_arguments, undisturbed, unwrapped
from growconv.network.optimizer import add_parameters, as_optimizers
from growconv.network.site import Activation, GrowthSite

KINDS = ("convolution", "residual")


def insert_layer(
    model: nn.Module,
    site: GrowthSite,
    *,
    kind: str = "convolution",
    kernel_size: int = 3,
    consumer: str | None = None,
    optimizer: Optimizers = None,
) -> GrowthEvent:
    """Insert a new layer in front of a consumer of a site; the function is preserved, in train and eval mode.

    The consumer's module becomes a Sequential of the new layer ("inserted") and the consumer itself ("consumer"), so
    that its parameters have new paths.

    Args:
        model: the raw model of the site, or one with the same names.
        site: the site; the new layer gets as many channels as the consumer reads.
        kind: "convolution": an identity convolution and an activation that does not change what it reads (the one
            before, where applying it twice changes nothing, else a PReLU of slope 1). "residual": x + body(x) with two
            convolutions, the last norm (of linear layers: the last one) starting at zero.
        kernel_size: odd number of taps per axis; a linear consumer gets a linear layer.
        consumer: which consumer, if the site has several.
        optimizer: the optimizer (or a list); new parameters join the group of the consumer's weight.

    Returns:
        The event.

    Raises:
        SiteError: when the site has several consumers and none was named.
        ArgumentValueError: for an unknown kind or an even kernel size.
        SurgeryError: the optimizer does not own the consumer's weight.

    Example:
        >>> event = growconv.insert_layer(model, sites[0], optimizer=optimizer)
        >>> len(model)
        7
    """
    model = unwrapped(model)
    site = site.of(model)
    site.check()
    if kind not in KINDS:
        raise ArgumentValueError("there is no such kind of layer", expected=" or ".join(KINDS), got=kind)
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ArgumentValueError("an inserted layer needs a kernel with a centre", expected="odd", got=kernel_size)
    path = consumer if consumer is not None else site.consumers[0]
    if path not in site.consumers or (consumer is None and len(site.consumers) > 1):
        expected = " or ".join(site.consumers)
        raise SiteError(
            "name the consumer that gets a layer in front", where=site.name, expected=expected, got=consumer
        )
    layer = layers.weighted(blocks.block_at(model, path))
    add_parameters(as_optimizers(optimizer), next(layer.module.parameters()), (), path)  # checks only
    values = {
        "kind": kind,
        "channels": layer.size(IN),
        "axes": len(layer.kernel_size),
        "kernel_size": kernel_size,
        "activation": _activation(site, path),
        "seed": int(torch.randint(2**31, ())),
    }
    widths = (site.width, site.width)
    reason = f"an identity {kind} in front of {path}"
    return _edited(model, {"module": path, "insert": values}, optimizer, site.name, "insert_layer", widths, reason)


def insert_copy(
    model: nn.Module, path: str, *, example_input: object = None, identity: bool = False, optimizer: Optimizers = None
) -> GrowthEvent:
    """Insert a copy of a whole block behind it: growth in depth.

    The module becomes a Sequential of itself ("original") and its copy ("inserted"). As in Gong et al., "Efficient
    training of BERT by progressively stacking" (ICML 2019), the copy has the trained weights, and the function changes.

    Args:
        model: the raw model.
        path: module path of a block whose outputs have the shape of its inputs.
        example_input: what the model's forward takes: to check those shapes before anything changes.
        identity: preserve the function: the last layer of a residual block (of its branch) starts at zero in the copy.
            Which layer that is, is found by trying on `example_input`.
        optimizer: the optimizer (or a list); each new parameter joins the group of its original.

    Returns:
        The event; its reason says which layer is zero.

    Raises:
        SiteError: there is no such block.
        ArgumentValueError: an identity is asked for without an example.
        SurgeryError: its shapes differ, or no layer makes the copy the identity.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        >>> event = growconv.insert_copy(net, "0", example_input=torch.zeros(1, 4, 8, 8))
    """
    model = unwrapped(model)
    block, silent = blocks.block_at(model, path), None
    if identity and example_input is None:
        raise ArgumentValueError("an identity copy needs an example", expected="example_input=...", where=path)
    if example_input is not None:
        given, returned = _seen(model, block, example_input, path)
        if given.shape != returned.shape:
            raise SurgeryError(
                "the block's output has another shape than its input, so that its copy cannot take it",
                where=path,
                expected=tuple(given.shape),
                got=tuple(returned.shape),
                fix="copy a block without stride and change of width",
            )
        silent = _silencing(block, returned, path) if identity else None
    reason = f"a copy behind {path}" + (f" with {silent} at zero" if silent else "")
    return _edited(model, {"module": path, "copy": silent}, optimizer, path, "insert_copy", (0, 0), reason)


def copy_blocks(
    model: nn.Module,
    patterns: Sequence[str],
    example_input: object,
    *,
    identity: bool = False,
    optimizer: Optimizers = None,
) -> list[GrowthEvent]:
    """Put a copy behind each of several blocks: depth by stacking, which doubles it every time.

    Args:
        model: the raw model.
        patterns: of module paths, as in a shell; "blocks.*" is every block, not what is inside. Blocks whose outputs
            have another shape than their inputs are left as they are.
        example_input: what the model's forward takes.
        identity: see `insert_copy`.
        optimizer: the optimizer (or a list).

    Returns:
        An event for each copy.

    Raises:
        SiteError: no block fits the patterns.
        SurgeryError: no layer makes a copy the identity.
    """
    model = unwrapped(model)
    named = [path for path, _ in model.named_modules() if any(fnmatchcase(path, pattern) for pattern in patterns)]
    outermost = [path for path in named if not any(path.startswith(f"{other}.") for other in named)]
    shapes = {path: _seen(model, blocks.block_at(model, path), example_input, path) for path in outermost}
    fitting = [path for path, (given, returned) in shapes.items() if given.shape == returned.shape]
    if not fitting:
        raise SiteError("no block that can be copied has such a path", got=list(patterns), fix="see named_modules()")
    options = {"example_input": example_input, "identity": identity, "optimizer": optimizer}
    return [insert_copy(model, path, **options) for path in fitting]


def merge_pair(
    model: nn.Module, site: GrowthSite, *, borders: bool = False, optimizer: Optimizers = None
) -> GrowthEvent:
    """Replace two convolutions with nothing in between by one.

    The first module becomes the composite convolution, the second an `nn.Identity`.

    Args:
        model: the raw model of the site, or one with the same names.
        site: a pair of convolutions with no norm, activation or pooling in between.
        borders: accept that outputs whose window reaches into the zero padding of the second convolution change
            (`growconv.convolution.kernels.exact_locations` says which ones). Without it such a pair is refused.
        optimizer: the optimizer (or a list) that trains the model; the new parameters take the old ones' place, without
            state.

    Returns:
        The event; its `details` say whether the function is the same up to rounding, at the borders too ("exact").

    Raises:
        SiteError: a site that the model does not have.
        SurgeryError: a pair that is no single convolution; nothing has changed then.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3))
        >>> event = growconv.merge_pair(net, growconv.find_sites(net, images)[0])
        >>> net(images).shape
        torch.Size([8, 6, 4, 4])
    """
    model = unwrapped(model)
    if not isinstance(site, GrowthSite):
        raise ArgumentTypeError("a site is needed", expected="GrowthSite", got=type(site).__name__, where="merge_pair")
    site = site.of(model)
    site.check()
    problem = _why_no_pair(site)
    if problem:
        expected = "two plain convolutions, the second reading the first one's output and nothing else"
        raise SurgeryError(problem, where=site.name, expected=expected)
    producer, consumer = site.producers[0], site.consumers[0]
    padding = Geometry.of(model.get_submodule(consumer)).padding
    exact = not any(low or high for low, high in padding)
    if not exact and not borders:
        raise SurgeryError(
            "the second convolution pads with zeros, so one convolution differs at the borders",
            where=consumer,
            expected="no padding in the second convolution",
            got=f"padding {padding}",
            fix="pass borders=True to accept that",
        )
    for path in (producer, consumer):
        blocks.check_replaceable(model, path, as_optimizers(optimizer))
    edit, reason = {"module": producer, "merge": consumer}, "exact" if exact else "exact but for the borders"
    widths = (site.width, 0)
    return _edited(model, edit, optimizer, site.name, "merge", widths, reason, residual=0.0, exact=exact)


def split_conv(
    model: nn.Module, name: str, hidden: int, *, first_size: PerAxis | None = None, optimizer: Optimizers = None
) -> GrowthEvent:
    """Replace one convolution by two smaller ones in a row: a way to grow depth.

    The module becomes an `nn.Sequential` of two convolutions whose composite is the best rank-K split of its kernel.
    All padding goes to the first and all stride to the second, so that the borders are those of the old convolution.

    Args:
        model: the raw model.
        name: module path of an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with groups=1.
        hidden: number of hidden channels in between.
        first_size: kernel size of the first; None takes (k + 1) // 2 per axis.
        optimizer: the optimizer (or a list) that trains the model; the new parameters take the old ones' place, without
            state.

    Returns:
        The event; its `details` say how far the kernel moved ("residual", relative) and whether it did not ("exact").

    Raises:
        SiteError: there is no such module.
        SurgeryError: for another layer, or one that several modules share.
        ArgumentValueError: for an impossible number of hidden channels.
        GeometryError: for kernel sizes that do not add up.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 6, 5))
        >>> growconv.split_conv(net, "0", hidden=9, first_size=3).details["exact"]
        True
    """
    model = unwrapped(model)
    conv = blocks.block_at(model, name)
    if not layers.is_plain_convolution(conv) or layers.groups_of(conv) != 1:
        raise SurgeryError(
            "only a plain convolution inside a model can be split",
            where=name,
            expected="nn.Conv1d, nn.Conv2d or nn.Conv3d with groups=1",
            got=f"{type(conv).__name__}, groups={layers.groups_of(conv)}",
        )
    geometry = Geometry.of(conv)
    sizes = tuple((taps + 1) // 2 for taps in geometry.kernel_size)
    if first_size is not None:
        sizes = per_axis(first_size, geometry.axes, "first_size", 1, name)
    if any(low != high for low, high in geometry.padding):
        raise SurgeryError(
            "nn.Conv pads both sides alike, so no first convolution can take this padding over",
            where=name,
            got=f"(low, high) per axis: {geometry.padding}",
            fix="pad the input by hand, or use a kernel of odd size",
        )
    _, residual = blocks.split(conv, hidden, sizes)
    blocks.check_replaceable(model, name, as_optimizers(optimizer))
    exact = residual <= 100 * torch.finfo(next(conv.parameters()).dtype).eps
    reason = "exact" if exact else f"relative residual of the kernel {residual:.3g}"
    edit = {"module": name, "split": {"hidden": hidden, "first_size": list(sizes)}}
    return _edited(model, edit, optimizer, name, "split", (0, hidden), reason, residual=residual, exact=exact)


def _edited(
    model: nn.Module,
    edit: Edit,
    optimizer: Optimizers,
    site: str,
    method: str,
    widths: tuple[int, int],
    reason: str,
    **details: float | bool,
) -> GrowthEvent:
    """Carry out an edit and tell about it."""
    optimizers = as_optimizers(optimizer)
    told = {"site": site, "method": method, "width_before": widths[0], "width_after": widths[1], "details": details}
    told |= {"channels": 0, "amplitude": 0.0, "gains": (), "reason": reason, "edits": (edit,)}
    return carried_out(model, optimizers, partial(blocks.apply_block_edit, model, edit, optimizers), **told)


def _activation(site: GrowthSite, path: str) -> str:
    """The activation of the new layer: the last one before the consumer, where applying it twice changes nothing."""
    alone = len(site.layout.axes[path, IN]) == 1  # else other channels came another way
    steps = next((route.steps for route in site.routes if route.consumer == path and alone), ())
    names = [step.name.lower() for step in steps if isinstance(step, Activation)]
    return names[-1] if names and names[-1] in blocks.IDEMPOTENT else "prelu"


def _seen(model: nn.Module, block: nn.Module, example_input: object, path: str) -> tuple[Tensor, Tensor]:
    """What a block is given and returns in one forward pass."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: nn.Module, given: tuple, returned: object) -> None:
        if len(given) == 1 and isinstance(given[0], Tensor) and isinstance(returned, Tensor):
            seen.append((given[0].detach(), returned.detach()))

    positional, named = example_arguments(example_input)
    handle = block.register_forward_hook(look)
    try:
        with torch.no_grad(), undisturbed(model):
            model.eval()(*positional, **named)
    finally:
        handle.remove()
    if not seen:
        raise SurgeryError("a block that can be copied is given one tensor and returns one", where=path)
    return seen[0]


def _silencing(block: nn.Module, x: Tensor, path: str) -> str:
    """The layer of a block that makes it the identity on its own outputs when it is zero, in eval and train mode."""
    tolerance = math.sqrt(torch.finfo(x.dtype).eps) * float(x.abs().max())
    names = [name for name, each in block.named_modules() if layers.is_weighted(each) or layers.is_norm(each)]
    for name in reversed(names):
        twin = copy.deepcopy(block)
        blocks.silence(twin.get_submodule(name))
        with torch.no_grad(), undisturbed(twin):
            outputs = [twin.train(mode)(x.clone()) for mode in (False, True)]
        if all(output.shape == x.shape and bool(((output - x).abs() <= tolerance).all()) for output in outputs):
            return name
    raise SurgeryError(
        "no layer of this block makes its copy the identity when it is zero",
        where=path,
        expected="a residual block whose branch ends in a norm or convolution",
        fix="insert_copy(..., identity=False), which changes the function",
    )


def _why_no_pair(site: GrowthSite) -> str | None:
    """One line saying why a site's two layers are no single convolution; None where they are."""
    if len(site.producers) != 1 or len(site.consumers) != 1:
        return "the channels have several producers or consumers"
    if site.followers:
        return f"{site.followers[0]} lies in between"
    route = site.routes[0]
    if route.problem or route.steps:
        return route.problem or f"{type(route.steps[0]).__name__} lies in between"
    if not site.alone:
        return "the layers have other channels too"
    for path in (*site.producers, *site.consumers):
        if not layers.is_plain_convolution(site.model.get_submodule(path)):
            return f"{path} is no plain convolution"
        if site.calls.get(path, 1) > 1:
            return f"{path} is called several times"
    return None
