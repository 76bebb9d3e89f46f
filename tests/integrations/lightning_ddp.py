"""A Lightning run on two processes that grow: python lightning_ddp.py FOLDER (the Trainer starts the second one)."""

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from sklearn.datasets import load_digits

from growconv.growth import parameter_hash
from growconv.integrations.lightning import GrowthCallback

warnings.simplefilter("ignore")
specification = importlib.util.spec_from_file_location("shared", Path(__file__).parent / "test_lightning.py")
shared = importlib.util.module_from_spec(specification)
specification.loader.exec_module(shared)


class Watch(pl.Callback):
    """Notes how far the entries that growth added have moved one step later: DDP must know the new parameters."""

    moved = 0.0

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 6:
            self.start = module.net[4].weight[4:].detach().clone()
        if trainer.global_step == 8:
            self.moved = float(
                (module.net[4].weight[4 : 4 + len(self.start)].detach()[:, :4] - self.start[:, :4]).abs().sum()
            )


def main(folder):
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1
    module = shared.Classifier()
    growth = GrowthCallback(shared.LOSS, every=3, times=3, amount=1, batches=2)
    watch = Watch()
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[growth, watch], default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"),
        enable_checkpointing=False, plugins=LightningEnvironment(),  # also inside a Slurm job of one task
    )  # fmt: skip
    trainer.fit(module, shared.loader((images, torch.tensor(raw.target)), count=768))
    record = {
        "hash": parameter_hash(module),
        "widths": [module.net[0].out_channels, module.net[4].out_channels],
        "events": [[e.site, e.step, e.amplitude, list(e.gains)] for e in growth.scheduler.history],
        "moved": watch.moved,
        "wrapped": type(trainer.strategy.model).__name__,
    }
    (Path(folder) / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1])
