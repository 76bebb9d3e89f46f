"""Hazard: a round that its neighbours, parts or budgets make wrong, and events that keep too little of it."""

import copy
import itertools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

import growconv
from growconv import GrowthScheduler
from growconv.errors import GrowthError
from growconv.growth import Budget
from growconv.growth import round as rounds
from growconv.growth.cost import ModelCost
from growconv.solvers import get_solver
from growconv.training.models import BasicBlock, ResidualNet

LOSS = nn.functional.cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore::growconv.solvers.FewSamplesWarning")


def collected(model, sites, method, batches):
    solver = growconv.solvers.get_solver(method)
    if not solver.reads:
        return {site.name: site for site in sites}
    keep = {"keep_samples": 64} if "samples" in solver.reads else {}
    return growconv.collect_statistics(model, sites, batches, LOSS, quantities=solver.reads, **keep)


def same_function(model, before, x):
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["tiny", "functional", "random"])
def test_all_sites_in_turn_in_every_order(chain, sites_of, batches_of, method):
    batches = batches_of(2, size=32, dtype=torch.float64)
    every = list(itertools.permutations(range(3)))
    for order in {"random": every, "tiny": every[1::2], "functional": every[4:5]}[method]:
        model = chain(3, 4, 5).double().eval()
        sites = sites_of(model)
        subjects, before, x = collected(model, sites, method, batches), model(batches[0][0]), batches[0][0]
        solved = {index: growconv.solve(subjects[sites[index].name], method, 2) for index in order[:2]}
        for index in order:
            growth = solved.get(index) or growconv.solve(subjects[sites[index].name], method, 2)
            growconv.grow(model, sites[index], growth, amplitude=0.0)
            same_function(model, before, x)
        assert [site.width for site in sites] == [5, 6, 7]
        LOSS(model(x), batches[0][1]).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["tiny", "functional", "random"])
@pytest.mark.parametrize("first", [0, 2])
def test_a_neighbour_that_shrinks_in_between_leaves_an_exact_growth_or_an_error(
    chain, sites_of, batches_of, method, first
):
    batches = batches_of(2, size=32, dtype=torch.float64)
    model = chain(3, 4, 5).double().eval()
    sites = sites_of(model)
    subjects = collected(model, sites, method, batches)
    early = growconv.solve(subjects[sites[1].name], method, 2)
    growconv.shrink(model, sites[first], [1])
    x, before = batches[0][0], model(batches[0][0])
    shapes = [parameter.shape for parameter in model.parameters()]
    for late in (False, True):
        refused = ""
        try:
            growth = growconv.solve(subjects[sites[1].name], method, 2) if late else early
            growconv.grow(model, sites[1], growth, amplitude=0.0)
        except GrowthError as error:
            refused = str(error)
        if refused:
            assert sites[1].name in refused
            assert [parameter.shape for parameter in model.parameters()] == shapes
        same_function(model, before, x)
        shapes = [parameter.shape for parameter in model.parameters()]


@pytest.mark.parametrize("samples", ["all", "auto"])
@pytest.mark.parametrize("kept", [200, 512])
def test_sites_in_parts_grow_as_all_at_once(kept, samples, chain, sites_of, batches_of, monkeypatch) -> None:
    """Where W* comes first, and where all samples are kept, so that none of them is looked at again."""
    whole = chain(3, 4).double()
    batches, parts = batches_of(4, dtype=torch.float64), copy.deepcopy(whole)
    options = {"method": "tiny", "amount": 2, "samples": samples, "statistics": {"keep_samples": kept}}
    GrowthScheduler(whole, None, sites_of(whole), **options).grow(batches, cross_entropy)
    monkeypatch.setattr(rounds, "ROOM_BYTES", 0)
    scheduler = GrowthScheduler(parts, None, sites_of(parts), **options)
    cost = ModelCost.measure(parts, batches[0][0])
    found, hold = rounds.parts_of(scheduler.sites, cost, scheduler.solver.reads, kept, batches)
    assert len(found) > 1
    assert hold == (kept == 512)
    scheduler.grow(batches, cross_entropy)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-9, atol=1e-12)


