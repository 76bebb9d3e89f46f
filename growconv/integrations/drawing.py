"""Growth batches from a training loader, without disturbing the training that is reading from it."""

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
