"""Models of torchvision and timm for the table of architectures, drawn, never downloaded.

Both ask pip for the release of torch that they were built with; so they are run where they are installed, each with a
section of its own.
"""

import importlib
from types import ModuleType

from experiments.benchmarks.growing import Builder

CLASSIFIERS = (
    "alexnet", "vgg11_bn", "squeezenet1_0", "squeezenet1_1", "densenet121", "googlenet", "inception_v3",
    "resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small",
    "mobilenet_v3_large", "shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0", "efficientnet_v2_s",
    "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny",
)  # fmt: skip
SEGMENTERS = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
TIMM = (
    "resnet18", "resnet26t", "resnetblur50", "seresnext26d_32x4d", "res2net50_26w_4s", "resnest14d",
    "skresnet18", "ecaresnet26t", "cspresnet50", "cs3darknet_s", "dla34", "hrnet_w18_small",
    "efficientnet_b0", "tf_efficientnetv2_b0", "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv4_conv_small",
    "mixnet_s", "ghostnet_100", "ghostnetv2_100", "rexnet_100", "regnetx_002", "regnety_002", "nf_regnet_b0",
    "eca_nfnet_l0", "convnext_atto", "convnextv2_atto", "repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9",
    "mobilevit_xxs", "mobilevitv2_050", "edgenext_xx_small", "levit_conv_128s", "poolformer_s12", "coatnet_pico_rw_224",
    "maxvit_rmlp_pico_rw_256", "halonet26t", "botnet26t_256", "lambda_resnet26t", "selecsls42b", "tresnet_m",
    "ese_vovnet19b_dw", "legacy_xception", "pnasnet5large",
)  # fmt: skip
SIDE = {"inception_v3": 299}
"""Of torchvision's models that are not asked for images of 224×224."""
INSTALL = {"torchvision": "torch torchvision", "timm": "torch torchvision timm"}
Models = dict[str, tuple[Builder, tuple[int, ...]]]


def torchvision() -> Models:
    """Name, builder and input shape of classifiers and segmentation networks of torchvision."""
    library = _library("torchvision.models")

    def builder(name: str, **without: None) -> Builder:
        return lambda: library.get_model(name, weights=None, **without)

    found: Models = {name: (builder(name), _images(SIDE.get(name, 224))) for name in CLASSIFIERS}
    return found | {name: (builder(name, weights_backbone=None), _images(128)) for name in SEGMENTERS}


def timm() -> Models:
    """Name, builder and the input shape that the model asks for, of classifiers of timm."""
    library = _library("timm")

    def builder(name: str) -> Builder:
        return lambda: library.create_model(name, pretrained=False)

    return {name: (builder(name), (1, *library.models.get_pretrained_cfg(name).input_size)) for name in TIMM}


ZOOS = {"torchvision": torchvision, "timm": timm}


def _images(side: int) -> tuple[int, ...]:
    return (1, 3, side, side)


def _library(module: str) -> ModuleType:
    """A library, or how to get it."""
    name = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        raise SystemExit(f"--zoo {name} needs {name} ({error}): pip install {INSTALL[name]}") from error
