"""Layers put in, copied, merged and split: the function, the optimizer, replay, interrupts."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.errors import ArgumentValueError, GrowthError, SiteError, SurgeryError
from growconv.network.depth import insert_copy, insert_layer, merge_pair, split_conv
from growconv.network.event import GrowthEvent, GrowthHistory, count_parameters, grow
from growconv.network.layout import IN, OUT
from growconv.network.site import GrowthSite, Route
from tests.network import hand
from tests.network.test_event import everything, interrupt_everywhere, same

Surgery = Callable[[nn.Module, torch.optim.Optimizer | None], GrowthEvent]


class Block(nn.Module):
    """A residual block with an activation behind the sum."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.b, self.m = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.m(self.b(F.relu(self.n(self.a(x))))))


def forward(m: hand.Net, x: Tensor) -> Tensor:
    return m.head(m.down(m.block(F.relu(m.second(m.first(x))))).mean((2, 3)))


def build(seed: int = 0) -> tuple[hand.Net, Tensor]:
    torch.manual_seed(seed)
    model = hand.Net(
        forward,
        first=nn.Conv2d(3, 5, 3, stride=2, padding=1), second=nn.Conv2d(5, 4, 3), block=Block(4), down=Block(4, 2),
        head=nn.Linear(4, 2),
    ).double()  # fmt: skip
    return model, torch.randn(4, 3, 14, 14, dtype=torch.float64)


def pair_site(model: nn.Module) -> GrowthSite:
    site = hand.site(model, {("first", OUT): hand.PLAIN, ("second", IN): hand.PLAIN})
    return replace(site, routes=(Route("first", "second", (), None),))


def head_site(model: nn.Module) -> GrowthSite:
    axes = dict.fromkeys((("down.b", OUT), ("down.shortcut", OUT), ("head", IN)), hand.PLAIN)
    return hand.site(model, axes)


SURGERY: dict[str, Surgery] = {
    "convolution": lambda m, o: insert_layer(m, pair_site(m), optimizer=o),
    "residual": lambda m, o: insert_layer(m, pair_site(m), kind="residual", kernel_size=5, optimizer=o),
    "linear": lambda m, o: insert_layer(m, head_site(m), optimizer=o),
    "linear residual": lambda m, o: insert_layer(m, head_site(m), kind="residual", optimizer=o),
    "identity copy": lambda m, o: insert_copy(m, "block", example_input=build()[1], identity=True, optimizer=o),
    "merge": lambda m, o: merge_pair(m, pair_site(m), optimizer=o),
    "split": lambda m, o: split_conv(m, "second", 16, optimizer=o),
    "copy": lambda m, o: insert_copy(m, "block", optimizer=o),
}


def trained(model: nn.Module, example: Tensor) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(example).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [name for name in SURGERY if name != "copy"])
def test_the_function_stays_and_every_new_parameter_is_trained(name: str, training: bool) -> None:
    model, example = build()
    optimizer = trained(model, example)
    model.train(training)
    expected = copy.deepcopy(model)(example)
    old = {id(p) for p in model.parameters()}
    event = SURGERY[name](model, optimizer)
    output = model(example)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    output.square().sum().backward()
    new = [p for p in model.parameters() if id(p) not in old]
    assert any(p.grad.abs().max() > 0 for p in new)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert event.parameters_after == count_parameters(model) != event.parameters_before
    optimizer.step()
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("name", SURGERY)
def test_replicas_follow_and_histories_replay_with_the_optimizer(name: str) -> None:
    model, example = build()
    replica, fresh = copy.deepcopy(model), build(seed=3)[0]
    optimizer = trained(model, example)
    replica.load_state_dict(model.state_dict())
    event = SURGERY[name](model, optimizer)
    event.apply_to(replica)
    assert torch.equal(replica.eval()(example), model.eval()(example))
    pickle.loads(pickle.dumps(event))
    model.train()(example).sum().backward()
    optimizer.step()
    history = GrowthHistory.from_json(GrowthHistory([event]).to_json())
    own = torch.optim.AdamW(fresh.parameters())
    history.replay(fresh, own)
    fresh.load_state_dict(model.state_dict())
    own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, step in ((model, optimizer), (fresh, own)):
        step.zero_grad()
        each.train()(example).square().sum().backward()
        step.step()
    for (key, value), other in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(value, other), key


@pytest.mark.parametrize("name", ["residual", "merge", "split", "copy"])
def test_an_interrupt_at_any_line_undoes_it(name: str) -> None:
    model, example = build()
    optimizer = trained(model, example)
    assert interrupt_everywhere(model, optimizer, lambda: SURGERY[name](model, optimizer)) > 10


def test_growing_goes_on_afterwards() -> None:
    model, example = build()
    optimizer = trained(model, example)
    insert_copy(model, "block", optimizer=optimizer)
    split_conv(model, "second", 16, optimizer=optimizer)
    axes = dict.fromkeys((("second.0", OUT), ("second.1", IN)), hand.PLAIN)
    site = hand.site(model, axes)
    expected = model(example)
    grow(model, site, hand.growth(site, 2), 0.0, optimizer)
    torch.testing.assert_close(model(example), expected, rtol=1e-9, atol=1e-9)


def test_refusals_come_before_anything_changes() -> None:
    model, example = build()
    before = everything(model)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    keys = [(f"{path}", IN) for path in ("block.a", "down.a", "down.shortcut")]
    stream = hand.site(model, dict.fromkeys((("second", OUT), ("block.b", OUT), *keys), hand.PLAIN))
    padded = copy.deepcopy(model)
    padded.second.padding = (1, 1)
    refusals: list[tuple[Callable[[], object], type[GrowthError], str]] = [
        (lambda: insert_layer(model, stream), SiteError, "name the consumer"),
        (lambda: insert_layer(model, pair_site(model), consumer="head"), SiteError, "name the consumer"),
        (lambda: insert_layer(model, pair_site(model), kernel_size=2), ArgumentValueError, "centre"),
        (lambda: insert_layer(model, pair_site(model), kind="attention"), ArgumentValueError, "no such kind"),
        (lambda: insert_layer(model, pair_site(model), optimizer=other), SurgeryError, "does not own"),
        (lambda: insert_copy(model, "nowhere"), SiteError, "no such module"),
        (lambda: insert_copy(model, ""), SiteError, "model itself"),
        (lambda: insert_copy(model, "down", example_input=example), SurgeryError, "another shape"),
        (lambda: insert_copy(model, "block", identity=True), ArgumentValueError, "needs an example"),
        (lambda: insert_copy(model, "block.a", example_input=example, identity=True), SurgeryError, "no layer of this"),
        (lambda: insert_copy(model, "block", optimizer=other), SurgeryError, "does not own"),
        (lambda: merge_pair(model, head_site(model)), SurgeryError, "several producers"),
        (lambda: merge_pair(padded, pair_site(padded)), SurgeryError, "pads with zeros"),
        (lambda: merge_pair(model, pair_site(model), optimizer=other), SurgeryError, "does not own"),
        (lambda: split_conv(model, "head", 3), SurgeryError, "only a plain convolution"),
        (lambda: split_conv(model, "second", 0), GrowthError, "hidden"),
        (lambda: split_conv(model, "nowhere", 3), SiteError, "no such module"),
        (lambda: split_conv(model, "second", 3, optimizer=other), SurgeryError, "does not own"),
    ]
    for refused, kind, message in refusals:
        with pytest.raises(kind, match=message):
            refused()
        assert same(everything(model), before), message
