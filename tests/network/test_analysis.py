"""What models are run on to be looked at, in which mode, and that looking disturbs nothing."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.errors import ArgumentTypeError, ArgumentValueError, TraceError
from growconv.network.event import grow
from growconv.network.find import explain_sites, find_sites
from growconv.network.proof import silent_growth
from tests.network import referee, zoo
from tests.network.hand import Net


def test_what_the_model_cannot_be_run_on() -> None:
    model, example = zoo.build("chain")
    with pytest.raises(TraceError, match="does not run on the example") as caught:
        find_sites(model, example[:, :2])
    assert "(2, 2, 14, 14)" in str(caught.value)
    with pytest.raises(TraceError, match="float32"):
        find_sites(model, example.float())
    with pytest.raises(ArgumentTypeError, match="example input"):
        find_sites(model, 3)
    with pytest.raises(ArgumentTypeError, match="empty list"):
        find_sites(model, [])
    with pytest.raises(ArgumentValueError, match="mode"):
        find_sites(model, example, modes=("test",))
    with pytest.raises(ArgumentTypeError, match="wrapped"):
        find_sites(nn.DataParallel(model), example)
    with pytest.raises(TraceError, match="an empty one shows nothing"):
        find_sites(model, example[:0])
    with pytest.raises(TraceError, match="gives no tensor"):
        find_sites(nn.Sequential(model, zoo.Called(Tensor.tolist)), example)
    with pytest.raises(TraceError, match="meta device"):
        find_sites(copy.deepcopy(model).to("meta"), example.to("meta"))
    closed = nn.Sequential(zoo.Called(lambda x: model.c(model.a(x))), model)
    with pytest.raises(TraceError, match="runs layers of the model itself"):
        find_sites(closed, example)
    model.kept = model(example)
    with pytest.raises(TraceError, match="cannot be copied"):
        find_sites(model, example)


def test_arguments_by_position_and_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, shift: Tensor, flag: bool = False) -> dict[str, Tensor]:
            y = self.a(x)
            return {"y": self.b(F.relu(-y if flag else y)) + shift}

    model, x, shift = Two(), torch.randn(2, 3), torch.randn(2)
    for given in ((x, shift), {"x": x, "shift": shift}, {"x": x, "shift": shift, "flag": True}):
        assert [each.name for each in find_sites(model, given)] == ["a -> b"]


def test_finding_does_not_disturb_other_threads() -> None:
    busy, x = zoo.build("residual")
    busy.eval()
    model, example = zoo.build("gated")
    expected, stop, wrong = busy(x), threading.Event(), []

    def run() -> None:
        while not stop.is_set():
            if not torch.equal(busy(x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            assert len(find_sites(model, example)) == 2
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_batch_of_one_that_a_norm_refuses_in_training_keeps_no_site_back() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1)]
    assert [each.name for each in find_sites(nn.Sequential(*layers), torch.randn(1, 3, 8, 8))] == ["0 -> 2", "2 -> 4"]


def test_an_example_of_one_sample_is_taken_twice_where_training_needs_more() -> None:
    """A head that only training calls, behind a batch norm at one location."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
            self.head = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1)
            )

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = torch.relu(self.a(x))
            return (self.b(y), self.head(y)) if self.training else (self.b(y),)

    assert [site.name for site in find_sites(Net(), torch.randn(1, 3, 6, 6))] == ["a -> b, head.1", "head.1 -> head.3"]


class Detector(nn.Module):
    """In training it needs targets, and gives a loss that another layer has a part in."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.extra = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 1, 1)

    def forward(self, images: list[Tensor], targets: list[Tensor] | None = None) -> dict[str, Tensor]:
        y = F.relu(self.a(torch.stack(images)))
        if not self.training:
            return {"found": self.b(y)}
        if targets is None:
            raise AssertionError("targets should not be none when in training mode")
        return {"loss": (self.b(y).mean((2, 3)) - torch.stack(targets)).square().mean() + self.extra(y).mean()}


def test_a_model_that_training_gives_more_is_refused_without_it_in_words_that_help() -> None:
    images, targets = [torch.randn(3, 6, 6)], [torch.randn(2)]
    with pytest.raises(TraceError, match="in training mode: targets should not be none") as caught:
        find_sites(Detector(), (images,))
    assert "modes=('eval',)" in str(caught.value)
    sites = find_sites(Detector(), [(images,), (images, targets)])
    assert [site.name for site in sites] == ["a -> b, extra"]
    table = explain_sites(Detector(), (images,), modes=("eval",))
    assert "extra is used by none of the examples" in str(table[0].reason)


def test_a_call_with_nothing_in_it_hides_no_other() -> None:
    """A head for boxes of which there are none in eval mode."""

    def forward(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(m.a(x))
        boxes = y if m.training else y[:0]
        return m.b(y), m.up(F.relu(m.norm(m.mask(boxes))))

    parts = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 2, 1), "mask": nn.Conv2d(4, 5, 1), "norm": nn.BatchNorm2d(5)}
    model = referee.prepared(Net(forward, **parts, up=nn.Conv2d(5, 2, 1)))
    example = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    sites = find_sites(model, example)
    assert [site.name for site in sites] == ["a -> b, mask", "mask -> up"]
    with torch.no_grad():
        old = model.train()(example)
    for each in sites:
        grow(model, each, silent_growth(each, 2), 0.0)
    with torch.no_grad():
        assert all(torch.allclose(new, before) for new, before in zip(model(example), old, strict=True))
    table = {row.path: row.reason for row in explain_sites(model, example, modes=("eval",))}
    assert table["mask"] == "none of the examples calls it"


@torch.library.custom_op("growconv_tests::roi_pool", mutates_args=())
def _cut_out(x: Tensor, boxes: Tensor) -> Tensor:
    """Maps of 2 by 2 of the samples and from the corners that boxes (n, 3) tell."""
    places = [(int(sample), int(row), int(column)) for sample, row, column in boxes.tolist()]
    return torch.stack([x[n, :, row : row + 2, column : column + 2] for n, row, column in places])


def _put_in(context: object, gradient: Tensor) -> tuple[Tensor, None]:
    total = gradient.new_zeros(context.shape)
    for each, (sample, row, column) in zip(gradient, context.boxes, strict=True):
        total[sample, :, row : row + 2, column : column + 2] += each
    return total, None


def _keep_boxes(ctx: object, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.shape, ctx.boxes = inputs[0].shape, inputs[1].long().tolist()


_cut_out.register_autograd(_put_in, setup_context=_keep_boxes)


def test_maps_cut_out_for_boxes_keep_their_channels() -> None:
    """The name is that of torchvision's operation, which cuts out finer."""
    boxes = torch.tensor([[0.0, 1, 1], [1, 0, 2], [0, 2, 2], [1, 3, 0], [1, 1, 1]])

    def forward(m: Net, x: Tensor) -> Tensor:
        cut = _cut_out(F.relu(m.a(x)), boxes)
        placed = torch.zeros(6, *cut.shape[1:], dtype=cut.dtype)
        placed[torch.tensor([4, 2, 1, 0, 5])] = cut
        return m.b(placed.flatten(1))

    model = Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Linear(16, 2)).double()
    example = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    sites = find_sites(model, example)
    assert [site.name for site in sites] == ["a -> b"]
    assert referee.untrained(referee.check(model, example, sites), example) == []
