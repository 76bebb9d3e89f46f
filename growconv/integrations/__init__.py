"""Growth inside other trainers.

`lightning` and `huggingface` each provide a callback; a loop of your own needs no more than this:

    from growconv import GrowthScheduler, find_sites

    sites = find_sites(model, example)
    scheduler = GrowthScheduler(model, optimizer, sites, method="tiny", every=100, times=4, amount=0.25)
    step = 0
    for epoch in range(epochs):
        for inputs, targets in train_loader:
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            optimizer.step()
            step += 1
            if scheduler.due(step, {"epoch": epoch}):
                scheduler.grow(growth_batches(), loss)
    torch.save({"model": model.state_dict(), "growth": scheduler.state_dict()}, path)

`growth_batches()` gives a few (inputs, targets) pairs of training data. To load the file again, build the small model,
call `GrowthHistory.from_records(saved["growth"]["history"]).replay(model)` and then
`model.load_state_dict(saved["model"])`. Under DistributedDataParallel, give the scheduler the raw model, and continue
with `growconv.growth.rewrap(wrapped)` after a growth.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch

from growconv.errors import ScheduleError


def draw_batches(loader: Iterable[Any], count: int) -> list[Any]:
    """The first batches of a fresh pass over a loader.

    Generators that the loader and its sampler were given are put back, so that the training sees its own order of
    samples. torch's global generator is the caller's business. They are fewer where the loader ends earlier.

    Raises:
        ScheduleError: a loader that keeps its workers, whose running pass a second one would break off; an empty one.
    """
    if getattr(loader, "persistent_workers", False):
        raise ScheduleError(
            "a loader with persistent workers cannot be read twice at once",
            where="growth batches",
            fix="give the callback a loader of its own: loader=DataLoader(...)",
        )
    owners = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler"))]
    owners += [getattr(owners[-1], "sampler", None)]
    found = {getattr(owner, "generator", None) for owner in owners}
    states = [(each, each.get_state()) for each in found if isinstance(each, torch.Generator)]
    try:
        batches = list(islice(iter(loader), count))
    finally:
        for generator, state in states:
            generator.set_state(state)
    if not batches:
        raise ScheduleError("the loader gave no growth batches", expected="at least one batch", where="growth batches")
    return batches
