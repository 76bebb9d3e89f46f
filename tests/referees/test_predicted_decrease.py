"""Hazard: a predicted decrease that is not the slope of the true loss behind some norm, activation or weight norm.

The referee is the loss of two grown copies, in float64, in the mode in which the statistics were collected.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import growconv
from growconv.errors import SolverError
from growconv.network.site import GrowthSite
from growconv.solvers import get_solver

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fewer kept"),
    pytest.mark.filterwarnings("ignore:.*what lies between"),
]
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda _: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "batch, no running": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "batch, plain": lambda c: nn.BatchNorm2d(c, affine=False),
    "one group": lambda c: nn.GroupNorm(1, c),
    "two groups": lambda c: nn.GroupNorm(2, c),
    "a group each": lambda c: nn.GroupNorm(c, c),
    "groups, plain": lambda c: nn.GroupNorm(2, c, affine=False),
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
    "instance, running": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "two norms": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.GroupNorm(2, c)),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    **{
        kind.__name__: kind
        for kind in (
            *(
                nn.Identity,
                nn.ReLU,
                nn.LeakyReLU,
                nn.ReLU6,
                nn.ELU,
                nn.SELU,
                nn.CELU,
                nn.GELU,
                nn.SiLU,
                nn.Mish,
                nn.Tanh,
            ),
            *(nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Tanhshrink, nn.PReLU),
        )
    },
    "PReLU by channel": lambda: nn.PReLU(4),
    "Softshrink": lambda: nn.Softshrink(0.1),
    "Threshold": lambda: nn.Threshold(0.1, 0.0),
}
LIFTED = ("none", "batch", "batch, no running")
METHODS = ("tiny", "exact", "functional", "gradmax", "firefly")


def build(norm: str, activation: str, weight_normed: str, first: bool, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    between = [NORMS[norm](4), ACTIVATIONS[activation]()]
    convolutions = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)]
    for index in weight_normed:
        weight_norm(convolutions[int(index)])
    model = nn.Sequential(
        convolutions[0], *between[:: 1 if first else -1], convolutions[1], nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)
    )  # fmt: skip
    model(torch.zeros(2, 3, 7, 7))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape) if "var" in name or "weight" in name else tensor + 0.2)
    return model.double()


def slope_and_prediction(model: nn.Sequential, method: str, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    site = first_site(model, x)
    reads = get_solver(method).reads | {"samples"}
    found = growconv.collect_statistics(model, [site], [(x, y)], F.cross_entropy, quantities=reads, keep_samples=len(x))
    options = {"random_starts": 1} if method == "exact" else {}
    growth = growconv.solve(found[site.name], method, 2, **options)
    assert growth.expected_decrease is not None
    step = 1e-5 / max(float(weight.abs().max()) for weight in growth.outgoing.values())
    values = []
    for amplitude in (-step, step):
        grown = copy.deepcopy(model)
        growconv.grow(grown, first_site(grown, x), growth, amplitude=amplitude)
        values.append(float(F.cross_entropy(grown.train(model.training)(x), y).detach()))
    return (values[0] - values[1]) / (2 * step), growth.expected_decrease, 1e-11 / step


def first_site(model: nn.Sequential, x: Tensor) -> GrowthSite:
    return next(site for site in growconv.find_sites(model, x) if site.producers == ("0",))


def dead(norm: str, activation: str, method: str) -> bool:
    """Whether channels with α = 0 would stay there and cannot be lifted."""
    flat = activation in ("Softshrink", "Threshold") or (activation in ("ReLU", "ReLU6") and norm not in LIFTED)
    return method == "gradmax" and flat


@settings(max_examples=30)
@given(
    norm=st.sampled_from(sorted(NORMS)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    weight_normed=st.sampled_from(("", "0", "1", "01")),
    method=st.sampled_from(METHODS),
    training=st.booleans(),
    first=st.booleans(),
    seed=st.integers(0, 100),
)
@example("batch", "ReLU", "", "gradmax", True, True, 0)  # lifted by the bias of a norm in training
@example("batch, no running", "ReLU", "", "gradmax", False, True, 0)
@example("one group", "GELU", "", "functional", True, True, 0)
@example("two groups", "ReLU", "01", "tiny", True, True, 0)
@example("a group each", "PReLU", "", "tiny", False, False, 0)  # a slope that all channels share
def test_the_prediction_is_the_slope_of_the_loss(
    norm: str, activation: str, weight_normed: str, method: str, training: bool, first: bool, seed: int
) -> None:
    model = build(norm, activation, weight_normed, first, seed).train(training)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 3, 7, 7, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (12,), generator=generator)
    refused = pytest.raises(SolverError, match="dead channels") if dead(norm, activation, method) else nullcontext()
    with refused:
        slope, predicted, rounding = slope_and_prediction(model, method, x, y)
        assert predicted == pytest.approx(slope, rel=0.02, abs=rounding)
