"""Growth of the rank of CP and Tucker convolutions."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import growconv
from growconv.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    ScheduleError,
    SiteError,
    SolverError,
    StatisticsError,
    SurgeryError,
)
from growconv.growth.scheduler import GrowthScheduler
from growconv.growth.where import Best
from growconv.network.rank import RankSite, find_rank_sites
from growconv.solvers import SOLVERS, get_solver, solve
from growconv.solvers.rank import Rank, collect_rank_statistics, grow_rank, solve_rank
from growconv.statistics.consumer import ConsumerStatistics


def net(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        growconv.CPConv2d(6, 8, 3, padding=1, rank=4),
        nn.ReLU(),
        growconv.TuckerConv2d(8, 5, (3, 2), rank=(3, 4)),
        nn.ReLU(),
        nn.Conv2d(5, 4, 1),
    )
    return model.to(dtype)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 3, 7, 6, generator=generator, dtype=dtype)
    y = torch.randn(24, 4, 5, 5, generator=generator, dtype=dtype)
    return [(x[:12], y[:12]), (x[12:], y[12:])]


def loss(output, target):
    return F.mse_loss(output, target, reduction="sum") / len(output)


def mean_loss(model):
    with torch.no_grad():
        return sum(loss(model(x), y).item() for x, y in data()) / 2


def dense_tangent(layer):
    """Every first-order change of kernel and bias that the factors can make, as columns (D·C2, P)."""
    names = [name for name, _ in layer.named_parameters()]

    def matrix(*values):
        given = dict(zip(names, values, strict=True))
        rows = torch.func.functional_call(_Kernel(layer), {f"layer.{name}": given[name] for name in names}, ())
        return torch.cat([rows, given["bias"].unsqueeze(0)])

    jacobians = torch.autograd.functional.jacobian(matrix, tuple(p.detach() for p in layer.parameters()))
    return torch.cat([each.flatten(2).flatten(0, 1) for each in jacobians], dim=1)


class _Kernel(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        return self.layer.weight.flatten(1).T


@pytest.mark.parametrize(("path", "ranks"), [("2", 2), ("4", (0, 1)), ("4", (1, 0)), ("4", (2, 2))])
def test_rank_growth_by_finite_differences(path, ranks):
    model = net()
    sites = [site for site in find_rank_sites(model) if site.path == path]
    statistics = collect_rank_statistics(model, sites, data(), loss)[sites[0].name]
    before = mean_loss(model)
    outputs = model(data()[0][0])
    silent = copy.deepcopy(model)
    event = grow_rank(silent.get_submodule(path), ranks, statistics, amplitude=0.0)
    torch.testing.assert_close(silent(data()[0][0]), outputs, rtol=0, atol=1e-12)
    assert event.predicted_decrease == 0
    for amplitude in (1e-4, 1e-3):
        grown = copy.deepcopy(model)
        event = grow_rank(grown.get_submodule(path), ranks, statistics, amplitude=amplitude)
        assert before - mean_loss(grown) == pytest.approx(event.predicted_decrease, rel=0.02)
        assert event.predicted_decrease > 0
    assert event.width_after - event.width_before == event.channels == (ranks if path == "2" else sum(ranks))
    assert all(gain >= 0 for gain in event.gains)


def measured_layer(kind):
    """A layer with strides, dilation and padding in a model, and what it reads."""
    torch.manual_seed(3)
    options = {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}
    layer = {
        "cp": lambda: growconv.CPConv2d(6, 5, (3, 2), rank=4, **options),
        "tucker": lambda: growconv.TuckerConv2d(6, 5, (3, 2), rank=(3, 4), bias=False, **options),
        "rebuilt": lambda: growconv.CPConv2d(6, 5, 3, rank=4, padding=1, implementation="reconstructed"),
        "pointwise": lambda: growconv.CPConv2d(6, 5, 1, rank=4, stride=2),
        "circular": lambda: growconv.CPConv2d(6, 5, 3, rank=4, padding=1, padding_mode="circular"),
    }[kind]()
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), layer, nn.Tanh(), nn.Conv2d(5, 4, 1)).double()


def moments_by_hand(model):
    """M, S2 and ‖v‖²/n of the layer: patches read off one by one, v from autograd."""
    layer, rows, changes, n = model[2], [], [], 0
    for x, y in data():
        h = model[:2](x).detach()
        z = layer(h).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(target_loss(model[3:](z), y), z)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(h, [layer.padding[1]] * 2 + [layer.padding[0]] * 2, mode=mode)
        patches = F.unfold(padded, layer.kernel_size, stride=layer.stride, dilation=layer.dilation)
        if layer.bias is not None:
            patches = torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1)
        rows.append(patches.transpose(1, 2).flatten(0, 1))
        changes.append((-len(x) * gradient).flatten(2).transpose(1, 2).flatten(0, 1))
        n += len(x)
    patches, v = torch.cat(rows), torch.cat(changes)
    return patches.T @ v / n, patches.T @ patches / n, float(v.square().sum() / n)


def target_loss(output, target):
    return (output.mean((2, 3)) - target.mean((2, 3))).square().sum() / len(output)


@pytest.mark.parametrize("path", ["auto", "dense", "unfold", "offset"])
@pytest.mark.parametrize("kind", ["cp", "tucker", "rebuilt", "pointwise", "circular"])
def test_the_collector_measures_a_factorized_layer_as_its_patches_say(kind, path):
    model = measured_layer(kind)
    sites = find_rank_sites(model)
    if kind == "circular" and path == "offset":
        with pytest.raises(StatisticsError, match="circular"):
            growconv.collect_statistics(model, sites, data(), target_loss, path=path)
        return
    M, S2, energy = moments_by_hand(model)
    with growconv.StatisticsCollector(model, sites, quantities=Rank.reads, path=path) as collector:
        for x, y in data():
            target_loss(model(x), y).backward()
    for found in (growconv.collect_statistics(model, sites, data(), target_loss, path=path), collector.statistics):
        assert list(found) == [site.name for site in sites]
        for site in sites:
            statistics = found[site.name]
            torch.testing.assert_close(statistics.S2, S2, rtol=1e-10, atol=1e-10 * float(S2.abs().max()))
            torch.testing.assert_close(statistics.M, M, rtol=1e-10, atol=1e-10 * float(M.abs().max()))
            assert statistics.gradient_energy == pytest.approx(energy, rel=1e-10)
            assert (statistics.samples, statistics.growth_site, statistics.samples_kept) == (24, site, None)
            assert (statistics.S, statistics.N) == (None, None)
        assert len({id(found[site.name].S2) for site in sites}) == 1  # both ranks of a Tucker convolution share it


def test_ranks_and_channels_are_measured_in_one_pass():
    model = nn.Sequential(*net(), nn.ReLU(), nn.Conv2d(4, 4, 1)).double()
    sites = [*growconv.find_sites(model, data()[0][0]), *find_rank_sites(model)]
    options = {"quantities": {"S", "N", "samples"}, "keep_samples": 12}
    together = growconv.collect_statistics(model, sites, data(), loss, **options)
    alone = collect_rank_statistics(model, find_rank_sites(model), data(), loss)
    pair = growconv.collect_statistics(model, sites[:1], data(), loss, **options)[sites[0].name]
    assert len(together) == len(sites) == len(alone) + 1
    assert torch.equal(together[sites[0].name].N, pair.N)
    assert len(together[sites[0].name].samples_kept) == 12
    for name, statistics in alone.items():
        assert torch.equal(together[name].M, statistics.M)
        assert torch.equal(together[name].S2, statistics.S2)
        assert together[name].samples_kept is None


def test_calls_of_one_loss_add_up_and_batches_merge():
    """A layer that is called twice in a pass, and a layer that is the model."""
    torch.manual_seed(0)
    layer = growconv.CPConv2d(4, 4, 3, padding=1, rank=3).double()
    (site,) = find_rank_sites(layer)
    batches = [(torch.randn(6, 4, 5, 5).double(), torch.randn(6, 4, 5, 5).double()) for _ in range(3)]

    whole = collect_rank_statistics(layer, [site], batches, loss)[site.name]
    first, second, third = (collect_rank_statistics(layer, [site], [each], loss)[site.name] for each in batches)
    merged = first + second + third
    torch.testing.assert_close(merged.M, whole.M)
    torch.testing.assert_close(merged.S2, whole.S2)
    model = nn.Sequential(layer, layer)
    (site, *_) = find_rank_sites(model)
    found = collect_rank_statistics(model, [site], batches, loss)[site.name]
    rows, changes = [], []
    for x, y in batches:
        hidden = layer(x).detach().requires_grad_()
        output = layer(hidden).detach().requires_grad_()
        (last,) = torch.autograd.grad(loss(output, y), output)
        (first,) = torch.autograd.grad(layer(hidden), hidden, last)
        for h, gradient in ((x, first), (hidden.detach(), last)):
            patches = torch.cat([F.unfold(h, 3, padding=1), torch.ones(6, 1, 25).double()], dim=1)
            rows.append(patches.transpose(1, 2).flatten(0, 1))
            changes.append((-6 * gradient).flatten(2).transpose(1, 2).flatten(0, 1))
    patches, v = torch.cat(rows), torch.cat(changes)
    torch.testing.assert_close(found.S2, patches.T @ patches / 18)
    torch.testing.assert_close(found.M, patches.T @ v / 18)
    assert found.samples == 18


def test_a_loss_that_is_not_finite_leaves_the_buffers_as_they_were():
    model = nn.Sequential(nn.BatchNorm2d(3), growconv.CPConv2d(3, 2, 3, rank=1)).double()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(StatisticsError, match="finite"):
        collect_rank_statistics(model, [RankSite(model, "1")], data(), lambda z, _: z.sum() * float("inf"))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_new_terms_beat_drawn_ones_and_give_what_the_factors_cannot():
    model = net()
    site = RankSite(model, "2")
    statistics = collect_rank_statistics(model, [site], data(), loss)[site.name]
    growth = solve_rank(site, statistics, 1)
    tangent = dense_tangent(model[2])
    weights = torch.linalg.cholesky(statistics.S2)
    half = torch.kron(weights.T.contiguous(), torch.eye(8, dtype=torch.float64))
    wanted = torch.linalg.solve_triangular(weights, statistics.M, upper=False).flatten()
    basis = torch.linalg.qr(half @ tangent)[0]
    rank = int((torch.linalg.svdvals(half @ tangent) > 1e-8).sum())
    basis = torch.linalg.svd(half @ tangent, full_matrices=False)[0][:, :rank]
    residual = wanted - basis @ (basis.T @ wanted)

    def captured(kernel):
        change = torch.cat([kernel.flatten(1).T, torch.zeros(1, 8, dtype=torch.float64)]).flatten()
        image = half @ change
        return float((residual @ image) ** 2 / (image @ image))

    best = captured(site.kernel(growth))
    assert best == pytest.approx(float(growth.gains.sum()), rel=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        parts = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (8, 6, 3, 3)]
        assert captured(torch.einsum("o,i,a,b->oiab", *parts)) < best
    more = solve_rank(site, statistics, 3)
    assert float(more.gains.sum()) > best
    assert more.gains.tolist() == sorted(more.gains.tolist(), reverse=True)


def test_rank_is_a_method_of_the_registry_and_serves_ranks_alone():
    model = nn.Sequential(*net(), nn.ReLU(), nn.Conv2d(4, 4, 1)).double()
    pair = growconv.find_sites(model, data()[0][0])[0]
    sites = find_rank_sites(model)
    assert isinstance(get_solver("rank"), SOLVERS["rank"])
    assert pair.refusal("rank") == "it is a GrowthSite, and this method serves a RankSite"
    assert sites[0].refusal("tiny") == "it is a RankSite, and this method serves a GrowthSite"
    assert sites[0].refusal("rank") is None
    found = growconv.collect_statistics(model, [pair, *sites], data(), loss)
    for site in sites:
        growth, expected = solve(found[site.name], "rank", 2), solve_rank(site, found[site.name], 2)
        assert growth.site == site.name
        for name in ("incoming", "outgoing", "entries"):
            assert getattr(growth, name).keys() == getattr(expected, name).keys()
            assert all(torch.equal(each, getattr(expected, name)[path]) for path, each in getattr(growth, name).items())
        assert growth.gains.tolist() == expected.gains.tolist()
        assert growth.expected_decrease == expected.expected_decrease
    twin = copy.deepcopy(model)
    before, growth = mean_loss(twin), solve(found[sites[0].name], "rank", 1, twin)
    assert growconv.grow(twin, sites[0].of(twin), growth, amplitude=1e-3).method == "rank"
    assert mean_loss(twin) < before
    assert (twin[2].rank, model[2].rank) == (5, 4)
    with pytest.raises(SolverError, match=r"(?s)'tiny' cannot serve this site.*None: rank\b"):
        solve(found[sites[0].name], "tiny", 1)
    with pytest.raises(SolverError, match=r"(?s)'rank' cannot serve this site.*None: exact, .*tiny"):
        solve(found[pair.name], "rank", 1)
    with pytest.raises(SolverError, match="'rank' needs statistics"):
        solve(sites[0], "rank", 1)
    with pytest.raises(SolverError, match="no measure by which to choose"):
        solve(found[sites[0].name], "rank", "auto")
    with pytest.raises(ScheduleError, match="'rank' cannot serve any of these sites"):
        GrowthScheduler(model, None, [pair], method="rank")
    able = "exact or firefly or functional or gradmax or senn or splitting or tiny"
    with pytest.raises(ScheduleError, match=rf"has none\n  expected: {able}\n"):
        GrowthScheduler(model, None, [pair], method="random", where=Best(by="energy"))


@pytest.mark.parametrize(
    ("method", "amount", "terms"), [("random", 1, [1, 1]), ("functional", "auto", [1, 1]), ("rank", 100, [2, 4])]
)
def test_ranks_grow_beside_any_method(method, amount, terms):
    """The schedule's method reads nothing, or samples, or is the ranks' own; terms beyond the room are cut."""
    model = nn.Sequential(*net(), nn.ReLU(), nn.Conv2d(4, 4, 1)).double()
    pairs, ranks = growconv.find_sites(model, data()[0][0]), find_rank_sites(model)[1:]
    sites = ranks if method == "rank" else [*ranks, *pairs]
    scheduler = GrowthScheduler(model, None, sites, method=method, amount=amount)
    with warnings.catch_warnings(action="ignore"):  # few samples
        events = {event.site: event for event in scheduler.grow(data(), loss)}
    assert [events[site.name].channels for site in ranks] == terms
    for site in ranks:
        assert events[site.name].method == "rank"
        assert 0 < events[site.name].details["captured_energy"] <= 1
        assert events[site.name].details["samples"] == 12  # the others are held out for the amplitude
        assert len(events[site.name].details["losses"]) > 2
        assert events[site.name].realised_decrease >= 0
    assert method != "random" or "captured_energy" not in events[pairs[0].name].details


def test_rank_growth_without_statistics_preserves_the_function_and_lives():
    model = net()
    x = data()[0][0]
    before = model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    grow_rank(model[2], 2, optimizer=optimizer)
    grow_rank(model[4], (1, 2), optimizer=optimizer)
    assert (model[2].rank, model[4].rank) == (6, (4, 6))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    model(x).square().sum().backward()
    assert model[2].out_factor.grad[:, -2:].any()
    optimizer.step()
    model(x).square().sum().backward()
    assert model[2].in_factor.grad[:, -2:].any()


def test_the_scheduler_drives_channels_and_ranks():
    torch.manual_seed(0)
    model = nn.Sequential(*net(torch.float32), nn.ReLU(), nn.Conv2d(4, 4, 1))
    fresh = copy.deepcopy(model)
    batches = [(x.float(), y.float()) for x, y in data(torch.float32)]
    optimizer = torch.optim.Adam(model.parameters())
    sites = [*growconv.find_sites(model, batches[0][0]), *find_rank_sites(model)]
    scheduler = GrowthScheduler(model, optimizer, sites, every=1, times=2, amount=0.3)
    methods = set()
    for step in (1, 2):
        assert scheduler.due(step)
        before = sum(loss(model(x), y).item() for x, y in batches)
        events = scheduler.grow(batches, loss)
        methods |= {event.method for event in events}
        assert sum(loss(model(x), y).item() for x, y in batches) < before + 1e-3
        for x, y in batches:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    assert methods == {"tiny", "rank"}
    scheduler.history.replay(fresh).load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(batches[0][0]), model(batches[0][0]))


def test_rank_sites_name_themselves_and_their_bounds():
    model = net()
    names = [str(site) for site in find_rank_sites(model)]
    assert names == [
        "2 rank  (rank, 4 of at most 54 terms)",
        "4 output rank  (rank, 3 of at most 5 terms)",
        "4 input rank  (rank, 4 of at most 8 terms)",
    ]


def test_impossible_rank_growth():
    model = net()
    state = copy.deepcopy(model.state_dict())
    site = RankSite(model, "2")
    statistics = collect_rank_statistics(model, [site], data(), loss)[site.name]
    for ranks in (0, -1, 51, (1, 1)):
        with pytest.raises(ArgumentValueError):
            grow_rank(model[2], ranks, statistics)
    for ranks in ((0, 0), (3, 0), (1, 2, 3)):
        with pytest.raises(ArgumentValueError):
            grow_rank(model[4], ranks)
    with pytest.raises(ArgumentTypeError, match="factorized"):
        grow_rank(model[0], 1)
    with pytest.raises(SolverError, match="another layer"):
        grow_rank(model[4], 1, statistics)
    pair = ConsumerStatistics("2", 1, (8, 6, 3, 3), True, {}, 0.0)
    with pytest.raises(StatisticsError, match="M and S2 were not collected"):
        grow_rank(model[2], 1, pair)
    with pytest.raises(SiteError, match="rank"):
        RankSite(model, "0")
    with pytest.raises(SiteError, match="no such"):
        RankSite(model, "nowhere")
    with pytest.raises(ArgumentValueError, match="two ranks"):
        RankSite(model, "4")
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(SurgeryError, match="does not own"):
        grow_rank(model[2], 1, statistics, optimizer=stranger)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_channels_of_factorized_layers_do_not_grow_and_say_so():
    rows = growconv.explain_sites(net(), data()[0][0])
    reasons = {row.path: row.reason for row in rows if not row.growable}
    assert {"0", "2", "4"} <= set(reasons)
    assert all("factor" in reasons[path] for path in ("0", "2", "4"))
