"""Hazard: growth that the Hugging Face Trainer does not notice, or that its checkpoints lose."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from growconv.errors import CheckpointError, ScheduleError
from growconv.growth import GainAbove, Plateau
from growconv.integrations.huggingface import GrowthCallback, load_grown

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Digits(Dataset):
    def __init__(self, digits, start=0, count=320):
        self.images, self.labels = digits[0][start : start + count], digits[1][start : start + count]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def build(seed=0):
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=10
    )
    return ResNetForImageClassification(config)


def inner(sites):
    """The channels between the two convolutions of each block."""
    return [site for site in sites if site.closed_form and site.kind == "pair"]


def trainer_of(folder, model, callback, data, epochs=2, evaluation=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=1e-2, seed=3,
        report_to=[], use_cpu=True, save_strategy=options.pop("save_strategy", "epoch"), logging_strategy="no",
        disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, eval_dataset=evaluation, callbacks=[callback])


def test_a_model_grows_trains_saves_and_loads(tmp_path, digits):
    # what a user writes
    growth = GrowthCallback(sites=inner, method="tiny", every=5, times=3, amount=2, batches=4)
    model = build()
    trainer = trainer_of(tmp_path, model, growth, Digits(digits))
    trainer.train()
    trainer.save_model(tmp_path / "final")
    loaded = load_grown(ResNetForImageClassification, tmp_path / "final")
    # up to here
    assert [event.step for event in growth.scheduler.history][::2] == [5, 10, 15]
    assert all(site.width > 6 for site in growth.scheduler.sites)
    images = digits[0][:64]
    assert torch.equal(loaded(images).logits, model.eval()(images).logits)
    checkpoint = load_grown(ResNetForImageClassification, tmp_path / "checkpoint-10")
    assert sum(p.numel() for p in checkpoint.parameters()) < sum(p.numel() for p in loaded.parameters())


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, digits):
    def callback():
        return GrowthCallback(sites=inner, every=5, times=4, amount=1, batches=4)

    whole = build()
    trainer_of(tmp_path / "whole", whole, callback(), Digits(digits)).train()
    half = tmp_path / "whole" / "checkpoint-10"
    resumed, growth = load_grown(ResNetForImageClassification, half), callback()
    trainer_of(tmp_path / "resumed", resumed, growth, Digits(digits)).train(resume_from_checkpoint=str(half))
    assert [event.step for event in growth.scheduler.history][::2] == [5, 10, 15, 20]
    for mine, theirs in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_growing_nothing_changes_nothing_of_the_training(tmp_path, digits):
    plain, watched = build(), build()
    idle = GrowthCallback(sites=inner, every=10**6)
    trainer_of(tmp_path / "a", plain, idle, Digits(digits), epochs=1, save_strategy="no").train()
    growth = GrowthCallback(sites=inner, when=GainAbove(0.999999, every=3), amount=1, batches=3)
    trainer_of(tmp_path / "b", watched, growth, Digits(digits), epochs=1, save_strategy="no").train()
    assert growth.scheduler.rounds == 3
    assert len(growth.scheduler.history) == 0
    for mine, theirs in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_metrics_of_an_evaluation_reach_the_policies_once(tmp_path, digits):
    plateau = Plateau("eval_loss", patience=1, min_delta=0.99)
    growth = GrowthCallback(sites=inner, when=plateau, amount=1, batches=3)
    held_out = Digits(digits, start=320, count=64)
    options = {"eval_strategy": "epoch", "save_strategy": "no"}
    trainer_of(tmp_path, build(), growth, Digits(digits), epochs=3, evaluation=held_out, **options).train()
    assert [event.step for event in growth.scheduler.history][::2] == [21]


def test_code_that_a_config_brings_along_is_not_run(tmp_path, digits):
    growth = GrowthCallback(sites=inner, method="random", every=5, times=1, amount=2, batches=1)
    trainer = trainer_of(tmp_path, build(), growth, Digits(digits), epochs=1, save_strategy="no")
    trainer.train()
    folder = tmp_path / "final"
    trainer.save_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    load_grown(ResNetForImageClassification, folder)
    assert not (tmp_path / "pwned").exists()


def test_two_models_of_one_config_grow_by_themselves(tmp_path, digits):
    first = build()
    models = (first, ResNetForImageClassification(first.config))
    for amount, model in enumerate(models, 1):
        growth = GrowthCallback(sites=inner, method="random", every=2, times=1, amount=amount, batches=2)
        trainer_of(tmp_path / str(amount), model, growth, Digits(digits, count=96), epochs=1).train()
        assert [site.width for site in growth.scheduler.sites] == [4 + amount, 6 + amount]
        model.save_pretrained(tmp_path / f"saved{amount}")
    for amount, model in enumerate(models, 1):
        loaded = load_grown(ResNetForImageClassification, tmp_path / f"saved{amount}")
        assert torch.equal(loaded(digits[0][:8]).logits, model.eval()(digits[0][:8]).logits)


@pytest.mark.parametrize("method", ["tiny", "senn"])
def test_a_model_in_bf16_grows_in_bf16(tmp_path, digits, method):
    model, growth = build().bfloat16(), GrowthCallback(sites=inner, method=method, every=2, times=1, batches=2)
    data = Digits((digits[0].bfloat16(), digits[1]), count=96)
    trainer_of(tmp_path, model, growth, data, epochs=1, save_strategy="no").train()
    assert len(growth.scheduler.history) == 2
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

    def forward(self, pixel_values, labels):
        return {"loss": nn.functional.cross_entropy(self.net(pixel_values), labels)}


def test_a_plain_module_is_refused_at_the_start(tmp_path, digits):
    with pytest.raises(ScheduleError, match="PreTrainedModel"):
        trainer_of(tmp_path, Plain(), GrowthCallback(every=2, times=1), Digits(digits, count=96), epochs=1).train()


def test_what_cannot_work_is_refused(tmp_path, digits):
    with pytest.raises(ScheduleError, match="batches"):
        GrowthCallback(batches=0)
    build().save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no growth history"):
        load_grown(ResNetForImageClassification, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no weights"):
        load_grown(ResNetForImageClassification, tmp_path / "nowhere")
