"""Which channels arrive where, which are tied and which are blocked, under every kind of operation."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.network.layout import OUT
from tests.network.hand import Net
from tests.network.numbered import arrivals, blocked, classes, looked, through

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
    assert (classes(numbers) == APART) == alone == (not blocked(numbers, "a"))


def test_what_is_written_through_views_is_seen() -> None:
    def shift(y: Tensor) -> Tensor:
        out = torch.zeros_like(y)
        out[:, :1] = y[:, 3:]
        out[:, 1:].copy_(y[:, :3])
        return out

    assert arrivals(through(shift)) == [3, 0, 1, 2]


def test_a_gate_of_all_channels_is_blocked_and_not_the_means_that_it_multiplies() -> None:
    model = Net(
        lambda m, x: m.b(m.a(x).mean((2, 3), keepdim=True) * m.gate(x)),
        a=nn.Conv2d(3, 4, 1),
        gate=nn.Conv2d(3, 1, 1),
        b=nn.Conv2d(4, 2, 1),
    )
    numbers = looked(model, torch.randn(1, 3, 5, 5))
    assert classes(numbers) == [[0], [1], [2], [3]]
    assert not blocked(numbers, "a")
    assert blocked(numbers, "gate") == set(numbers.range_of(("gate", OUT)))
