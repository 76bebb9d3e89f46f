"""The examples in the docstrings of all public names print what they say."""

import copy
import doctest
import inspect
import warnings

import pytest
import torch
from torch import nn

import growconv

EXAMPLES = [name for name in growconv.__all__ if not inspect.ismodule(getattr(growconv, name))]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(name, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10),
    )  # fmt: skip
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    given = {
        "growconv": growconv, "torch": torch, "nn": nn, "copy": copy, "warnings": warnings, "folder": tmp_path,
        "model": model, "images": images, "batches": [(images, labels)] * 2, "loss": nn.functional.cross_entropy,
        "sites": growconv.find_sites(model, images), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }  # fmt: skip
    parser = doctest.DocTestParser()
    test = parser.get_doctest(inspect.getdoc(getattr(growconv, name)) or "", given, name, None, 0)
    assert test.examples, "an example is missing"
    said: list[str] = []
    with warnings.catch_warnings():
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)
