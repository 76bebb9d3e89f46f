"""Every method on every kind of site: it grows and trains, or says at once that it cannot."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growconv
from growconv.errors import GrowthError
from growconv.network.site import GrowthSite
from growconv.solvers import get_solver
from tests.methods import METHODS
from tests.network import hand
from tests.network.between_layers import shuffled_units

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fewer kept samples"),
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*what lies between"),
]
CLOSED = {"tiny", "exact", "gradmax"}


def siamese(m: hand.Net, x: Tensor) -> Tensor:
    first, second = (m.b(F.relu(m.a(each))).mean((2, 3)) for each in (x, x.flip(3)))
    return m.head(torch.cat([first, second], 1))


def levels(m: hand.Net, x: Tensor) -> Tensor:
    low = F.gelu(m.a(x))
    high = F.gelu(m.c(F.avg_pool2d(x, 2)))
    return m.b(low).mean((2, 3)) + m.b(high).mean((2, 3))


def repvgg(m: hand.Net, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.b(F.relu(m.n(x) + m.n1(m.c(x)) + m.n2(m.d(x))))


MODELS: dict[str, Callable[[], tuple[hand.Net, Tensor]]] = {
    "siamese": lambda: (
        hand.Net(siamese, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 5, 3), head=nn.Linear(10, 2)),
        torch.randn(6, 3, 7, 7),
    ),
    "levels": lambda: (
        hand.Net(levels, a=nn.Conv2d(3, 4, 3, padding=1), c=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(4, 2, 1)),
        torch.randn(6, 3, 8, 8),
    ),
    "repvgg": lambda: (
        hand.Net(
            repvgg, a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4), n1=nn.BatchNorm2d(4), n2=nn.BatchNorm2d(4),
            c=nn.Conv2d(4, 4, 3, padding=1), d=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 2, 1),
        ),
        torch.randn(6, 3, 8, 8),
    ),
    "squeeze excite": lambda: (
        hand.Net(
            lambda m, x: m.b((y := F.silu(m.a(x))) * torch.sigmoid(m.fc(y.mean((2, 3)))).view(*y.shape[:2], 1, 1)),
            a=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 4), b=nn.Conv2d(4, 2, 1),
        ),
        torch.randn(6, 3, 8, 8),
    ),
    "shuffled units": lambda: (shuffled_units(), torch.randn(6, 3, 5, 5)),
}  # fmt: skip


@cache
def build(name: str) -> tuple[nn.Module, Tensor, GrowthSite]:
    torch.manual_seed(0)
    if name in hand.SITES:
        model, x, site = hand.SITES[name]()
        model, x = model.double(), torch.randn(6, *x.shape[1:], dtype=torch.float64)
        found = [each for each in growconv.find_sites(model, x) if set(each.producers) == set(site.producers)]
        return model, x, found[0] if found else site
    model, x = MODELS[name]()
    model, x = model.double(), x.double()
    (site,) = growconv.find_sites(model, x)[:1]
    return model, x, site


def loss(output: Tensor, _: object) -> Tensor:
    return output.square().mean() + output.sin().mean()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in (*hand.SITES, *MODELS) if name != "weight norm hook"])
def test_grows_and_trains_or_is_refused(name: str, method: str) -> None:
    model, x, site = copy.deepcopy(build(name))
    solver = get_solver(method, **({"random_starts": 1} if method == "exact" else {}))
    refused = site.refusal(method)
    if method not in CLOSED | {"net2net", "splitting"}:
        assert refused is None
    batches = [(x, None), (x + 0.1, None)]
    if refused is not None:
        assert method in CLOSED or name in ("weight norm", "standardised")
        with pytest.raises(GrowthError):
            growconv.solve(site, method, 2, model)
        return
    subject = site
    if solver.reads:
        kept = {"keep_samples": 12} if "samples" in solver.reads else {}
        subject = growconv.collect_statistics(model, [site], batches, loss, quantities=solver.reads, **kept)[site.name]
    before = copy.deepcopy(model)
    growth = growconv.solve(subject, solver, 2, model, torch.Generator().manual_seed(0))
    if growth.channels == 0:
        assert growth.reason
        return
    width = site.width
    growconv.grow(model, site, growth)
    assert site.width == width + growth.channels
    model.eval(), before.eval()
    if method in ("senn", "north", "random", "net2net", "variance_transfer"):
        torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-4)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model(x), None).backward()
        optimizer.step()
    assert all(bool(torch.isfinite(each).all()) for each in model.parameters())
