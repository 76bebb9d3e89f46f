"""The collector in loops as people write them: in-place activations, accumulation, frozen layers, checkpointing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import growconv
from growconv.errors import ArgumentTypeError, ArgumentValueError, SiteError, StatisticsError
from growconv.statistics import StatisticsCollector, collect_statistics, unfolded

X = torch.randn(6, 3, 9, 8, generator=torch.Generator().manual_seed(0))


Y = torch.tensor([0, 1, 2, 3, 1, 0])


def network(inplace=False, norm=False):
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(inplace=inplace), nn.Conv2d(5, 4, 3, padding=1)]
    if norm:
        layers.insert(1, nn.BatchNorm2d(5))
    return nn.Sequential(*layers, nn.ReLU(inplace=inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def site_of(model):
    return growconv.find_sites(model, X[:1].to(next(model.parameters()).dtype))[0]


def collected(model, x=X, y=Y, loss=F.cross_entropy, **options):
    site = site_of(model)
    collector = StatisticsCollector(model, site, **options)
    with collector:
        loss(model(x), y).backward()
    return collector.statistics[site.name]


def assert_same(first, second, tolerance=1e-5):
    for name, value in first.consumer.moments.items():
        other = second.consumer.moments[name]
        assert float((value - other).norm()) <= tolerance * float(other.norm()), name
    assert first.samples == second.samples


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_inplace_activations_do_not_disturb():
    assert_same(collected(network(inplace=True)), collected(network()))


def test_batches_accumulate_to_the_whole():
    model = network()
    site = site_of(model)
    with StatisticsCollector(model, site, reduction="sum") as collector:
        for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
            F.cross_entropy(model(X[part]), Y[part], reduction="sum").backward()
    assert_same(collector.statistics[site.name], collected(model))


def test_mean_and_sum_losses_give_the_same_v():
    model = network()
    summed = collected(model, loss=lambda z, y: F.cross_entropy(z, y, reduction="sum"), reduction="sum")
    assert_same(summed, collected(model))


def test_two_forwards_before_one_backward():
    model = network()
    site = site_of(model)
    with StatisticsCollector(model, site, reduction="sum") as collector:
        first = F.cross_entropy(model(X[:2]), Y[:2], reduction="sum")
        second = F.cross_entropy(model(X[2:]), Y[2:], reduction="sum")
        (first + second).backward()
    assert_same(collector.statistics[site.name], collected(model))


def test_forward_passes_without_gradients_do_not_count():
    model = network()
    site = site_of(model)
    with StatisticsCollector(model, site) as collector:
        with torch.no_grad():
            model(X)
        F.cross_entropy(model(X), Y).backward()
        with torch.inference_mode():
            model(X)
    assert_same(collector.statistics[site.name], collected(model))


def test_frozen_layers_can_be_measured():
    model = network()
    reference = collected(model)
    site = site_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head = nn.Linear(4, 4)
    with torch.no_grad():
        head.weight.copy_(torch.eye(4))
        head.bias.zero_()
    with StatisticsCollector(model, site) as collector:
        F.cross_entropy(head(model(X)), Y).backward()
    assert_same(collector.statistics[site.name], reference)


def test_frozen_consumer_that_overwrites_its_input_is_not_fooled():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)
            self.overwrites = False

        def forward(self, x):
            h = torch.relu(self.a(x))
            z = self.b(h)
            if self.overwrites:
                h.detach().mul_(0)  # the layer's weight is frozen, so autograd keeps no watch over its input
            return z.mean(dim=(2, 3))

    torch.manual_seed(1)
    model = Overwriting()
    site = growconv.site(model, "a", "b", example_input=X)
    expected = collect_statistics(model, site, [(X, Y)], F.cross_entropy, quantities=("S2",))[site.name].S2
    model.overwrites = True
    for parameter in model.b.parameters():
        parameter.requires_grad_(False)
    found = collect_statistics(model, site, [(X, Y)], F.cross_entropy, quantities=("S2",))[site.name].S2
    torch.testing.assert_close(found, expected)


def test_gradient_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.body, self.reentrant = network()[:3], reentrant

        def forward(self, x):
            x = x.clone().requires_grad_()
            return checkpoint(self.body, x, use_reentrant=self.reentrant).relu().mean(dim=(2, 3))

    plain = growconv.site(Checkpointed(reentrant=False), "body.0", "body.2", example_input=X)
    for reentrant in (False, True):
        model = Checkpointed(reentrant)
        site = plain.of(model)
        with StatisticsCollector(model, site) as collector:
            F.cross_entropy(model(X), Y).backward()
        assert_same(collector.statistics[site.name], collected(network()))


def test_shared_modules_sum_over_their_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)

        def forward(self, x):
            x = self.b(torch.relu(self.a(x)))
            return self.b(torch.relu(self.a(x))).mean(dim=(2, 3))

    torch.manual_seed(0)
    model = Twice()
    (site,) = [site for site in growconv.find_sites(model, X) if site.producers == ("a",)]
    y = Y.clamp(max=2)
    found = collect_statistics(model, site, [(X, y)], F.cross_entropy, quantities=("S", "N_raw"))[site.name]
    assert found.samples == len(X)
    middle = model.b(torch.relu(model.a(X))).detach()
    once = nn.Sequential(model.a, nn.ReLU(), model.b, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    batch = (torch.cat([X, middle]), torch.cat([y, y]))
    by_hand = collect_statistics(
        once, growconv.site(once, "0", "2", example_input=X), [batch], F.cross_entropy, quantities="S"
    )
    torch.testing.assert_close(found.S, 2 * by_hand["0 -> 2"].S, rtol=1e-5, atol=1e-4)


def test_calls_that_cannot_be_paired_are_refused():
    class Host(nn.Sequential):
        def forward(self, x):
            h = self[0](x)
            return (self[1](h) + self[1](h + 1)).mean(dim=(2, 3))

    host = Host(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1))
    plain = nn.Sequential(*host)
    site = growconv.site(plain, "0", "1", example_input=X).of(host)
    with pytest.raises(StatisticsError, match="number of times"), StatisticsCollector(host, site):
        host(X)
    assert hooks(host) == 0


def test_only_what_is_asked_for_is_computed():
    found = collected(network(), quantities=("S",))
    assert set(found.consumer.moments) == {"S"}
    assert found.N is None
    assert found.update is None
    assert found.samples_kept is None
    assert found.S_full is None
    kept = collected(network(), quantities=("samples",), keep_samples=4)
    assert not kept.consumer.moments
    assert len(kept.samples_kept) == 4
    assert kept.gradient_energy > 0
    first, rest = kept.samples_kept.split(0.5)
    assert (len(first), len(rest)) == (2, 2)
    with pytest.raises(ArgumentValueError, match="split"):
        kept.samples_kept.split(1.5)
    assert "samples only" in str(kept)


def test_hooks_and_caches_are_freed_after_an_exception():
    model = network()
    site = site_of(model)
    collector = StatisticsCollector(model, site)

    def loop():
        with collector:
            F.cross_entropy(model(X), Y).backward()
            model(torch.zeros(1, 7, 3, 3))

    with pytest.raises(RuntimeError, match="expected"):
        loop()
    assert hooks(model) == 0
    assert not collector._loss.passes
    assert not collector._outputs
    assert collector.statistics[site.name].samples == len(X)


def test_a_collector_is_entered_once_at_a_time():
    model = network()
    collector = StatisticsCollector(model, site_of(model))
    with collector, pytest.raises(StatisticsError, match="already"):
        collector.__enter__()


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"path": "fft"},
        {"nonfinite": "ignore"},
        {"quantities": ("S", "Q")},
        {"scratch_bytes": 0},
        {"keep_samples": -1},
        {"quantities": ("samples",)},
    ],
)
def test_impossible_options_are_refused(options):
    model = network()
    with pytest.raises(ArgumentValueError):
        StatisticsCollector(model, site_of(model), **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrong_models_and_sites_are_refused():
    model = network()
    site = site_of(model)
    with pytest.raises(SiteError, match="another model"):
        StatisticsCollector(network(), site)
    with pytest.raises(ArgumentTypeError):
        StatisticsCollector(model, ["0 -> 2"])
    with pytest.raises(ArgumentTypeError):
        StatisticsCollector(nn.DataParallel(model), site)
    with pytest.raises(ArgumentTypeError):
        StatisticsCollector(torch.compile(model), site)


def test_two_backward_passes_through_one_forward_are_refused():
    model = network()
    with StatisticsCollector(model, site_of(model)):
        z = model(X)
        F.cross_entropy(z, Y).backward(retain_graph=True)
        with pytest.raises(StatisticsError, match="propagated back twice"):
            z.sum().backward()


def test_sites_without_closed_form_keep_samples_only():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1), nn.Conv2d(5, 4, 1)

        def forward(self, x):
            x = self.a(x)
            return self.c(x * self.b(torch.relu(x))).mean(dim=(2, 3))

    model = Gated()
    stream = next(site for site in growconv.find_sites(model, X) if len(site.producers) > 1)
    with pytest.raises(StatisticsError, match="closed-form"):
        StatisticsCollector(model, stream)
    found = collect_statistics(model, stream, [(X, Y)], F.cross_entropy, quantities=("samples",), keep_samples=3)
    kept = found[stream.name].samples_kept
    assert set(kept.x) == set(stream.producers)
    assert set(kept.h) == set(kept.v) == set(stream.consumers)


def test_m_is_the_gradient_that_autograd_computes_anyway(monkeypatch):
    """Next to the same loop by torch.autograd.grad, which leaves the gradients of weights out."""
    model = network()
    site = site_of(model)
    with StatisticsCollector(model, site) as collector:
        for _ in range(2):
            torch.autograd.grad(F.cross_entropy(model(X), Y), collector.outputs)
    expected = collector.statistics[site.name]
    assert float(expected.M.abs().max()) > 0

    def unused(*_):
        raise AssertionError("M is computed a second time")

    monkeypatch.setattr(unfolded, "weight_gradient", unused)
    with StatisticsCollector(model, site, quantities=("S", "update")) as collector:
        for _ in range(2):
            F.cross_entropy(model(X), Y).backward()
    found = collector.statistics[site.name]
    for name in ("S", "S2", "M"):
        torch.testing.assert_close(found.consumer.moments[name], expected.consumer.moments[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["full", "convolutions in bfloat16", "autocast"])
def test_m_is_computed_anew_where_autograd_is_allowed_less_than_full_precision(precision, monkeypatch):
    convolution = getattr(torch.backends.mkldnn, "conv", None)
    if convolution is None:
        pytest.skip("this torch has no precision of convolutions to set")
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return own(*arguments)

    own = unfolded.weight_gradient
    monkeypatch.setattr(unfolded, "weight_gradient", counted)
    model = network()
    collector = StatisticsCollector(model, site_of(model), quantities=("S", "update"))
    before, convolution.fp32_precision = convolution.fp32_precision, "bf16" if "bfloat16" in precision else "ieee"
    try:
        with collector, torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            F.cross_entropy(model(X), Y).backward()
    finally:
        convolution.fp32_precision = before
    assert next(iter(collector.statistics.values())).M is not None
    assert bool(calls) == (precision != "full")
