"""Statistics of every kind of site that has a closed form, against the dense reference and against autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growconv
from growconv.statistics import QUANTITIES, collect_statistics
from growconv.statistics.problem import site_problem
from tests.network.hand import Net

EVERYTHING = sorted(set(QUANTITIES) - {"samples"})
Y = torch.tensor([0, 1, 2, 3, 1])


class Fan(nn.Module):
    """One producer, two consumers with other strides and kernels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv1d(3, 6, 5, padding=2),
            nn.Conv1d(6, 4, 3, padding=1),
            nn.Conv1d(6, 4, 1, stride=2),
        )

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.b(h).mean(dim=2) + self.c(h).mean(dim=2)


class Tokens(nn.Module):
    """Linear layers on a grid, channels last."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 7), nn.Linear(7, 4)

    def forward(self, x):
        return self.down(F.gelu(self.up(x.movedim(1, -1)))).flatten(1, -2).mean(dim=1)


HEAD = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
MODELS = {
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 6, 4), nn.ReLU(), nn.Conv1d(6, 4, 3, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten()
        ),
        (17,),
    ),
    "conv3d": (
        lambda: nn.Sequential(
            nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 4, (2, 3, 1)), nn.AdaptiveAvgPool3d(1), nn.Flatten()
        ),
        (6, 5, 4),
    ),
    "fan": (Fan, (17,)),
    "conv to linear, flattened": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 4, 4)),
        (7, 6),
    ),
    "conv to linear, pooled to one": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), *HEAD, nn.Linear(6, 4)),
        (8, 6),
    ),
    "conv to linear, pooled to a grid": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(), nn.Linear(36, 4)
        ),
        (7, 6),
    ),
    "linear to linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 9), nn.ReLU(), nn.Linear(9, 4)), (8,)),
    "linear layers on a grid": (Tokens, (5, 4)),
    "average pooling": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, 1, 1), nn.AvgPool2d(2), nn.Conv2d(5, 4, 3, 1, 1), *HEAD),
        (11, 8),
    ),
    "padded average pooling": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 5, 3, 1, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Conv2d(5, 4, 3), *HEAD
        ),
        (11, 8),
    ),
    "average pooling that counts its padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, 1, 1), nn.AvgPool2d(3, 2, 1), nn.Conv2d(5, 4, 3), *HEAD),
        (11, 8),
    ),
    "strided with a pooling that overlaps": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.AvgPool2d(3, 1), nn.Conv2d(5, 4, 2), *HEAD),
        (13, 14),
    ),
    "one tap with a stride": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, (2, 1), 1), nn.ReLU(), nn.Conv2d(5, 4, 1, (3, 2)), *HEAD),
        (11, 8),
    ),
    "one tap with a stride on one axis, behind a pooling": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, 1, 1), nn.AvgPool2d(2, 1), nn.Conv2d(5, 4, (1, 3), 2, (0, 1)), *HEAD),
        (12, 9),
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.ReLU6(), nn.Conv2d(6, 6, 3, 2, 1, groups=6), nn.Conv2d(6, 4, 1), *HEAD
        ),
        (9, 8),
    ),
    "circular padding": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"),
            nn.Conv2d(5, 4, 3, padding=1, padding_mode="reflect"),
            *HEAD,
        ),
        (7, 6),
    ),
    "same padding, even kernel": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, (3, 5), padding="same"), nn.Tanh(), nn.Conv2d(5, 4, (4, 2)), *HEAD),
        (7, 6),
    ),
}


def case(name):
    maker, size = MODELS[name]
    torch.manual_seed(0)
    model = maker().double()
    x = torch.randn(5, 3, *size, dtype=torch.float64)
    return model, x, growconv.find_sites(model, x)[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scratch", [1 << 28, 20_000])
def test_the_chosen_path_agrees_with_the_reference(name, scratch):
    model, x, site = case(name)
    assert site.closed_form
    quantities = [q for q in EVERYTHING if scratch > 1 << 20 or q not in ("S_full", "N")]
    expected = collect_statistics(model, site, [(x, Y)], F.cross_entropy, quantities=quantities, path="dense")
    found = collect_statistics(model, site, [(x, Y)], F.cross_entropy, quantities=quantities, scratch_bytes=scratch)
    assert [r.consumer for r in found[site.name].consumers] == list(site.consumers)
    for mine, reference in zip(found[site.name].consumers, expected[site.name].consumers, strict=True):
        assert mine.moments.keys() == reference.moments.keys()
        for key, value in reference.moments.items():
            assert float((mine.moments[key] - value).abs().max()) <= 1e-10 * float(value.abs().max()), key
    torch.testing.assert_close(found[site.name].patch_gram, expected[site.name].patch_gram)
    torch.testing.assert_close(found[site.name].patch_mean, expected[site.name].patch_mean)


@pytest.mark.parametrize("name", MODELS)
def test_n_raw_is_the_gradient_of_a_linear_new_channel(name):
    """A new channel is carried by the model's own operations, activations aside; its outgoing gradient is N_raw."""
    model, x, site = case(name)
    stats = collect_statistics(model, site, [(x, Y)], F.cross_entropy, quantities=("N_raw",), keep_samples=5)[site.name]
    producer = model.get_submodule(site.producers[0])
    kept = stats.samples_kept
    weight = torch.randn(1, *producer.weight.shape[1:], dtype=torch.float64)
    bias = torch.randn(1, dtype=torch.float64) if producer.bias is not None else None
    entries = torch.cat([weight.flatten(), bias]) if bias is not None else weight.flatten()
    new = _apply(producer, kept.x[site.producers[0]], weight, bias)
    for name, module in list(model.named_children()):
        if isinstance(module, (nn.ReLU, nn.ReLU6, nn.Tanh)):
            setattr(model, name, nn.Identity())
    for consumer, route in zip(stats.consumers, site.routes, strict=True):
        read = new
        for step in route.steps:
            read = _carried(model, step, read)
        layer = model.get_submodule(consumer.consumer)
        entries_read = read.shape[-1] if isinstance(layer, nn.Linear) else read.shape[1]
        shape = (layer.weight.shape[0], entries_read, *layer.weight.shape[2:])
        zero = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        written = _apply(layer, read, zero, None)
        (gradient,) = torch.autograd.grad((written * kept.v[consumer.consumer]).sum() / len(x), zero)
        found = torch.einsum("a,abc->cb", entries, consumer.N_raw)
        torch.testing.assert_close(found, gradient.flatten(1), rtol=1e-9, atol=1e-12)


