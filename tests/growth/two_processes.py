"""What each of two gloo processes runs for test_distributed.py: python two_processes.py RANK WORLD FOLDER."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before the group is made, which its defaults would keep alive
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from growconv.convolution.tucker import TuckerConv2d
from growconv.errors import GrowthError, ScheduleError
from growconv.growth import Best, Budget, GrowthScheduler, Plateau, parameter_hash, require_equal_parameters, rewrap
from growconv.growth.distributed import agreed, reduce_statistics
from growconv.network.find import find_sites
from growconv.network.rank import find_rank_sites
from growconv.statistics.collect import collect_statistics

LOSS = nn.functional.cross_entropy
GLOBAL_BATCH = 32


def build(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.SELU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, 5),
    ).to(dtype)  # fmt: skip


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(640, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return images, (images.mean((1, 2, 3)) * 20).round().long().remainder(5)


def share(batches, rank, world):
    """Every process takes its part of each global batch."""
    return [(x[rank::world], y[rank::world]) for x, y in batches]


def growth_batches(dtype=torch.float64):
    images, labels = data(dtype)
    return [(images[i : i + 64], labels[i : i + 64]) for i in range(0, 384, 64)]


def sites_of(model):
    dtype = next(model.parameters()).dtype
    return [site for site in find_sites(model, torch.zeros(2, 1, 8, 8, dtype=dtype)) if site.closed_form]


def moments(rank, world):
    """All statistics of all sites, averaged over the processes, and the gathered samples."""
    model = build()
    own = share(growth_batches(), rank, world)
    quantities = {"S", "N", "N_raw", "S_full", "patch", "samples"}
    found = reduce_statistics(
        collect_statistics(model, sites_of(model), own, LOSS, quantities=quantities, keep_samples=500)
    )
    twice = reduce_statistics(  # so little scratch that P needs a second pass
        collect_statistics(
            model,
            sites_of(model),
            own,
            LOSS,
            quantities={"N"},
            scratch_bytes=2000,
            run=agreed,
            average=reduce_statistics,
        )
    )
    answer = {f"{name} twice": statistics.N for name, statistics in twice.items()}
    answer["passes"] = torch.tensor(float(all(statistics.notes for statistics in twice.values())))
    for name, statistics in found.items():
        for consumer in statistics.consumers:
            values = {**consumer.moments, "N": consumer.N, "energy": torch.tensor(consumer.gradient_energy)}
            answer |= {f"{name} {consumer.consumer} {key}": value for key, value in values.items()}
            kept = statistics.samples_kept
            answer[f"{name} kept"] = (
                kept.x[statistics.growth_site.producers[0]].square().sum()
                + kept.v_perp(consumer.consumer).square().sum()
            )
        answer |= {f"{name} mean": statistics.patch_mean, f"{name} gram": statistics.patch_gram}
        answer[f"{name} samples"] = torch.tensor(float(statistics.samples))
    return answer


def train(rank, world, dtype=torch.float64, method="tiny", amplitude=0.3, where="all"):
    """Train with growth in between; the model is wrapped again after each growth."""
    images, labels = data(dtype)
    model = build(dtype)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    scheduler = GrowthScheduler(
        model, optimizer, sites_of(model), method=method, amount=1, amplitude=amplitude, where=where,
        when=Plateau("loss", patience=3, min_delta=0.5), times=5, budget=Budget(seconds=1e6),
    )  # fmt: skip
    hashes = []
    for step in range(1, 31):
        index = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))[:GLOBAL_BATCH][rank::world]
        loss = LOSS(wrapped(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler.due(step, {"loss": 1.0 + rank}):
            events = scheduler.grow(share(growth_batches(dtype), rank, world), LOSS)
            if events and world > 1:
                wrapped = rewrap(wrapped)
            hashes.append(parameter_hash(model))
    return model, scheduler, hashes


def terms(rank, world):
    """M and S2 of a factorized layer over the processes, and its factors after a round of rank growth."""
    torch.manual_seed(0)
    model = nn.Sequential(TuckerConv2d(1, 6, 3, rank=(2, 1)), nn.Tanh(), nn.Flatten(), nn.Linear(216, 5)).double()
    own = share(growth_batches(), rank, world)
    scheduler = GrowthScheduler(model, None, find_rank_sites(model), amplitude=0.3, amount=2)
    (found,) = reduce_statistics(
        collect_statistics(model, scheduler.sites, own, LOSS, quantities={"M", "S2"}, run=agreed)
    ).values()
    (event,) = scheduler.grow(own, LOSS, step=1)
    solved = {"gains": torch.tensor(event.gains), **model.state_dict()}
    return {"rank M": found.M, "rank S2": found.S2} | {f"solved {name}": value for name, value in solved.items()}


def failures(rank, world):
    """Names of errors that have to be raised on both ranks."""
    seen = []
    model = build(seed=rank)
    try:
        require_equal_parameters(model)
    except ScheduleError as error:
        seen.append(str(error).splitlines()[0])
    model = build(torch.float32)
    scheduler = GrowthScheduler(model, None, sites_of(model), amplitude=1.0, amount=1)
    before = parameter_hash(model)

    def loss(output, targets):  # only rank 1 sees a value that is not finite
        return LOSS(output, targets) * (float("nan") if rank == 1 else 1.0)

    try:
        scheduler.grow(share(growth_batches(torch.float32), rank, world), loss, step=1)
    except GrowthError as error:
        seen.append(type(error).__name__)
    return [*seen, before == parameter_hash(model)]


def main(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    statistics = moments(rank, world) | terms(rank, world)
    model, scheduler, hashes = train(rank, world)
    searched, _, searched_hashes = train(rank, world, torch.float32, amplitude="line_search")
    where = Best(by="decrease")
    compared, _, compared_hashes = train(rank, world, torch.float32, amplitude="line_search", where=where)
    record = {
        "hashes": hashes,
        "searched_hashes": [*searched_hashes, parameter_hash(searched)],
        "compared_hashes": [*compared_hashes, parameter_hash(compared)],
        "final": parameter_hash(model),
        "events": [[e.site, e.step, e.channels, list(e.gains), e.amplitude] for e in scheduler.history],
        "failures": failures(rank, world),
    }
    torch.save({"statistics": statistics, "weights": model.state_dict()}, Path(folder) / f"rank{rank}.pt")
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(record))
    dist.barrier()  # a process that ends while the other still speaks to it can end it, too
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
