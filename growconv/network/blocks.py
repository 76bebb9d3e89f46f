"""Exchanging whole modules, from plain values: a layer put in, a block copied, a convolution split, two merged."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growconv.convolution.geometry import Geometry
from growconv.convolution.kernels import CONVS, compose_convs, make_conv
from growconv.convolution.split import split_kernel
from growconv.errors import SiteError, SurgeryError
from growconv.network.optimizer import add_parameters, check_optimizers, owned_by, replace_parameters

IDEMPOTENT = {"relu": nn.ReLU, "relu6": nn.ReLU6}  # f(f(x)) = f(x)
IN_FRONT = ".inserted"
"""Ends `path_before` of whatever was put in front of a layer."""
_FIRST = {frozenset({"inserted", "consumer"}): "consumer", frozenset({"original", "inserted"}): "original"}
"""By the names inside a pair that `edited` makes, the module that was there first."""
_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Residual(nn.Module):
    """x + body(x), whose last layer starts at zero, so that the block starts as the identity."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        return x + self.body(x)


def identity_layer(kind: str, channels: int, axes: int, kernel_size: int, activation: str, seed: int = 0) -> nn.Module:
    """A new "convolution" or "residual" that starts as the identity on what its activation leaves alone.

    Args:
        axes: grid axes; 0 for a linear layer.
        activation: "relu", "relu6" or "prelu".
        seed: of the random weights, so that a replayed layer has the same.
    """

    def layer(bias: bool = True) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d:
        if axes == 0:
            return nn.Linear(channels, channels, bias=bias)
        return CONVS[axes](channels, channels, kernel_size, padding=kernel_size // 2, bias=bias)

    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        if kind == "convolution":
            only = layer()
            silence(only)
            (nn.init.dirac_ if axes else nn.init.eye_)(only.weight)
            return nn.Sequential(only, nn.PReLU(init=1.0) if activation == "prelu" else IDEMPOTENT[activation]())
        norm = _BATCH_NORMS.get(axes)
        if norm is None:  # linear layers on any grid, where a batch norm would ask for its axes
            body = nn.Sequential(layer(), nn.ReLU(), layer())
        else:
            body = nn.Sequential(layer(bias=False), norm(channels), nn.ReLU(), layer(bias=False), norm(channels))
        silence(body[-1])
        return Residual(body)


def silence(module: nn.Module) -> None:
    """Set the weight and bias of a layer to zero."""
    for parameter in module.parameters(recurse=False):
        nn.init.zeros_(parameter)


def merged(first: nn.Module, second: nn.Module) -> nn.Module:
    """The one convolution of two, which trains where one of them did."""
    conv = compose_convs(first, second)  # pyright: ignore[reportArgumentType]
    trained = any(each.requires_grad for each in (*first.parameters(), *second.parameters()))
    return conv.requires_grad_(trained).train(first.training)


def split(conv: nn.Module, hidden: int, first_size: Sequence[int]) -> tuple[nn.Sequential, float]:
    """Two convolutions for one, padding to the first and stride to the second, and how far their kernel is from it."""
    geometry, found = Geometry.of(conv), split_kernel(conv.weight, hidden, tuple(first_size))  # pyright: ignore
    none, one = (0,) * geometry.axes, (1,) * geometry.axes
    bias = None if conv.bias is None else torch.zeros(hidden).to(conv.bias)  # pyright: ignore
    padding = tuple(low for low, _ in geometry.padding)
    first = make_conv(found.first, bias, one, padding, geometry.dilation, 1, conv.padding_mode)  # pyright: ignore
    second = make_conv(found.second, conv.bias, geometry.stride, none, geometry.dilation)  # pyright: ignore
    for parameter in (*first.parameters(), second.weight):
        parameter.requires_grad_(conv.weight.requires_grad)  # pyright: ignore
    return nn.Sequential(first, second).train(conv.training), float(found.residual)


def block_at(model: nn.Module, path: str) -> nn.Module:
    """A module inside a model that can be replaced; SiteError where there is none, or it is in several places."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise SiteError("there is no such module", where=path, fix="see model.named_modules()") from None
    if module is model:
        raise SiteError("the model itself cannot be replaced", expected="a path inside the model", got=repr(path))
    if sum(each is module for _, each in model.named_modules(remove_duplicate=False)) > 1:
        raise SiteError("the module is registered in several places", where=path)
    return module


def check_replaceable(model: nn.Module, path: str, optimizers: Sequence[Optimizer]) -> list[tuple[str, nn.Parameter]]:
    """The paths and Parameters of a module that is to go; errors where it, or a parameter, cannot."""
    inside = list(block_at(model, path).modules())
    outside = [each for each in model.modules() if all(each is not own for own in inside)]
    shared = {id(parameter) for module in outside for parameter in module.parameters(recurse=False)}
    removed = [(f"{path}.{name}", parameter) for name, parameter in inside[0].named_parameters()]
    for name, parameter in removed:
        if id(parameter) in shared:
            raise SurgeryError("the parameter is shared with another module", where=name)
    check_optimizers(optimizers, removed)
    return removed


def apply_block_edit(model: nn.Module, edit: Mapping, optimizers: Sequence[Optimizer]) -> None:
    """Do what an edit of the history says; parameters join, follow or leave the optimizers' groups.

    Args:
        edit: "module" is a path, and one of
            "insert": the arguments of `identity_layer`; the new layer comes in front of the module;
            "copy": the path inside the module of the layer that is silent in the copy behind it, or None;
            "split": the arguments of `split`;
            "merge": the path of a second convolution, which becomes an identity.
        optimizers: all that train the model.

    Raises:
        KeyError: for an edit that is none of these.
    """
    path = edit["module"]
    module = block_at(model, path)
    if "insert" in edit:
        weight = next(module.parameters())
        new = identity_layer(**edit["insert"]).to(weight.device, weight.dtype).train(module.training)
        _pair(model, path, {"inserted": new, "consumer": module})
        add_parameters(optimizers, weight, new.parameters(), path)
    elif "copy" in edit:
        twin, owned = copy.deepcopy(module), owned_by(optimizers)
        if edit["copy"] is not None:
            silence(twin.get_submodule(edit["copy"]))
        _pair(model, path, {"original": module, "inserted": twin})
        for old, new in zip(module.parameters(), twin.parameters(), strict=True):
            new.grad = None
            if id(old) in owned or old.requires_grad:
                add_parameters(optimizers, old, [new], path)
    elif "split" in edit:
        _replace(model, path, split(module, **edit["split"])[0], optimizers)
    else:
        second = model.get_submodule(edit["merge"])
        _replace(model, path, merged(module, second), optimizers)
        _replace(model, edit["merge"], nn.Identity().train(second.training), optimizers)


def _pair(model: nn.Module, path: str, children: dict[str, nn.Module]) -> None:
    """Put two modules in a row in the place of one."""
    pair = nn.Sequential()
    for name, child in children.items():
        pair.add_module(name, child)
    pair.training = child.training
    model.set_submodule(path, pair)


def path_before(path: str, model: nn.Module) -> str:
    """The path that a layer had before anything was put in front of it or behind its block.

    Copies have the path of their original; what was put in front of a layer has that layer's, and IN_FRONT. `path` is
    one of the model as it is now, or as it was at some time before.
    """
    module, parts = model, []
    for part in path.split("."):
        while part not in module._modules and (first := _FIRST.get(frozenset(module._modules))):
            module = module.get_submodule(first)  # the path is older than what has been put around the layer
        first = _FIRST.get(frozenset(module._modules))
        if first == "consumer" and part == "inserted":
            return ".".join(parts) + IN_FRONT
        if first is None:
            parts.append(part)
        module = module._modules.get(part) or nn.Module()
    return ".".join(parts)


def _replace(model: nn.Module, path: str, new: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Put a module in the place of another; parameters that both have stay where they are."""
    kept = {id(parameter) for parameter in new.parameters()}
    gone = [each for each in check_replaceable(model, path, optimizers) if id(each[1]) not in kept]
    replace_parameters(optimizers, gone, list(new.parameters()))
    model.set_submodule(path, new)
