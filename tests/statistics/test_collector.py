"""The collector in loops as people write them: in-place activations, accumulation, frozen layers, checkpointing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import growconv
from growconv.errors import ArgumentTypeError, ArgumentValueError, SiteError, StatisticsError
from growconv.statistics import StatisticsCollector, collect_statistics
from growconv.statistics.held_out import without

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


def test_merged_statistics_are_those_of_all_samples():
    model = network().double()
    x = X.double()
    options = {"reduction": "sum", "keep_samples": 3, "quantities": ("S", "N", "patch", "samples"), "full": True}
    loss = lambda z, y: F.cross_entropy(z, y, reduction="sum")  # noqa: E731
    whole = collected(model, x, Y, loss, **options)
    merged = collected(model, x[:2], Y[:2], loss, **options) + collected(model, x[2:], Y[2:], loss, **options)
    assert_same(merged, whole, 1e-12)
    torch.testing.assert_close(merged.N, whole.N, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(merged.patch_gram, whole.patch_gram)
    torch.testing.assert_close(merged.samples_kept.x["0"], x[:5])
    assert merged.gradient_energy == pytest.approx(whole.gradient_energy)


def test_statistics_that_do_not_belong_together_are_not_merged():
    wide = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(StatisticsError, match="belong together"):
        collected(network()) + collected(wide)
    with pytest.raises(StatisticsError, match="quantities"):
        collected(network()) + collected(network(), quantities=("S",))


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


def test_dropout_norms_buffers_and_gradients_are_left_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(5, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    F.cross_entropy(model(X), Y).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    site = site_of(model)
    runs = [
        collect_statistics(model, site, iter([(X, Y)]), F.cross_entropy, scratch_bytes=s)[site.name]
        for s in (1, 1 << 28)
    ]
    torch.testing.assert_close(runs[0].N, runs[1].N, rtol=1e-3, atol=1e-5)  # dropout would differ between passes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert model[3].training
    assert model[1].training


@pytest.mark.parametrize("calls", [2, 12])
def test_n_of_held_batches_is_that_of_p(calls):
    model = network(norm=True).double().eval()
    site = site_of(model)
    limit = 100_000  # P has 92,736 bytes
    batches = [(X.double() + number, Y) for number in range(calls)]
    collectors = [StatisticsCollector(model, site, hold=hold, scratch_bytes=limit) for hold in (True, False)]
    for collector in collectors:
        with collector:
            for x, y in batches:
                F.cross_entropy(model(x), y).backward()
                x.zero_()  # what is held does not change with the caller's own tensors
        batches = [(X.double() + number, Y) for number in range(calls)]
    held, summed = (collector.statistics[site.name] for collector in collectors)
    assert ("held of 2 calls" in collectors[0].explain()) == (calls == 2)
    assert ("P" in held.consumer.moments) == (calls > 2)
    assert "P" in summed.consumer.moments
    for name in ("S", "S2", "M", "N_raw", "P", "N"):
        torch.testing.assert_close(getattr(held, name), getattr(summed, name), rtol=1e-9, atol=1e-12)
    both = held + summed
    torch.testing.assert_close(both.N, summed.N, rtol=1e-8, atol=1e-12)


def test_samples_taken_out_of_held_batches_leave_the_rest():
    model = network().double()
    site, batches = site_of(model), [(X.double(), Y), (X.double() - 1, Y)]
    options = {"quantities": ("S", "N", "samples"), "keep_samples": 6}
    loss = lambda z, y: F.cross_entropy(z, y, reduction="sum")  # noqa: E731
    whole = collect_statistics(model, site, batches, loss, reduction="sum", **options)[site.name]
    rest = collect_statistics(model, site, batches[1:], loss, reduction="sum", **options)[site.name]
    assert whole.consumer.held is not None
    remaining = without(whole, whole.samples_kept, rest.samples_kept)
    torch.testing.assert_close(remaining.N, rest.N, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(remaining.P, rest.P)


def test_the_second_pass_gives_the_same_n():
    model = network(norm=True).double().eval()
    batches = [(X[:2].double(), Y[:2]), (X[2:].double(), Y[2:])]
    site = site_of(model)
    loss = lambda z, y: F.cross_entropy(z, y, reduction="sum")  # noqa: E731
    one = collect_statistics(model, site, batches, loss, reduction="sum")[site.name]
    two = collect_statistics(model, site, batches, loss, reduction="sum", scratch_bytes=10_000)[site.name]
    assert two.P is None
    assert one.P is not None
    torch.testing.assert_close(two.N, one.N, rtol=1e-9, atol=1e-12)
    assert two.bottleneck_energy == pytest.approx(one.bottleneck_energy)
    assert any("second pass" in note for note in two.notes)
    with pytest.raises(StatisticsError, match="cannot be merged"):
        two + two


def test_a_hand_written_loop_is_told_about_the_second_pass():
    model = network()
    site = site_of(model)
    collector = StatisticsCollector(model, site, scratch_bytes=1)
    with collector:
        F.cross_entropy(model(X), Y).backward()
    assert collector.needs_second_pass
    assert collector.statistics[site.name].S is not None
    with pytest.raises(StatisticsError, match="second_pass"):
        _ = collector.statistics[site.name].N
    with collector.second_pass():
        F.cross_entropy(model(X), Y).backward()
    torch.testing.assert_close(collector.statistics[site.name].N, collected(model).N, rtol=1e-4, atol=1e-6)
    assert not collector.needs_second_pass
    with pytest.raises(StatisticsError, match="no second pass"), collector.second_pass():
        pass
    assert "second pass" in collector.explain()


def test_the_forced_path_and_its_reason_can_be_seen():
    model = network()
    for path in ("dense", "unfold", "offset"):
        collector = StatisticsCollector(model, site_of(model), path=path)
        assert "no batch" in collector.explain()
        with collector:
            F.cross_entropy(model(X), Y).backward()
        assert f"by {path} (as asked)" in collector.explain()
    collector = StatisticsCollector(model, site_of(model))
    with collector:
        F.cross_entropy(model(X), Y).backward()
    assert "multiply-adds" in collector.explain()


def test_images_of_several_sizes():
    model = network().double()
    site = site_of(model)
    images = [X.double(), X.double()[..., :6, :], X.double()]
    results = {}
    for path in ("dense", "auto", "unfold"):
        with StatisticsCollector(model, site, path=path, full=True) as collector:
            for image in images:
                F.cross_entropy(model(image), Y).backward()
        results[path] = collector.statistics[site.name]
    for path in ("auto", "unfold"):
        assert_same(results[path], results["dense"], 1e-12)


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


def test_kept_samples_are_what_the_modules_saw():
    model = network()
    kept = collected(model, keep_samples=4).samples_kept
    torch.testing.assert_close(kept.x["0"], X[:4])
    torch.testing.assert_close(kept.h["2"], model[:2](X[:4]).detach())
    z = model[:3](X).detach().requires_grad_()
    F.cross_entropy(model[3:](z), Y, reduction="sum").backward()
    torch.testing.assert_close(kept.v["2"], -z.grad[:4], rtol=1e-4, atol=1e-6)


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


def test_a_loss_that_never_reaches_the_pair():
    model = network()
    site = site_of(model)
    with StatisticsCollector(model, site) as collector:
        model(X)
    with pytest.raises(StatisticsError, match="zero samples"):
        _ = collector.statistics
    with pytest.raises(StatisticsError, match="does not depend"):
        collect_statistics(model, site, [(X, Y)], lambda z, y: torch.zeros(()))
    with pytest.raises(StatisticsError, match="zero samples"):
        collect_statistics(model, site, [], F.cross_entropy)
    with pytest.raises(StatisticsError, match="one number"):
        collect_statistics(model, site, [(X, Y)], lambda z, y: F.cross_entropy(z, y, reduction="none"))
    assert hooks(model) == 0


def test_two_backward_passes_through_one_forward_are_refused():
    model = network()
    with StatisticsCollector(model, site_of(model)):
        z = model(X)
        F.cross_entropy(z, Y).backward(retain_graph=True)
        with pytest.raises(StatisticsError, match="propagated back twice"):
            z.sum().backward()


def test_sites_without_closed_form_keep_samples_only():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1), nn.Conv2d(5, 4, 1)

        def forward(self, x):
            x = self.a(x)
            return self.c(x + self.b(torch.relu(x))).mean(dim=(2, 3))

    model = Residual()
    stream = next(site for site in growconv.find_sites(model, X) if len(site.producers) > 1)
    with pytest.raises(StatisticsError, match="closed-form"):
        StatisticsCollector(model, stream)
    found = collect_statistics(model, stream, [(X, Y)], F.cross_entropy, quantities=("samples",), keep_samples=3)
    kept = found[stream.name].samples_kept
    assert set(kept.x) == set(stream.producers)
    assert set(kept.h) == set(kept.v) == set(stream.consumers)
