"""A short run, for the tests of what becomes of a finished one."""

import json

QUICK = [
    "data.limit=200",
    "growth=random",
    "growth.samples=96",
    "growth.batch_size=32",
    "growth.every=4",
    "growth.times=2",
    "lr_schedule=constant",
    "trainer.progress=none",
    "report=false",
]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())
