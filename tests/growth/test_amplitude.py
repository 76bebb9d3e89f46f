"""The amplitude: losses against models that have grown, the cap, the scale of the filters, and training after it."""

import copy
import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import growconv
from growconv.errors import ArgumentValueError, StatisticsError
from growconv.growth.amplitude import amplitude_cap, choose_amplitudes, rescaled
from growconv.solvers import solve
from growconv.statistics import collect_statistics

pytestmark = pytest.mark.filterwarnings("ignore::growconv.solvers.FewSamplesWarning")


@pytest.fixture
def proposed(sites_of, batches_of):
    """A site of a model and new channels for it."""

    def propose(model, method="tiny", channels=2, site=0, dtype=torch.float64):
        chosen = sites_of(model)[site]
        solver = growconv.solvers.get_solver(method)
        options = {"keep_samples": 256} if "samples" in solver.reads else {}
        collected = collect_statistics(
            model, [chosen], batches_of(4, dtype=dtype), F.cross_entropy, quantities=solver.reads, **options
        )
        return chosen, solve(collected[chosen.name], solver, channels, generator=torch.Generator().manual_seed(0))

    return propose


def mean_loss(model, batches):
    with torch.no_grad():
        return statistics.mean(float(F.cross_entropy(model(x), y)) for x, y in batches)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("norm", [True, False])
def test_losses_are_those_of_grown_models(chain, sites_of, batches_of, proposed, activation, norm) -> None:
    model = chain(3, 4, norm=norm, activation=activation).double().eval()
    site, growth = proposed(model)
    held_out = batches_of(2, start=600, dtype=torch.float64)
    choice = choose_amplitudes(model, [(site, growth)], held_out, F.cross_entropy)
    losses = {}
    for strength in (0.0, *(2.0**-power for power in range(8))):
        grown = copy.deepcopy(model)
        growconv.grow(grown, sites_of(grown)[0], growth, amplitude=strength * choice.units[0])
        losses[strength] = mean_loss(grown, held_out)
    assert choice.strength == min(losses, key=losses.__getitem__)  # though it tries only some of them
    assert 4 <= len(choice.losses) < len(losses)
    for strength, loss in choice.losses.items():
        assert losses[strength] == pytest.approx(loss, rel=1e-9)
    assert 0.0 in choice.losses
    assert max(choice.losses) == choice.cap
    assert choice.cap * choice.units[0] == pytest.approx(amplitude_cap(site, growth))
    assert choice.held_out == (choice.losses[0.0], min(choice.losses.values()))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["plain", "weight norm", "stream"])
def test_every_loss_is_that_of_the_grown_model(kind, mode, digits, sites_of, batches_of) -> None:
    model = unusual(kind).double().train(mode == "train")
    site = sites_of(model)[0]
    generator = torch.Generator().manual_seed(1)
    growth = growconv.solve(site, method="random", channels=2, generator=generator)
    outgoing = {path: torch.randn_like(weight) for path, weight in growth.outgoing.items()}
    growth, batches = replace(growth, outgoing=outgoing), batches_of(2, start=600, dtype=torch.float64)
    choice = choose_amplitudes(model, [(site, growth)], batches, F.cross_entropy)
    assert len(choice.losses) >= 4
    assert {0.0, 0.25, 1.0} <= choice.losses.keys()
    for strength, loss in choice.losses.items():
        grown = copy.deepcopy(model)
        growconv.grow(grown, site, growth, amplitude=strength * choice.units[0])
        assert loss == pytest.approx(mean_loss(grown, batches), rel=1e-12)


