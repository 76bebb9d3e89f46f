"""variance_transfer: pairs cancel, variances are those of Table 1, rescaled old weights change no output."""

import pytest
import torch
from torch import nn

from growconv.network.apply import grow
from growconv.network.find import find_sites
from growconv.solvers import solve
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
    assert batch_norm_behind(site, model, "2") == "3"
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


def test_where_no_scale_passes_old_weights_stay_and_the_growth_says_so(make):
    model, x, _ = make("tanh")
    site = find_sites(model, x)[0]
    growth = solve(site, "variance_transfer", 4)
    assert not growth.revised
    assert "tanh lies in between" in growth.reason
    plain, inputs, _ = make("relu")
    assert not solve(find_sites(plain, inputs)[0], "variance_transfer", 4, rescale=False).revised
