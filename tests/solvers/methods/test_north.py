"""north: new responses are orthogonal to the old ones, over data, filters, or as far as candidates go."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from growconv.errors import ArgumentValueError, SolverError
from growconv.network.event import grow
from growconv.network.find import find_sites
from growconv.solvers import solve
from growconv.solvers.north import effective_dimension, most_orthogonal, orthogonal_filters


def cosines(first, second):
    """Largest cosine between rows of two matrices."""
    first, second = (each / each.norm(dim=1, keepdim=True) for each in (first, second))
    return (first @ second.mT).abs().max()


@given(
    entries=st.integers(2, 12),
    old=st.integers(1, 8),
    new=st.integers(1, 8),
    rank=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_filters_are_orthogonal_in_the_metric_of_the_patches(entries, old, new, rank, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    patches, filters = draw(200, min(rank, entries)) @ draw(min(rank, entries), entries), draw(old, entries)
    gram = patches.mT @ patches / 200
    found = orthogonal_filters(draw(new, entries), filters, gram)
    free = min(rank, entries) - min(old, rank, entries)
    assert found.shape[0] == min(new, max(free, 0))
    if found.shape[0]:
        responses = patches @ found.mT / 200**0.5
        torch.testing.assert_close(responses.mT @ responses, torch.eye(found.shape[0], dtype=torch.float64))
        assert cosines(responses.mT, (patches @ filters.mT).mT) < 1e-6


@pytest.mark.parametrize("name", ["relu", "no bias", "norm", "linear"])
def test_new_responses_before_the_activation_are_orthogonal_to_the_old_ones(make, collect, name):
    model, x, y = make(name)
    statistics = collect(model, x, y, {"patch"})
    site = statistics.growth_site
    producer = model.get_submodule(site.producers[0])
    read = torch.flatten(x, 1) if name == "linear" else x
    growth = solve(statistics, "north", 3)
    module = functional.linear if name == "linear" else functional.conv2d
    geometry = {} if name == "linear" else {"padding": 1}
    old = module(read, producer.weight, producer.bias, **geometry).movedim(1, 0).flatten(1)
    new = module(read, growth.alpha, growth.alpha_bias, **geometry).movedim(1, 0).flatten(1)
    assert cosines(new, old) < 1e-8
    norms = [producer.weight.flatten(1).square().sum(1) + (0 if producer.bias is None else producer.bias.square())]
    sizes = growth.alpha.flatten(1).square().sum(1) + (0 if growth.alpha_bias is None else growth.alpha_bias.square())
    torch.testing.assert_close(sizes.sqrt(), norms[0].sqrt().mean().detach().expand(3))
    for mean, variance in growth.norms.values():
        torch.testing.assert_close(mean, new.mean(1))
        torch.testing.assert_close(variance, new.var(1, unbiased=False))


def test_nothing_changes_and_the_new_weights_can_learn(any_model, collect):
    name, model, x, y = any_model
    site = find_sites(model, x)[0]
    variant = "pre" if site.closed_form and len(site.producers) == 1 else "select"
    model.eval()
    before = model(x).detach()
    statistics = collect(model, x, y, {"samples"} if variant == "select" else {"patch"}, site=site)
    grow(model, site, solve(statistics, "north", 2, variant=variant))
    assert (model(x) - before).abs().max() < 1e-12, name
    functional.cross_entropy(model(x), y).backward()
    consumer = model.get_submodule(site.consumers[0])
    own = consumer.weight.grad[:, site.entries(site.consumers[0])]
    assert own.unflatten(1, (site.width, -1))[:, -2:].abs().amax((0, *range(2, 3))).min() > 0


def test_where_no_direction_is_left_fewer_come_with_the_reason(make, collect):
    model, x, y = make("linear")
    statistics = collect(model, x[:6], y[:6], {"patch"})
    growth = solve(statistics, "north", 10)
    # six samples span six directions, of which the four old channels use four
    assert growth.channels == 2
    assert "no more directions" in growth.reason


def test_weight_variant_needs_no_data(make):
    model, x, _ = make("relu")
    growth = solve(find_sites(model, x)[0], "north", 5, variant="weight")
    old = torch.cat([model[0].weight.flatten(1), model[0].bias[:, None]], 1)
    new = torch.cat([growth.alpha.flatten(1), growth.alpha_bias[:, None]], 1)
    assert cosines(new, old) < 1e-10
    assert growth.measured["rank"] == 1


@pytest.mark.parametrize("name", ["relu", "norm", "residual", "fan"])
def test_select_beats_random_choice_and_its_first_is_the_best_candidate(make, collect, name):
    model, x, y = make(name)
    statistics = collect(model, x, y, {"samples"})
    site = statistics.growth_site

    def orthogonality(growth):
        """Share of the new responses' energy outside the span of the old ones, measured through the grown model."""
        seen = {}
        hooks = [
            model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: seen.update({path: args[0]}))
            for path in site.consumers
        ]
        event = grow(model, site, growth)
        model.eval()(x)
        for hook in hooks:
            hook.remove()
        rows = torch.cat(
            [seen[path].transpose(0, 1).unflatten(0, (site.width, -1)).flatten(1) for path in site.consumers], 1
        )
        old, new = rows[: event.width_before].detach(), rows[event.width_before :].detach()
        basis = torch.linalg.qr(old.mT).Q
        return ((new - new @ basis @ basis.mT).norm(dim=1) / new.norm(dim=1)).mean()

    drawn = orthogonality(solve(statistics, "north", 2, variant="select", candidates=1))
    model, x, y = make(name)
    statistics = collect(model, x, y, {"samples"})
    site = statistics.growth_site
    assert orthogonality(solve(statistics, "north", 2, variant="select", candidates=64)) > drawn