def test_streams_in_parts_have_the_gains_of_all_at_once(sites_of, batches_of, monkeypatch) -> None:
    """Where memory is short, samples wait in bfloat16, which moves only what is measured on them: norms by 1e-3."""
    torch.manual_seed(0)
    whole = ResidualNet(BasicBlock, ((4, 1), (6, 1)), 4, in_channels=1, classes=10, image_size=8)
    parts, exact, found, seen = copy.deepcopy(whole), copy.deepcopy(whole).double(), [], []
    collect = rounds.collect_statistics
    monkeypatch.setattr(
        rounds,
        "collect_statistics",
        lambda *args, **options: seen.append(options.get("keep_dtype")) or collect(*args, **options),
    )
    for model, room in ((whole, 2**30), (parts, 0)):
        monkeypatch.setattr(rounds, "ROOM_BYTES", room)
        scheduler = GrowthScheduler(model, None, sites_of(model), method="tiny", amount=2)
        found.append(scheduler.grow(batches_of(6), cross_entropy))
    assert set(seen) == {None, torch.bfloat16}
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(torch.tensor(two.gains), torch.tensor(one.gains), rtol=1e-4, atol=0)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=5e-3, atol=1e-3)
    seen.clear()  # neither where gains are judged on the samples, nor in float64
    GrowthScheduler(parts, None, sites_of(parts), method="tiny", amount="auto").grow(batches_of(6), cross_entropy)
    doubles = batches_of(6, dtype=torch.float64)
    GrowthScheduler(exact, None, sites_of(exact), method="tiny", amount=2).grow(doubles, cross_entropy)
    assert set(seen) == {None}


def test_every_part_takes_one_pass_once_w_is_known(chain, sites_of, batches_of, monkeypatch) -> None:
    model, batches, calls = chain(3, 4, 5), batches_of(4), []
    scheduler = GrowthScheduler(model, None, sites_of(model), method="tiny", amplitude=1.0)
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    monkeypatch.setattr(
        rounds, "parts_of", lambda sites, cost, reads, *_: ([[[0, 2]], [[1]]] if "N" in reads else [[[0, 1, 2]]], 0)
    )
    scheduler.grow(batches, cross_entropy)
    assert sum(calls) == 3 * len(batches)  # one for all W*, one for each part


def test_parts_hold_every_site_once_and_no_more_than_there_is_room_for(
    chain, sites_of, batches_of, monkeypatch
) -> None:
    model, batches = chain(3, 4), batches_of(4)
    sites, cost = sites_of(model), ModelCost.measure(model, batches[0][0])
    ((everything,),), room = rounds.parts_of(sites, cost, frozenset(), 0, batches)
    assert everything == list(range(len(sites)))
    assert room == rounds.ROOM_BYTES
    monkeypatch.setattr(rounds, "ROOM_BYTES", 1000)
    assert rounds.parts_of(sites, cost, {"N"}, 0, batches)[1] == 0  # not all batches can be held, so none is
    monkeypatch.setattr(rounds, "ROOM_BYTES", 0)
    parts, _ = rounds.parts_of(sites, cost, frozenset({"samples"}), 512, batches)
    assert [index for (part,) in parts for index in part] == everything
    assert len(parts) > 1


def test_samples_come_in_portions_where_that_takes_fewer_passes(sites_of, batches_of, monkeypatch) -> None:
    """Eight batches, of which the samples take one; all averages fit into one part, but not with the samples."""
    torch.manual_seed(0)
    model = ResidualNet(BasicBlock, ((4, 2), (6, 2)), 4, in_channels=1, classes=10, image_size=8)
    batches, sites = batches_of(8), sites_of(model)
    cost, reads = ModelCost.measure(model, batches[0][0]), frozenset({"S", "N", "samples"})
    kept, room = len(batches[0][0]), sum(sum(rounds.moment_bytes(site, reads).values()) for site in sites)
    monkeypatch.setattr(ModelCost, "activations", lambda self: 0.0)
    monkeypatch.setattr(rounds, "ROOM_BYTES", room)
    joint, _ = rounds.parts_of(sites, cost, reads, kept, batches)
    ((*portions,),), hold = rounds.parts_of(sites, cost, reads, kept, batches, apart=True)
    assert len(joint) > 1
    assert all(len(part) == 1 for part in joint)
    assert hold == 0
    assert sorted(index for portion in portions for index in portion) == list(range(len(sites)))
    assert len(portions) > 1
    assert len(batches) + len(portions) < len(joint) * len(batches)
    every = rounds.parts_of(sites, cost, reads, kept, batches[:1], apart=True)[0]
    assert all(len(part) == 1 for part in every)  # nothing is won where the samples take all batches

    grown = {}
    for apart in (False, True):
        twin = copy.deepcopy(model).double()
        scheduler = GrowthScheduler(
            twin, None, sites_of(twin), method="tiny", amount=2, statistics={"keep_samples": kept}
        )
        monkeypatch.setattr(rounds.Round, "_are_apart", lambda self, solver, apart=apart: apart)
        passes: list[bool] = []
        hook = twin.register_forward_hook(lambda *_, passes=passes: passes.append(torch.is_grad_enabled()))
        scheduler.grow(batches_of(8, dtype=torch.float64), cross_entropy)
        hook.remove()
        grown[apart] = (twin.state_dict(), sum(passes))
    assert grown[True][1] < grown[False][1]
    for name, value in grown[False][0].items():
        torch.testing.assert_close(grown[True][0][name], value, rtol=1e-9, atol=1e-12)


