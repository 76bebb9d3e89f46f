"""What lies between producers and consumers, against what the code of small models says."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.convolution.geometry import Geometry
from growconv.network.layout import ENTRY, GROUP_IN, GROUP_OUT, IN, OUT
from growconv.network.site import Activation, AdaptivePool, Depthwise, Flatten, Norm, Other, Pool, Step
from growconv.network.steps import recorded_routes
from growconv.network.tape import Tape
from tests.network import hand

Code = Callable[[hand.Net, Tensor], Tensor]

RELU = Activation("relu", None, homogeneous=True)
CHAINS: dict[str, tuple[Code, list[Step]]] = {
    "nothing": (lambda m, y: m.b(y), []),
    "norm, function, window": (
        lambda m, y: m.b(F.max_pool2d(F.relu_(m.n(y)), 2)),
        [Norm("n"), RELU, Pool(Geometry((2, 2), (2, 2), (1, 1), ((0, 0), (0, 0))), average=False)],
    ),
    "slopes": (lambda m, y: m.b(m.p(y)), [Activation("prelu", "p", homogeneous=True)]),
    "depthwise": (lambda m, y: m.b(m.d(y)), [Depthwise("d", Geometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))))]),
    "written out": (lambda m, y: m.b(F.relu(y * torch.sigmoid(y))), [Activation("composite mul"), RELU]),
    "mean": (lambda m, y: m.b(F.relu(y).mean((2, 3), keepdim=True)), [RELU, AdaptivePool((1, 1), average=True)]),
    "vector": (lambda m, y: m.fc(y.mean((2, 3))), [AdaptivePool((1, 1), average=True), Flatten((1, 1))]),
    "flattened": (
        lambda m, y: m.fc(F.avg_pool2d(y, 8).flatten(1)),
        [Pool(Geometry((8, 8), (8, 8), (1, 1), ((0, 0), (0, 0))), average=True, counts_padding=True), Flatten((1, 1))],
    ),
    "one axis": (
        lambda m, y: m.c(F.max_pool1d(y.mean(3), 2)),
        [Other("mean"), Pool(Geometry((2,), (2,), (1,), ((0, 0),)), average=False)],
    ),
    "mean of one axis, squeezed": (
        lambda m, y: m.fc(y.mean(3).unsqueeze(2).mean((2, 3)).squeeze(-1)),
        [Other("mean"), Other("unsqueeze"), AdaptivePool((1, 1), average=True), Flatten((1, 1))],
    ),
    "sum of a window": (lambda m, y: m.b(F.avg_pool2d(y, 2, divisor_override=1)), [Other("avg_pool2d")]),
    "interpolated": (lambda m, y: m.b(F.interpolate(y, scale_factor=2)), [Other("upsample_nearest2d")]),
    "scaled by a map": (lambda m, y: m.b(y * m.map), [Other("mul")]),
    "halved": (lambda m, y: m.b(y / 2), [Activation("div", None, homogeneous=True)]),
}
BROKEN: dict[str, tuple[Code, str]] = {
    "gated": (lambda m, y: m.b(F.relu(y * torch.sigmoid(y.mean((2, 3), keepdim=True)))), "mul joins several producers"),
    "itself normalised": (lambda m, y: m.b(y + m.n(y)), "several ways lead from one producer to one consumer"),
    "called twice": (lambda m, y: m.b(y) + m.b(F.relu(y)), "several ways lead from one to the other"),
}


def recorded(code: Code) -> tuple[hand.Net, Tape]:
    torch.manual_seed(0)
    model = hand.Net(
        lambda m, x: code(m, m.a(x)),
        a=nn.Conv2d(3, 4, 3, padding=1), e=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1), c=nn.Conv1d(4, 2, 1),
        fc=nn.Linear(4, 2), n=nn.BatchNorm2d(4), p=nn.PReLU(4), d=nn.Conv2d(4, 4, 3, padding=1, groups=4),
    )  # fmt: skip
    model.register_buffer("map", torch.rand(8, 8))
    with Tape(model) as tape:
        model(torch.randn(2, 3, 8, 8))
    return model, tape


def joined(model: hand.Net, tape: Tape, *producers: str):
    (consumer,) = (path for path in ("b", "c", "fc") if path in tape.calls)
    keys = [(path, OUT) for path in producers] + [("n", ENTRY), ("p", ENTRY), ("d", GROUP_IN), ("d", GROUP_OUT)]
    return recorded_routes(tape, hand.site(model, dict.fromkeys([*keys, (consumer, IN)], hand.PLAIN)))


@pytest.mark.parametrize("name", list(CHAINS))
def test_a_chain_of_steps_is_read_off_in_order(name: str) -> None:
    (route,) = joined(*recorded(CHAINS[name][0]), "a")
    assert (route.producer, list(route.steps), route.problem) == ("a", CHAINS[name][1], None)


@pytest.mark.parametrize("name", list(BROKEN))
def test_what_is_no_chain_says_why(name: str) -> None:
    (route,) = joined(*recorded(BROKEN[name][0]), "a")
    assert route.problem == BROKEN[name][1]


def test_a_sum_has_a_route_from_each_of_its_producers() -> None:
    model, tape = recorded(lambda m, y: m.b(F.relu(F.silu(y) + m.n(m.e(torch.ones(2, 3, 8, 8))))))
    first, second = joined(model, tape, "a", "e")
    assert (first.producer, first.steps) == ("a", (Activation("silu"), RELU))
    assert (second.producer, second.steps) == ("e", (Norm("n"), RELU))


def test_a_write_through_a_slice_is_no_chain() -> None:
    def code(m: hand.Net, y: Tensor) -> Tensor:
        out = torch.zeros(2, 4, 8, 8)
        out[:, :, 4:] = y[:, :, 4:]
        return m.b(out)

    (route,) = joined(*recorded(code), "a")
    assert "joins several producers" in str(route.problem)
