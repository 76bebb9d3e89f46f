"""net2net: the function stays, copies share what they were copied from, and stop being copies in training."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from growconv.errors import ArgumentValueError, SolverError
from growconv.network.event import grow
from growconv.network.find import find_sites
from growconv.solvers import solve
from growconv.solvers.base import get_solver
from growconv.solvers.net2net import draw_copies, draw_shares


@pytest.mark.parametrize("training", [False, True])
def test_the_function_stays_on_every_kind_of_site(any_model, training):
    name, model, x, _ = any_model
    model.train(training)
    before = model(x).detach()
    for seed in range(2):
        for site in find_sites(model, x):
            width = site.width
            growth = solve(site, "net2net", 4, generator=torch.Generator().manual_seed(seed))
            grow(model, site, growth)
            assert site.width == width + 4, name
            assert (model(x) - before).abs().max() < 1e-12 * before.abs().max(), (name, site.name)


def test_the_function_stays_in_single_precision(make):
    model, x, _ = make("norm", torch.float32)
    model.eval()
    before = model(x)
    site = find_sites(model, x)[0]
    grow(model, site, solve(site, "net2net", 9))
    assert (model(x) - before).abs().max() < 1e-5


def test_without_imbalance_weights_are_those_of_the_paper(make):
    model, x, _ = make("relu")
    site = find_sites(model, x)[0]
    first, second = model[0], model[2]
    old_in, old_bias, old_out = (t.detach().clone() for t in (first.weight, first.bias, second.weight))
    growth = solve(site, "net2net", 6, imbalance=0.0, generator=torch.Generator().manual_seed(3))
    source = torch.cat([torch.arange(4), growth.copied_from])
    counts = torch.bincount(source, minlength=4)
    assert counts.max() > 2
    grow(model, site, growth)
    torch.testing.assert_close(first.weight.detach(), old_in[source])
    torch.testing.assert_close(first.bias.detach(), old_bias[source])
    torch.testing.assert_close(second.weight.detach(), old_out[:, source] / counts[source].view(1, -1, 1, 1))


@given(old=st.integers(1, 6), new=st.integers(1, 8), imbalance=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_shares_are_positive_sum_to_one_and_stay_in_their_bounds(old, new, imbalance, seed):
    generator = torch.Generator().manual_seed(seed)
    copied = draw_copies(old, new, generator)
    kept, shared = draw_shares(copied, old, imbalance, generator)
    total = kept.index_add(0, copied, shared)
    torch.testing.assert_close(total, torch.ones(old, dtype=torch.float64))
    counts = torch.bincount(copied, minlength=old) + 1
    assert (kept > 0).all()
    assert (shared > 0).all()
    ratio = (1 + imbalance) / (1 - imbalance)
    assert (kept <= ratio / counts + 1e-12).all()
    assert (shared <= ratio / counts[copied] + 1e-12).all()


@pytest.mark.parametrize("imbalance", [0.0, 0.4])
def test_copies_that_keep_the_rms_keep_the_squares_of_every_outgoing_weight(make, imbalance):
    model, x, _ = make("relu")
    site = find_sites(model, x)[0]
    old = model[2].weight.detach().clone()
    growth = solve(site, "net2net", 6, imbalance=imbalance, keeps="rms", generator=torch.Generator().manual_seed(3))
    grow(model, site, growth)
    new, source = model[2].weight.detach(), torch.cat([torch.arange(4), growth.copied_from])
    squares = torch.zeros_like(old).index_add(1, source, new.square())
    torch.testing.assert_close(squares, old.square())
    assert bool((new * old[:, source] >= 0).all())
    shares = (new / old[:, source])[0, :, 0, 0]
    equal = torch.bincount(source)[source].rsqrt().to(shares)
    assert torch.allclose(shares, equal) == (imbalance == 0)


@pytest.mark.parametrize(("imbalance", "apart"), [(0.0, False), (0.2, True)])
def test_unequal_shares_are_what_tells_copies_apart_in_training(make, imbalance, apart):
    model, x, y = make("relu")
    site = find_sites(model, x)[0]
    growth = solve(site, "net2net", 1, imbalance=imbalance)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grow(model, site, growth, optimizer=optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    difference = (model[0].weight[4] - model[0].weight[growth.copied_from[0]]).abs().max()
    assert bool(difference > 1e-6) == apart


def test_noise_is_relative_to_each_filter(make):
    model, x, _ = make("relu")
    with torch.no_grad():
        model[0].weight[1] *= 1000
    site = find_sites(model, x)[0]
    growth = solve(site, "net2net", 400, noise=0.1, generator=torch.Generator().manual_seed(0))
    old = model[0].weight.detach()[growth.copied_from]
    off = (growth.alpha - old).flatten(1).square().mean(1).sqrt() / old.flatten(1).square().mean(1).sqrt()
    assert off.mean() == pytest.approx(0.1, rel=0.02)
    assert off[growth.copied_from == 1].mean() == pytest.approx(0.1, rel=0.05)


def test_groups_of_a_group_norm_are_copied_whole(make):
    model, x, _ = make("group norm")
    site = find_sites(model, x)[0]
    growth = solve(site, "net2net", 3)
    assert growth.channels == 4
    assert (growth.copied_from % 2 == torch.tensor([0, 1, 0, 1])).all()


def test_impossible_hyperparameters_and_auto_are_refused(make):
    model, x, _ = make("relu")
    site = find_sites(model, x)[0]
    with pytest.raises(ArgumentValueError, match="imbalance"):
        solve(site, "net2net", 2, imbalance=1.0)
    with pytest.raises(ArgumentValueError, match="keeps"):
        get_solver("net2net", keeps="variance")
    with pytest.raises(ArgumentValueError, match="noise"):
        solve(site, "net2net", 2, noise=-1.0)
    with pytest.raises(SolverError, match="auto"):
        solve(site, "net2net", "auto")
