"""Datasets: splits, order as a function of seed and position, augmentation, and what is mixed in which share."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from growconv.cli import main
from growconv.errors import DataError
from growconv.training import data
from growconv.training.data import epoch_order, generator_for, load_data, mix, seed_for, shift_and_flip, steps_per_epoch

KORNIA = pytest.mark.skipif(find_spec("kornia") is None, reason="kornia is not installed")
COMMON = {"validation": 0.1, "augmentation": "none", "limit": None}


def test_digits_are_split_once_and_for_all():
    digits = load_data("digits", **COMMON)
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1294, 144, 359)
    again = load_data("digits", **COMMON)
    assert torch.equal(digits.train.inputs, again.train.inputs)
    everything = torch.cat([digits.train.inputs, digits.validation.inputs, digits.test.inputs]).double().mean((1, 2, 3))
    from sklearn.datasets import load_digits

    expected = torch.from_numpy(np.round(load_digits().images * (255 / 16))).mean((1, 2))
    torch.testing.assert_close(everything.sort().values, expected.sort().values)
    inputs = digits.inputs(digits.train, torch.arange(len(digits.train)))
    torch.testing.assert_close(inputs.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std(), torch.tensor(1.0), atol=1e-3, rtol=0)


def test_limit_keeps_the_validation_split():
    whole, part = load_data("digits", **COMMON), load_data("digits", **COMMON | {"limit": 100})
    assert len(part.train) == 100
    assert torch.equal(part.validation.inputs, whole.validation.inputs)
    assert torch.equal(part.train.inputs, whole.train.inputs[:100])


@pytest.mark.parametrize("limit", [0, 5000])
def test_impossible_settings_are_named(limit):
    with pytest.raises(DataError, match=r"data\.limit"):
        load_data("digits", **COMMON | {"limit": limit})
    with pytest.raises(DataError, match="no such dataset"):
        load_data("mnist3d", **COMMON)


def test_shift_and_flip_against_a_loop():
    images = torch.randn(7, 2, 5, 6)
    generator = torch.Generator().manual_seed(0)
    got = shift_and_flip(images, generator, pad=2, flip=True)
    generator.manual_seed(0)
    shifts = torch.randint(0, 5, (2, 7, 1), generator=generator)
    mirrored = torch.rand(7, 1, generator=generator) < 0.5
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for i in range(7):
        top, left = shifts[0, i].item(), shifts[1, i].item()
        window = padded[i, :, top : top + 5, left : left + 6]
        assert torch.equal(got[i], window.flip(2) if mirrored[i] else window)
    assert 0 < mirrored.sum() < 7


def test_order_depends_on_seed_and_epoch_alone():
    assert torch.equal(epoch_order(50, 1, 2), epoch_order(50, 1, 2))
    assert not torch.equal(epoch_order(50, 1, 2), epoch_order(50, 1, 3))
    assert not torch.equal(epoch_order(50, 1, 2), epoch_order(50, 2, 2))
    assert epoch_order(50, 1, 2).sort().values.tolist() == list(range(50))
    assert seed_for(0, "a", 1) != seed_for(0, "a", 2)
    assert 0 <= seed_for(0, "a") < 2**63
    state = torch.get_rng_state()
    generator_for(3, "x")
    assert torch.equal(torch.get_rng_state(), state)
    assert steps_per_epoch(100, 32) == 3
    assert steps_per_epoch(10, 32) == 1


def test_batches_of_ranks_cover_a_split_once():
    digits = load_data("digits", **COMMON)
    seen = torch.cat([y for rank in range(3) for _, y in digits.batches(digits.test, 50, rank, 3)])
    assert seen.sort().values.tolist() == digits.test.targets.sort().values.tolist()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@KORNIA
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_shares_are_those_of_the_pixels(kind):
    """Image k is k everywhere, and of class k: its pixels tell what it was mixed of."""
    labels = torch.arange(6)
    images = labels.double()[:, None, None, None].expand(6, 1, 16, 16).contiguous()
    before = torch.get_rng_state()
    mixed, shares = mix(kind, images, labels, 7, generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert mixed.shape == images.shape
    torch.testing.assert_close(shares.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(shares @ torch.arange(7.0).double(), mixed.mean((1, 2, 3)), rtol=1e-5, atol=1e-5)
    assert (shares > 0).sum() > 6
    again = mix(kind, images, labels, 7, generator())
    assert torch.equal(again[0], mixed)
    assert not torch.equal(mix(kind, images, labels, 7, generator(1))[0], mixed)


@KORNIA
def test_randaugment_changes_training_images_only():
    changed = load_data("digits", validation=0.15, augmentation="randaugment", limit=64)
    plain = load_data("digits", validation=0.15, augmentation="none", limit=64)
    index = torch.arange(32)
    assert torch.equal(changed.inputs(changed.train, index), plain.inputs(plain.train, index))
    first, second = (changed.inputs(changed.train, index, generator(seed)) for seed in (0, 0))
    assert torch.equal(first, second)
    assert not torch.equal(first, changed.inputs(changed.train, index, generator(1)))
    assert torch.isfinite(first).all()


@KORNIA
def test_a_run_with_all_of_them_is_reproducible(tmp_path, capsys):
    command = ["trainer.mix=cutmix", "trainer.label_smoothing=0.1", "trainer.ema=0.9", "data.augmentation=randaugment"]
    command += ["growth=random", "growth.times=1", "growth.samples=64", "growth.batch_size=32", "data.limit=160"]
    command += ["trainer.epochs=2", "report=false", "baselines=[]", "trainer.progress=none"]
    for name in ("first", "second"):
        assert main([*command, f"hydra.run.dir={tmp_path / name}"]) == 0, capsys.readouterr().err
    told = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("first", "second")]
    assert told[0]["test_loss"] == told[1]["test_loss"]


@KORNIA
def test_what_cannot_be_mixed_or_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["trainer.mix=mixap"]) == 1
    assert "did you mean trainer.mix=mixup?" in capsys.readouterr().err
    assert main(["experiment=teacher", "trainer.mix=mixup", "growth=none", "data.samples=64"]) == 1
    assert "a single class each" in capsys.readouterr().err
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    assert main(["data.augmentation=randaugment"]) == 1
    assert "growconv[augment]" in capsys.readouterr().err
