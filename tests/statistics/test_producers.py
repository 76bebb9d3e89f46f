"""Several producers as one, against patches stacked by hand in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import growconv
from growconv.statistics.producers import site_problem
from tests.network.hand import Net

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
