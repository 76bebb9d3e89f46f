"""Statistics against autograd: what linear new channels would really do, and what the loss says about them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import growconv

SETTINGS = st.fixed_dictionaries(
    {
        "k1": st.tuples(st.integers(1, 3), st.integers(1, 4)),
        "k2": st.tuples(st.integers(1, 3), st.integers(1, 4)),
        "s1": st.integers(1, 2),
        "s2": st.integers(1, 2),
        "p1": st.integers(0, 2),
        "p2": st.integers(0, 2),
        "d1": st.integers(1, 2),
        "d2": st.integers(1, 2),
        "bias1": st.booleans(),
        "bias2": st.booleans(),
        "size": st.tuples(st.integers(7, 10), st.integers(9, 12)),
        "path": st.sampled_from(["auto", "dense", "unfold", "offset"]),
    }
)


class Pair(nn.Module):
    """conv1, tanh, conv2, and optionally a linear new channel beside the old ones."""

    def __init__(self, s):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, s["k1"], s["s1"], s["p1"], s["d1"], bias=s["bias1"])
        self.conv2 = nn.Conv2d(3, 4, s["k2"], s["s2"], s["p2"], s["d2"], bias=s["bias2"])

    def forward(self, x):
        return self.conv2(torch.tanh(self.conv1(x)))

    def new(self, x, alpha, alpha_bias, omega):
        hidden = F.conv2d(x, alpha, alpha_bias, self.conv1.stride, self.conv1.padding, self.conv1.dilation)
        return F.conv2d(hidden, omega, None, self.conv2.stride, self.conv2.padding, self.conv2.dilation)


def prepared(s, seed=0):
    torch.manual_seed(seed)
    model = Pair(s).double()
    x = torch.randn(5, 2, *s["size"], dtype=torch.float64)
    try:
        target = torch.randn_like(model(x))
    except RuntimeError:
        return None
    return model, x, target


def loss(z, target):
    return ((z - target) ** 2 * target.abs()).sum()


def collect(model, x, target, s, **options):
    site = growconv.site(model, "conv1", "conv2", example_input=x)
    options.setdefault("path", s["path"])
    options.setdefault("quantities", ("S", "N", "S_full", "update", "P", "N_raw"))
    found = growconv.collect_statistics(model, site, [(x, target)], loss, reduction="sum", **options)
    return found[site.name]


@settings(max_examples=40)
@given(SETTINGS)
def test_statistics_mean_what_they_say(s):
    case = prepared(s)
    if case is None:
        return
    model, x, target = case
    stats = collect(model, x, target, s)
    n, bias = len(x), s["bias1"]
    taps = torch.Size(s["k2"]).numel()
    alpha = torch.randn(1, 2, *s["k1"], dtype=torch.float64)
    alpha_bias = torch.randn(1, dtype=torch.float64) if bias else None
    omega = torch.randn(4, 1, *s["k2"], dtype=torch.float64)
    a = torch.cat([alpha.flatten(), alpha_bias]) if alpha_bias is not None else alpha.flatten()
    theta = torch.einsum("a,cb->abc", a, omega.flatten(1))

    # N_raw: gradient of the loss with respect to the outgoing weights of a linear new channel
    z = model(x)
    zero = torch.zeros_like(omega, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(z + model.new(x, alpha, alpha_bias, zero), target), zero)
    expected = -gradient.flatten(1).T / n  # (b, c)
    torch.testing.assert_close(torch.einsum("a,abc->bc", a, stats.N_raw), expected, rtol=1e-9, atol=1e-9)

    # S and S_full: energies of what the channel writes
    output = model.new(x, alpha, alpha_bias, omega)
    columns = theta.flatten(0, 1)
    torch.testing.assert_close((columns * (stats.S_full @ columns)).sum(), output.square().sum() / n, rtol=1e-9, atol=0)
    taps_one_by_one = torch.eye(taps, dtype=torch.float64).view(taps, 1, *s["k2"])
    by_tap = model.new(x, alpha, alpha_bias, taps_one_by_one)
    torch.testing.assert_close(a @ stats.S @ a, by_tap.square().sum() / n, rtol=1e-9, atol=0)

    # P: its product with what an update of the existing weights writes
    change = torch.randn_like(model.conv2.weight)
    old = F.conv2d(
        torch.tanh(model.conv1(x)), change, None, model.conv2.stride, model.conv2.padding, model.conv2.dilation
    )
    inner = stats.P[..., : change[0].numel()] @ change.flatten(1).T
    torch.testing.assert_close((theta * inner).sum(), (output * old).sum().detach() / n, rtol=1e-9, atol=1e-9)


@settings(max_examples=25)
@given(SETTINGS)
def test_the_best_update_is_least_squares_and_n_is_orthogonal_to_it(s):
    case = prepared(s, seed=1)
    if case is None:
        return
    model, x, target = case
    stats = collect(model, x, target, s, keep_samples=5)
    kept = stats.samples_kept
    h, v = kept.h["conv2"], kept.v["conv2"]

    def updated(weight, bias):
        return F.conv2d(h, weight, bias, model.conv2.stride, model.conv2.padding, model.conv2.dilation)

    # no gradient is left in the least-squares problem: W* is the best
    weight = stats.update.clone().requires_grad_()
    bias = None if stats.update_bias is None else stats.update_bias.clone().requires_grad_()
    residual = v - updated(weight, bias)
    gradients = torch.autograd.grad(residual.square().sum(), [weight] if bias is None else [weight, bias])
    assert max(float(g.abs().max()) for g in gradients) < 1e-6 * float(v.square().sum())
    torch.testing.assert_close(kept.v_perp("conv2"), residual.detach(), rtol=1e-9, atol=1e-12)
    energy = float(residual.detach().square().sum()) / len(x)
    assert stats.bottleneck_energy == pytest.approx(energy, rel=1e-6, abs=1e-9 * stats.gradient_energy)
    assert stats.gradient_energy == pytest.approx(float(v.square().sum()) / len(x), rel=1e-9)

    # N is N_raw of v⊥
    x0 = kept.x["conv1"]
    alpha = torch.randn(1, 2, *s["k1"], dtype=torch.float64)
    a = torch.cat([alpha.flatten(), torch.zeros(int(s["bias1"]), dtype=torch.float64)])
    zero = torch.zeros(4, 1, *s["k2"], dtype=torch.float64, requires_grad=True)
    inner = (model.new(x0, alpha, None, zero) * residual.detach()).sum() / len(x)
    (expected,) = torch.autograd.grad(inner, zero)
    scale = float(stats.N_raw.abs().max())
    torch.testing.assert_close(
        torch.einsum("a,abc->bc", a, stats.N), expected.flatten(1).T, rtol=1e-6, atol=1e-7 * max(scale, 1.0)
    )


def test_patch_moments_predict_the_new_channels_own_values():
    torch.manual_seed(0)
    s = {"k1": (3, 3), "k2": (3, 3), "s1": 2, "s2": 1, "p1": 1, "p2": 1, "d1": 1, "d2": 1, "bias1": True, "bias2": True}
    model = Pair(s).double()
    x = torch.randn(6, 2, 11, 12, dtype=torch.float64)
    site = growconv.site(model, "conv1", "conv2", example_input=x)
    for path in ("dense", "unfold", "offset"):
        stats = growconv.collect_statistics(
            model, site, [(x, torch.zeros(()))], lambda z, _: z.square().mean(), quantities=("patch",), path=path
        )[site.name]
        filters = torch.cat([model.conv1.weight.flatten(1), model.conv1.bias.unsqueeze(1)], dim=1).detach()
        values = model.conv1(x).detach().transpose(0, 1).flatten(1)
        torch.testing.assert_close(filters @ stats.patch_mean, values.mean(dim=1))
        second = torch.einsum("ka,ad,kd->k", filters, stats.patch_gram, filters)
        torch.testing.assert_close(second, values.square().mean(dim=1))
        assert stats.S is None
        assert stats.N is None


@pytest.mark.parametrize("path", ["auto", "unfold", "dense"])
def test_s_full_is_left_out_where_it_does_not_fit(path):
    s = {"k1": (3, 2), "k2": (2, 3), "s1": 1, "s2": 2, "p1": 1, "p2": 2, "d1": 2, "d2": 1, "bias1": True, "bias2": True}
    s["size"], s["path"] = (9, 11), path
    model, x, target = prepared(s)
    assert collect(model, x, target, s, quantities=("S_full",), scratch_bytes=2000).S_full is None