def _apply(layer, x, weight, bias):
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if layer.padding_mode != "zeros":
        sides = layer._reversed_padding_repeated_twice
        return F.conv2d(F.pad(x, sides, mode=layer.padding_mode), weight, bias, layer.stride, 0, layer.dilation)
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
    return convolve(x, weight, bias, layer.stride, layer.padding, layer.dilation)


def _carried(model, step, maps):
    """One step of a route on a new channel, by torch's own layers: max poolings do not occur here."""
    kind = type(step).__name__
    if kind == "Flatten":
        return maps.flatten(1)
    if kind == "AdaptivePool":
        return {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}[maps.dim()](
            maps, step.output_size
        )
    if kind == "Pool":
        pool = next(module for module in model.modules() if isinstance(module, nn.AvgPool2d))
        return pool(maps)
    if kind == "Depthwise":
        layer = model.get_submodule(step.path)
        kernel = torch.zeros(1, 1, *layer.kernel_size, dtype=maps.dtype)
        kernel[0, 0, 1, 1] = 1
        return F.conv2d(maps, kernel, None, layer.stride, layer.padding)
    return maps


def test_a_fan_has_no_single_n():
    model, x, site = case("fan")
    stats = collect_statistics(model, site, [(x, Y)], F.cross_entropy)[site.name]
    with pytest.raises(growconv.GrowthError, match="2 consumers"):
        _ = stats.N
    torch.testing.assert_close(stats.S, stats.consumers[0].S + stats.consumers[1].S)
    assert stats.columns.shape == (16, 3 * 4 + 1 * 4)
    torch.testing.assert_close(stats.columns[:, :12].view(16, 3, 4), stats.consumers[0].N)
    assert set(stats.outgoing_shapes) == {"b", "c"}


