"""Datasets: parsing, checksums, splits, augmentation, and order as a function of seed and position."""

import numpy as np
import pytest
import torch

from growconv.errors import DataError
from growconv.training.data import epoch_order, generator_for, load_data, seed_for, shift_and_flip, steps_per_epoch

COMMON = {"validation": 0.1, "augmentation": "none", "limit": None}


def test_digits_are_split_once_and_for_all():
    data = load_data("digits", **COMMON)
    assert (len(data.train), len(data.validation), len(data.test)) == (1294, 144, 359)
    again = load_data("digits", **COMMON)
    assert torch.equal(data.train.inputs, again.train.inputs)
    everything = torch.cat([data.train.inputs, data.validation.inputs, data.test.inputs]).double().mean((1, 2, 3))
    from sklearn.datasets import load_digits

    expected = torch.from_numpy(np.round(load_digits().images * (255 / 16))).mean((1, 2))
    torch.testing.assert_close(everything.sort().values, expected.sort().values)
    inputs = data.inputs(data.train, torch.arange(len(data.train)))
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
    data = load_data("digits", **COMMON)
    seen = torch.cat([y for rank in range(3) for _, y in data.batches(data.test, 50, rank, 3)])
    assert seen.sort().values.tolist() == data.test.targets.sort().values.tolist()
