"""Growing keeps the function at amplitude 0, in eval and train mode, and is undone as a whole where it fails."""

import copy
import inspect
import itertools
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

import pytest
import torch
from torch import nn

from growconv.errors import GrowthError, SiteError, SurgeryError
from growconv.network import layers
from growconv.network import optimizer as exchanging
from growconv.network.apply import grow, shrink
from growconv.network.event import count_parameters
from growconv.network.layout import IN, OUT
from growconv.network.plan import plan_size
from tests.network import hand

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", hand.SITES)
def test_amplitude_zero_keeps_the_function_and_every_new_weight_trains(name: str, training: bool) -> None:
    model, example, site = hand.build(name)
    model.train(training)
    expected = copy.deepcopy(model)(example) if "hook" not in name else model(example)
    growth = hand.growth(site, 2)
    predicted = plan_size(site, growth.channels)
    event = grow(model, site, growth, 0.0)
    output = model(example)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    output.square().sum().backward()
    for path in site.consumers:
        layer = layers.weighted(model.get_submodule(path))
        new = site.entries(path)[-int(growth.channels * site.ratio(path)) :]
        weight = next(
            parameter for name, parameter in layer.module.named_parameters() if name.endswith(layer.slots(IN)[0].name)
        )
        axis = layer.slots(IN)[0].axis
        assert weight.grad is not None
        per_group = layer.size(IN) // layer.groups
        index = new if axis == 0 or layer.groups == 1 else sorted({entry % per_group for entry in new})
        if not layer.transposed:
            assert weight.grad.index_select(1, torch.tensor(index)).abs().max() > 0
    assert event.parameters_after - event.parameters_before == predicted > 0
    assert event.parameters_after == count_parameters(model)
    assert event.width_after == site.width == event.width_before + growth.channels
    site.check()


