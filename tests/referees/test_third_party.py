"""A sample of other people's models: every site grows, the function stays, new weights get gradients.

The whole table is made by experiments/benchmarks/architectures.py.
"""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from growconv.network.analysis import analyse
from growconv.network.find import rows_of
from tests.network import referee


def pytorchcv(file: str, name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip(f"pytorchcv.models.{file}"), name)()


def transformers(model: str, config: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        pytest.importorskip("transformers")
        package = importlib.import_module(f"transformers.models.{config.lower().removesuffix('config')}")
        return getattr(package, model)(getattr(package, config)(**options))

    return build


def monai_unet() -> nn.Module:
    networks = pytest.importorskip("monai.networks.nets")
    return networks.UNet(
        spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1
    )


CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]}
# name: (builder, input shape, convolutions whose outputs may stay as they are)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "resnet20": (pytorchcv("resnet_cifar", "resnet20_cifar10"), (2, 3, 32, 32), 0),
    "convnext": (transformers("ConvNextForImageClassification", "ConvNextConfig", **CONVNEXT), (2, 3, 64, 64), 0),
    "hf_resnet": (transformers("ResNetForImageClassification", "ResNetConfig", **RESNET), (2, 3, 32, 32), 0),
    "monai_unet": (monai_unet, (2, 1, 16, 16, 16), 2),
}
MORE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "seresnet20": (pytorchcv("seresnet_cifar", "seresnet20_cifar10"), (2, 3, 32, 32), 0),
    "densenet40": (pytorchcv("densenet_cifar", "densenet40_k12_cifar10"), (2, 3, 32, 32), 0),
    "mobilenetv2": (pytorchcv("mobilenetv2", "mobilenetv2_wd4"), (2, 3, 96, 96), 1),
    "shufflenet": (pytorchcv("shufflenet", "shufflenet_g1_wd4"), (2, 3, 96, 96), 0),
    "ghostnet": (pytorchcv("ghostnet", "ghostnet"), (2, 3, 96, 96), 0),
    "mixnet": (pytorchcv("mixnet", "mixnet_s"), (2, 3, 96, 96), 0),
    "igcv3": (pytorchcv("igcv3", "igcv3_wd4"), (2, 3, 96, 96), 1),
}


def grow_every_site(builder: Callable[[], nn.Module], shape: tuple[int, ...], refused: int) -> None:
    torch.manual_seed(0)
    model, example = referee.prepared(builder()), torch.randn(shape, dtype=torch.float64)
    found = analyse(model, example)
    rows = [row for row in rows_of(found) if row.layer.startswith("Conv")]
    assert sum(not row.growable for row in rows) == refused
    assert all(row.growable or row.reason for row in rows)
    referee.check(model, example, found.sites, units=[3])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_every_site_grows_by_three(name: str) -> None:
    grow_every_site(*MODELS[name])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MORE)
def test_every_site_of_larger_models_grows_by_three(name: str) -> None:
    grow_every_site(*MORE[name])