def test_max_pooling_counts_as_its_average():
    torch.manual_seed(0)

    def build(pool):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 5, 3, 1, 1), pool, nn.Conv2d(5, 4, 3, 1, 1), *HEAD).double()

    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    found = []
    for pool in (nn.MaxPool2d(2), nn.AvgPool2d(2)):
        model = build(pool)
        site = growconv.find_sites(model, x)[0]
        found.append(collect_statistics(model, site, [(x, Y)], F.cross_entropy, quantities=("S",))[site.name].S)
    torch.testing.assert_close(*found)


# Several producers as one, against patches stacked by hand in float64.

Kernel = tuple[int, int, int]  # kernel, stride, padding


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).sum(1).mean()


def downsampled(m: Net, x: Tensor) -> Tensor:
    y = m.main(torch.relu(m.before(x))) + m.shortcut(x)
    y = y + m.up(torch.relu(m.down(y)))
    return m.head(y)


@pytest.mark.parametrize(
    ("main", "shortcut", "up", "one"),
    [
        ((3, 1, 1), (1, 2, 0), (3, 1, 1), True),  # as in a ResNet
        ((1, 1, 0), (1, 2, 0), (1, 1, 0), True),  # as in one with bottlenecks
        ((3, 1, 1), (3, 2, 1), (1, 1, 0), False),
        ((5, 1, 2), (1, 2, 0), (3, 1, 1), False),
    ],
)
@pytest.mark.parametrize("bias", [(True, True, True), (False, True, False), (False, False, False)])
def test_producers_of_several_geometries(
    main: Kernel, shortcut: Kernel, up: Kernel, one: bool, bias: tuple[bool, bool, bool]
) -> None:
    torch.manual_seed(0)
    specs = {"main": (3, 4, *main), "shortcut": (2, 4, *shortcut), "up": (3, 4, *up)}
    layers = {path: nn.Conv2d(*spec, bias=biased) for (path, spec), biased in zip(specs.items(), bias, strict=True)}
    layers |= {"before": nn.Conv2d(2, 3, 3, 2, 1), "down": nn.Conv2d(4, 3, 3, padding=1)}
    model = Net(downsampled, **layers, head=nn.Conv2d(4, 2, 3, 2, 1)).double()
    x = torch.randn(5, 2, 9, 8, dtype=torch.float64)
    site = next(each for each in growconv.find_sites(model, x) if set(each.producers) == set(specs))
    given, gave = {}, {}

    def record(path: str, args: tuple[Tensor], output: Tensor) -> None:
        given[path], gave[path] = args[0].detach(), output

    for path in (*specs, *site.consumers):
        model.get_submodule(path).register_forward_hook(lambda _m, a, o, p=path: record(p, a, o))
    target = torch.randn(5, 2, 3, 2, dtype=torch.float64)
    gradients = torch.autograd.grad(loss(model(x), target), [gave[path] for path in site.consumers])
    found = growconv.collect_statistics(
        model, [site], [(x, target)], loss, quantities={"S", "N_raw", "S_full"}, full=True
    )[site.name]
    for each, path, gradient in zip(found.consumers, site.consumers, gradients, strict=True):
        maps = []
        for producer in site.producers:
            layer = model.get_submodule(producer)
            patches = F.unfold(given[producer], layer.kernel_size, padding=layer.padding, stride=layer.stride)
            if layer.bias is not None:
                patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
            maps.append(patches if path == "head" or producer != "up" else torch.zeros_like(patches))
        stacked = torch.cat(maps, 1).unflatten(2, (5, 4))
        consumer = model.get_submodule(path)
        X = F.unfold(stacked, 3, padding=1, stride=consumer.stride).unflatten(1, (-1, 9))
        torch.testing.assert_close(each.S, torch.einsum("nabm,ndbm->ad", X, X) / 5)
        full = torch.einsum("nabm,ndem->abde", X, X).reshape(X.shape[1] * 9, -1) / 5
        torch.testing.assert_close(each.S_full, full)
        torch.testing.assert_close(each.N_raw, -torch.einsum("nabm,ncm->abc", X, gradient.flatten(2)))
    problem = site_problem(site, "head", given, torch.zeros(5, 4, 5, 4), torch.zeros(5, 2, 3, 2))[0]
    assert (problem.first.taps == max(main[0], up[0]) ** 2) == one