def test_what_a_step_and_the_maps_of_a_site_take(chain, sites_of, batches_of):
    model, ((x, _), *_rest) = chain(3, 4, norm=True), batches_of(1)
    cost, (site, *_) = ModelCost.measure(model, x), sites_of(model)
    shapes = {}
    for path in (*site.producers, *site.consumers):
        model.get_submodule(path).register_forward_hook(
            lambda _, args, output, path=path: shapes.update({path: (args[0][0].numel(), output[0].numel())})
        )
    model(x)
    ((producer, _), (read, given)) = shapes[site.producers[0]], shapes[site.consumers[0]]
    assert sum(cost.maps(site).values()) == 4 * (producer + read + given)
    assert (
        sum(rounds.moment_bytes(site, {"S"}).values())
        == 8 * growconv.collect_statistics(model, site, batches_of(1), LOSS, quantities={"S"})[site.name].S.numel()
    )


@pytest.mark.parametrize("method", ["net2net", "variance_transfer", "splitting"])
@pytest.mark.parametrize("norm", [False, True])
def test_the_function_stays_when_all_layers_of_a_chain_grow_in_one_round(
    chain, sites_of, digits, batches_of, method, norm
):
    model = chain(3, 4, 5, norm=norm).double()
    images = digits[0][:32].double()
    model(images)
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    solver = get_solver(method, **({"step": 1e-6} if method == "splitting" else {}))
    scheduler = GrowthScheduler(model, optimizer, sites_of(model), method=solver, amount=2)
    before = model(images)
    for step in (1, 2):
        events = scheduler.grow(batches_of(2, dtype=torch.float64), functional.cross_entropy, step)
        assert len(events) == 3
        torch.testing.assert_close(model(images), before, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["net2net", "variance_transfer"])
def test_the_function_stays_when_a_budget_cuts_the_channels_or_an_amplitude_is_set(
    chain, sites_of, digits, batches_of, method
):
    model = chain(6, 7, norm=False).double().eval()
    images = digits[0][:32].double()
    before, size = model(images), sum(parameter.numel() for parameter in model.parameters())
    site = sites_of(model)[0]
    per_channel = 10 + 7 * 9
    scheduler = GrowthScheduler(
        model, None, [site], method=method, amount=6, amplitude=0.5, budget=Budget(parameters=size + 3 * per_channel)
    )
    (event,) = scheduler.grow(batches_of(1, dtype=torch.float64), functional.cross_entropy, 1)
    assert event.channels == 3
    assert event.amplitude == 1.0
    torch.testing.assert_close(model(images), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "spectrum", "energy"),
    [("tiny", True, True), ("gradmax", True, False), ("firefly", True, False), ("random", False, False)],
)
def test_events_hold_spectrum_and_captured_energy(chain, sites_of, batches_of, method, spectrum, energy):
    model = chain(3, 4)
    scheduler = GrowthScheduler(model, None, sites_of(model)[1:], method=method, amount=2, statistics={})
    (event,) = scheduler.grow(batches_of(3), functional.cross_entropy, 1)
    details = json.loads(json.dumps(event.to_dict()))["details"]
    assert ("spectrum" in details) == spectrum
    assert ("captured_energy" in details) == energy
    if spectrum:
        assert len(details["spectrum"]) > event.channels == 2
        assert details["spectrum"] == sorted(details["spectrum"], reverse=True)
        assert details["spectrum"][:2] == pytest.approx(list(event.gains))
    told = str(event)
    if method in ("gradmax", "random"):
        assert "outputs unchanged" in told
        assert event.realised_decrease is None
    else:
        losses = dict(event.details["losses"])
        before, after = losses[0.0], losses[event.amplitude]
        assert before - after == event.realised_decrease > 0
        assert f"held-out loss {before:.4g} -> {after:.4g}" in told
    assert "amplitude" not in told
    if energy:
        assert 0 < details["captured_energy"] < 1


def test_splitting_says_what_it_changes(chain, sites_of, batches_of):
    model = chain(3, 4)
    scheduler = GrowthScheduler(model, None, sites_of(model)[1:], method="splitting", amount=2, held_out=1 / 3)
    batches = batches_of(3)
    model.train()

    def loss():
        with torch.no_grad():
            return float(functional.cross_entropy(copy.deepcopy(model)(batches[-1][0]), batches[-1][1]))

    before = loss()
    (event,) = scheduler.grow(batches, functional.cross_entropy, 1)
    losses = dict(event.details["losses"])
    assert losses == pytest.approx({0.0: before, 1.0: loss()}, rel=1e-5)
    assert losses[0.0] != losses[1.0]
    assert f"held-out loss {losses[0.0]:.4g} -> {losses[1.0]:.4g}" in str(event)