def test_greedy_choice_equals_a_search_over_all_pairs():
    generator = torch.Generator().manual_seed(1)
    old, candidates = (torch.randn(n, 30, generator=generator, dtype=torch.float64) for n in (4, 7))
    chosen, shares = most_orthogonal(candidates, old, 2)
    basis = torch.linalg.qr(old.mT).Q
    alone = (candidates - candidates @ basis @ basis.mT).norm(dim=1) / candidates.norm(dim=1)
    assert chosen[0] == int(alone.argmax())
    assert shares[0] == pytest.approx(float(alone.max()))
    second = torch.linalg.qr(torch.cat([old, candidates[chosen[:1]]]).mT).Q
    rest = (candidates - candidates @ second @ second.mT).norm(dim=1) / candidates.norm(dim=1)
    assert chosen[1] == int(rest.argmax())


def test_effective_dimension_counts_directions():
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    gram = basis * torch.tensor([1.0, 0.5, 1e-2, 1e-3, 1e-6, 0.0], dtype=torch.float64) @ basis.mT
    # singular values are the roots: 1, 0.71, 0.1, 0.03, 0.001, 0
    assert effective_dimension(gram, 0.01) == 4
    assert effective_dimension(gram, 0.05) == 3
    assert effective_dimension(torch.zeros(3, 3), 0.01) == 0


@pytest.mark.parametrize("variant", ["pre", "select"])
@pytest.mark.parametrize("name", ["relu", "linear"])
def test_the_rank_is_that_of_what_the_consumer_reads(make, collect, name, variant):
    model, x, y = make(name)
    producer = model[0 if name != "linear" else 1]
    with torch.no_grad():  # two channels that differ before the activation, and not behind it: both are off
        producer.weight[:2] *= 1e-3
        producer.bias[:2] = -1.0
    model.eval()
    statistics = collect(model, x, y, {"patch", "samples"})
    (site,), seen = [statistics.growth_site], []
    hook = model.get_submodule(site.consumers[0]).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(x)
    hook.remove()
    responses = seen[0].detach().transpose(0, 1).flatten(1)
    values = torch.linalg.svdvals(responses / responses.shape[1] ** 0.5)
    for relative, least in ((True, 0.01 * values.max()), (False, 0.01)):
        growth = solve(statistics, "north", 2, variant=variant, relative=relative)
        assert growth.measured["rank"] == int((values > least).sum()) / len(responses)
    assert growth.measured["rank"] < 1


def test_bad_hyperparameters_and_missing_statistics_are_named(make, collect):
    model, x, y = make("relu")
    with pytest.raises(ArgumentValueError, match="variant"):
        solve(find_sites(model, x)[0], "north", 2, variant="post")
    with pytest.raises(SolverError, match="needs statistics"):
        solve(find_sites(model, x)[0], "north", 2)
    with pytest.raises(SolverError, match="no measure by which to choose"):
        solve(collect(model, x, y, {"patch"}), "north", "auto")
    with pytest.raises(SolverError, match="patches was not collected"):
        solve(collect(model, x, y, {"S"}), "north", 2)
