"""Numbers of layers and bare parameters: what is cut, carried and called."""

import torch
from torch import Tensor, nn

from growconv.network.layout import ENTRY, GROUP_IN, GROUP_OUT, OUT
from tests.network.hand import Net
from tests.network.numbered import classes, looked


def test_a_slope_that_all_channels_share_is_of_none_of_them() -> None:
    """Also where a group norm over all of them makes them one class."""
    slope, norm = nn.PReLU(), nn.GroupNorm(1, 4)
    for middle in ([slope], [slope, norm], [norm, slope]):
        numbers = looked(nn.Sequential(nn.Conv2d(3, 4, 1), *middle, nn.Conv2d(4, 2, 1)), torch.randn(2, 3, 4, 4))
        (shared,) = (numbers.range_of((path, ENTRY)) for path in numbers.shapes)
        assert numbers.roots()[shared[0]] not in numbers.roots()[numbers.range_of(("0", OUT))]


def test_parameters_and_buffers_have_numbers_of_their_own() -> None:
    model = Net(lambda m, x: m.b(m.a(x) * m.scale + m.shift[:, None, None]), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))
    model.scale, _ = nn.Parameter(torch.ones(4, 1, 1)), model.register_buffer("shift", torch.ones(4))
    numbers = looked(model, torch.randn(1, 3, 2, 2))
    assert numbers.shapes == {"scale": (4, 1, 1), "shift": (4,)}
    for position, number in enumerate(numbers.range_of(("a", OUT))):
        together = {int(numbers.roots()[numbers.range_of((path, ENTRY))[position]]) for path in ("scale", "shift")}
        assert together == {int(numbers.roots()[number])}


def test_norms_and_grouped_convolutions_carry_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 8, 1, groups=4), nn.Conv2d(8, 2, 1))
    numbers = looked(model, torch.randn(2, 3, 4, 4))
    assert classes(numbers, ("0", OUT)) == [[0, 1], [2, 3]]
    assert len(numbers.columns["2", GROUP_IN]) == 4
    assert classes(numbers, ("2", GROUP_OUT)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(numbers.columns["1", ENTRY]) == 4


def test_calls_order_and_layers_without_gradients() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.a = nn.Conv2d(4, 2, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.a(x)
            return self.b(y) + self.b(self.a(x.flip(-1)))

    numbers = looked(Siamese(), torch.randn(1, 3, 2, 2))
    assert numbers.calls == {"a": 2, "b": 2}
    assert numbers.order == ["a", "b"]
    assert numbers.trained == {"a": True, "b": True}  # one of the two calls is enough
    assert numbers.outputs == 1
