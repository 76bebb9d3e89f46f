"""What several consumers have in common is summed once."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import growconv
from growconv.statistics import StatisticsCollector, best_updates, collect_statistics
from tests.statistics.test_collector import X, Y


class Readers(nn.Module):
    """A stream of two producers: `early` reads the first, `late` and `other` both; some batches skip some of them."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 1), nn.Conv2d(4, 5, 3, padding=1)
        self.early, self.late, self.other = (nn.Conv2d(5, 4, 3, padding=1) for _ in range(3))
        self.skipped = ()

    def forward(self, x):
        x = torch.relu(self.stem(x))
        found = [] if "early" in self.skipped else [self.early(x)]
        x = x + self.down(torch.relu(self.up(x)))
        found += [getattr(self, name)(x) for name in ("late", "other") if name not in self.skipped]
        return torch.stack([each.mean(dim=(2, 3)) for each in found]).sum(dim=0)


@pytest.mark.parametrize("known", [False, True], ids=["w searched", "w known"])
@pytest.mark.parametrize("skips", [[(), (), ()], [(), ("late",), ("early", "other"), ("other",)]])
def test_consumers_that_read_alike_share_s(known, skips):
    """Against the collection of each consumer alone, on the batches that call it."""
    torch.manual_seed(0)
    model = Readers().double()
    site = next(each for each in growconv.find_sites(model, X[:1].double()) if each.producers == ("stem", "down"))
    assert set(site.consumers) == {"up", "early", "late", "other"}
    options = {"quantities": {"S", "N", "S_full"}, "hold_bytes": 0}
    batches = [(X.double() + number, Y) for number in range(len(skips))]

    def collect(site, chosen):
        def run(each_pass):
            numbers = iter(chosen)
            hook = model.register_forward_pre_hook(lambda *_: setattr(model, "skipped", skips[next(numbers)]))
            try:
                each_pass()
            finally:
                hook.remove()

        given = {"run": run, **options}
        own = [batches[number] for number in chosen]
        if known:
            first = collect_statistics(model, site, own, F.cross_entropy, **given | {"quantities": {"update"}})
            given["updates"] = best_updates(first)
        return collect_statistics(model, site, own, F.cross_entropy, **given)[site.name]

    together = collect(site, range(len(skips)))
    for each in together.consumers:
        called = [number for number, skipped in enumerate(skips) if each.consumer not in skipped]
        routes = tuple(route for route in site.routes if route.consumer == each.consumer)
        alone = collect(replace(site, consumers=(each.consumer,), routes=routes), called).consumer
        assert each.samples == alone.samples
        assert each.moments.keys() == alone.moments.keys()
        for name, value in alone.moments.items():
            torch.testing.assert_close(each.moments[name], value, rtol=1e-9, atol=1e-11)


def test_a_shared_s_is_there_though_it_is_taken_of_every_second_loss_only():
    """The first loss skips `early`, so that the second is the first that tells anything of its S."""
    torch.manual_seed(0)
    model = Readers().double()
    site = next(each for each in growconv.find_sites(model, X[:1].double()) if each.producers == ("stem", "down"))
    collector = StatisticsCollector(model, site, quantities={"S"}, moments_every=2)
    with collector:
        for skipped in (("early",), ()):
            model.skipped = skipped
            F.cross_entropy(model(X.double() + len(skipped)), Y).backward()
    second = collect_statistics(model, site, [(X.double(), Y)], F.cross_entropy, quantities={"S"})[site.name]
    early = site.consumers.index("early")
    found = collector.statistics[site.name].consumers[early].S
    torch.testing.assert_close(found, second.consumers[early].S, rtol=1e-9, atol=1e-11)


def test_s_is_summed_once_for_consumers_that_read_alike():
    torch.manual_seed(0)
    model = Readers()
    sites = growconv.find_sites(model, X[:1])
    collector = StatisticsCollector(model, sites)
    with collector:
        F.cross_entropy(model(X), Y).backward()
    told = collector.explain()
    assert told.count("S by") == 5
    assert told.count("S by what is summed for") == 2


class Concatenated(nn.Module):
    """`last` reads the channels of both layers before it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.last = nn.Conv2d(9, 4, 3, padding=1)

    def forward(self, x):
        one = torch.relu(self.first(x))
        return self.last(torch.cat([one, torch.relu(self.second(one))], 1)).mean(dim=(2, 3))


@pytest.mark.parametrize("hold_bytes", [None, 0])
def test_what_concerns_a_consumer_alone_is_summed_once_for_all_its_sites(hold_bytes):
    """Against each site collected alone."""
    torch.manual_seed(0)
    model = Concatenated().double()
    sites = growconv.find_sites(model, X[:1].double())
    assert [site.consumers for site in sites] == [("second", "last"), ("last",)]
    batches = [(X.double(), Y), (X.double() + 1, Y)]
    options = {"quantities": {"S", "N", "update"}, "hold_bytes": hold_bytes}
    together = collect_statistics(model, sites, batches, F.cross_entropy, **options)
    first, second = (together[site.name].consumers[-1] for site in sites)
    assert first.S2 is second.S2
    assert first.M is second.M
    for site in sites:
        alone = collect_statistics(model, site, batches, F.cross_entropy, **options)[site.name]
        for one, other in zip(together[site.name].consumers, alone.consumers, strict=True):
            assert one.moments.keys() == other.moments.keys()
            for name in ("S", "N", "M", "S2", "best_update"):
                torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-8, atol=1e-11)
    known = best_updates(together)
    some = {key: update for key, update in known.items() if key[0] == sites[0].name}
    mixed = collect_statistics(
        model, sites, batches, F.cross_entropy, **options | {"quantities": {"N"}, "updates": some}
    )
    for site in sites:
        for one, other in zip(mixed[site.name].consumers, together[site.name].consumers, strict=True):
            torch.testing.assert_close(one.N, other.N, rtol=1e-8, atol=1e-11)
    assert known[sites[0].name, "last"] is known[sites[1].name, "last"]
    collector = StatisticsCollector(model, sites)
    with collector:
        F.cross_entropy(model(X.double()), Y).backward()
    assert f"M, S2 by what is summed for {sites[0].name}, consumer last" in collector.explain()