@pytest.mark.parametrize("name", hand.SITES)
def test_filters_are_those_proposed_and_old_ones_stay(name: str) -> None:
    model, _, site = hand.build(name)
    old = {
        path: layers.weighted(model.get_submodule(path)).filters().detach()
        for path in (*site.producers, *site.consumers)
    }
    before = {key: site.entries(*key) for key in site.axes}
    growth = hand.growth(site, 2)
    grow(model, site, growth, 0.7)
    for path in site.producers:
        layer = layers.weighted(model.get_submodule(path))
        new = site.entries(path, OUT)[len(before[path, OUT]) :]
        rows = layer.filters()[new][:, : growth.incoming[path].shape[1]]
        torch.testing.assert_close(rows, growth.incoming[path], rtol=1e-10, atol=1e-12)
        if layer.bias() is not None:
            torch.testing.assert_close(layer.bias()[new], growth.incoming_bias[path])
    for path in site.consumers:
        layer = layers.weighted(model.get_submodule(path))
        if layer.groups == 1:
            new = site.entries(path, IN)[len(before[path, IN]) :]
            columns = layer.filters()[: len(old[path]), new]
            torch.testing.assert_close(columns, 0.7 * growth.outgoing[path], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", hand.SITES)
def test_shrinking_takes_back_what_growing_put_in(name: str) -> None:
    model, example, site = hand.build(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model.eval()(example)
    growth = hand.growth(site, 2)
    width = site.width
    grow(model, site, growth, 0.0)
    shrink(model, site, range(width, site.width))
    assert site.width == width
    torch.testing.assert_close(model(example), expected, rtol=0, atol=1e-12)
    if "weight norm" not in name:
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def everything(model: nn.Module, *optimizers: torch.optim.Optimizer) -> list:
    """What a model and its optimizers are made of: identities of tensors, values, attributes."""
    found: list = []
    for path, module in model.named_modules():
        found += [(path, name, id(p), p.shape, p.requires_grad, id(p.grad)) for name, p in module.named_parameters()]
        found += [(path, name, value.clone()) for name, value in module.named_buffers()]
        found += [(path, name, value) for name, value in vars(module).items() if isinstance(value, int | tuple | bool)]
        found.append((path, len(module._forward_pre_hooks), len(module._forward_hooks), id(module)))
    found += [(name, p.detach().clone(), sorted(vars(p))) for name, p in model.named_parameters()]
    for optimizer in optimizers:
        found += [[id(p) for p in group["params"]] for group in optimizer.param_groups]
        found += [(id(p), {k: id(v) for k, v in state.items()}) for p, state in optimizer.state.items()]
        found += [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]
    return found


def same(first: list, second: list) -> bool:
    """Whether two lists of `everything` are equal, tensors by value."""
    return len(first) == len(second) and all(
        torch.equal(a, b)
        if isinstance(a, torch.Tensor)
        else same(list(a), list(b))
        if isinstance(a, tuple | list)
        else a == b
        for a, b in zip(first, second, strict=True)
    )


class Interrupted:
    """Inside, a KeyboardInterrupt comes at the next line of some files of growconv.network that had none.

    Each line has two: one as it runs the first time, and one as it runs the second time, amid a loop.
    """

    def __init__(self, had: set[tuple[str, int, int]], files: tuple[str, ...]) -> None:
        self.had, self.files = had, tuple(f"network/{name}.py" for name in files)
        self.runs: Counter[tuple[str, int]] = Counter()
        self.at: tuple[str, int] | None = None

    def _trace(self, frame: FrameType, event: str, _: object) -> object:
        if not frame.f_code.co_filename.endswith(self.files):
            return None
        if event == "line":
            line = (frame.f_code.co_filename, frame.f_lineno)
            self.runs[line] += 1
            if self.at is None and self.runs[line] <= 2 and (*line, self.runs[line]) not in self.had:
                self.at = line
                self.had.add((*line, self.runs[line]))
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


def interrupt_everywhere(model: nn.Module, optimizer: torch.optim.Optimizer, surgery: Callable[[], object]) -> int:
    """Interrupt a piece of surgery at every line that changes something; the number of interrupts."""
    files = ("apply", "optimizer", "entry_ages", "blocks", "depth", "event")
    before, had = everything(model, optimizer), set[tuple[str, int, int]]()
    while True:
        trace = Interrupted(had, files)
        try:
            with trace:
                surgery()
        except KeyboardInterrupt:
            assert torch.is_grad_enabled()
            assert same(everything(model, optimizer), before), trace.at
        else:
            assert torch.is_grad_enabled()
            return len(had)


@pytest.mark.parametrize("name", ["stream", "weight norm hook"])
def test_an_interrupt_at_any_line_leaves_everything_as_it_was(name: str) -> None:
    model, example, site = hand.build(name)
    optimizer = torch.optim.Adam(model.parameters())
    model(example).square().sum().backward()
    optimizer.step()
    growth = hand.growth(site, 1)
    width = site.width
    revised = {"head.bias": torch.zeros(2, dtype=torch.float64)} if name == "stream" else {}
    lines = interrupt_everywhere(
        model, optimizer, lambda: grow(model, site, replace(growth, revised=revised), 1.0, optimizer)
    )
    assert lines > 30
    assert site.width == width + 1
    interrupt_everywhere(model, optimizer, lambda: shrink(model, site, [0], optimizer))
    assert site.width == width
    model(example).sum().backward()
    optimizer.step()


def test_an_error_half_way_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, site = hand.build("pair")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = everything(model, optimizer)
    calls = itertools.count()

    def failing(*arguments: object) -> None:
        if next(calls) == 2:
            raise RuntimeError("no memory")
        migrate(*arguments)

    migrate = exchanging.migrate
    monkeypatch.setattr(exchanging, "migrate", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        grow(model, site, hand.growth(site, 1), 1.0, optimizer)
    assert same(everything(model, optimizer), before)


def test_several_pieces_of_surgery_are_undone_together() -> None:
    model, example, site = hand.build("pair")
    optimizer = torch.optim.Adam(model.parameters())
    model(example).sum().backward()
    optimizer.step()
    before = everything(model, optimizer)

    journal = exchanging.Journal(model, [optimizer], [*model.parameters(), *model.buffers()])
    grow(model, site, hand.growth(site, 1), 1.0, optimizer)
    shrink(model, site, [1], optimizer)
    model.a.weight.detach().zero_()
    model.head.weight.detach().zero_()
    journal.restore()
    assert same(everything(model, optimizer), before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_model_site_and_optimizer_grow(how: str) -> None:
    model, example, site = hand.build("pair")
    model.run = hand.pair_forward
    optimizer = torch.optim.Adam(model.parameters())
    model(example).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    together = (model, site, optimizer)
    copied = copy.deepcopy(together) if how == "deepcopy" else pickle.loads(pickle.dumps(together))
    for each_model, each_site, each_optimizer in (copied, together):
        assert each_site.model is each_model
        grow(each_model, each_site, hand.growth(each_site, 2), 1.0, each_optimizer)
        assert each_site.width == 6
        each_model(example).sum().backward()
        each_optimizer.step()
    assert torch.equal(copied[0](example), model(example))


def test_a_site_serves_another_model_of_the_same_names() -> None:
    model, example, site = hand.build("pair")
    other, _, _ = hand.build("pair", seed=5)
    expected = other(example)
    grow(other, site, hand.growth(site, 3), 0.0)
    assert (site.width, site.of(other).width) == (4, 7)
    torch.testing.assert_close(other(example), expected, rtol=0, atol=1e-12)
    with pytest.raises(SiteError, match="no such layer"):
        grow(nn.Sequential(nn.Linear(2, 2)), site, hand.growth(site, 1))
    assert model.a.out_channels == 4


def test_dtype_memory_format_hooks_gradients_and_requires_grad_stay() -> None:
    model, example, site = hand.build("pair")
    model = model.float().to(memory_format=torch.channels_last)
    model.n.bias.requires_grad_(False)
    seen = []
    model.b.weight.register_hook(lambda grad: seen.append(grad.shape))
    model.b.weight.note = "kept"
    model.b.register_forward_hook(lambda *_: None)
    model(example.float()).square().sum().backward()
    old = model.b.weight.grad.clone()
    seen.clear()
    grow(model, site, hand.growth(site, 3), 0.0)
    assert model.b.weight.dtype is torch.float32
    assert model.b.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.n.bias.requires_grad
    assert model.b.weight.note == "kept"
    assert len(model.b._forward_hooks) == 1
    assert torch.equal(model.b.weight.grad[:, :4], old)
    assert model.b.weight.grad[:, 4:].abs().max() == 0
    model(example.float()).sum().backward()
    assert seen == [model.b.weight.shape]


def test_bad_input_is_refused_before_anything_changes() -> None:
    model, _, site = hand.build("pair")
    growth = hand.growth(site, 1)
    before = everything(model)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    for arguments, message in [
        ((model, site, growth, float("nan")), "finite"),
        ((model, site, growth, "much"), "number"),
        ((model, site, "more", 1.0), "a proposal is needed"),
        ((model, "a", growth, 1.0), "a site is needed"),
        ((torch.nn.DataParallel(model), site, growth, 1.0), "wrapped"),
        ((model, site, growth, 1.0, other), "does not own"),
        ((model, site, growth, 1.0, "sgd"), "no optimizer"),
        ((model, site, replace(growth, incoming={"a": torch.full((1, 3, 3, 3), torch.inf)}), 1.0), "finite"),
        ((model, site, replace(growth, incoming={"a": torch.zeros(2, 3, 3, 3)}), 1.0), "wrong shape"),
        ((model, site, replace(growth, outgoing={}), 1.0), "no outgoing weights"),
        ((model, site, replace(growth, site="elsewhere"), 1.0), "another site"),
        ((model, site, replace(growth, norms={"n": (torch.zeros(1), -torch.ones(1))}), 1.0), "negative"),
        ((model, site, replace(growth, incoming_bias={}), 1.0), "no incoming bias"),
    ]:
        with pytest.raises(GrowthError, match=message):
            inspect.unwrap(grow)(*arguments)  # without the types that the tests check at run time
    for channels in ([], [4], [-1], [0, 1, 2, 3]):
        with pytest.raises(SurgeryError, match="cannot be removed"):
            shrink(model, site, channels)
    assert same(everything(model), before)
