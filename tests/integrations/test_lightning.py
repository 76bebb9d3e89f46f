"""Hazard: growth that the Lightning Trainer does not notice, or that its checkpoints lose."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from growconv.errors import CheckpointError, ScheduleError, TraceError
from growconv.growth import GainAbove, Plateau
from growconv.integrations.lightning import GrowthCallback, load_grown

SCRIPT = Path(__file__).parent / "lightning_ddp.py"
LOSS = nn.functional.cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Classifier(pl.LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(16, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        loss = LOSS(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", LOSS(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def loader(digits, shuffle=False, count=640):
    data = TensorDataset(digits[0][:count], digits[1][:count])
    return DataLoader(data, batch_size=32, shuffle=shuffle, generator=torch.Generator().manual_seed(5))


def fit(folder, module, callback, train, epochs, ckpt_path=None, validation=None, **options):
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[callback], default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", enable_checkpointing=False, deterministic=True, **options,
    )  # fmt: skip
    trainer.fit(module, train, validation, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("attribute", ["", "net"])
def test_a_module_grows_trains_and_loads(tmp_path, digits, attribute):
    # what a user writes
    growth = GrowthCallback(LOSS, attribute=attribute, method="tiny", every=15, times=3, amount=2, batches=4)
    module = Classifier()
    trainer = fit(tmp_path, module, growth, loader(digits), epochs=3)
    # up to here
    assert [event.step for event in growth.scheduler.history] == [15, 15, 30, 30, 45, 45]
    assert [module.net[0].out_channels, module.net[4].out_channels] == [9, 10]
    assert all(id(p) in {id(q) for q in trainer.optimizers[0].param_groups[0]["params"]} for p in module.parameters())
    moved = trainer.optimizers[0].state[module.net[4].weight]["momentum_buffer"]
    assert float(moved[4:].abs().sum()) > 0
    path = tmp_path / "grown.ckpt"
    trainer.save_checkpoint(path)
    loaded = load_grown(Classifier(seed=9), path)
    assert torch.equal(loaded.eval()(digits[0][:64]), module.eval()(digits[0][:64]))
    accuracy = (module(digits[0][640:]).argmax(1) == digits[1][640:]).float().mean()
    assert float(accuracy) > 0.5


def test_a_resumed_fit_is_bitwise_the_uninterrupted_one(tmp_path, digits):
    def callback():
        return GrowthCallback(LOSS, every=15, times=4, amount=1, batches=4)

    whole = Classifier()
    fit(tmp_path, whole, callback(), loader(digits, shuffle=True), epochs=4)

    train = loader(digits, shuffle=True)
    trainer = fit(tmp_path, Classifier(), callback(), train, epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, growth = Classifier(seed=3), callback()
    fit(tmp_path, resumed, growth, train, epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert len(growth.scheduler.history) == 8
    for mine, theirs in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_growing_nothing_changes_nothing_of_the_training(tmp_path, digits):
    plain, watched = Classifier(), Classifier()
    fit(tmp_path, plain, pl.Callback(), loader(digits, shuffle=True), epochs=1)
    growth = GrowthCallback(LOSS, when=GainAbove(0.999999, every=5), amount=1, batches=3)
    fit(tmp_path, watched, growth, loader(digits, shuffle=True), epochs=1)
    assert growth.scheduler.rounds > 0
    assert len(growth.scheduler.history) == 0
    for mine, theirs in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_validation_metrics_reach_the_policies_once(tmp_path, digits):
    plateau = Plateau("val_loss", patience=2, min_delta=0.99)
    growth = GrowthCallback(LOSS, when=plateau, amount=1, batches=3)
    fit(tmp_path, Classifier(), growth, loader(digits), epochs=5, validation=loader(digits, count=128))
    assert [event.step for event in growth.scheduler.history][::2] == [61]  # best after epoch 1, then two without


def test_accumulation_and_bf16(tmp_path, digits):
    growth = GrowthCallback(LOSS, every=4, times=2, amount=1, batches=3)
    module = Classifier()
    fit(tmp_path, module, growth, loader(digits), epochs=1, accumulate_grad_batches=2, precision="bf16-mixed")
    assert [event.step for event in growth.scheduler.history] == [4, 4, 8, 8]
    assert module.net[0].weight.dtype == torch.float32


@pytest.mark.parametrize("method", ["tiny", "functional", "splitting"])
def test_a_module_in_bf16_grows_in_bf16(tmp_path, digits, method):
    growth, module = GrowthCallback(LOSS, method=method, every=2, times=2, amount=1, batches=2), Classifier()
    fit(tmp_path, module, growth, loader(digits, count=160), epochs=1, precision="bf16-true")
    assert [event.step for event in growth.scheduler.history] == [2, 2, 4, 4]
    assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())


def test_a_module_without_forward_names_the_part_that_grows(tmp_path, digits):
    class Bare(Classifier):
        forward = pl.LightningModule.forward

        def training_step(self, batch, index):
            return LOSS(self.net(batch[0]), batch[1])

    train = loader(digits, count=160)
    with pytest.raises(TraceError, match="forward"):
        fit(tmp_path, Bare(), GrowthCallback(LOSS, every=2, times=1, batches=2), train, epochs=1)
    growth = GrowthCallback(LOSS, every=2, times=1, batches=2, attribute="net")
    fit(tmp_path, Bare(), growth, train, epochs=1)
    assert growth.scheduler.history


def test_what_cannot_work_is_refused(tmp_path, digits):
    with pytest.raises(ScheduleError, match="batches"):
        GrowthCallback(LOSS, batches=0)

    class TwoOptimizers(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

    with pytest.raises(ScheduleError, match="one optimizer"):
        fit(tmp_path, TwoOptimizers(), GrowthCallback(LOSS, every=5), loader(digits), epochs=1)
    trainer = fit(tmp_path, Classifier(), pl.Callback(), loader(digits, count=64), epochs=1)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="GrowthCallback"):
        load_grown(Classifier(), tmp_path / "plain.ckpt")


def test_a_pickle_of_a_stranger_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    torch.save({"state_dict": {}, "callbacks": {}, "x": Evil()}, tmp_path / "evil.ckpt")
    (tmp_path / "noise.ckpt").write_bytes(b"no checkpoint at all")
    for name in ("evil.ckpt", "noise.ckpt"):
        with pytest.raises(CheckpointError, match=name):
            load_grown(Classifier(), tmp_path / name)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.slow
def test_two_processes_grow_the_same_model(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    records = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert records[0] == records[1]
    assert records[0]["widths"] == [6, 7]
    assert records[0]["moved"] > 0


class Follows(pl.Callback):
    """Compares the average with the module after every step; saves a checkpoint at the end of the second epoch."""

    def __init__(self, averaging, path):
        self.averaging, self.path, self.widths = averaging, path, []

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, module, *_):
        average = self.averaging._average_model
        average = getattr(average, "module", average)
        shapes = [[tuple(each.shape) for each in net.state_dict().values()] for net in (average, module)]
        assert shapes[0] == shapes[1]
        width = module.net[0].out_channels
        if self.widths and width > self.widths[-1]:
            new = [net.net[0].weight[self.widths[-1] :] for net in (average, module)]
            torch.testing.assert_close(*new)
            assert not torch.equal(average.net[0].weight[: self.widths[-1]], module.net[0].weight[: self.widths[-1]])
        self.widths.append(width)


def averaged(folder, digits, averaging, module, epochs, growth, ckpt_path=None, train=None):
    callbacks = [growth, averaging, Follows(averaging, folder / "half.ckpt")]
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=callbacks, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", enable_checkpointing=False, deterministic=True,
    )  # fmt: skip
    trainer.fit(module, train or loader(digits, shuffle=True), ckpt_path=ckpt_path)
    assert callbacks[-1].widths[-1] == module.net[0].out_channels > 3


@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_the_averages_of_lightning_grow_along(tmp_path, digits, kind):
    averaging = EMAWeightAveraging(decay=0.9) if kind == "EMA" else StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    module, growth = Classifier(), GrowthCallback(LOSS, every=15, times=3, amount=1, batches=3)
    averaged(tmp_path, digits, averaging, module, 4, growth)
    accuracy = (module(digits[0][640:]).argmax(1) == digits[1][640:]).float().mean()
    assert float(accuracy) > 0.5


def test_a_resumed_fit_with_an_average_is_bitwise_the_uninterrupted_one(tmp_path, digits):
    def growth():
        return GrowthCallback(LOSS, every=15, times=4, amount=1, batches=3)

    whole = Classifier()
    averaged(tmp_path, digits, EMAWeightAveraging(decay=0.9), whole, 4, growth())
    train, half = loader(digits, shuffle=True), Classifier()
    averaged(tmp_path, digits, EMAWeightAveraging(decay=0.9), half, 2, growth(), train=train)
    resumed = Classifier(seed=3)
    path = tmp_path / "half.ckpt"
    averaged(tmp_path, digits, EMAWeightAveraging(decay=0.9), resumed, 4, growth(), ckpt_path=path, train=train)
    for mine, theirs in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_schedule_is_asked_for_at_the_start(tmp_path, digits):
    with pytest.raises(ScheduleError, match="no schedule"):
        fit(tmp_path, Classifier(), GrowthCallback(LOSS, amount=1), loader(digits), epochs=1)
