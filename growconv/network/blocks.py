"""Modules as plain values: how surgery in depth describes the layers that it puts in, and builds them again."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growconv.errors import SiteError, SurgeryError
from growconv.network.optimizer import add_parameters, check_optimizers, replace_parameters

CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
IDEMPOTENT = {"relu": nn.ReLU, "relu6": nn.ReLU6}  # f(f(x)) = f(x)
_GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class Residual(nn.Module):
    """x + body(x).

    Args:
        body: what is added; its last layer starts at zero, so that the block starts as the identity.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        return x + self.body(x)


def identity_layer(kind: str, channels: int, axes: int, kernel_size: int, activation: str, seed: int = 0) -> nn.Module:
    """A new layer that starts as the identity on what its activation leaves alone.

    Args:
        kind: "convolution" or "residual".
        channels: channels in and out.
        axes: grid axes; 0 for a linear layer.
        kernel_size: odd number of taps per axis.
        activation: "relu", "relu6" or "prelu".
        seed: of the random weights, so that a replayed layer has the same.
    """
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        return _identity_layer(kind, channels, axes, kernel_size, activation)


def _identity_layer(kind: str, channels: int, axes: int, kernel_size: int, activation: str) -> nn.Module:
    if kind == "convolution":
        layer = _layer(channels, axes, kernel_size)
        with torch.no_grad():
            layer.bias.zero_()  # pyright: ignore[reportCallIssue]
            (nn.init.dirac_ if axes else nn.init.eye_)(layer.weight)  # pyright: ignore[reportArgumentType]
        return nn.Sequential(layer, nn.PReLU(init=1.0) if activation == "prelu" else IDEMPOTENT[activation]())
    if not axes:  # on any grid, where a batch norm would ask for its axes
        last = _layer(channels, 0, 1)
        nn.init.zeros_(last.weight)  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(last.bias)  # pyright: ignore[reportArgumentType]
        return Residual(nn.Sequential(_layer(channels, 0, 1), nn.ReLU(), last))
    norms = [_BATCH_NORMS[axes](channels) for _ in range(2)]
    nn.init.zeros_(norms[1].weight)
    first, second = (_layer(channels, axes, kernel_size, bias=False) for _ in range(2))
    return Residual(nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1]))


def _layer(channels: int, axes: int, kernel_size: int, bias: bool = True) -> nn.Module:
    if axes == 0:
        return nn.Linear(channels, channels, bias=bias)
    return CONVOLUTIONS[axes](channels, channels, kernel_size, padding=kernel_size // 2, bias=bias)


def described(module: nn.Module) -> dict[str, object]:
    """A convolution, identity or Sequential of them as plain values, for `built`."""
    if isinstance(module, nn.Sequential):
        return {"sequential": [described(each) for each in module]}
    if isinstance(module, nn.Identity):
        return {"identity": True}
    values = {name: getattr(module, name) for name in _GEOMETRY}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {"convolution": {"axes": len(values["kernel_size"]), "bias": module.bias is not None, **values}}


def built(values: Mapping[str, object]) -> nn.Module:
    """The module that `described` describes, with random weights."""
    if "sequential" in values:
        return nn.Sequential(*(built(each) for each in values["sequential"]))  # pyright: ignore[reportGeneralTypeIssues]
    if "identity" in values:
        return nn.Identity()
    given: dict = dict(values["convolution"])  # pyright: ignore[reportCallIssue, reportArgumentType]
    kind = CONVOLUTIONS[given.pop("axes")]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def module_at(model: nn.Module, path: str) -> nn.Module:
    """A module inside a model that can be replaced.

    Raises:
        SiteError: there is none, or it is the model itself or registered in several places.
    """
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
    """Check that a module and its parameters can go.

    Returns:
        Path and Parameter of everything that goes.

    Raises:
        SiteError: a module that cannot be replaced.
        SurgeryError: a parameter that another module shares, or that no optimizer owns.
    """
    inside = list(module_at(model, path).modules())
    outside = [each for each in model.modules() if all(each is not own for own in inside)]
    shared = {id(parameter) for module in outside for parameter in module.parameters(recurse=False)}
    removed = [(f"{path}.{name}", parameter) for name, parameter in inside[0].named_parameters()]
    for name, parameter in removed:
        if id(parameter) in shared:
            raise SurgeryError("the parameter is shared with another module", where=name)
    check_optimizers(optimizers, removed)
    return removed


def insert(model: nn.Module, path: str, values: Mapping[str, object], optimizers: Sequence[Optimizer]) -> nn.Module:
    """Put the identity layer that plain values describe in front of a module; returns the new layer."""
    consumer = module_at(model, path)
    weight = next(consumer.parameters())
    new = identity_layer(**values).to(weight.device, weight.dtype).train(consumer.training)  # pyright: ignore
    _pair(model, path, {"inserted": new, "consumer": consumer})
    add_parameters(optimizers, weight, new.parameters(), path)
    return new


def insert_twin(model: nn.Module, path: str, zeroed: str | None, optimizers: Sequence[Optimizer]) -> nn.Module:
    """Put a copy of a module behind it; returns the copy.

    Args:
        model: the model.
        path: of the module.
        zeroed: path inside the module of the layer whose weight and bias are zero in the copy; None for none.
        optimizers: the copy's parameters join the groups of the originals.
    """
    original = module_at(model, path)
    twin = copy.deepcopy(original)
    if zeroed is not None:
        zero(twin.get_submodule(zeroed))
    owned = {id(each) for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]}
    _pair(model, path, {"original": original, "inserted": twin})
    for old, new in zip(original.parameters(), twin.parameters(), strict=True):
        new.grad = None
        if id(old) in owned or old.requires_grad:
            add_parameters(optimizers, old, [new], path)
    return twin


def zero(module: nn.Module) -> None:
    """Set the weight and bias of a layer to zero."""
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.zero_()


def _pair(model: nn.Module, path: str, children: Mapping[str, nn.Module]) -> None:
    pair = nn.Sequential()
    for name, child in children.items():
        pair.add_module(name, child)
    pair.training = next(iter(children.values())).training
    model.set_submodule(path, pair)


def apply_block_edit(
    model: nn.Module, edit: Mapping[str, object], optimizers: Sequence[Optimizer], new: nn.Module | None = None
) -> None:
    """Do what an edit with "insert", "copy" or "replace" says.

    Args:
        model: the model.
        edit: what to do.
        optimizers: their groups and state follow.
        new: the module that "replace" puts in, with its weights; None to build one.

    Raises:
        KeyError: for an edit that is none of these.
    """
    path = str(edit["module"])
    if "insert" in edit:
        insert(model, path, edit["insert"], optimizers)  # pyright: ignore[reportArgumentType]
        return
    if "copy" in edit:
        insert_twin(model, path, edit["copy"], optimizers)  # pyright: ignore[reportArgumentType]
        return
    removed = check_replaceable(model, path, optimizers)
    if new is None:
        old = model.get_submodule(path)
        weight = next(old.parameters())
        new = built(edit["replace"])  # pyright: ignore[reportArgumentType]
        new.to(weight.device, weight.dtype).train(old.training).requires_grad_(weight.requires_grad)
    kept = {id(parameter) for parameter in new.parameters()}
    gone = [(name, parameter) for name, parameter in removed if id(parameter) not in kept]
    replace_parameters(optimizers, gone, list(new.parameters()))
    model.set_submodule(path, new)
