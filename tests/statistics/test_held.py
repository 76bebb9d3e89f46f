"""N of batches that are held until W* is known, and what is let go."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from growconv.errors import StatisticsError
from growconv.statistics import StatisticsCollector, collect_statistics
from tests.statistics.test_collector import X, Y, network, site_of


@pytest.mark.parametrize("calls", [2, 12])
def test_n_of_held_batches_is_that_of_p(calls):
    model = network(norm=True).double().eval()
    site = site_of(model)
    limit = 100_000  # P has 92,736 bytes
    batches = [(X.double() + number, Y) for number in range(calls)]
    asked = ({"S", "N"}, {"S", "N", "P"})
    collectors = [StatisticsCollector(model, site, quantities=each, scratch_bytes=limit) for each in asked]
    for collector in collectors:
        with collector:
            for x, y in batches:
                F.cross_entropy(model(x), y).backward()
                x.zero_()  # what is held does not change with the caller's own tensors
        batches = [(X.double() + number, Y) for number in range(calls)]
    held, summed = (collector.statistics[site.name] for collector in collectors)
    assert ("held of 2 calls" in collectors[0].explain()) == (calls == 2)
    assert ("P" in held.consumer.moments) == (calls > 2)
    assert "P" in summed.consumer.moments
    for name in ("S", "S2", "M", "N_raw", "P", "N"):
        torch.testing.assert_close(getattr(held, name), getattr(summed, name), rtol=1e-9, atol=1e-12)
    both = held + summed
    torch.testing.assert_close(both.N, summed.N, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("room", [0, 20_000, None])
def test_beyond_hold_bytes_n_comes_from_a_second_pass(room):
    model = network(norm=True).double().eval()
    site = site_of(model)
    batches = [(X.double() + number, Y) for number in range(3)]
    options = {} if room is None else {"hold_bytes": room}
    found = collect_statistics(model, site, batches, F.cross_entropy, **options)[site.name]
    reference = collect_statistics(model, site, batches, F.cross_entropy, quantities={"S", "N", "P"})[site.name]
    assert bool(found.notes) == (room is not None)
    for name in ("S", "S2", "M", "N"):
        torch.testing.assert_close(getattr(found, name), getattr(reference, name), rtol=1e-9, atol=1e-12)
    assert found.bottleneck_energy == pytest.approx(reference.bottleneck_energy)


@pytest.mark.parametrize(("keep", "again"), [(0, 3), (len(X), 2), (2 * len(X), 1)])
def test_a_second_pass_leaves_out_batches_whose_samples_are_kept(keep, again):
    model = network(norm=True).double().eval()
    site = site_of(model)
    batches = [(X.double() + number, Y) for number in range(3)]
    quantities, seen = {"S", "N"} | ({"samples"} if keep else set()), []

    def loss(z, y):
        seen.append(float(z.detach().sum()))
        return F.cross_entropy(z, y)

    found = collect_statistics(model, site, batches, loss, quantities=quantities, keep_samples=keep, hold_bytes=1)
    assert seen == seen[:3] + seen[3 - again : 3]
    reference = collect_statistics(model, site, batches, F.cross_entropy, quantities={"S", "N", "P"})[site.name]
    torch.testing.assert_close(found[site.name].N, reference.N, rtol=1e-9, atol=1e-12)


def test_nothing_is_collected_after_a_second_pass():
    model = network()
    collector = StatisticsCollector(model, site_of(model), hold_bytes=0)
    with collector:
        F.cross_entropy(model(X), Y).backward()
    with collector.second_pass():
        F.cross_entropy(model(X), Y).backward()
    with pytest.raises(StatisticsError, match="has made its second pass"), collector:
        pass


@pytest.mark.parametrize("keep", [0, 2])
def test_a_batch_is_let_go_before_the_next_one_comes(keep):
    model = network(norm=True)
    site = site_of(model)
    inputs: list[weakref.ref] = []
    handle = model.get_submodule(site.consumers[0]).register_forward_pre_hook(
        lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage()))
    )
    quantities = {"S", "N", "samples"} if keep else {"S", "N"}
    alive: list[int] = []

    def loss(z, y):
        alive.append(sum(each() is not None for each in inputs))
        return F.cross_entropy(z, y)

    gc.collect()
    gc.disable()
    try:
        collect_statistics(model, site, [(X, Y)] * 4, loss, quantities=quantities, keep_samples=keep, hold_bytes=0)
    finally:
        gc.enable()
        handle.remove()
    assert max(alive) <= 1
