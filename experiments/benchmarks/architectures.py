"""Grow other people's models: every site of pytorchcv's, transformers' and MONAI's architectures, by three channels.

    python -m experiments.benchmarks.architectures [--only NAME ...] [--print]

For each architecture: convolutions, those whose output can grow, sites, CPU seconds to find the sites and to grow all
of them by 3 channels (or the next whole number of groups), the change of the output in float32 eval mode relative to
its largest entry, readers whose new weights get no gradient in one training step although their old ones do, whether
the number of parameters is the one predicted, and why the other convolutions cannot grow. Weights are random, batch
norms are calibrated on a batch; nothing is downloaded.
"""

import argparse
import importlib
import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import growconv
from experiments.benchmarks.table import write_section
from growconv.network import layers
from growconv.network.explain import rows_of
from growconv.network.graph import trace
from growconv.network.site import Analysis, GrowthSite

CHANNELS = 3
WIDELY_USED = (
    "resnet", "preresnet", "resnext", "seresnet", "sepreresnet", "seresnext", "wrn", "densenet", "vgg", "bn_vgg",
    "mobilenet", "fdmobilenet", "efficientnet", "shufflenet", "squeeze", "dla", "regnet", "transformers", "MONAI",
)  # fmt: skip
"""How the names of the families that most people use begin; the others are here to find out what does not work."""
TOLERANCE = 1e-5
"""Change of the output, relative to its largest entry, that counts as none in float32."""
DRAWS = 8  # at most: three random channels of a squeeze-and-excite layer are all off on a batch of 3 one time in 8


def _words(text: str) -> list[str]:
    return text.split()


SMALL = _words(
    """
    resnet_cifar.resnet20 resnet_cifar.resnet56 seresnet_cifar.seresnet56 preresnet_cifar.preresnet20
    seresnet_cifar.seresnet20 sepreresnet_cifar.sepreresnet20 resnext_cifar.resnext20_16x4d wrn_cifar.wrn16_10
    densenet_cifar.densenet40_k12 pyramidnet_cifar.pyramidnet110_a48 shakeshakeresnet_cifar.shakeshakeresnet20_2x16d
    nin_cifar.nin ror_cifar.ror3_56 rir_cifar.rir fractalnet_cifar.fractalnet diaresnet_cifar.diaresnet20
    xdensenet_cifar.xdensenet40_2_k24_bc
    """
)  # their names end in _cifar10; 32×32
LARGE = _words(
    """
    resnet.resnet18 resnet.resnet50 preresnet.preresnet18 resnext.resnext50_32x4d seresnet.seresnet18
    seresnext.seresnext50_32x4d senet.senet16 sepreresnet.sepreresnet18 resnetd.resnetd50b resneta.resneta10
    densenet.densenet121 ibndensenet.ibn_densenet121 vgg.vgg11 vgg.bn_vgg11 vgg.bn_vgg16 alexnet.alexnet zfnet.zfnet
    mobilenet.mobilenet_w1 fdmobilenet.fdmobilenet_w1 mobilenetb.mobilenetb_w1 mobilenetv2.mobilenetv2_w1
    mobilenetv3.mobilenetv3_small_w1 mobilenetv3.mobilenetv3_large_w1 igcv3.igcv3_w1 mnasnet.mnasnet_a1
    fbnet.fbnet_cb proxylessnas.proxylessnas_cpu spnasnet.spnasnet efficientnet.efficientnet_b0
    efficientnet.efficientnet_b1 efficientnetedge.efficientnet_edge_small_b shufflenet.shufflenet_g1_w1
    shufflenetv2.shufflenetv2_w1 squeezenet.squeezenet_v1_0 squeezenet.squeezenet_v1_1 squeezenet.squeezeresnet_v1_1
    squeezenext.sqnxt23_w1 dla.dla34 dla.dla46c regnet.regnetx002 regnet.regnetx004 regnet.regnety002
    ghostnet.ghostnet hardnet.hardnet39ds vovnet.vovnet27s peleenet.peleenet selecsls.selecsls42 darknet.darknet_ref
    drn.drnd22 dpn.dpn68 bninception.bninception cbamresnet.cbam_resnet18 bamresnet.bam_resnet18 mixnet.mixnet_s
    diracnetv2.diracnet18v2 resnesta.resnestabc14 fishnet.fishnet99 condensenet.condensenet74_c4_g4
    """
)  # 224×224
OWN_SIZE = {
    "inceptionv3.inceptionv3": 299, "linknet.linknet_cityscapes": 256,
    "erfnet.erfnet_cityscapes": 256, "enet.enet_cityscapes": 256,
}  # fmt: skip
TRANSFORMERS = {
    "ResNet": ("resnet", "ResNetForImageClassification"),
    "ConvNeXt": ("convnext", "ConvNextForImageClassification"),
    "MobileNetV2": ("mobilenet_v2", "MobileNetV2ForImageClassification"),
    "RegNet": ("regnet", "RegNetForImageClassification"),
}


