"""Mixup, CutMix, RandAugment: what is mixed and in which share, by the pixels; a run with them is reproducible."""

import json

import pytest
import torch

from growconv.cli import main
from growconv.training import mixing
from growconv.training.data import load_data

pytest.importorskip("kornia")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_shares_are_those_of_the_pixels(kind):
    """Image k is k everywhere, and of class k: its pixels tell what it was mixed of."""
    labels = torch.arange(6)
    images = labels.double()[:, None, None, None].expand(6, 1, 16, 16).contiguous()
    before = torch.get_rng_state()
    mixed, shares = mixing.mix(kind, images, labels, 7, generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert mixed.shape == images.shape
    torch.testing.assert_close(shares.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(shares @ torch.arange(7.0).double(), mixed.mean((1, 2, 3)), rtol=1e-5, atol=1e-5)
    assert (shares > 0).sum() > 6
    again = mixing.mix(kind, images, labels, 7, generator())
    assert torch.equal(again[0], mixed)
    assert not torch.equal(mixing.mix(kind, images, labels, 7, generator(1))[0], mixed)


def test_randaugment_changes_training_images_only():
    data = load_data("digits", validation=0.15, augmentation="randaugment", limit=64)
    plain = load_data("digits", validation=0.15, augmentation="none", limit=64)
    index = torch.arange(32)
    assert torch.equal(data.inputs(data.train, index), plain.inputs(plain.train, index))
    first, second = (data.inputs(data.train, index, generator(seed)) for seed in (0, 0))
    assert torch.equal(first, second)
    assert not torch.equal(first, data.inputs(data.train, index, generator(1)))
    assert torch.isfinite(first).all()


def test_a_run_with_all_of_them_is_reproducible(tmp_path, capsys):
    command = ["trainer.mix=cutmix", "trainer.label_smoothing=0.1", "trainer.ema=0.9", "data.augmentation=randaugment"]
    command += ["growth=random", "growth.times=1", "growth.samples=64", "growth.batch_size=32", "data.limit=160"]
    command += ["trainer.epochs=2", "report=false", "baselines=[]", "trainer.progress=none"]
    for name in ("first", "second"):
        assert main([*command, f"hydra.run.dir={tmp_path / name}"]) == 0, capsys.readouterr().err
    told = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("first", "second")]
    assert told[0]["test_loss"] == told[1]["test_loss"]


def test_what_cannot_be_mixed_or_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["trainer.mix=mixap"]) == 1
    assert "did you mean trainer.mix=mixup?" in capsys.readouterr().err
    assert main(["experiment=teacher", "trainer.mix=mixup", "growth=none", "data.samples=64"]) == 1
    assert "a single class each" in capsys.readouterr().err
    monkeypatch.setattr(mixing, "find_spec", lambda name: None)
    assert main(["data.augmentation=randaugment"]) == 1
    assert "growconv[augment]" in capsys.readouterr().err
