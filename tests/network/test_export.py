"""A grown model is plain PyTorch: torch.export and ONNX take it."""

from pathlib import Path

import pytest
import torch

import growconv
from growconv.network.find import find_sites
from tests.network import zoo

pytestmark = pytest.mark.filterwarnings("ignore")


def grown(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    model, example = zoo.build(name)
    model, example = model.float().eval(), example.float()
    for site in find_sites(model, example):
        growconv.grow(model, site, zoo.random_growth(site, 3), 0.5)
    return model, example


@pytest.mark.parametrize("name", zoo.MODELS)
def test_torch_export(name: str) -> None:
    model, example = grown(name)
    exported = torch.export.export(model, (example,)).module()
    torch.testing.assert_close(exported(example), model(example), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "gated", "unet"])
def test_onnx(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model, example = grown(name)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (example,), file, dynamo=True, verbose=False)
    onnx.checker.check_model(onnx.load(file))
    (output,) = reference.ReferenceEvaluator(str(file)).run(
        None, {onnx.load(file).graph.input[0].name: example.numpy()}
    )
    torch.testing.assert_close(torch.from_numpy(output), model(example), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_inserted_layers_are_plain_too() -> None:
    model, example = grown("residual")
    for kind in ("convolution", "residual"):
        growconv.insert_layer(model, find_sites(model, example)[1], kind=kind)
    exported = torch.export.export(model, (example,)).module()
    torch.testing.assert_close(exported(example), model(example), rtol=1e-5, atol=1e-5)
