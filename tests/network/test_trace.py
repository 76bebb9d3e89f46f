"""Numbers of channels: which are consumed where, which are tied, which are blocked, under every kind of operation."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.network.layout import ENTRY, GROUP_IN, GROUP_OUT, IN, OUT
from growconv.network.numbers import Numbers
from growconv.network.trace import LookFailed, look
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


def _blocked(numbers: Numbers, path: str) -> set[int]:
    """The outputs of a layer that cannot grow."""
    reasons, roots = numbers.reasons(), numbers.roots()
    return {number for number in numbers.range_of((path, OUT)) if int(roots[number]) in reasons}


APART = [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    ("operation", "arrive"),
    [
        (torch.relu, [0, 1, 2, 3]),
        (lambda y: y.flip(1), [3, 2, 1, 0]),
        (lambda y: y.roll(1, 1), [3, 0, 1, 2]),
        (lambda y: y[:, [2, 0, 1, 3]], [2, 0, 1, 3]),
        (lambda y: torch.cat([y[:, 2:], y[:, :2]], 1), [2, 3, 0, 1]),
        (lambda y: F.channel_shuffle(y, 2), [0, 2, 1, 3]),
        (lambda y: torch.stack([y[:, 1], y[:, 0], y[:, 3], y[:, 2]], 1), [1, 0, 3, 2]),
        (lambda y: F.pad(y[:, 1:], (0, 0, 0, 0, 1, 0)), [-1, 1, 2, 3]),
        (lambda y: y.permute(0, 2, 3, 1).reshape(2, -1, 4).transpose(1, 2).view(2, 4, 4, 4), [0, 1, 2, 3]),
        (lambda y: y.clone().unsqueeze_(1).squeeze_(1), [0, 1, 2, 3]),
        (lambda y: F.interpolate(F.pad(y, (1, 1, 1, 1), mode="circular"), size=(4, 4)), [0, 1, 2, 3]),
        (lambda y: y.flatten(2).softmax(-1).view_as(y) * y, [0, 1, 2, 3]),
        (lambda y: y * y.mean((2, 3)).view(y.size(0), y.size(1), 1, 1), [0, 1, 2, 3]),
        (lambda y: F.adaptive_avg_pool2d(y.contiguous(memory_format=torch.channels_last), 1) * y, [0, 1, 2, 3]),
        (lambda y: y.mean((2, 3), keepdim=True).as_strided((2, 4, 1, 1), (4, 1, 4, 4)).flip(1), [3, 2, 1, 0]),
        (
            lambda y: y.contiguous(memory_format=torch.channels_last).as_strided((2, 4), (64, 1))[..., None, None] * y,
            [0, 1, 2, 3],
        ),
    ],
)
def test_channels_arrive_where_they_are_moved(operation: Callable[[Tensor], Tensor], arrive: list[int]) -> None:
    numbers = through(operation)
    assert arrivals(numbers) == arrive
    assert classes(numbers) == APART
    assert not any(int(numbers.roots()[number]) in numbers.reasons() for number in numbers.range_of(("a", OUT)))


@pytest.mark.parametrize(
    ("operation", "inputs", "tied"),
    [
        (lambda y: F.glu(y, 1), 2, [[0, 2], [1, 3]]),
        (lambda y: y.chunk(2, 1)[0] * y.chunk(2, 1)[1].sigmoid(), 2, [[0, 2], [1, 3]]),
        (lambda y: y[:, ::2] + y[:, 1::2], 2, [[0, 1], [2, 3]]),
        (lambda y: F.pixel_shuffle(y, 2), 1, [[0, 1, 2, 3]]),
        (lambda y: y + y.flip(1), 4, [[0, 3], [1, 2]]),
        (lambda y: torch.stack([y, y.roll(2, 1)]).mean(0), 4, [[0, 2], [1, 3]]),
        (lambda y: y.softmax(1), 4, [[0, 1, 2, 3]]),
        (lambda y: y.unflatten(1, (2, 2)).amax(2), 2, [[0, 1], [2, 3]]),
    ],
)
def test_channels_that_are_computed_together_are_tied(
    operation: Callable[[Tensor], Tensor], inputs: int, tied: list[list[int]]
) -> None:
    assert classes(through(operation, inputs=inputs)) == tied


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda y: torch.einsum("nchw,cd->ndhw", y, torch.eye(4)), "multiplies its channels with each other"),
        (lambda y: y * y[:, :1], "by broadcasting"),
        (lambda y: y / y.sum(1, keepdim=True), "depend on each other"),
        (lambda y: y / (y.var(1, keepdim=True) + 1), "depend on each other"),
        (lambda y: torch.fft.fft(y).real, "is not followed"),
        (lambda y: y[y > 0].mean() * torch.ones(1, 4, 4, 4), "not followed|chooses entries"),
    ],
)
def test_what_is_not_followed_blocks(operation: Callable[[Tensor], Tensor], reason: str) -> None:
    numbers = through(operation)
    said = [numbers.reasons().get(int(numbers.roots()[number])) for number in numbers.range_of(("a", OUT))]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(said)


@pytest.mark.parametrize(
    "operation",
    [
        lambda y: y - y.mean(1, keepdim=True),
        lambda y: F.layer_norm(y, y.shape[1:]),
        lambda y: y / (y.square().mean(1, keepdim=True) + 1).sqrt(),
        lambda y: y / (y.std(1, correction=0, keepdim=True) + 1),
        lambda y: y - torch.var_mean(y, 1, unbiased=False, keepdim=True)[1],
    ],
)
def test_what_stays_where_all_channels_come_twice_ties_loosely(operation: Callable[[Tensor], Tensor]) -> None:
    numbers = through(operation)
    assert classes(numbers) == APART
    assert classes(numbers, loosely=True) == [[0, 1, 2, 3]]


@pytest.mark.parametrize("name", ["var", "std", "var_mean", "std_mean"])
@pytest.mark.parametrize("options", [{}, {"correction": 0}, {"correction": 1}, {"unbiased": False}, {"unbiased": True}])
def test_a_variance_counts_as_one_that_copies_leave_alone_exactly_where_they_do(name: str, options: dict) -> None:
    def computed(y: Tensor) -> Tensor:
        found = getattr(torch, name)(y, 1, keepdim=True, **options)
        return found[0] if isinstance(found, tuple) else found

    y = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    alone = torch.allclose(computed(y), computed(torch.cat([y, y], 1)))
    numbers = through(lambda y: y / (computed(y) + 1))
    assert (classes(numbers) == APART) == alone == (not _blocked(numbers, "a"))


def test_a_slope_that_all_channels_share_is_of_none_of_them() -> None:
    """Also where a group norm over all of them makes them one class."""
    slope, norm = nn.PReLU(), nn.GroupNorm(1, 4)
    for middle in ([slope], [slope, norm], [norm, slope]):
        numbers = looked(nn.Sequential(nn.Conv2d(3, 4, 1), *middle, nn.Conv2d(4, 2, 1)), torch.randn(2, 3, 4, 4))
        (shared,) = (numbers.range_of((path, ENTRY)) for path in numbers.shapes)
        assert numbers.roots()[shared[0]] not in numbers.roots()[numbers.range_of(("0", OUT))]


def test_what_is_written_through_views_is_seen() -> None:
    def shift(y: Tensor) -> Tensor:
        out = torch.zeros_like(y)
        out[:, :1] = y[:, 3:]
        out[:, 1:].copy_(y[:, :3])
        return out

    assert arrivals(through(shift)) == [3, 0, 1, 2]


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


def test_an_error_of_the_model_comes_with_the_numbers_that_it_met() -> None:
    model = Net(lambda m, x: m.b(m.a(x) + torch.zeros(3, 1, 1)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))
    with pytest.raises(LookFailed) as caught:
        looked(model, torch.randn(1, 3, 2, 2))
    assert "size of tensor" in str(caught.value.failures[0].error)
    assert len(caught.value.failures[0].numbers) == 4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_operation_that_fails_hides_no_later_one_but_those_that_it_causes() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.b(F.relu(m.a(x).view(1, 4, -1)).view(1, 4, 2, 2) + 1)
        return m.c(y.view(1, -1, 2, 2).split(y.shape[1] // 2, 1)[0] + m.d(x)[:, : x.shape[1]])

    layers = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 6, 1), "c": nn.Conv2d(3, 2, 1), "d": nn.Conv2d(3, 3, 1)}
    model, x = Net(run, **layers), torch.randn(1, 3, 2, 2)
    ran = look(model, ((x,), {}), Numbers())
    wider = Net(run, **(layers | {"a": nn.Conv2d(3, 5, 1), "b": nn.Conv2d(4, 8, 1)}))
    numbers = Numbers()
    with pytest.raises(LookFailed) as caught:
        look(wider, ((x,), {}), numbers, before=ran)
    first, second = caught.value.failures
    assert first.fixed
    assert first.numbers == set(numbers.range_of(("a", OUT)))
    assert "size of tensor" in str(second.error)
    assert set(numbers.range_of(("d", OUT))) <= second.numbers
    assert not second.fixed
    assert caught.value.stopped is None


def test_sizes_that_followed_other_channels_are_told() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.c(m.b(y).split([y.shape[1], 1], 1)[0])

    layers = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 5, 1), "c": nn.Conv2d(4, 2, 1)}
    x = torch.randn(1, 3, 2, 2)
    ran = look(Net(run, **layers), ((x,), {}), Numbers())
    wider = layers | {"a": nn.Conv2d(3, 6, 1), "b": nn.Conv2d(6, 5, 1)}
    with pytest.raises(LookFailed) as caught:
        look(Net(run, **wider), ((x,), {}), Numbers(), before=ran)
    (failure,) = caught.value.failures
    assert failure.more == {2}
    assert not failure.fixed


def test_a_gate_of_all_channels_is_blocked_and_not_the_means_that_it_multiplies() -> None:
    model = Net(
        lambda m, x: m.b(m.a(x).mean((2, 3), keepdim=True) * m.gate(x)),
        a=nn.Conv2d(3, 4, 1),
        gate=nn.Conv2d(3, 1, 1),
        b=nn.Conv2d(4, 2, 1),
    )
    numbers = looked(model, torch.randn(1, 3, 5, 5))
    assert classes(numbers) == [[0], [1], [2], [3]]
    assert not _blocked(numbers, "a")
    assert _blocked(numbers, "gate") == set(numbers.range_of(("gate", OUT)))


def test_an_attribute_that_is_a_list_of_tensors_tells_no_sizes() -> None:
    model = Net(lambda m, x: m.b(torch.cat(m.a(x).split([1, 3], 1), 1)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))
    model.anchors = [torch.ones(4, 4), torch.ones(4, 4)]
    assert not looked(model, torch.randn(1, 3, 5, 5)).reasons().keys() & {0, 1, 2, 3}
