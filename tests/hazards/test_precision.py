"""Half precision, autocast, loss scaling, memory formats and values that are not finite."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import growconv
from growconv.errors import GeometryError, StatisticsError
from growconv.statistics import StatisticsCollector, collect_statistics

X = torch.randn(6, 3, 9, 8, generator=torch.Generator().manual_seed(0))


Y = torch.tensor([0, 1, 2, 3, 1, 0])


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def collected(model, x=X, scale=1.0, autocast=False, **options):
    site = growconv.find_sites(model, x[:1])[0]
    with StatisticsCollector(model, site, **options) as collector:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x), Y)
        (loss * scale).backward()
    return collector.statistics[site.name]


def difference(first, second):
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model, reference = network().to(dtype), network()
    x = X.to(dtype)
    found, expected = collected(model, x), collected(reference, x.float())
    assert found.S.dtype == found.N.dtype == torch.float64
    assert difference(found.S, expected.S) < 1e-6  # the images are the same
    assert difference(found.N_raw, expected.N_raw) < 0.1  # the network's own arithmetic is half precision


def test_float64_models():
    found, reference = collected(network().double(), X.double()), collected(network())
    assert difference(reference.N, found.N) < 1e-4


def test_loss_scale_is_divided_out():
    model = network()
    assert difference(collected(model, scale=1024.0, loss_scale=1024.0).N, collected(model).N) < 1e-5
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    assert difference(collected(model, scale=scaler.get_scale(), loss_scale=scaler).N, collected(model).N) < 1e-5
    with pytest.raises(growconv.GrowthError, match="loss_scale"):
        collected(model, loss_scale=0.0)


def test_memory_formats_and_strides():
    model = network()
    expected = collected(model)
    last = network().to(memory_format=torch.channels_last)
    assert difference(collected(last, X.to(memory_format=torch.channels_last)).N, expected.N) < 1e-4
    wide = torch.stack([X, X], dim=-1).flatten(-2)
    for view in (wide[..., ::2], X.transpose(2, 3).contiguous().transpose(2, 3), X.flip(0).flip(0)):
        for path in ("offset", "unfold", "dense"):
            assert difference(collected(model, view, path=path).N, expected.N) < 1e-4


def test_single_images_without_a_batch_axis():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3))
    site = growconv.site(model, "0", "2", example_input=X)
    loss = lambda z, _: z.square().sum()  # noqa: E731
    single = collect_statistics(model, site, [(X[0], None)], loss, keep_samples=1)[site.name]
    batch = collect_statistics(model, site, [(X[:1], None)], loss, keep_samples=1)[site.name]
    assert single.samples == 1
    assert difference(single.N, batch.N) < 1e-5
    assert single.samples_kept.h["2"].shape == batch.samples_kept.h["2"].shape


@pytest.mark.parametrize(
    ("spoilt", "named"), [("x", "input of 0"), ("h", "input of 2"), ("v", "gradient at the output of 2")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_or_skipped(spoilt, named, value):
    model, images = network().double(), X.double()
    model[1] = nn.Identity()
    site = growconv.site(model, "0", "2", example_input=images)
    noise = torch.tensor([0.0, value, 0, 0, 0]).view(5, 1, 1)
    model[1].register_forward_hook(lambda module, args, h: h + noise if spoilt == "h" else None)
    x = images.clone()
    if spoilt == "x":
        x[1, 2, 3, 4] = value

    def loss(z, y):
        factor = torch.ones_like(z)
        factor[0, 0] = value if spoilt == "v" else 1.0
        return (z * factor)[y >= 0].sum()

    with StatisticsCollector(model, site), pytest.raises(StatisticsError, match=named):
        loss(model(x), Y).backward()
    collector = StatisticsCollector(model, site, nonfinite="skip")
    with collector:
        loss(model(x), Y).backward()
        with pytest.raises(StatisticsError, match="zero samples"):
            _ = collector.statistics
        spoilt = "nothing"
        model(images).square().sum().backward()
    found = collector.statistics[site.name]
    assert found.samples == len(X)
    assert found.skipped_batches == 1
    assert "1 batches skipped" in str(found)
    expected = collect_statistics(model, site, [(images, Y)], lambda z, _: z.square().sum())[site.name]
    assert difference(found.N, expected.N) < 1e-6


def test_empty_batches_and_images_smaller_than_the_kernel():
    model = network()
    site = growconv.find_sites(model, X[:1])[0]
    with pytest.raises(StatisticsError, match="empty batch"):
        collect_statistics(model, site, [(X[:0], Y[:0])], F.cross_entropy)
    with pytest.raises(GeometryError, match="does not fit"):
        growconv.mask_tensor((2, 2), nn.Conv2d(1, 1, 5, padding=1))


def test_a_loss_that_is_not_finite():
    model = network()
    site = growconv.find_sites(model, X[:1])[0]
    with pytest.raises(StatisticsError, match="loss is not finite"):
        collect_statistics(model, site, [(X, Y)], lambda z, _: (z * float("inf")).sum())
