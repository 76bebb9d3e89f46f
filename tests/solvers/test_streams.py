"""Closed forms on residual streams, which several layers produce and consume, against brute force in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growconv
from growconv.network.layout import IN
from growconv.network.site import GrowthSite
from tests.network import zoo
from tests.network.hand import Net

STREAM, READERS = ("stem", "up1", "up2"), ("down1", "down2", "head")
SEEN = {"down1": STREAM[:1], "down2": STREAM[:2], "head": STREAM}
SIDE, SAMPLES = 6, 24


def residual(m: Net, x: Tensor) -> Tensor:
    y = m.stem(x)
    y = y + m.up1(torch.relu(m.down1(y)))
    y = y + m.up2(torch.relu(m.down2(y)))
    return m.head(y)


def build(width: int, seed: int = 0, bias: bool = True) -> Net:
    torch.manual_seed(seed)
    sizes = {"stem": (2, width), "up1": (3, width), "up2": (3, width), "down1": (width, 3), "down2": (width, 3)}
    sizes |= {"head": (width, 2)}
    layers = {path: nn.Conv2d(*size, 3, padding=1, bias=bias) for path, size in sizes.items()}
    return Net(residual, **layers).double()


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(SAMPLES, 2, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, build(4, seed=5)(x)


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).sum(1).mean()


def stream_of(model: nn.Module, x: Tensor) -> GrowthSite:
    return next(site for site in growconv.find_sites(model, x) if set(site.producers) == set(STREAM))


def by_hand(model: Net, x: Tensor, target: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per consumer X (n, a, b, m), with zeros for what comes after it, and v, from what the layers are given."""
    given, gave = {}, {}

    def record(path: str, args: tuple[Tensor], output: Tensor) -> None:
        given[path], gave[path] = args[0], output

    for path in (*STREAM, *READERS):
        model.get_submodule(path).register_forward_hook(lambda _m, a, o, p=path: record(p, a, o))
    value = loss(model(x), target)
    gradients = torch.autograd.grad(value, [gave[path] for path in READERS])
    columns = {}
    for reader in READERS:
        maps = []
        for path in STREAM:
            patches = F.unfold(given[path].detach(), 3, padding=1)
            patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)  # the bias
            maps.append(patches if path in SEEN[reader] else torch.zeros_like(patches))
        stacked = torch.cat(maps, 1).unflatten(2, (SIDE, SIDE))
        columns[reader] = F.unfold(stacked, 3, padding=1).unflatten(1, (-1, 9))
    return columns, {path: -len(x) * each.flatten(2) for path, each in zip(READERS, gradients, strict=True)}


