"""Sixty forged and damaged files: each ends in a typed error with nothing changed, or loads rightly."""

import copy
import json
import resource

import pytest
import torch
from torch import nn
from torch.nn import functional

import growconv
from growconv.errors import GrowthError
from growconv.growth import Plateau, StageRates
from tests.forged import opened, write

X, Y = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3


def build():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.GroupNorm(3, 6),
        nn.PReLU(6),
        nn.Flatten(),
        nn.Linear(96, 3),
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scheduler = growconv.GrowthScheduler(
        model,
        optimizer,
        growconv.find_sites(model, X[:2])[:1],
        method="random",
        amount=2,
        when=Plateau("loss", patience=2),
        learning_rate=StageRates(0.5),
    )
    return model, optimizer, scheduler


def train(model, optimizer, scheduler=None):
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    if scheduler is not None:
        scheduler.due(3, {"loss": 1.0})
        scheduler.grow([(X[:16], Y[:16]), (X[16:], Y[16:])], functional.cross_entropy, step=3)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The record and the tensors of a checkpoint that loads."""
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    model, optimizer, scheduler = build()
    train(model, optimizer, scheduler)
    train(model, optimizer)
    growconv.save_checkpoint(path, model, optimizer, scheduler)
    return path.read_bytes(), *opened(path)


def everything(model, optimizer, scheduler):
    return copy.deepcopy(
        (
            dict(model.state_dict().items()),
            optimizer.state_dict(),
            {key: value for key, value in scheduler.state_dict().items() if key != "seconds"},
            [
                {k: v for k, v in vars(module).items() if isinstance(v, int | tuple | bool | str)}
                for module in model.modules()
            ],
        )
    )


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def refused_or_right(path, expected=None):
    """What is asked of every file; the message of the error, None where the file loads."""
    model, optimizer, scheduler = build()
    before = everything(model, optimizer, scheduler)
    parameters = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    error = None
    try:
        growconv.load_checkpoint(path, model, optimizer, scheduler)
    except GrowthError as raised:
        error = raised
    if error is not None:
        assert same(before, everything(model, optimizer, scheduler)), error
        assert parameters == [id(parameter) for parameter in model.parameters()]
        return str(error)
    for name, value in (expected or {}).items():
        assert torch.equal(model.state_dict()[name], value), name
    train(model, optimizer, scheduler)
    train(model, optimizer)
    return None


def edits(record, change):
    for events in (record["history"]["events"], record["scheduler"]["history"]):
        for edit in events[0]["edits"]:
            change(edit)


def both(record, **values):
    for events in (record["history"]["events"], record["scheduler"]["history"]):
        events[0].update(values)


def add_edit(**edit):
    def forge(record, tensors):
        for events in (record["history"]["events"], record["scheduler"]["history"]):
            events[0]["edits"].append({"module": "0", **edit})

    return forge


def in_edits(key, value):
    return lambda record, tensors: edits(record, lambda edit: edit.update({key: value}) if key in edit else None)


def in_scheduler(**values):
    return lambda record, tensors: record["scheduler"].update(values)


def in_event(**values):
    return lambda record, tensors: both(record, **values)


def in_group(**values):
    return lambda record, tensors: record["optimizer"]["param_groups"][0].update(values)


def drop(*path):
    def forge(record, tensors):
        for key in path[:-1]:
            record = record[key]
        del record[path[-1]]

    return forge


def attribute(name, value):
    def change(edit):
        if edit.get("attribute") == name:
            edit["value"] = value

    return lambda record, tensors: edits(record, change)


def cut(name):
    return lambda record, tensors: tensors.update({name: tensors[name][:-1].clone()})


def without(name):
    return lambda record, tensors: tensors.pop(name)


def widths_differ(record, tensors):
    """All of the record agrees on a width that the tensors do not have."""
    site = next(iter(record["scheduler"]["widths"]))
    record["scheduler"]["widths"][site] = 99
    both(record, width_after=99)
    edits(record, lambda edit: edit.update(value=99) if edit.get("attribute") == "out_channels" else None)


def births_differ(record, tensors):
    state = next(values for values in record["optimizer"]["state"].values() if "growconv_ages" in values)
    state["growconv_ages"]["born"][0] = [1]


FORGED = {
    "nothing": lambda record, tensors: None,
    "no optimizer in the record": drop("optimizer"),
    "no scheduler in the record": drop("scheduler"),
    "no history": drop("history"),
    "no state": drop("state"),
    "state a list": lambda record, tensors: record.update(state=[]),
    "scheduler empty": lambda record, tensors: record.update(scheduler={}),
    "scheduler a list": lambda record, tensors: record.update(scheduler=[]),
    "rounds null": in_scheduler(rounds=None),
    "rounds negative": in_scheduler(rounds=-1),
    "seconds a string": in_scheduler(seconds="long"),
    "seconds NaN": in_scheduler(seconds=float("nan")),
    "spent empty": in_scheduler(spent={}),
    "last step a string": in_scheduler(last_step="3"),
    "widths empty": in_scheduler(widths={}),
    "widths a list": in_scheduler(widths=[6]),
    "initial widths of strings": in_scheduler(initial_widths={"0 -> 3": "4"}),
    "visits empty": in_scheduler(visits={}),
    "policies empty": in_scheduler(policies={}),
    "a policy's state a string": lambda record, tensors: record["scheduler"]["policies"].update(when="x"),
    "a policy's state of strings": lambda record, tensors: record["scheduler"]["policies"]["when"].update(best="x"),
    "a policy's state lacks an entry": drop("scheduler", "policies", "when", "waited"),
    "two histories": lambda record, tensors: record["scheduler"].update(history=[]),
    "widths that no tensor has": widths_differ,
    "10^9 channels": in_edits("count", 10**9),
    "10^30 channels": in_edits("count", 10**30),
    "channels a string": in_edits("count", "2"),
    "no channels": in_edits("count", 0),
    "negative position": in_edits("position", -1),
    "position behind the end": in_edits("position", 1000),
    "axis behind the last": in_edits("axis", 7),
    "axis true": in_edits("axis", True),
    "another tensor": in_edits("tensor", "weights"),
    "module a number": in_edits("module", 0),
    "an edit that is no mapping": lambda record, tensors: (
        record["history"]["events"][0].update(edits=[5]),
        record["scheduler"]["history"][0].update(edits=[5]),
    ),
    "an edit that sets forward": add_edit(attribute="forward", value=5),
    "an edit that sets training": add_edit(attribute="training", value=1),
    "an edit that sets a hook": add_edit(attribute="_forward_hooks", value=[1]),
    "an edit that sets a class": add_edit(attribute="__class__", value=1),
    "an edit that removes everything": add_edit(tensor="weight", axis=0, removed=list(range(6))),
    "an edit that removes a string": add_edit(tensor="weight", axis=0, removed=["a"]),
    "an inserted layer of 10^6 channels": add_edit(
        insert={"kind": "convolution", "channels": 10**6, "axes": 2, "kernel_size": 3, "activation": "relu"}
    ),
    "an inserted layer of no kind": add_edit(
        insert={"kind": "system", "channels": 6, "axes": 2, "kernel_size": 3, "activation": "relu"}
    ),
    "an inserted layer with more options": add_edit(insert={"kind": "convolution", "_target_": "os.system"}),
    "out_channels of a string": attribute("out_channels", "6"),
    "out_channels that the tensor has not": attribute("out_channels", 7),
    "num_features that the tensor has not": attribute("num_features", 5),
    "gains of strings": in_event(gains=["a", "b"]),
    "an event without a site": in_event(site=None),
    "an event with an unknown entry": in_event(__class__=1),
    "parameters before that are not": in_event(parameters_before=3),
    "lr a string": in_group(lr="big"),
    "lr negative": in_group(lr=-1.0),
    "betas empty": in_group(betas=[]),
    "amsgrad a number": in_group(amsgrad=3),
    "no eps": drop("optimizer", "param_groups", 0, "eps"),
    "no groups": lambda record, tensors: record["optimizer"].update(param_groups=[]),
    "parameters counted twice": lambda record, tensors: record["optimizer"]["param_groups"][0].update(
        params=[0] * len(record["optimizer"]["param_groups"][0]["params"])
    ),
    "state of a parameter that is not": lambda record, tensors: record["optimizer"]["state"].update(
        {"77": {"step": 1}}
    ),
    "state under a word": lambda record, tensors: record["optimizer"]["state"].update(first={}),
    "no moment of a parameter": without("optimizer/0/exp_avg"),
    "a moment too short": cut("optimizer/0/exp_avg_sq"),
    "births of another length": births_differ,
    "a tensor too short": cut("model/0.weight"),
    "a tensor missing": without("model/3.bias"),
    "a tensor too many": lambda record, tensors: tensors.update({"model/9.weight": torch.zeros(2)}),
    "a running mean of another length": cut("model/1.running_mean"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_file(name, good, tmp_path):
    _, record, tensors = good
    record, tensors = json.loads(record), dict(tensors)
    FORGED[name](record, tensors)
    path = tmp_path / "forged.safetensors"
    write(path, json.dumps(record), tensors)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, limits[1]))
    try:
        message = refused_or_right(path, {name[6:]: t for name, t in tensors.items() if name.startswith("model/")})
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert (message is None) == (name == "nothing"), message


DAMAGED = {
    "empty": lambda content: b"",
    "eight bytes": lambda content: content[:8],
    "a header of 2^60 bytes": lambda content: (2**60).to_bytes(8, "little") + content[8:],
    "a header that is no JSON": lambda content: content[:8] + b"x" + content[9:],
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "more behind the end": lambda content: content + b"1234",
    "a flipped bit in a tensor": lambda content: content[:-40] + bytes([content[-40] ^ 1]) + content[-39:],
    "another number in the record": lambda content: content.replace(b'\\"rounds\\": 1', b'\\"rounds\\": 9'),
    "another checksum": lambda content: content.replace(b'"sha256":"', b'"sha265":"'),
    "zeros": lambda content: bytes(len(content)),
    "a pickle": lambda content: b"\x80\x04cos\nsystem\n(S'false'\ntR.",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file(name, good, tmp_path):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(DAMAGED[name](good[0]))
    assert "damaged.safetensors" in (refused_or_right(path) or "")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"state": {}}', "5", '{"history": 1e999}', "null"])
def test_a_record_that_is_none(text, good, tmp_path):
    path = tmp_path / "odd.safetensors"
    write(path, text, {})
    assert "odd.safetensors" in (refused_or_right(path) or "")


def test_there_are_at_least_sixty():
    assert len(FORGED) + len(DAMAGED) >= 60


def test_an_interrupt_amid_the_replay_leaves_the_small_model(good, tmp_path, monkeypatch):
    from growconv.network import tensors

    path = tmp_path / "good.safetensors"
    path.write_bytes(good[0])
    for at in range(1, 6):
        model, optimizer, scheduler = build()
        before, calls, real = everything(model, optimizer, scheduler), [0], tensors.enlarge

        def interrupted(tensor, *arguments, calls=calls, at=at, real=real, **options):
            calls[0] += tensor.device.type != "meta"
            if calls[0] == at:
                raise KeyboardInterrupt
            return real(tensor, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(tensors, "enlarge", interrupted)
            with pytest.raises(KeyboardInterrupt):
                growconv.load_checkpoint(path, model, optimizer, scheduler)
        assert same(before, everything(model, optimizer, scheduler))
        train(model, optimizer)