@pytest.mark.parametrize("norm", [True, False])
def test_neighbouring_sites_are_tried_together(norm, chain, sites_of, batches_of) -> None:
    model = chain(3, 4, norm=norm).double()
    sites, batches = sites_of(model), batches_of(2, start=600, dtype=torch.float64)
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    parameters, widths = list(model.parameters()), []
    drawn = [growconv.solve(site, method="random", channels=2, outgoing=1.0) for site in sites[:2]]

    def one_by_one():
        for site, growth in zip(sites, drawn, strict=False):
            widths.append([each.width for each in sites[:2]])
            yield site, growth

    choice = choose_amplitudes(model, one_by_one(), batches, F.cross_entropy)
    assert widths == [[3, 4], [5, 4]]
    for strength, loss in choice.losses.items():
        grown = copy.deepcopy(model)
        for site, growth, unit in zip(sites, drawn, choice.units, strict=False):
            growconv.grow(grown, site, growth, amplitude=strength * unit)
        assert loss == pytest.approx(mean_loss(grown, batches), rel=1e-12)
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    assert modules == list(model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Stream(nn.Module):
    """A convolution that reads and writes the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head((x + torch.relu(self.body(x))).mean((2, 3)))


def unusual(kind: str) -> nn.Module:
    """A model for digits with batch norms, weights stored as lengths and directions, or a residual stream."""
    torch.manual_seed(0)
    if kind == "stream":
        return Stream()
    norm = nn.utils.parametrizations.weight_norm if kind == "weight norm" else lambda layer: layer
    middle = [nn.BatchNorm2d(3)] if kind == "plain" else []
    pair = [norm(nn.Conv2d(1, 3, 3)), *middle, nn.ReLU(), norm(nn.Conv2d(3, 4, 3))]
    return nn.Sequential(*pair, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


@pytest.mark.parametrize("quiet", [False, True])
def test_at_the_cap_no_new_channel_is_strong_beside_the_old_ones(chain, proposed, sites_of, quiet) -> None:
    model = chain(3, 4, norm=False).double()
    site, growth = proposed(model)
    scale = 1e-3 if quiet else 1e3  # the same function with quiet channels and large outgoing weights, or the reverse
    growth = replace(
        growth,
        incoming={path: scale * weight for path, weight in growth.incoming.items()},
        incoming_bias={path: scale * bias for path, bias in growth.incoming_bias.items()},
        outgoing={path: weight / scale for path, weight in growth.outgoing.items()},
    )
    growconv.grow(model, site, growth, amplitude=amplitude_cap(site, growth))
    writer, reader = (model.get_submodule(paths[0]) for paths in (site.producers, site.consumers))
    incoming = torch.cat([writer.weight.flatten(1), writer.bias[:, None]], 1).norm(dim=1).detach()
    outgoing = reader.weight.transpose(0, 1).flatten(1).norm(dim=1).detach()
    strength = float((incoming * outgoing)[3:].max() / (incoming[:3].mean() * outgoing[:3].mean()))
    weight = float(outgoing[3:].max() / outgoing[:3].mean())
    assert max(strength, weight / 4) == pytest.approx(1, rel=1e-9)
    assert (weight == pytest.approx(4)) == quiet


@pytest.mark.parametrize("strongest", [1 / 4, 2.0, None])
def test_the_search_goes_as_far_as_its_cap_allows_and_without_one_as_far_as_the_loss_falls(
    chain, batches_of, proposed, strongest
) -> None:
    model = chain(3, 4, norm=False).double()
    with torch.no_grad():
        model[-1].weight *= 0.05  # the network has hardly begun: much larger channels help at once
        model[3].weight *= 0.05
    site, growth = proposed(model)
    choice = choose_amplitudes(
        model, [(site, growth)], batches_of(2, start=600, dtype=torch.float64), F.cross_entropy, strongest
    )
    assert choice.units == (amplitude_cap(site, growth, 1.0),)
    assert choice.losses[choice.strength] == min(choice.losses.values()) < choice.losses[0.0]
    if strongest is None:
        assert choice.cap == float("inf")
        assert max(choice.losses) == 2 * choice.strength > 8
    else:
        assert choice.cap == strongest == choice.strength


def test_channels_that_do_harm_start_silent(chain, batches_of, proposed) -> None:
    model = chain(3, 4).double().eval()
    site, growth = proposed(model)
    harmful = replace(growth, outgoing={path: -weight for path, weight in growth.outgoing.items()})
    choice = choose_amplitudes(model, [(site, harmful)], batches_of(2, start=0, dtype=torch.float64), F.cross_entropy)
    assert choice.strength == 0.0
    assert "silent" in choice.reason
    assert choice.held_out == (choice.losses[0.0],) * 2


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_filters_are_rescaled_where_the_function_stays(chain, sites_of, digits, proposed, activation) -> None:
    model = chain(3, 4, activation=activation).double().eval()
    site, growth = proposed(model)
    same = rescaled(site, growth)
    if activation is nn.Tanh:
        assert same is growth
        return
    norms = torch.cat([same.alpha.flatten(1), same.alpha_bias[:, None]], 1).norm(dim=1)
    old = torch.cat([model[0].weight.flatten(1), model[0].bias[:, None]], 1).norm(dim=1).mean().detach()
    torch.testing.assert_close(norms, old.expand(2))
    outputs = []
    for each in (growth, same):
        grown = copy.deepcopy(model)
        growconv.grow(grown, sites_of(grown)[0], each)
        outputs.append(grown(digits[0][:50].double()))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("method", ["tiny", "random"])
@pytest.mark.parametrize(("width", "size"), [(16, 1.0), (6, (6 / 16) ** 0.5)])
def test_behind_a_norm_new_channels_are_as_large_as_the_old_ones_or_together_an_eighth(
    chain, sites_of, digits, proposed, method, width, size
) -> None:
    model = chain(width, 4).double()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 3.0)
        model[1].bias.uniform_(-1.0, 1.0)
    model(digits[0][:600].double())
    site, growth = proposed(model.eval())
    if method == "random":
        growth = growconv.solve(site, "random", 2)
    grown = copy.deepcopy(model)
    growconv.grow(grown, sites_of(grown)[0], rescaled(site, growth))
    with torch.no_grad():
        behind = grown[:2].train()(digits[0][:600].double())
    sizes = behind.square().mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(sizes[width:], size * sizes[:width].mean().expand(2), rtol=0.1, atol=0)


def test_nothing_about_the_model_changes(chain, batches_of, proposed) -> None:
    model = chain(3, 4).train()
    site, growth = proposed(model, dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    choose_amplitudes(model, [(site, growth)], batches_of(2, start=600), F.cross_entropy)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bad_input(chain, batches_of, proposed) -> None:
    model = chain(3, 4).double().eval()
    site, growth = proposed(model)
    batches = batches_of(1, start=600, dtype=torch.float64)
    with pytest.raises(ArgumentValueError, match="no held-out batches"):
        choose_amplitudes(model, [(site, growth)], [], F.cross_entropy)
    with pytest.raises(ArgumentValueError, match="old weights"):
        choose_amplitudes(
            model, [(site, replace(growth, revised={"3.bias": torch.zeros(4)}))], batches, F.cross_entropy
        )
    none = replace(
        growth,
        incoming={path: weight[:0] for path, weight in growth.incoming.items()},
        outgoing={path: weight[:, :0] for path, weight in growth.outgoing.items()},
        gains=growth.gains[:0],
        reason="nothing to gain",
    )
    assert rescaled(site, none) is none
    with pytest.raises(ArgumentValueError, match="nothing to gain"):
        choose_amplitudes(model, [(site, none)], batches, F.cross_entropy)
    with pytest.raises(StatisticsError, match="not finite"):
        choose_amplitudes(model, [(site, growth)], batches, lambda output, target: output.sum() * float("inf"))


@pytest.mark.parametrize("method", ["functional", "tiny"])
def test_training_goes_on_as_well_as_without_growing(chain, sites_of, digits, batches_of, proposed, method) -> None:
    images, labels = digits
    ratios = []
    for seed in range(2):
        model = chain(2, 8, norm=False, seed=seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        generator = torch.Generator().manual_seed(seed)
        steps = [torch.randint(0, 1400, (64,), generator=generator) for _ in range(140)]

        def train(net, opt, indices):
            losses = []
            for index in indices:
                opt.zero_grad()
                loss = F.cross_entropy(net(images[index]), labels[index])
                loss.backward()
                opt.step()
                losses.append(loss.item())
            return statistics.mean(losses)

        train(model, optimizer, steps[:80])
        plain = copy.deepcopy(model)
        twin = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        options = {"iterations": 5, "trial_iterations": 1} if method == "functional" else {}
        site, growth = proposed(model, growconv.solvers.get_solver(method, **options), site=0, dtype=torch.float32)
        growth = rescaled(site, growth)
        choice = choose_amplitudes(model, [(site, growth)], batches_of(4, start=1500, size=64), F.cross_entropy)
        growconv.grow(model, site, growth, amplitude=choice.strength * choice.units[0], optimizer=optimizer)
        ratios.append(train(model, optimizer, steps[80:]) / train(plain, twin, steps[80:]))
    assert max(ratios) < 1.02, ratios
