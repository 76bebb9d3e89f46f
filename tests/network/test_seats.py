"""Seats: what consumers read of new channels, against the grown model itself."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.errors import SiteError
from growconv.network import layers
from growconv.network.between import region_of
from growconv.network.event import grow
from growconv.network.find import find_sites
from growconv.network.layout import IN, OUT
from growconv.network.seats import Inserted, Region
from growconv.network.site import GrowthSite
from growconv.network.tape import Tape
from tests.network import hand

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


def recorded(model: nn.Module, x: Tensor, site: GrowthSite) -> Region:
    with Tape(model) as tape:
        model(x)
    return region_of(tape, site)


def seen(model: nn.Module, x: Tensor, site: GrowthSite) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """What producers give and consumers are given, call by call."""
    given: dict[str, list[Tensor]] = {path: [] for path in site.producers}
    read: dict[str, list[Tensor]] = {path: [] for path in site.consumers}
    hooks = [
        model.get_submodule(p).register_forward_hook(lambda m, a, o, p=p: given[p].append(o.clone()) and None)
        for p in given
    ]
    hooks += [
        model.get_submodule(p).register_forward_pre_hook(lambda m, a, p=p: read[p].append(a[0].clone()) and None)
        for p in read
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return given, read


def own(site: GrowthSite, path: str, side: str, tensor: Tensor, start: int) -> Tensor:
    entries = site.entries(path, side)[start:]
    return tensor.index_select(layers.channel_axis(site.model.get_submodule(path), tensor.dim()), torch.tensor(entries))


@pytest.mark.parametrize("units", [2, 7])
@pytest.mark.parametrize("name", list(hand.SITES))
def test_consumers_of_the_grown_model_read_the_same(name: str, units: int) -> None:
    model, x, site = hand.build(name)
    model.eval()
    region = recorded(model, x, site)
    growth = hand.growth(site, units)
    old = {key: len(site.entries(*key)) for key in site.axes if key[1] in (IN, OUT)}
    grow(model, site, growth)
    given, read = seen(model, x, site)
    new = {path: [own(site, path, OUT, each, old[path, OUT]) for each in given[path]] for path in given}
    found = region.read(new, Inserted(growth.norms, growth.norm_scale, growth.carried))
    for path in site.consumers:
        for mine, theirs in zip(found[path], read[path], strict=True):
            torch.testing.assert_close(mine, own(site, path, IN, theirs, old[path, IN]), rtol=1e-10, atol=1e-10)


class Zoo(nn.Module):
    def __init__(self, run: Callable[["Zoo", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.d = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.h, self.g, self.fc = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(2, 6, 3, padding=1), nn.Linear(8, 8)
        self.big, self.scale = nn.Linear(128, 6), nn.Parameter(torch.rand(8, 1, 1))
        self.register_buffer("kernels", torch.rand(1, 1, 3, 3).repeat(8, 1, 1, 1))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def written(m: Zoo, x: Tensor) -> Tensor:
    y = m.a(x)
    out = x.new_zeros(y.shape)
    out[:, : y.shape[1]] = y
    out.add_(1.0)
    return m.b(out)


def views(m: Zoo, x: Tensor) -> Tensor:
    y = m.a(x)
    half = y[:, :, :3]
    half.mul_(2.0).add_(0.5)
    return m.b(F.relu_(y))


def twice(m: Zoo, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x))) + m.b(torch.tanh(m.a(x.flip(3))))


def squeezed(m: Zoo, x: Tensor) -> Tensor:
    y = F.silu(m.a(x))
    return m.b(y * torch.sigmoid(m.fc(y.mean((2, 3)))).view(*y.shape[:2], 1, 1))


def residual(m: Zoo, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y + m.scale * F.gelu(m.d(y)))


def shuffled(m: Zoo, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y.view(y.shape[0], 2, y.shape[1] // 2, *y.shape[2:]).transpose(1, 2).flatten(1, 2))


CODES: dict[str, Callable[[Zoo, Tensor], Tensor]] = {
    "in place": lambda m, x: m.b(F.relu_(m.a(x).mul_(2).add_(0.1))),
    "slice assignment": written,
    "write through a view": views,
    "two calls": twice,
    "squeeze excite": squeezed,
    "residual": residual,
    "shuffle": shuffled,
    "glu": lambda m, x: m.h(F.glu(m.a(x), 1)),
    "pixel shuffle": lambda m, x: m.g(F.pixel_shuffle(m.a(x), 2)),
    "flatten": lambda m, x: m.big(F.adaptive_avg_pool2d(m.a(x), 4).flatten(1)),
    "pool and pad": lambda m, x: m.b(F.pad(F.max_pool2d(m.a(x), 2), (1, 1, 0, 1), mode="reflect")),
    "blur": lambda m, x: m.b(F.conv2d(F.relu(m.a(x)), m.kernels, padding=1, groups=len(m.kernels))),
    "dropout": lambda m, x: m.b(F.dropout(F.relu(m.a(x)), 0.0)),
}


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", list(CODES))
def test_the_models_own_forward_with_the_entries_replaced(name: str, grad: bool, narrow: bool) -> None:
    torch.manual_seed(0)
    model, x = used(Zoo(CODES[name]).double()), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    (site,) = (each for each in find_sites(model, x) if "a" in each.producers)
    with torch.set_grad_enabled(grad):
        region = recorded(model, x, site)
    if region.narrow and not narrow:
        region = forced(model, x, site)
    units, granularity = 2, site.granularity
    entries = {p: site.entries(p, OUT)[: int(units * granularity * site.ratio(p, OUT))] for p in site.producers}
    given, _ = seen(model, x, site)
    new = {
        p: [torch.randn_like(own(site, p, OUT, each, 0))[:, : len(entries[p])].requires_grad_() for each in given[p]]
        for p in given
    }
    count = dict.fromkeys(new, 0)

    def replaced(p: str, output: Tensor) -> Tensor:
        count[p] += 1
        return output.detach().index_copy(1, torch.tensor(entries[p]), new[p][count[p] - 1])

    with torch.no_grad():
        if hasattr(model, "scale"):
            model.scale.copy_(model.scale.mean().expand(8, 1, 1))  # as surgery does
    hooks = [model.get_submodule(p).register_forward_hook(lambda m, a, o, p=p: replaced(p, o)) for p in new]
    read: dict[str, list[Tensor]] = {p: [] for p in site.consumers}
    hooks += [
        model.get_submodule(p).register_forward_pre_hook(lambda m, a, p=p: read[p].append(a[0].clone()) and None)
        for p in read
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    found = region.read(new)
    truth, mine = [], []
    for path in site.consumers:
        positions = site.entries(path, IN)[: int(units * granularity * site.ratio(path, IN))]
        for each, theirs in zip(found[path], read[path], strict=True):
            expected = theirs.index_select(1, torch.tensor(positions))
            assert torch.equal(each, expected)
            truth.append(expected.sin().sum())
            mine.append(each.sin().sum())
    leaves = [each for calls in new.values() for each in calls]
    for first, second in zip(
        torch.autograd.grad(sum(mine), leaves), torch.autograd.grad(sum(truth), leaves), strict=True
    ):
        torch.testing.assert_close(first, second)


def used(model: Zoo) -> Zoo:
    """The model without layers and parameters that its code does not use, which might consume anything."""
    called = set()
    hooks = [m.register_forward_hook(lambda *_, name=name: called.add(name)) for name, m in model.named_children()]
    model(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    for name in [name for name, _ in model.named_children() if name not in called]:
        delattr(model, name)
    model(torch.zeros(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    if model.scale.grad is None:
        del model.scale
    model.zero_grad()
    return model


def forced(model: nn.Module, x: Tensor, site: GrowthSite) -> Region:
    """By seats, although the channels could be run alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("growconv.network.between._in_order", lambda *_: False)
        return recorded(model, x, site)


