"""A copy that looks wider for a while, and is as it was afterwards."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.network.layout import ENTRY, IN, OUT, Layout, Run, SizeAttribute
from growconv.network.numbers import Numbers
from growconv.network.pretender import pretending
from growconv.network.trace import look
from tests.network.hand import Net


def test_a_pretending_model_has_the_shapes_of_a_wider_one() -> None:
    model = Net(
        lambda m, x: m.b(F.relu(m.n(m.a(x)) * m.scale)).flatten(1),
        a=nn.Conv2d(3, 4, 3),
        n=nn.BatchNorm2d(4),
        b=nn.Conv2d(4, 2, 1),
    )
    model.scale = nn.Parameter(torch.arange(4.0).view(4, 1, 1))
    plain = (Run(0, 1),)
    layout = Layout(
        {("a", OUT): plain, ("n", ENTRY): plain, ("scale", ENTRY): plain, ("b", IN): plain}, (1,), {"scale": 0}
    )
    twin, numbers, x = copy.deepcopy(model), Numbers(), torch.randn(2, 3, 5, 5)
    with pretending(twin, layout, [4], [6]):
        assert twin.scale.shape == (6, 1, 1)
        assert twin.a.out_channels == 6
        assert twin.a.weight.shape == (6, 3, 3, 3)
        look(twin, ((x,), {}), numbers)
        assert len(numbers.columns["b", IN]) == len(numbers.columns["n", ENTRY]) == 6
    assert twin.a.out_channels == 4
    assert all(torch.equal(new, old) for new, old in zip(twin.parameters(), model.parameters(), strict=True))
    assert torch.equal(twin(x), model(x))


def test_what_is_written_to_outputs_that_are_only_pretended_arrives_where_it_does_in_a_wider_model() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y = F.relu_(m.n(m.a(x)))
        y = y.mul_(2).add_(m.c(x)).sigmoid() * F.max_pool2d(y, 3, 1, 1)
        z = m.a(x)
        z[:, :2] = y[:, 2:4]
        z += y.flip(1)[:, : z.shape[1]] * torch.linspace(0, 1, y.shape[-1])
        return m.b(torch.cat([y, z.transpose(1, 2).reshape(len(z), z.shape[1], -1).view_as(z)], 1))

    def net(width: int) -> Net:
        return Net(
            run,
            a=nn.Conv2d(3, width, 3, padding=1),
            n=nn.BatchNorm2d(width),
            c=nn.Conv2d(3, width, 1),
            b=nn.Conv2d(2 * width, 2, 1),
        )

    plain = (Run(0, 1),)
    axes = {("a", OUT): plain, ("n", ENTRY): plain, ("c", OUT): plain, ("b", IN): (*plain, Run(0, 1, slots=(1,)))}
    model, x, told, true = net(4), torch.randn(2, 3, 5, 5), Numbers(), Numbers()
    with pretending(model, Layout(axes, (1,), {}), [4], [6]):
        look(model, ((x,), {}), told, pretending=True)
    look(net(6), ((x,), {}), true)
    assert told.columns.keys() == true.columns.keys()
    for key, columns in true.columns.items():
        assert (told.roots()[told.columns[key]] == true.roots()[columns]).all()


def test_sizes_are_put_back() -> None:
    model = nn.Identity()
    model.sizes = [2, 3]
    with pretending(model, Layout({}, (1,), {}, (SizeAttribute("", "sizes", 1, {0: 2}),)), [3], [5]):
        assert model.sizes == [2, 7]
    assert model.sizes == [2, 3]
