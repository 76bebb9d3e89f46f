"""variance_transfer: pairs cancel, variances are those of Table 1, rescaled old weights change no output."""

import pytest
import torch
from torch import nn

from growconv.errors import SolverError
from growconv.network.event import grow
from growconv.network.find import find_sites
from growconv.solvers import get_solver, solve
from growconv.solvers.variance_transfer import batch_norm_behind


@pytest.mark.parametrize("channels", [2, 3, 8])
def test_the_function_stays_on_every_kind_of_site(any_model, channels):
    name, model, x, _ = any_model
    model.eval()
    before = model(x).detach()
    for site in find_sites(model, x):
        grow(model, site, solve(site, "variance_transfer", channels))
        assert (model(x) - before).abs().max() < 1e-10 * before.abs().max(), (name, site.name)


def test_the_function_stays_in_single_precision_and_in_training_mode(make):
    for name in ("norm", "norm behind", "relu"):
        model, x, _ = make(name, torch.float32)
        before = model(x)
        site = find_sites(model, x)[0]
        grow(model, site, solve(site, "variance_transfer", 4))
        # in training mode the eps of a BatchNorm behind does not scale along: 1e-5 over the variances of this small net
        assert (model(x) - before).abs().max() < (1e-3 if name == "norm behind" else 1e-5), name
        model.eval()
        before = model(x)
        grow(model, site, solve(site, "variance_transfer", 4))
        assert (model(x) - before).abs().max() < 1e-5, name


def test_new_weights_come_in_pairs_that_cancel(make):
    model, x, _ = make("relu")
    growth = solve(find_sites(model, x)[0], "variance_transfer", 7)
    assert growth.channels == 7
    torch.testing.assert_close(growth.alpha[:3], growth.alpha[3:6])
    torch.testing.assert_close(growth.omega[:, :3], -growth.omega[:, 3:6])
    assert growth.omega[:, 6].abs().max() == 0
    assert growth.omega[:, :6].abs().min() > 0


def test_variances_are_one_over_the_fan_in_after_growth():
    model = nn.Sequential(nn.Conv2d(8, 40, 3), nn.ReLU(), nn.Conv2d(40, 50, 3), nn.Flatten(), nn.Linear(50, 2))
    site = find_sites(model, torch.randn(1, 8, 5, 5))[0]
    growth = solve(site, "variance_transfer", 60, generator=torch.Generator().manual_seed(0))
    assert growth.alpha.var() == pytest.approx(1 / (8 * 9), rel=0.05)
    assert growth.omega.var() == pytest.approx(1 / (100 * 9), rel=0.05)


def test_old_weights_take_the_larger_fan_in_and_the_batch_norm_behind_follows(make):
    model, x, _ = make("norm behind")
    site = find_sites(model, x)[0]
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert batch_norm_behind(site, "2") == "3"
    grow(model, site, solve(site, "variance_transfer", 5))
    new, scale = model.state_dict(), (4 / 9) ** 0.5
    torch.testing.assert_close(new["2.weight"][:, :4], scale * old["2.weight"])
    torch.testing.assert_close(new["2.bias"], scale * old["2.bias"])
    torch.testing.assert_close(new["3.running_mean"], scale * old["3.running_mean"])
    torch.testing.assert_close(new["3.running_var"] + 1e-5, scale**2 * (old["3.running_var"] + 1e-5))
    torch.testing.assert_close(new["0.weight"][:4], old["0.weight"])


def test_without_a_norm_behind_the_incoming_side_compensates(make):
    model, x, _ = make("relu")
    site = find_sites(model, x)[0]
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    growth = solve(site, "variance_transfer", 12)
    grow(model, site, growth)
    new = model.state_dict()
    torch.testing.assert_close(new["2.weight"][:, :4], old["2.weight"] / 2)
    torch.testing.assert_close(new["0.weight"][:4], old["0.weight"] * 2)
    torch.testing.assert_close(new["0.bias"][:4], old["0.bias"] * 2)
    assert growth.reason is None


@pytest.mark.parametrize("norm", [True, False])
def test_output_layers_take_the_other_rule_of_the_table(norm):
    torch.manual_seed(0)
    middle = [nn.BatchNorm2d(40)] if norm else []
    model = nn.Sequential(
        nn.Conv2d(3, 40, 3), *middle, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 50)
    )
    x, head = torch.randn(4, 3, 6, 6), str(4 + norm)
    model.eval()
    (site,) = find_sites(model, x)
    before, bias = model(x).detach(), model[-1].bias.detach()
    solver = get_solver("variance_transfer", output_layers=[head])
    assert not solver.function_preserving
    growth = solve(site, solver, 60, generator=torch.Generator().manual_seed(0))
    grow(model, site, growth)
    assert growth.omega.std() == pytest.approx(1 / 100, rel=0.05)
    torch.testing.assert_close(model(x) - bias, 0.4 * (before - bias), rtol=1e-4, atol=1e-6)
    with pytest.raises(SolverError, match="no such output layer"):
        solve(site, "variance_transfer", 2, output_layers=["head"])


def test_an_output_layer_beside_others_has_its_own_factor():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            x = torch.relu(self.a(x))
            return self.head(x.mean((2, 3))), self.b(x)

    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 6, 6)
    (site,) = (each for each in find_sites(model, x) if "head" in each.name)
    (logits, maps), bias = model(x), model.head.bias.detach()
    grow(model, site, solve(site, "variance_transfer", 12, output_layers=["head"]))
    after, same = model(x)
    torch.testing.assert_close(same, maps, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after - bias, (logits - bias) / 4, rtol=1e-4, atol=1e-6)


def test_where_no_scale_passes_old_weights_stay_and_the_growth_says_so(make):
    model, x, _ = make("tanh")
    site = find_sites(model, x)[0]
    growth = solve(site, "variance_transfer", 4)
    assert not growth.revised
    assert "tanh lies in between" in growth.reason
    plain, inputs, _ = make("relu")
    assert not solve(find_sites(plain, inputs)[0], "variance_transfer", 4, rescale=False).revised
