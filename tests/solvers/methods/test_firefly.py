"""firefly: Taylor gains are derivatives of the loss, training raises them, the largest are kept."""

import copy

import pytest
import torch
from torch.nn import functional

from growconv.errors import ArgumentValueError, StatisticsError
from growconv.network.event import grow
from growconv.network.find import find_sites
from growconv.solvers import Request, get_solver, solve
from growconv.solvers.firefly import Candidates
from growconv.solvers.splitting import Splitting
from growconv.solvers.weights import filter_norms


@pytest.mark.parametrize("name", ["tanh", "norm", "fan", "residual"])
def test_halves_of_old_channels_compete_with_new_ones(make, collect, name):
    model, x, y = make(name)
    model.eval()
    statistics = collect(model, x, y, {"samples"})
    site, options = (
        statistics.growth_site,
        {"splits": True, "candidates": 1, "steps": 2, "strength": 3e-4, "step": 0.05},
    )
    every = solve(statistics, "firefly", 8, generator=torch.Generator().manual_seed(0), **options)
    assert (every.gains.diff() <= 0).all()
    alone = Splitting(step=0.05, tolerance=0.0).solve(
        Request(site, "auto", statistics, torch.Generator().manual_seed(0))
    )
    norms = filter_norms(site)
    for index, channel in enumerate(every.copied_from.tolist()):
        if channel >= 0:  # what a split takes off the loss: ε²/2·|λ|
            half = alone.copied_from.tolist().index(channel)
            expected = float(alone.gains[half] * (0.05 * norms[channel]) ** 2 / 2)
            assert float(every.gains[index]) == pytest.approx(expected, rel=1e-3)
    if name in ("tanh", "norm"):
        assert {channel < 0 for channel in every.copied_from.tolist()} == {True, False}
    old, before = copy.deepcopy(model), functional.cross_entropy(model(x), y).item()
    grow(model, site, every)
    if name == "tanh":  # smooth: the second derivative is that of the loss
        decrease = before - functional.cross_entropy(model(x), y).item()
        assert decrease == pytest.approx(every.expected_decrease, rel=0.15)
    if name == "norm":
        for index, channel in enumerate(every.copied_from.tolist()):
            if channel >= 0:
                assert model[1].running_var[4 + index] == old[1].running_var[channel]
                assert model[1].weight[4 + index] == old[1].weight[channel]
            else:  # transparent
                root = (model[1].running_var[4 + index] + model[1].eps).sqrt()
                assert float(model[1].weight[4 + index].detach()) == pytest.approx(float(root))


@pytest.mark.parametrize("name", ["relu", "norm", "tanh", "gelu and pooling", "fan", "linear", "residual", "depthwise"])
def test_the_prediction_is_the_derivative_of_the_true_loss(make, collect, name):
    model, x, y = make(name)
    model.eval()
    statistics = collect(model, x, y, {"samples"})
    growth = solve(statistics, "firefly", 3, steps=3, generator=torch.Generator().manual_seed(0))
    before = functional.cross_entropy(model(x), y).item()
    site, step = statistics.growth_site, 1e-4
    grow(model, site, growth, amplitude=step)
    decrease = (before - functional.cross_entropy(model(x), y).item()) / step
    assert growth.expected_decrease > 0
    assert decrease == pytest.approx(growth.expected_decrease, rel=2e-3)


def test_taylor_gains_are_derivatives_by_each_candidates_strength(make, collect):
    model, x, y = make("relu")
    statistics = collect(model, x, y, {"samples"})
    candidates = Candidates(statistics.samples_kept, 5, torch.Generator().manual_seed(0))
    gains = candidates.taylor_gains()
    filters, outgoing = candidates.weights()
    weights, biases = filters.weights
    hidden = functional.relu(functional.conv2d(x, weights["0"], biases["0"], padding=1))
    strength = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    z = model[2](functional.relu(model[0](x))) + functional.conv2d(hidden, outgoing["2"] * strength.view(1, -1, 1, 1))
    loss = functional.cross_entropy(model[3:](z), y)
    torch.testing.assert_close(gains, -torch.autograd.grad(loss, strength)[0])


def test_the_kept_candidates_are_those_with_the_largest_gains(make, collect):
    model, x, y = make("relu")
    statistics = collect(model, x, y, {"samples"})
    growth = solve(statistics, "firefly", 4, candidates=6, steps=2, generator=torch.Generator().manual_seed(5))
    candidates = Candidates(statistics.samples_kept, 24, torch.Generator().manual_seed(5))
    candidates.train(2, get_solver("firefly").learning_rate)
    gains = candidates.taylor_gains().abs()
    torch.testing.assert_close(growth.gains, gains.sort(descending=True).values[:4])
    filters, _ = candidates.weights()
    torch.testing.assert_close(growth.alpha, filters.weights[0]["0"][gains.argsort(descending=True)[:4]].detach())


def test_training_raises_every_candidates_gain_and_they_do_not_see_each_other(make, collect):
    model, x, y = make("relu")
    kept = collect(model, x, y, {"samples"}).samples_kept
    candidates = Candidates(kept, 16, torch.Generator().manual_seed(0))
    before = candidates.taylor_gains()
    candidates.train(30, 0.1)
    after = candidates.taylor_gains()
    assert (after > before).all()
    assert (after > 0).all()
    alone = Candidates(kept, 16, torch.Generator().manual_seed(0))
    alone.filters = alone.filters.picked([0]).each(lambda rows: rows.detach().requires_grad_())
    alone.outgoing = {path: tensor.detach()[:, :1].requires_grad_() for path, tensor in alone.outgoing.items()}
    alone.train(30, 0.1)
    torch.testing.assert_close(alone.taylor_gains(), after[:1])


def test_a_long_training_finds_the_best_direction_of_a_linear_pair():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 2, bias=False), torch.nn.Linear(2, 4, bias=False)).double()
    x, y = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    from growconv.statistics import collect_statistics

    (site,) = find_sites(model, x)

    def loss(out, target):
        return (out - target).square().sum(1).mean() / 2

    statistics = collect_statistics(model, [site], [(x, y)], loss, quantities={"samples", "N_raw"}, keep_samples=50)[
        site.name
    ]
    growth = solve(statistics, "firefly", 1, candidates=3, steps=600, learning_rate=0.02)
    # ⟨v, δz⟩ = αᵀNω with unit ω and α at the old filters' norm: the largest singular value is the largest gain
    best = torch.linalg.svdvals(statistics.N_raw[:, 0])[0] * model[0].weight.norm(dim=1).mean()
    assert growth.gains[0] == pytest.approx(best.item(), rel=1e-3)


def test_no_gradient_means_no_channels(make, collect):
    model, x, y = make("relu")
    torch.nn.init.zeros_(model[5].weight)
    growth = solve(collect(model, x, y, {"samples"}), "firefly", 2)
    assert growth.channels == 0
    assert "nothing to gain" in growth.reason


def test_what_is_missing_is_named(make, collect):
    model, x, y = make("relu")
    with pytest.raises(StatisticsError, match="keep_samples"):
        solve(collect(model, x, y, {"S"}), "firefly", 2)
    with pytest.raises(ArgumentValueError, match="candidates"):
        solve(find_sites(model, x)[0], "firefly", 2, candidates=0)
