"""Hazard: a documented recipe that does not run."""

import inspect
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import growconv.integrations
from growconv import GrowthHistory
from growconv.integrations import huggingface, lightning


def recipe(text):
    """The indented code of a docstring."""
    lines = [line for line in inspect.cleandoc(text).splitlines() if line.startswith("    ") or not line]
    return textwrap.dedent("\n".join(lines)).strip()


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip


def test_the_recipe_for_your_own_loop_runs_and_its_file_loads(tmp_path, digits):
    code = recipe(growconv.integrations.__doc__)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    images, labels = digits
    model = build()
    loader = DataLoader(TensorDataset(images[:640], labels[:640]), batch_size=16)
    names = {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=3e-3),
        "example": images[:2],
        "epochs": 4,
        "train_loader": loader,
        "loss": nn.functional.cross_entropy,
        "growth_batches": lambda: [(images[i : i + 64], labels[i : i + 64]) for i in range(0, 256, 64)],
        "path": tmp_path / "grown.pt",
    }
    exec(code, names)
    assert [site.width for site in names["scheduler"].sites] == [5, 5]
    saved = torch.load(tmp_path / "grown.pt", weights_only=True)
    fresh = GrowthHistory.from_records(saved["growth"]["history"]).replay(build(seed=4))
    fresh.load_state_dict(saved["model"])
    assert torch.equal(fresh(images[:32]), model(images[:32]))


@pytest.mark.parametrize("module", [lightning, huggingface])
def test_the_callbacks_take_few_lines(module):
    assert 1 <= len(recipe(module.GrowthCallback.__doc__).splitlines()) <= 15
