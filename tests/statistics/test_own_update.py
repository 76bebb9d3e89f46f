"""The best update of a lone layer, which needs no site."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import growconv
from growconv.errors import SiteError, StatisticsError

LONE = [
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, (3, 2), padding=(0, 1), dilation=(1, 2), groups=2, bias=False),
    nn.Conv1d(4, 3, 3, padding=1, padding_mode="circular"),
    nn.Linear(4, 3),
]


@pytest.mark.parametrize("layer", LONE, ids=str)
def test_the_update_of_a_lone_layer_is_least_squares_on_the_desired_outputs(layer: nn.Module) -> None:
    """Referee: the gradient of ‖v − δz‖² by the update vanishes (autograd), with the layer itself as the map."""
    layer, generator = layer.double(), torch.Generator().manual_seed(0)
    sizes = {nn.Conv2d: [(9, 8), (6, 7)], nn.Conv1d: [(30,), (20,)], nn.Linear: [()]}[type(layer)]
    inputs = [torch.randn(60, 4, *size, generator=generator).double() for size in sizes]
    pairs = []
    for x in inputs:
        z = layer(x).detach()
        pairs.append((x, torch.randn(z.shape, generator=generator, dtype=torch.float64)))
    weight, bias = growconv.best_update(layer, pairs)
    assert (bias is None) == (layer.bias is None)
    given = {"weight": weight.requires_grad_()} | ({} if bias is None else {"bias": bias.requires_grad_()})
    losses = [(v - torch.func.functional_call(layer, given, (x,))).square().sum() for x, v in pairs]
    total = torch.stack(losses).sum()
    gradients = torch.autograd.grad(total, list(given.values()))
    assert max(float(each.abs().max()) for each in gradients) < 1e-6 * float(total.detach())


def test_a_step_along_the_update_lowers_the_loss_as_its_energy_says() -> None:
    torch.manual_seed(0)
    layer, x, y = nn.Conv2d(2, 3, 3).double(), torch.randn(50, 2, 6, 6).double(), torch.randint(0, 3, (50,))
    z = layer(x)
    loss = F.cross_entropy(z.mean((2, 3)), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, z)
    weight, bias = growconv.best_update(layer, [(x, -gradient)])
    change = F.conv2d(x, weight, bias)
    step = 1e-4
    with torch.no_grad():
        after = F.cross_entropy((z + step * change).mean((2, 3)), y, reduction="sum")
    assert float(loss.detach() - after) == pytest.approx(step * float(change.square().sum()), rel=1e-3)


def test_the_update_of_something_else_is_refused() -> None:
    h = torch.randn(3, 4, 5, 5)
    layer = nn.Conv2d(4, 2, 3)
    with pytest.raises(SiteError):
        growconv.best_update(nn.ReLU(), [(h, h)])
    for pairs in ([(h[:, :3], layer(h))], [(h, layer(h)[:, :1])], [(h, layer(h)[..., :2])], [(h, h[:, :2])]):
        with pytest.raises(StatisticsError, match="not the input and output of the layer"):
            growconv.best_update(layer, pairs)
    with pytest.raises(StatisticsError, match="no samples"):
        growconv.best_update(layer, [])
