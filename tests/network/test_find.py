"""Which sites are found, of which kind, what is said of the other layers, and that finding disturbs nothing."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growconv.errors import ArgumentTypeError, ArgumentValueError, SiteError, TraceError
from growconv.network.event import grow
from growconv.network.find import explain_sites, find_sites, site
from growconv.network.proof import silent_growth
from tests.network import referee, zoo
from tests.network.between_layers import CASES
from tests.network.hand import Net
from tests.network.refused import Refused

SITES = {
    "chain": [("a -> b", "pair", 1), ("b -> c", "linear", 1), ("c -> d", "linear", 1)],
    "residual": [
        ("stem + a2 -> a1, b1, short", "stream", 1),
        ("a1 -> a2", "pair", 1),
        ("b1 -> b2", "pair", 1),
        ("b2 + short -> head", "stream", 1),
    ],
    "padded_shortcut": [("a + c -> b, d", "stream", 1), ("b -> c", "pair", 1)],
    "dense": [("a + d -> b, 3 more", "stream", 1), ("b + d -> c, d, e", "stream", 1), ("c -> d", "concatenation", 1)],
    "gated": [("a + b + up -> b, down, c", "stream", 1), ("down -> up", "linear", 1)],
    "grouped": [("a -> b", "depthwise", 1), ("b -> c", "grouped", 2)],
    "ghost": [("primary -> head", "depthwise", 1)],
    "shared": [("a + twice -> twice, b", "stream", 1), ("b + c + d -> c, d, e", "stream", 1)],
    "unet": [
        ("a -> b, c", "concatenation", 1),
        ("b -> up", "transposed", 1),
        ("up -> c", "concatenation", 1),
        ("c -> out", "pair", 1),
    ],
    "channels_last": [("stem + down -> up, head", "stream", 4), ("up -> down", "linear", 1)],
    "one_axis": [("0 -> 4", "pair", 1), ("4 -> 7", "linear", 1)],
    "three_axes": [("0 -> 4", "pair", 1), ("4 -> 8", "linear", 1)],
    "normalized": [],  # a spectral norm would move old weights after a growth
    "perceptron": [("0 -> 4", "linear", 1), ("4 -> 6", "linear", 1)],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_treats_channels_alike_is_found_and_grows_exactly(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, example = referee.prepared(case.build()), torch.randn(case.shape, dtype=torch.float64)
    sites = find_sites(model, example)
    assert {each.name: each.granularity for each in sites} == case.sites
    grown = referee.check(model, example, sites)
    assert referee.untrained(grown, example) == []
    referee.check(model, example, sites, units=[max(each.width // each.granularity, 4) for each in sites])


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_site_of_a_model_is_found_and_grows_exactly(name: str) -> None:
    model, example = zoo.build(name)
    zoo.without_dropout(model)
    sites = find_sites(model, example)
    assert [(each.name, each.kind, each.granularity) for each in sites] == SITES[name]
    grown = referee.check(model, example, sites)
    assert referee.untrained(grown, example) == []
    again = find_sites(grown.model, example)
    assert [(each.name, each.width) for each in again] == [(each.name, each.width) for each in grown.sites]
    for old, new in zip(grown.sites, again, strict=True):
        assert all(old.entries(path) == new.entries(path) for path in old.consumers) or old.granularity > 1


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("output", "the model's output"),
        ("literal view", "literal size"),
        ("literal slice", "literal size"),
        ("softmax", "depend on each other"),
        ("input", "size of tensor"),
        ("fixed tensor", "size of tensor"),
        ("recurrent", "rnn|lstm"),
        ("gather", "literal size"),
        ("matrix", "multiplies its channels with each other"),
        ("sort", "depend on each other"),
    ],
)
def test_a_layer_that_cannot_grow_has_its_reason(how: str, reason: str) -> None:
    table = explain_sites(Refused(how), torch.randn(2, 3, 5, 5))
    row = next(row for row in table if row.path == "a")
    assert not row.growable
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(row.reason)
    assert str(row.reason) in str(table)


def test_attention_over_channels_says_which_layer_takes_them_one_after_the_other() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        return m.b(y * m.eca(y.mean((2, 3)).unsqueeze(1)).sigmoid().view(len(x), -1, 1, 1))

    model = Net(forward, a=nn.Conv2d(3, 6, 1), eca=nn.Conv1d(1, 1, 3, padding=1), b=nn.Conv2d(6, 2, 1))
    table = {row.path: row.reason for row in explain_sites(model, torch.randn(2, 3, 5, 5))}
    assert table["a"] == "its channels depend on each other: eca takes them one after the other as its only input"


def test_maps_of_one_channel_with_a_bare_parameter_for_each_position_are_read_as_one_channel() -> None:
    model = Net(lambda m, x: m.b(m.place + m.a(x)), a=nn.Conv2d(3, 1, 1), b=nn.Conv2d(1, 4, 3))
    model.place = nn.Parameter(torch.randn(1, 1, 5, 5))
    assert "one after the other" not in str(explain_sites(model, torch.randn(2, 3, 5, 5))[0].reason)


def test_a_gate_that_a_layer_makes_along_another_axis_is_told() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        value, gate = m.a(x).chunk(2, -1)
        return m.b(value * m.mix(m.norm(gate).transpose(1, 2)).transpose(1, 2))

    model = Net(forward, a=nn.Linear(4, 12), norm=nn.LayerNorm(6), mix=nn.Linear(5, 5), b=nn.Linear(6, 3))
    table = {row.path: row.reason for row in explain_sites(model, torch.randn(2, 5, 4))}
    assert table["a"] == "mix reads it along another axis, and no other layer does"


@pytest.mark.parametrize("how", ["channel mean", "layer norm of maps", "rms norm"])
def test_channels_that_depend_on_each_other_grow_by_copies(how: str) -> None:
    model, example = referee.prepared(Refused(how)), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    (found,) = find_sites(model, example)
    assert found.copied
    assert found.granularity == found.width == 4
    referee.check(model, example, [found], units=[1])


def test_the_table_has_a_row_for_every_layer() -> None:
    model, example = zoo.build("residual")
    table = explain_sites(model, example)
    assert [row.path for row in table] == [
        name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    assert {row.path for row in table if not row.growable} == {"head"}
    assert next(row for row in table if row.path == "head").reads == ("b2 + short -> head",)
    assert table[0].layer == "Conv2d 3 -> 4, 3x3"


def test_layers_that_are_never_called_are_told() -> None:
    model, example = zoo.build("chain")
    model.spare = nn.Conv2d(9, 2, 1)
    row = next(row for row in explain_sites(model, example) if row.path == "spare")
    assert row.reason == "none of the examples calls it"


@pytest.mark.parametrize(
    ("producers", "consumers", "says"),
    [
        ("a", "nowhere", "nowhere: this is no convolution or linear layer"),
        ("norm", "b", "norm: this is no convolution or linear layer"),
        ("a", "c", "expected: a -> b"),
        ("b", "a", "expected: b -> c"),
        ("d", "a", "the model's output"),
        (("a", "b"), "c", "do not make up a site"),
    ],
)
def test_layers_that_make_no_site(producers: str, consumers: str, says: str) -> None:
    model, example = zoo.build("chain")
    with pytest.raises(SiteError, match=says):
        site(model, producers, consumers, example_input=example)


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
