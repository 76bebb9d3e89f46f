"""Classes of channels, and the spaces that they are gathered into."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.network.classes import mark_copied, spaces_of
from growconv.network.layout import ENTRY, IN, OUT
from growconv.network.numbers import Numbers
from growconv.network.trace import look
from tests.network.hand import Net


def numbers_of(model: nn.Module) -> Numbers:
    numbers = Numbers()
    look(model, ((torch.randn(2, 3, 4, 4),), {}), numbers)
    return numbers


def glu(m: Net, x: Tensor) -> Tensor:
    return m.c(F.relu(m.b(F.glu(m.n(m.a(x)), 1))))


def test_classes_of_one_signature_form_a_space() -> None:
    model = Net(glu, a=nn.Conv2d(3, 8, 1), n=nn.BatchNorm2d(8), b=nn.Conv2d(4, 5, 1), c=nn.Conv2d(5, 2, 1))
    spaces, why = spaces_of(numbers_of(model))
    assert [space.counts for space in spaces] == [
        {("a", OUT): 2, ("b", IN): 1, ("n", ENTRY): 2},
        {("b", OUT): 1, ("c", IN): 1},
    ]
    assert [space.units for space in spaces] == [4, 5]
    assert [space.channels for space in spaces] == [1, 1]
    assert spaces[0].paths(OUT, IN) == ("a", "b")
    assert why == {("c", OUT): "it is the model's output"}


def test_spaces_come_in_forward_order_with_their_reasons() -> None:
    model = Net(
        lambda m, x: m.d(torch.cat([m.a(x), F.relu(m.b(x))], 1)) + 0 * m.unread(x).sum(),
        unread=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 5, 1), a=nn.Conv2d(3, 4, 1), d=nn.Conv2d(9, 2, 1),
    )  # fmt: skip
    spaces, why = spaces_of(numbers_of(model))
    assert [space.paths(OUT) for space in spaces] == [("a",), ("b",)]
    assert why["unread", OUT] in ("no layer reads it", "it is multiplied or added to other channels by broadcasting")


def test_channels_that_depend_on_each_other_are_marked() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.c(F.relu(m.b(F.layer_norm(y, y.shape[1:]))))

    model = Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 5, 1), c=nn.Conv2d(5, 2, 1))
    numbers = numbers_of(model)
    spaces, _ = spaces_of(numbers)
    mark_copied(numbers, spaces)
    assert [(space.copied, space.blocks, space.units) for space in spaces] == [(True, 4, 1), (False, 1, 5)]


def test_channels_that_depend_on_those_of_other_spaces_have_a_reason() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = torch.cat([m.a(x), m.b(x)], 1)
        return m.c(y - y.mean(1, keepdim=True)) + m.d(m.b(x))

    model = Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), c=nn.Conv2d(8, 2, 1), d=nn.Conv2d(4, 2, 1))
    numbers = numbers_of(model)
    spaces, _ = spaces_of(numbers)
    mark_copied(numbers, spaces)
    assert {space.reason for space in spaces} == {"its channels depend on each other and on others"}