@pytest.mark.parametrize("name", ["pair", "depthwise", "whole groups", "transposed", "group norm", "flatten", "mlp"])
def test_both_ways_agree(name: str) -> None:
    model, x, site = hand.build(name)
    region, seated = recorded(model, x, site), forced(model, x, site)
    assert region.narrow
    assert not seated.narrow
    growth = hand.growth(site, 9)
    given, _ = seen(model, x, site)
    entries = {path: int(growth.channels * site.ratio(path, OUT)) for path in given}
    new = {}
    for path in given:
        axis = layers.channel_axis(model.get_submodule(path), given[path][0].dim())
        new[path] = [
            torch.randn_like(each.narrow(axis, 0, 1).repeat_interleave(entries[path], axis)) for each in given[path]
        ]
    for inserted in (Inserted(growth.norms, torch.rand(growth.channels), growth.carried), Inserted()):
        moments: list[dict] = [{}, {}]
        one, other = (each.read(new, inserted, found) for each, found in zip((region, seated), moments, strict=True))
        for path in one:
            for mine, theirs in zip(one[path], other[path], strict=True):
                torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(*moments)


@pytest.mark.parametrize(
    "name", ["pair", "glu", "pixel shuffle", "flatten last", "concatenation", "stream", "inside groups"]
)
def test_part_of_a_batch(name: str) -> None:
    model, x, site = hand.build(name)
    region = recorded(model, x, site)
    given, _ = seen(model, x, site)
    new = {path: [torch.randn_like(own(site, path, OUT, each, 0)) for each in given[path]] for path in given}
    index = torch.tensor([3, 1])
    moments: dict = {}
    whole = region.read(new, measured=moments)
    part = region.part(index).read({p: [each[index] for each in new[p]] for p in new}, Inserted(moments))
    for path in whole:
        for mine, theirs in zip(part[path], whole[path], strict=True):
            torch.testing.assert_close(mine, theirs[index])


def test_parameters_as_long_as_the_batch_are_no_samples() -> None:
    torch.manual_seed(0)
    model, x = used(Zoo(residual).double()), torch.randn(8, 3, 8, 8, dtype=torch.float64)
    (site,) = (each for each in find_sites(model, x) if "a" in each.producers)
    region = recorded(model, x, site)
    assert not region.narrow
    given, _ = seen(model, x, site)
    new = {path: [torch.randn_like(each) for each in given[path]] for path in given}
    part = region.part(slice(2, 5)).read({path: [each[2:5] for each in new[path]] for path in new})
    for path, calls in region.read(new).items():
        for whole, some in zip(calls, part[path], strict=True):
            torch.testing.assert_close(some, whole[2:5])


def test_samples_that_are_mixed_need_the_whole_batch() -> None:
    model = hand.Net(lambda m, x: m.b(m.a(x).softmax(0)), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 2, 1))
    x = torch.randn(4, 3, 6, 6)
    site = hand.site(model, {("a", OUT): hand.PLAIN, ("b", IN): hand.PLAIN})
    region = recorded(model, x, site)
    assert not region.divisible
    with pytest.raises(SiteError, match="all samples"):
        region.part(slice(0, 2))
