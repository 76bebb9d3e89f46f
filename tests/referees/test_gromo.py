"""The same statistics as GroMo's FullConv2dGrowingModule, the package of TINY's authors.

GroMo keeps gradients where we keep desired changes (their opposite), for a loss summed over samples, and orders N as
(patch entry, output channel, tap). It works in float32 only.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import growconv
from growconv.statistics import collect_statistics

gromo = pytest.importorskip(
    "gromo.modules.conv2d_growing_module",
    reason="GroMo is not installed; the bench extra brings it: pip install growconv[bench]",
)

CASES = st.fixed_dictionaries(
    {
        "k1": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "k2": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "p1": st.integers(0, 2),
        "p2": st.integers(0, 2),
        "s1": st.integers(1, 2),
        "s2": st.integers(1, 2),
        "d2": st.integers(1, 2),
        "size": st.tuples(st.integers(8, 11), st.integers(8, 11)),
        "bias": st.booleans(),
        "path": st.sampled_from(["dense", "unfold", "offset"]),
    }
)


@settings(max_examples=30)
@given(CASES)
def test_the_same_statistics(s):
    torch.manual_seed(0)
    x = torch.randn(40, 2, *s["size"])
    first = nn.Conv2d(2, 3, s["k1"], s["s1"], s["p1"], bias=s["bias"])
    hidden = first(x).shape[-2:]
    second = nn.Conv2d(3, 2, s["k2"], s["s2"], s["p2"], s["d2"], bias=s["bias"])
    try:
        target = torch.randn_like(second(first(x)))
    except RuntimeError:
        return  # the kernel does not fit

    device = torch.device("cpu")
    theirs_first = gromo.Conv2dGrowingModule(
        2, 3, s["k1"], s["s1"], s["p1"], input_size=s["size"], use_bias=s["bias"],
        post_layer_function=nn.Tanh(), device=device, name="first",
    )  # fmt: skip
    theirs = gromo.FullConv2dGrowingModule(
        3, 2, s["k2"], s["s2"], s["p2"], s["d2"], input_size=tuple(hidden), use_bias=s["bias"],
        previous_module=theirs_first, allow_growing=True, device=device, name="second",
    )  # fmt: skip
    theirs_first.layer.load_state_dict(first.state_dict())
    theirs.layer.load_state_dict(second.state_dict())
    theirs.init_computation()
    (theirs(theirs_first(x)) - target).square().sum().backward()
    theirs.update_computation()

    model = nn.Sequential(first, nn.Tanh(), second)
    site = growconv.site(model, "0", "2", example_input=x)
    stats = collect_statistics(
        model, site, [(x, target)], lambda z, y: (z - y).square().sum(), reduction="sum", path=s["path"]
    )[site.name]
    assert stats.samples == len(x)
    a, b, c = stats.N.shape

    def same(ours, other):
        torch.testing.assert_close(ours.float(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))

    same(stats.S, theirs.tensor_s_growth())
    same(stats.S2, theirs.tensor_s())
    same(stats.M, -theirs.tensor_m())
    same(stats.N_raw, -theirs.tensor_m_prev().view(a, c, b).transpose(1, 2))
    same(stats.P, theirs.cross_covariance().transpose(0, 1))
    if torch.linalg.cond(stats.S2) < 1e5:  # their solve is float32's
        theirs.compute_optimal_delta()
        n = theirs.tensor_n.view(a, c, b).transpose(1, 2)
        scale = float(stats.N_raw.abs().max())
        torch.testing.assert_close(stats.N.float(), n, rtol=1e-2, atol=1e-3 * scale)
