"""Sizes that attributes of modules tell."""

import torch
from torch import Tensor, nn

from tests.network.hand import Net
from tests.network.numbered import looked


def test_sizes_in_attributes_and_parts_that_are_taken() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.sizes = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 1), [2, 3]

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.a(x).split(self.sizes, 1)
            return self.b(torch.cat([second, first], 1))

    numbers = looked(Split(), torch.randn(1, 3, 2, 2))
    assert numbers.literals == {("", "sizes", 0): [0, 1], ("", "sizes", 1): [2, 3, 4]}
    assert numbers.cuts == [[0, 1], [2, 3, 4]]


def test_an_attribute_that_is_a_list_of_tensors_tells_no_sizes() -> None:
    model = Net(lambda m, x: m.b(torch.cat(m.a(x).split([1, 3], 1), 1)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))
    model.anchors = [torch.ones(4, 4), torch.ones(4, 4)]
    assert not looked(model, torch.randn(1, 3, 5, 5)).reasons().keys() & {0, 1, 2, 3}
