"""Numbers sent through small models, and how to read them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from growconv.network.layout import IN, OUT
from growconv.network.numbers import Numbers
from growconv.network.trace import look
from tests.network.hand import Net


def looked(model: nn.Module, *inputs: Tensor) -> Numbers:
    numbers = Numbers()
    look(model, (inputs, {}), numbers)
    return numbers


def through(operation: Callable[[Tensor], Tensor], outputs: int = 4, inputs: int = 4) -> Numbers:
    """The numbers of `a`, an operation, `b`."""
    model = Net(lambda m, x: m.b(operation(m.a(x))), a=nn.Conv2d(3, outputs, 1), b=nn.Conv2d(inputs, 2, 1))
    return looked(model, torch.randn(2, 3, 4, 4))


def arrivals(numbers: Numbers, key: tuple[str, str] = ("b", IN)) -> list[int]:
    """Per input of a consumer which output of `a` it is; -1 for none."""
    own = numbers.range_of(("a", OUT))
    return [number - own.start if number in own else -1 for number in numbers.columns[key]]


def classes(numbers: Numbers, key: tuple[str, str] = ("a", OUT), loosely: bool = False) -> list[list[int]]:
    """The outputs of a layer that live and die together, or depend on each other in other ways too."""
    found: dict[int, list[int]] = {}
    roots = numbers.loose_roots() if loosely else numbers.roots()
    for position, number in enumerate(numbers.range_of(key)):
        found.setdefault(int(roots[number]), []).append(position)
    return list(found.values())


def blocked(numbers: Numbers, path: str) -> set[int]:
    """The outputs of a layer that cannot grow."""
    reasons, roots = numbers.reasons(), numbers.roots()
    return {number for number in numbers.range_of((path, OUT)) if int(roots[number]) in reasons}