@dataclass(frozen=True)
class Outcome:
    """What growing one architecture gave."""

    name: str
    convolutions: int
    growable: int
    sites: int
    find_seconds: float
    grow_seconds: float
    change: float
    dead: int
    counted: bool
    reasons: str
    redrawn: int = 0
    exact_change: float | None = None
    rounding: float | None = None


def architectures() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Name, builder and input shape of every architecture of the table."""
    found: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {}
    for entry in SMALL:
        file, name = entry.split(".")
        found[f"{name} (CIFAR)"] = (_pytorchcv(file, f"{name}_cifar10"), (1, 3, 32, 32))
    for entry in LARGE:
        file, name = entry.split(".")
        found[name] = (_pytorchcv(file, name), (1, 3, 224, 224))
    for entry, side in OWN_SIZE.items():
        file, name = entry.split(".")
        found[name] = (_pytorchcv(file, name), (1, 3, side, side))
    for name, (package, model) in TRANSFORMERS.items():
        found[f"transformers {name}"] = (_transformers(package, model), (1, 3, 224, 224))
    found["MONAI UNet 2d"] = (_monai(2), (1, 1, 96, 96))
    found["MONAI UNet 3d"] = (_monai(3), (1, 1, 32, 32, 32))
    return found


def _pytorchcv(file: str, name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module(f"pytorchcv.models.{file}"), name)()


def _transformers(package: str, model: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module = importlib.import_module(f"transformers.models.{package}")
        kind = getattr(module, model)
        return kind(kind.config_class())

    return build


def _monai(axes: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        networks = importlib.import_module("monai.networks.nets")
        channels, strides = (16, 32, 64, 128, 256), (2, 2, 2, 2)
        return networks.UNet(axes, 1, 2, channels=channels, strides=strides, num_res_units=2)

    return build


def calibrate(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Running statistics of batch norms from a batch, so that an untrained network's values have a sane size."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model(torch.randn(2, *shape[1:]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def output_of(value: Any) -> Tensor:
    """The first tensor of a model's output."""
    if isinstance(value, Tensor):
        return value
    return output_of(next(iter(value.values() if isinstance(value, Mapping) else value)))


def grow_everywhere(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...]) -> Outcome:
    """Grow every site of an architecture and measure what the table tells."""
    torch.manual_seed(0)
    model = build()
    calibrate(model, shape)
    example = torch.randn(shape)
    start = time.process_time()
    analysis = Analysis(trace(model, example))
    rows = [row for row in rows_of(analysis) if "Conv" in row.layer]
    found = time.process_time() - start
    with torch.no_grad():
        before = output_of(model(example))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    parameters, predicted = _parameters(model), 0
    start = time.process_time()
    for site in analysis.sites:
        growth = growconv.solve(site, method="random", channels=CHANNELS, model=model)
        predicted += site.parameters_for(growth.channels)
        growconv.grow(model, site, growth, 0.0, optimizer)
    grown = time.process_time() - start
    with torch.no_grad():
        after = output_of(model(example))
    change = float((after - before).abs().max() / before.abs().max())
    exact_change, rounding = (None, None) if change <= TOLERANCE else in_double(build, shape)
    counted = _parameters(model) == parameters + predicted
    redrawn, dead = 0, _dead_readers(model, analysis.sites, example, optimizer)
    while any(dead.values()) and redrawn < DRAWS:
        redrawn += 1
        for site in {site for (site, _), off in dead.items() if off}:
            _draw_again(model, site, optimizer)
        dead = _dead_readers(model, analysis.sites, example, optimizer)
    reasons = Counter(_general(row.reason) for row in rows if not row.growable)
    return Outcome(
        name,
        len(rows),
        sum(row.growable for row in rows),
        len(analysis.sites),
        found,
        grown,
        change,
        sum(dead.values()),
        counted,
        "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common(3)),
        redrawn,
        exact_change,
        rounding,
    )


