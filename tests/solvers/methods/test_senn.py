"""senn: the score is a natural-gradient gain, the bound is a bound, and the optimum of the linear case is found."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from growconv.errors import ArgumentValueError
from growconv.network.event import grow
from growconv.network.find import find_sites
from growconv.network.seats import Inserted
from growconv.solvers import solve
from growconv.solvers.senn import expansion_score, output_precision
from growconv.statistics import collect_statistics
from growconv.statistics.columns import designs


def score_of(proposed, residual, precision, damping=1e-4):
    """Δη' from a_p (samples, p, locations) and g_r (samples, c, locations), averaged over samples."""
    moment = torch.einsum("ipm,iqm->pq", proposed, proposed) / len(proposed)
    return expansion_score(moment, torch.einsum("ipm,icm->pc", proposed, residual) / len(proposed), precision, damping)


def natural_gain(activations, gradient, precision):
    """gᵀF⁻¹g of one linear layer with F = A ⊗ Γ formed in full: the slow referee."""
    n = len(activations)
    cross = (activations.mT @ gradient / n).flatten()
    fisher = torch.kron(activations.mT @ activations / n, torch.linalg.inv(precision).contiguous())
    return cross @ torch.linalg.solve(fisher, cross)


@given(old=st.integers(1, 4), new=st.integers(1, 3), out=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_score_is_a_lower_bound_on_the_gain_and_exact_for_new_responses_free_of_the_old(old, new, out, seed):
    generator = torch.Generator().manual_seed(seed)
    n = 40
    a, p, g = (torch.randn(n, size, generator=generator, dtype=torch.float64) for size in (old, new, out))
    precision = output_precision(g.mT, damping=1e-12)
    basis = torch.linalg.qr(a).Q
    residual = g - basis @ basis.mT @ g

    def increase(proposed):
        joined = torch.cat([a, proposed], 1)
        return natural_gain(joined, g, precision) - natural_gain(a, g, precision)

    score = score_of(p[:, :, None], residual[:, :, None], precision, damping=1e-12)
    assert score <= increase(p) * (1 + 1e-8) + 1e-12
    free = p - basis @ basis.mT @ p
    score = score_of(free[:, :, None], residual[:, :, None], precision, damping=1e-12)
    torch.testing.assert_close(score, increase(free), rtol=1e-6, atol=1e-10)


@given(taps=st.integers(1, 3), locations=st.integers(1, 5), seed=st.integers(0, 50))
def test_locations_are_summed_as_in_the_fisher_of_a_convolution(taps, locations, seed):
    generator = torch.Generator().manual_seed(seed)
    proposed = torch.randn(6, 2 * taps, locations, generator=generator, dtype=torch.float64)
    residual = torch.randn(6, 3, locations, generator=generator, dtype=torch.float64)
    precision = output_precision(residual.transpose(0, 1).flatten(1), 1e-6)
    moment = sum(proposed[i] @ proposed[i].mT for i in range(6)) / 6
    cross = sum(proposed[i] @ residual[i].mT for i in range(6)) / 6
    damped = moment + 1e-4 * moment.diagonal().mean() * torch.eye(2 * taps)
    expected = torch.trace(precision @ cross.mT @ torch.linalg.inv(damped) @ cross)
    torch.testing.assert_close(score_of(proposed, residual, precision, 1e-4), expected)


def test_residual_gradients_are_orthogonal_to_what_the_consumer_reads(any_model, collect):
    name, model, x, y = any_model
    model = model.eval()
    kept = collect(model, x, y, {"samples"}).samples_kept
    (each,), (free,) = kept.passes, kept.projected().passes
    for path in kept.site.consumers:
        (own,) = designs(model.get_submodule(path), each.h[path], 1)
        (residual,), (wanted,) = free.targets(path), each.targets(path)
        if own.shape[1] < 4 * len(own) + 4:
            continue  # few samples: a ridge keeps the update short
        cross = residual @ own.mT
        assert cross.abs().max() < 1e-7 * (wanted.abs() @ own.abs().mT).max(), name


def test_the_optimum_of_a_linear_pair_is_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)).double()
    x, y = torch.randn(60, 6, dtype=torch.float64), torch.randn(60, 5, dtype=torch.float64)
    (site,) = find_sites(model, x)

    def loss(out, target):
        return (out - target).square().sum(1).mean() / 2

    statistics = collect_statistics(model, [site], [(x, y)], loss, quantities={"samples", "S", "N"}, keep_samples=60)[
        site.name
    ]
    growth = solve(statistics, "senn", 2, steps=400, damping=1e-8)
    wanted = statistics.samples_kept.v[site.consumers[0]]
    precision = output_precision(wanted.mT, 1e-8)
    # with A_p = αᵀSα the best K filters span the leading singular vectors of S^-1/2 N Γ^-1/2
    whitened = torch.linalg.solve(torch.linalg.cholesky(statistics.S), statistics.N[:, 0])
    best = torch.linalg.svdvals(whitened @ torch.linalg.cholesky(precision))[:2].square().sum()
    reached = score_of(
        (x @ growth.alpha.mT)[:, :, None],
        statistics.samples_kept.v_perp(site.consumers[0])[:, :, None],
        precision,
        1e-8,
    )
    assert reached == pytest.approx(best.item(), rel=1e-3)
    read = statistics.samples_kept.h[site.consumers[0]]
    assert growth.measured["score"] == pytest.approx(float(natural_gain(read, wanted, precision)), rel=1e-6)


def score_together(statistics, growth):
    """Δη' of all new channels, summed over the consumers and their groups."""
    kept, inserted = statistics.samples_kept, Inserted(norms=growth.norms)
    reads = [each.read(growth.incoming, growth.incoming_bias, inserted) for each in kept.passes]
    total = 0.0
    for path in kept.site.consumers:
        designs = zip(
            *(each.design(path, read[path]) for each, read in zip(kept.passes, reads, strict=True)), strict=True
        )
        wanted, residual = (
            zip(*(each.targets(path) for each in samples.passes), strict=True) for samples in (kept, kept.projected())
        )
        for design, gradient, free in zip(designs, wanted, residual, strict=True):
            precision = output_precision(torch.cat(gradient, 1))
            total += score_of(torch.cat(design, 1)[None], torch.cat(free, 1)[None], precision).item()
    return total


@pytest.mark.parametrize("name", ["relu", "norm", "gelu and pooling", "fan", "residual", "depthwise"])
def test_training_raises_the_score_and_nothing_changes(make, collect, name):
    model, x, y = make(name)
    model.eval()
    statistics = collect(model, x, y, {"samples"})
    start, end = (
        solve(statistics, "senn", 3, steps=steps, generator=torch.Generator().manual_seed(0)) for steps in (0, 40)
    )
    assert score_together(statistics, end) > score_together(statistics, start)
    assert (end.gains.diff() <= 0).all()
    before = model(x)
    grow(model, statistics.growth_site, end)
    assert (model(x) - before).abs().max() < 1e-12


def test_proposals_that_are_silent_on_all_samples_score_nothing():
    residual = torch.randn(5, 2, 3)
    score = score_of(torch.zeros(5, 4, 3), residual, output_precision(residual.transpose(0, 1).flatten(1)))
    assert score == 0


def test_impossible_settings_are_named(make, collect):
    model, x, _ = make("relu")
    with pytest.raises(ArgumentValueError, match="damping"):
        solve(find_sites(model, x)[0], "senn", 2, damping=0.0)
