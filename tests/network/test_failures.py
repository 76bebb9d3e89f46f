"""Errors of the code at other widths: what each tells, and going on after it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.network.failures import LookFailed
from growconv.network.layout import OUT
from growconv.network.numbers import Numbers
from growconv.network.trace import look
from tests.network.hand import Net
from tests.network.numbered import looked


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