def in_double(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[float, float]:
    """The change of the output in float64, and what float32 alone does to the output of the ungrown model."""
    torch.manual_seed(0)
    model = build()
    calibrate(model, shape)
    example = torch.randn(shape)
    with torch.no_grad():
        rounded = output_of(model(example))
        model, example = model.double(), example.double()
        before = output_of(model(example))
        for site in growconv.find_sites(model, example):
            growth = growconv.solve(site, method="random", channels=CHANNELS, model=model)
            growconv.grow(model, site, growth, 0.0)
        after, size = output_of(model(example)), before.abs().max()
    return float((after - before).abs().max() / size), float((rounded - before).abs().max() / size)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _dead_readers(
    model: nn.Module, sites: list[GrowthSite], example: Tensor, optimizer: torch.optim.Optimizer
) -> dict[tuple[GrowthSite, str], bool]:
    """One training step; per reader whether its new weights got no gradient although its old ones did."""
    batch = torch.cat([example, 0.5 * torch.randn_like(example), 2 * example.flip(-1)])
    optimizer.zero_grad()
    output = output_of(model.train()(batch))
    (output * torch.randn_like(output)).mean().backward()
    dead = {}
    for site in sites:
        for path in site.consumers:
            module = model.get_submodule(path)
            gradient: Any = module.get_parameter("weight").grad
            axis = layers.reading_slots(module)[0].axis
            entries = site.entries(path)
            new = torch.tensor(entries[-site.growable_channels(CHANNELS) * site.ratio(path) :])
            alive = gradient.index_select(axis, new).abs().max() > 0
            dead[site, path] = bool(gradient.abs().max() > 0) and not bool(alive)
    optimizer.step()
    return dead


def _draw_again(model: nn.Module, site: GrowthSite, optimizer: torch.optim.Optimizer) -> None:
    """Other new channels for a site whose three are all off behind a ReLU on the whole batch."""
    count = site.growable_channels(CHANNELS)
    growconv.shrink(model, site, range(site.width - count, site.width), optimizer)
    growconv.grow(model, site, growconv.solve(site, method="random", channels=count, model=model), 0.0, optimizer)


def _general(reason: str | None) -> str:
    """A reason without the number of the operation."""
    return re.sub(r"\b([a-z]+(?:_[a-z]+)*)_\d+\b", r"\1", str(reason))


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="parts of names")
    parser.add_argument("--kept", type=Path, help="file of finished outcomes, from which an interrupted run goes on")
    parser.add_argument("--finished", action="store_true", help="write what --kept has, compute nothing")
    parser.add_argument("--print", action="store_true", help="print lines only, leave RESULTS.md alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    kept = json.loads(options.kept.read_text()) if options.kept and options.kept.exists() else {}
    outcomes = []
    for name, (build, shape) in architectures().items():
        if options.only and not any(part in name for part in options.only):
            continue
        if options.finished and name not in kept:
            continue
        if name not in kept:
            kept[name] = asdict(grow_everywhere(name, build, shape))
            if options.kept:
                options.kept.write_text(json.dumps(kept))
        outcomes.append(Outcome(**kept[name]))
        print(outcomes[-1], flush=True)
    convolutions, growable = (sum(getattr(o, field) for o in outcomes) for field in ("convolutions", "growable"))
    within = sum(outcome.change <= TOLERANCE for outcome in outcomes)
    beyond = [o for o in outcomes if o.exact_change is not None and o.rounding is not None]
    summary = (
        f"{len(outcomes)} architectures, {convolutions} convolutions, {growable} growable "
        f"({growable / convolutions:.1%}); output unchanged to 1e-5 in {within}; parameter count as predicted in "
        f"{sum(outcome.counted for outcome in outcomes)}; new weights of "
        f"{sum(outcome.dead for outcome in outcomes)} readers without a gradient."
    )
    common = [o for o in outcomes if o.name.startswith(WIDELY_USED)]
    common_share = sum(o.growable for o in common) / max(1, sum(o.convolutions for o in common))
    summary += f" Of the {len(common)} in the families that most people use {common_share:.1%}."
    least = sorted(outcomes, key=lambda o: o.growable - o.convolutions)[:5]
    rest = [o for o in outcomes if o not in least]
    share = sum(o.growable for o in rest) / max(1, sum(o.convolutions for o in rest))
    summary += (
        f" Without the five that lose most ({', '.join(o.name for o in least)}: channel shuffles, splits into literal "
        f"sizes, convolutions with a forward of their own) {share:.1%} are growable."
    )
    if beyond:
        summary += (
            " Where float32 changes more than 1e-5: "
            + ", ".join(
                f"{o.name}: {o.exact_change:.0e} in float64, while rounding alone moves the ungrown float32 model's "
                f"output by {o.rounding:.0e}"
                for o in beyond
            )
            + "."
        )
    print(summary)
    if options.print or options.only:
        return
    columns = [
        "architecture",
        "convs",
        "growable",
        "share",
        "sites",
        "find CPU s",
        "grow CPU s",
        "output change",
        "no gradient",
        "not growable",
    ]
    table = [
        [
            o.name,
            str(o.convolutions),
            str(o.growable),
            f"{o.growable / o.convolutions:.0%}",
            str(o.sites),
            f"{o.find_seconds:.2f}",
            f"{o.grow_seconds:.2f}",
            f"{o.change:.1e}",
            str(o.dead) + (f" (draw {o.redrawn + 1})" if o.redrawn else ""),
            o.reasons or "–",
        ]
        for o in outcomes
    ]
    notes = [
        summary,
        "A convolution is growable when new output channels can be added. Readers whose old weights got no gradient "
        'either (a ReLU behind them that is off on the whole batch) are not counted under "no gradient". '
        '"(draw n)": three random channels behind a ReLU, most often in squeeze-and-excite layers, were all off on the '
        "batch of 3 and were taken out and drawn again.",
        '"output change": largest entry of the change over the largest entry of the output, float32, eval mode, '
        "all sites grown by 3 channels or the next number of whole groups.",
    ]
    write_section(
        "architectures",
        "Growing other people's architectures",
        "python -m experiments.benchmarks.architectures",
        columns,
        table,
        notes,
    )


if __name__ == "__main__":
    main()
