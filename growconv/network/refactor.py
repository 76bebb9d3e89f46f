"""One convolution for two, or two for one, inside a model: kernel algebra on real modules."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from growconv.convolution.arguments import PerAxis, per_axis
from growconv.convolution.geometry import Geometry
from growconv.convolution.kernels import Conv, compose_convs, make_conv
from growconv.convolution.split import split_kernel
from growconv.errors import ArgumentTypeError, SiteError, SurgeryError
from growconv.network.graph import unwrapped
from growconv.network.optimizer import as_optimizers, check_optimizers, replace_parameters
from growconv.network.site import GrowthSite
from growconv.network.surgery import count_parameters


@dataclass(frozen=True)
class Refactoring:
    """What a merge or a split did.

    Attributes:
        kind: "merge" or "split".
        before: module paths that were replaced.
        after: module paths of the convolutions that stand there now.
        residual: relative distance of the composite kernel from the one it stands for; 0 for a merge.
        exact: whether the function is the same up to rounding, at the borders too.
        parameters_before: number of parameters of the model before.
        parameters_after: number after.
    """

    kind: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    residual: float
    exact: bool
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        """One line."""
        how = "exact" if self.exact else f"relative residual of the kernel {self.residual:.3g}"
        if not self.exact and self.kind == "merge":
            how = "exact but for the borders"
        more = self.parameters_after - self.parameters_before
        return f"{self.kind} {' + '.join(self.before)} -> {' + '.join(self.after)}: {how}, {more:+d} parameters"


def merge_pair(model: nn.Module, site: GrowthSite, *, borders: bool = False, optimizer: Any = None) -> Refactoring:
    """Put one convolution in the place of two with nothing in between.

    The first module becomes the composite convolution, the second an `nn.Identity`. Find the model's sites again
    afterwards.

    Args:
        model: the raw model.
        site: a pair of convolutions with no norm, activation or pooling in between.
        borders: accept that outputs whose window reaches into the zero padding of the second convolution change
            (`growconv.convolution.kernels.exact_locations` says which ones). Without it such a pair is refused.
        optimizer: the optimizer (or a list) that trains the model; the new parameters take the old ones' place, without
            state.

    Returns:
        What was done.

    Raises:
        SiteError: a site of another model.
        SurgeryError: a pair that is no single convolution; nothing has changed then.
    """
    model = unwrapped(model)
    if not isinstance(site, GrowthSite):
        raise ArgumentTypeError("a site is needed", expected="GrowthSite", got=type(site).__name__, where="merge_pair")
    site.check(model)
    problem = _why_no_pair(site)
    if problem:
        raise SurgeryError(
            problem,
            where=site.name,
            expected="two plain convolutions, the second reading the first one's output and nothing else",
        )
    writer, reader = site.producers[0], site.consumers[0]
    first, second = model.get_submodule(writer), model.get_submodule(reader)
    padded = any(low or high for low, high in Geometry.of(second).padding)
    if padded and not borders:
        raise SurgeryError(
            "the second convolution pads with zeros, so one convolution differs at the borders",
            where=reader,
            expected="no padding in the second convolution",
            got=f"padding {Geometry.of(second).padding}",
            fix="pass borders=True to accept that",
        )
    merged = compose_convs(first, second)
    for parameter in merged.parameters():
        parameter.requires_grad_(any(each.requires_grad for each in (*first.parameters(), *second.parameters())))
    before = count_parameters(model)
    old = [(writer, first), (reader, second)]
    _exchange(model, old, {writer: merged.train(first.training), reader: nn.Identity()}, [merged], optimizer)
    return Refactoring("merge", (writer, reader), (writer,), 0.0, not padded, before, count_parameters(model))


def split_conv(
    model: nn.Module, name: str, hidden: int, *, first_size: PerAxis | None = None, optimizer: Any = None
) -> Refactoring:
    """Put two smaller convolutions in a row in the place of one: a way to grow depth.

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
        What was done; its `residual` says how far the function moved, `exact` whether it did not.

    Raises:
        SurgeryError: for another layer, or one that several modules share.
        ArgumentValueError: for an impossible number of hidden channels.
        GeometryError: for kernel sizes that do not add up.
    """
    model = unwrapped(model)
    try:
        conv = model.get_submodule(name)
    except AttributeError:
        raise SiteError("there is no such module", where=name, fix="see model.named_modules()") from None
    if not isinstance(conv, Conv) or conv.groups != 1 or not name:
        raise SurgeryError(
            "only a plain convolution inside a model can be split",
            where=name or "the model itself",
            expected="nn.Conv1d, nn.Conv2d or nn.Conv3d with groups=1",
            got=f"{type(conv).__name__}, groups={getattr(conv, 'groups', 1)}",
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
    split = split_kernel(conv.weight, hidden, sizes)
    none, one = (0,) * geometry.axes, (1,) * geometry.axes
    bias = None if conv.bias is None else torch.zeros(hidden).to(conv.bias)
    padding = tuple(low for low, _ in geometry.padding)
    first = make_conv(split.first, bias, one, padding, geometry.dilation, 1, conv.padding_mode)
    second = make_conv(split.second, conv.bias, geometry.stride, none, geometry.dilation)
    pair = nn.Sequential(first, second).train(conv.training)
    for parameter in (first.weight, second.weight, *([] if first.bias is None else [first.bias])):
        parameter.requires_grad_(conv.weight.requires_grad)
    before = count_parameters(model)
    _exchange(model, [(name, conv)], {name: pair}, [pair], optimizer)
    names = (f"{name}.0", f"{name}.1")
    exact = split.residual <= 100 * torch.finfo(conv.weight.dtype).eps
    return Refactoring("split", (name,), names, split.residual, exact, before, count_parameters(model))


def _why_no_pair(site: GrowthSite) -> str | None:
    """One line saying why a site's two layers are no single convolution; None where they are."""
    if len(site.producers) != 1 or len(site.consumers) != 1:
        return "the channels have several writers or readers"
    if site.followers:
        return f"{site.followers[0]} lies in between"
    route = site.routes[0]
    if route.problem:
        return route.problem
    if route.steps:
        return f"{type(route.steps[0]).__name__} lies in between"
    paths = (route.producer, route.consumer)
    for path in paths:
        if not isinstance(site.model.get_submodule(path), Conv):
            return f"{path} is no plain convolution"
    for binding in site.bindings:
        if len(binding.nodes) > 1:
            return f"{binding.path} is called several times"
    return None


def _exchange(
    model: nn.Module,
    old: Sequence[tuple[str, nn.Module]],
    new: dict[str, nn.Module],
    added: Sequence[nn.Module],
    optimizer: Any,
) -> None:
    """Put new modules in, and their parameters into the optimizer, after checking that this can be done."""
    optimizers = as_optimizers(optimizer)
    outside = [module for module in model.modules() if all(module is not each for _, each in old)]
    shared = {id(parameter) for module in outside for parameter in module.parameters(recurse=False)}
    kept = {id(parameter) for module in added for parameter in module.parameters()}
    removed = []
    for path, module in old:
        if sum(each is module for _, each in model.named_modules(remove_duplicate=False)) > 1:
            raise SurgeryError("the module is registered in several places", where=path)
        for name, parameter in module.named_parameters():
            if id(parameter) in shared:
                raise SurgeryError("the parameter is shared with another module", where=f"{path}.{name}")
            if id(parameter) not in kept:
                removed.append((f"{path}.{name}", parameter))
    check_optimizers(optimizers, removed)
    fresh = [parameter for module in added for parameter in module.parameters()]
    replace_parameters(optimizers, removed, fresh)
    for path, module in new.items():
        model.set_submodule(path, module)
