"""Growing keeps the function at amplitude 0, is undone as a whole where it fails, and replays on copies and replica."""

import copy
import inspect
import itertools
import json
import pickle
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

import pytest
import torch
from torch import nn

from growconv.errors import ArgumentValueError, CheckpointError, GrowthError, SiteError, SurgeryError
from growconv.network import layers
from growconv.network import optimizer as exchanging
from growconv.network.event import GrowthEvent, GrowthHistory, apply_edits, count_parameters, grow, shrink
from growconv.network.layout import IN, OUT
from growconv.network.plan import plan_size
from growconv.network.site import GrowthSite
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


def surgery(model: nn.Module, site: GrowthSite, optimizer: torch.optim.Optimizer | None = None) -> list[GrowthEvent]:
    """Grow twice and shrink once."""
    events = [grow(model, site, hand.growth(site, 2), 0.5, optimizer)]
    events.append(shrink(model, site, range(site.granularity, 2 * site.granularity), optimizer))
    events.append(grow(model, site, hand.growth(site, 1, seed=3), 1.0, optimizer))
    return events


@pytest.mark.parametrize("name", hand.SITES)
def test_a_replica_grows_alike_to_the_last_bit(name: str) -> None:
    model, example, site = hand.build(name)
    replica, _, _ = hand.build(name)
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9)
    applied = [event.apply_to(replica, optimizer) for event in surgery(model, site)]
    for (key, value), other in zip(model.state_dict().items(), replica.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    assert torch.equal(model.eval()(example), replica.eval()(example))
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in replica.parameters()}
    assert [event.parameters_after for event in applied][-1] == count_parameters(model)


@pytest.mark.parametrize("name", ["pair", "stream", "weight norm", "concatenation"])
def test_an_average_keeps_its_function_at_amplitude_zero(name: str) -> None:
    model, example, site = hand.build(name)
    average = hand.build(name, seed=7)[0].requires_grad_(False)  # other weights, as an average or a teacher has
    expected = average.eval()(example)
    event = grow(model, site, hand.growth(site, 2), 0.0)
    event.apply_to(average)
    assert not any(parameter.requires_grad for parameter in average.parameters())
    torch.testing.assert_close(average(example), expected, rtol=0, atol=1e-12)
    assert {k: v.shape for k, v in average.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", hand.SITES)
def test_a_history_replays_on_a_fresh_model_from_json(name: str) -> None:
    model, example, site = hand.build(name)
    fresh, _, _ = hand.build(name, seed=1)
    history = GrowthHistory(surgery(model, site))
    assert history.starts_from(fresh)
    read = GrowthHistory.from_json(history.to_json())
    assert [event.to_dict() for event in read] == [json.loads(json.dumps(event.to_dict())) for event in history]
    optimizer = torch.optim.AdamW(fresh.parameters())
    assert read.replay(fresh, optimizer) is fresh
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval()(example), model.eval()(example), rtol=0, atol=0)
    assert history.widths(site.name) == [(None, event.width_after) for event in history]
    fresh.train()(example).sum().backward()
    optimizer.step()
    assert "channels by random" in str(history)


@pytest.mark.parametrize("how", [pickle.loads, copy.deepcopy, "json"])
def test_events_from_elsewhere_know_shapes_only(how: object) -> None:
    model, example, site = hand.build("pair")
    other, _, _ = hand.build("pair", seed=2)
    event = grow(model, site, hand.growth(site, 2))
    event = replace(event, step=7)
    assert event.recipe is not None
    if how == "json":
        event = GrowthEvent.from_dict(json.loads(json.dumps(event.to_dict())))
    else:
        event = how(pickle.dumps(event)) if how is pickle.loads else how(event)
    assert event.recipe is None
    assert event.step == 7
    expected = other.eval()(example)
    event.apply_to(other)
    assert other.a.out_channels == 6
    assert other.b.weight[:, 4:].abs().max() == 0
    torch.testing.assert_close(other(example), expected, rtol=0, atol=1e-12)
    other.load_state_dict(model.state_dict())
    with pytest.raises(SurgeryError, match="as the other one was"):
        event.apply_to(other)


def test_a_model_that_is_not_in_step_is_refused_unchanged() -> None:
    model, _, site = hand.build("pair")
    other, _, _ = hand.build("pair")
    events = surgery(model, site)
    before = everything(other)
    for event, message in ((events[1], "as the other one was"), (events[2], "as the other one was")):
        with pytest.raises(SurgeryError, match=message):
            event.apply_to(other)
    with pytest.raises(GrowthError):
        events[0].apply_to(nn.Sequential(nn.Linear(2, 2)))
    assert same(everything(other), before)


def test_edits_that_do_not_fit_change_nothing() -> None:
    model, _, site = hand.build("pair")
    fresh, _, _ = hand.build("pair")
    edits = [edit for event in surgery(model, site) for edit in event.edits]
    optimizer = torch.optim.Adam(fresh.parameters())
    before = everything(fresh, optimizer)
    for wrong in (
        {"module": "nowhere", "tensor": "weight", "axis": 0, "position": 1, "count": 1},
        {"module": "a", "tensor": "weight", "axis": 9, "position": 1, "count": 1},
        {"module": "a", "tensor": "weight", "axis": 0, "position": "1", "count": 1},
        {"module": "a"},
    ):
        with pytest.raises(SurgeryError, match="does not fit this model"):
            apply_edits(fresh, [*edits, wrong], optimizer)
        assert same(everything(fresh, optimizer), before)


def test_histories_that_cannot_be_read_are_refused() -> None:
    for text, message in (
        ("no json", "has to be JSON"),
        ("{}", "no kind of growth history"),
        ('{"format": 1, "events": [{}]}', "read"),
    ):
        with pytest.raises(CheckpointError, match=message):
            GrowthHistory.from_json(text)
    with pytest.raises(ArgumentValueError, match="unknown entries"):
        GrowthEvent.from_dict({"colour": "blue"})
    model, _, site = hand.build("pair")
    history = GrowthHistory(surgery(model, site))
    with pytest.raises(CheckpointError, match="began with another model"):
        history.replay(model)


def test_an_interrupt_in_a_replay_undoes_all_of_it() -> None:
    model, _, site = hand.build("mlp")
    fresh, example, _ = hand.build("mlp")
    optimizer = torch.optim.Adam(fresh.parameters())
    fresh(example).sum().backward()
    optimizer.step()
    event = grow(model, site, hand.growth(site, 1))
    assert interrupt_everywhere(fresh, optimizer, lambda: apply_edits(fresh, event.edits, optimizer)) > 30


def test_models_grow_in_threads_of_their_own() -> None:
    built = [hand.build(name) for name in ("pair", "stream", "mlp", "depthwise") * 2]
    expected = [model.eval()(example) for model, example, _ in built]
    failures = []

    def work(model: nn.Module, site: GrowthSite) -> None:
        try:
            for seed in range(5):
                grow(model, site, hand.growth(site, 1, seed), 0.0, torch.optim.SGD(model.parameters(), lr=0.1))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(model, site)) for model, _, site in built]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for (model, example, _), output in zip(built, expected, strict=True):
        torch.testing.assert_close(model(example), output, rtol=0, atol=1e-12)