@pytest.mark.parametrize("scratch_bytes", [2**28, 2**19])  # the second takes a few samples at a time
def test_statistics_stack_the_patches_of_all_producers(scratch_bytes: int) -> None:
    model, (x, target) = build(3), data()
    site = stream_of(model, x)
    found = growconv.collect_statistics(
        model, [site], [(x, target)], loss, quantities={"S", "N_raw"}, scratch_bytes=scratch_bytes
    )
    assert found[site.name].samples == SAMPLES
    columns, v = by_hand(copy.deepcopy(model), x, target)
    for each in found[site.name].consumers:
        X = columns[each.consumer]
        S = torch.einsum("nabm,ndbm->ad", X, X) / len(x)
        N = torch.einsum("nabm,ncm->abc", X, v[each.consumer]) / len(x)
        torch.testing.assert_close(each.S, S, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(each.N_raw, N, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["tiny", "exact", "gradmax"])
def test_the_slope_of_the_loss_is_the_expected_decrease(method: str) -> None:
    """The way through the stream is linear here, so that the statistics tell the slope at amplitude 0."""
    model, (x, target) = build(3), data()
    site = stream_of(model, x)
    solver = growconv.solvers.get_solver(method, **({"random_starts": 1} if method == "exact" else {}))
    found = growconv.collect_statistics(
        model, [site], [(x, target)], loss, quantities=solver.reads | {"N_raw"}, keep_samples=SAMPLES
    )[site.name]
    growth = growconv.solve(found, solver, 3, model)
    values = []
    for amplitude in (-1e-5, 1e-5):
        grown = copy.deepcopy(model)
        growconv.grow(grown, site.of(grown), growth, amplitude)
        values.append(float(loss(grown(x), target).detach()))
    assert growth.expected_decrease is not None
    assert growth.expected_decrease >= 0
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(growth.expected_decrease, rel=1e-4, abs=1e-9)


def test_tiny_sees_every_producer_as_the_consumers_that_read_it_do() -> None:
    """The share that is captured, by brute force: more than with S summed over consumers that do not read all of it."""
    model, (x, target) = build(3), data()
    site = stream_of(model, x)
    solver = growconv.solvers.get_solver("tiny", signs=False)
    found = growconv.collect_statistics(model, [site], [(x, target)], loss, quantities=solver.reads, keep_samples=4)
    subject = found[site.name]
    columns, _ = by_hand(copy.deepcopy(model), x, target)

    def captured(alpha: Tensor, omega: Tensor) -> float:
        agreement = energy = 0.0
        parts = omega.split([each.N[0].numel() for each in subject.consumers], 1)
        for each, part in zip(subject.consumers, parts, strict=True):
            theta = torch.einsum("ka,kbc->abc", alpha, part.reshape(-1, *each.N.shape[1:]))
            agreement += float((theta * each.N).sum())
            energy += float(torch.einsum("nabm,abc->ncm", columns[each.consumer], theta).square().sum()) / len(x)
        return agreement**2 / energy

    growth = growconv.solve(subject, solver, 2, model)
    alpha = torch.cat(
        [torch.cat([growth.incoming[p].flatten(1), growth.incoming_bias[p][:, None]], 1) for p in STREAM], 1
    )
    rights = [growth.outgoing[each.consumer].permute(1, 2, 3, 0).flatten(1) for each in subject.consumers]
    summed = growconv.solvers.tiny(subject.S, subject.columns, 2)
    assert captured(alpha, torch.cat(rights, 1)) > captured(summed.alpha, summed.omega)


def test_as_many_channels_as_hold_their_gain_on_other_samples() -> None:
    model, (x, target) = build(3), data()
    site = stream_of(model, x)
    solver = growconv.solvers.get_solver("tiny")
    found = growconv.collect_statistics(
        model, [site], [(x, target)], loss, quantities=solver.reads, keep_samples=SAMPLES // 2
    )
    growth = growconv.solve(found[site.name], solver, "auto", model)
    assert growth.reason is not None
    assert f"on {SAMPLES // 4} held-out samples" in growth.reason


def test_moments_of_norm_layers_behind_a_stream_need_samples() -> None:
    model = zoo.build("residual")[0]
    site = next(each for each in growconv.find_sites(*zoo.build("residual")) if len(each.producers) > 1)
    assert "kept samples" in str(growconv.solvers.get_solver("tiny", signs=False).refusal(site.of(model)))


def test_what_a_hyperparameter_rules_out_is_said_when_the_schedule_is_made() -> None:
    model, example = zoo.build("residual")
    stream = next(each for each in growconv.find_sites(model, example) if len(each.producers) > 1)
    solver = growconv.solvers.get_solver("tiny", signs=False)
    with pytest.raises(growconv.errors.ScheduleError, match="kept samples"):
        growconv.GrowthScheduler(model, None, [stream], method=solver, every=1)
    assert growconv.GrowthScheduler(model, None, [stream], method="tiny", every=1).sites == (stream,)


def test_exact_captures_more_than_tiny_and_tiny_more_than_chance() -> None:
    model, (x, target) = build(3), data()
    site, shares = stream_of(model, x), {}
    for method in ("exact", "tiny"):
        solver = growconv.solvers.get_solver(method)
        found = growconv.collect_statistics(
            model, [site], [(x, target)], loss, quantities=solver.reads, keep_samples=SAMPLES
        )
        growth = growconv.solve(found[site.name], solver, 2, model, torch.Generator().manual_seed(0))
        shares[method] = growconv.captured_energy(model, site, growth, [(x, target)], loss)
    drawn = growconv.solve(site, "random", 2, model, torch.Generator().manual_seed(0), outgoing=1.0)
    chance = growconv.captured_energy(model, site, drawn, [(x, target)], loss)
    assert shares["exact"] > 1.2 * shares["tiny"]
    assert shares["tiny"] > 5 * chance


@pytest.mark.parametrize("method", ["tiny", "gradmax"])
def test_every_site_of_a_residual_network_is_served(method: str) -> None:
    """With batch norms and ReLUs, as in a ResNet; a small step with the new channels lowers the loss."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = torch.relu(m.n0(m.stem(x)))
        y = torch.relu(y + m.n2(m.up1(torch.relu(m.n1(m.down1(y))))))
        y = torch.relu(m.n5(m.short(y)) + m.n4(m.up2(torch.relu(m.n3(m.down2(y))))))
        return m.head(y.mean((2, 3)))

    torch.manual_seed(0)
    convs = {"stem": (2, 4, 1), "down1": (4, 4, 1), "up1": (4, 4, 1), "down2": (4, 6, 2), "up2": (6, 8, 1)}
    layers = {path: nn.Conv2d(a, b, 3, stride, 1, bias=False) for path, (a, b, stride) in convs.items()}
    norms = {f"n{index}": nn.BatchNorm2d(size) for index, size in enumerate((4, 4, 4, 6, 8, 8))}
    model = Net(forward, **layers, **norms, short=nn.Conv2d(4, 8, 1, 2, bias=False), head=nn.Linear(8, 3)).double()
    x, target = torch.randn(SAMPLES, 2, 8, 8, dtype=torch.float64), torch.arange(SAMPLES) % 3
    model(x)
    model.eval()
    sites = growconv.find_sites(model, x)
    assert [site.refusal(method) for site in sites] == [None] * 4
    assert {len(site.producers) for site in sites} == {1, 2}
    solver = growconv.solvers.get_solver(method)
    keep = {"keep_samples": SAMPLES} if "samples" in solver.reads else {}
    for site in sites:
        found = growconv.collect_statistics(
            model, [site], [(x, target)], F.cross_entropy, quantities=solver.reads, **keep
        )[site.name]
        growth = growconv.solve(found, solver, 2, model)
        before, width = float(F.cross_entropy(model(x), target).detach()), len(site.entries(site.consumers[0], IN))
        growconv.grow(model, site, growth, amplitude=0.01)
        assert len(site.entries(site.consumers[0], IN)) == width + 2
        after = float(F.cross_entropy(model(x), target).detach())
        assert after < before if method == "tiny" else after == pytest.approx(before, abs=1e-3)
        gradients = torch.autograd.grad(
            F.cross_entropy(model(x), target), [model.get_submodule(p).weight for p in site.producers]
        )
        assert all(float(each[-2:].abs().max()) > 0 for each in gradients)
