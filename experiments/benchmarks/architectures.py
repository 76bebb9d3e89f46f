"""Grow other people's models: every site of pytorchcv's, transformers' and MONAI's architectures, by three channels.

    python -m experiments.benchmarks.architectures [--zoo torchvision|timm] [--only NAME ...] [--print] [--kept FILE]

For each architecture: convolutions, those that are proved growable, sites, CPU seconds to find the sites against the
price that is allowed (2 s and 20 forward passes of the example on one thread), CPU seconds to grow all of them by 3
channels (or the next whole number of groups; by copies where channels depend on each other), the change of the output
in eval and in train mode relative to its largest entry in float32, layers whose new weights get no gradient although
their old ones do, whether the number of parameters is the one predicted and whether the recorded events give the same
network on a fresh model, and why the other convolutions cannot grow. Weights are random, batch norms are calibrated on
a batch; nothing is downloaded. --zoo measures models of torchvision or timm instead, where these are installed, and has
a section of its own.
"""

import argparse
import importlib
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from experiments.benchmarks import idioms, zoos
from experiments.benchmarks.growing import EXACT, TOLERANCE, Builder, Outcome, measure
from experiments.benchmarks.table import write_section

WIDELY_USED = (
    "resnet", "preresnet", "resnext", "seresnet", "sepreresnet", "seresnext", "wrn", "densenet", "vgg", "bn_vgg",
    "mobilenet", "fdmobilenet", "efficientnet", "shufflenet", "squeeze", "dla", "regnet", "transformers", "MONAI",
)  # fmt: skip
"""How the names of the families that most people use begin; the others are here to find out what does not work."""


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
FURTHER = _words("shufflenetv2b.shufflenetv2b_w1 sknet.sknet50 menet.menet108_8x1_g3")
"""Channel shuffle with chunks, selective kernels (split attention), and a shuffle beside a gated side branch."""
TRANSFORMERS = {
    "ResNet": ("resnet", "ResNetForImageClassification"),
    "ConvNeXt": ("convnext", "ConvNextForImageClassification"),
    "MobileNetV2": ("mobilenet_v2", "MobileNetV2ForImageClassification"),
    "RegNet": ("regnet", "RegNetForImageClassification"),
}


def architectures() -> dict[str, tuple[Builder, tuple[int, ...]]]:
    """Name, builder and input shape of every architecture of the table."""
    found: dict[str, tuple[Builder, tuple[int, ...]]] = {}
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
    channels, strides = (16, 32, 64, 128, 256), (2, 2, 2, 2)
    found["MONAI UNet 2d"] = (_monai("UNet", 2, 1, 2, channels, strides, num_res_units=2), (1, 1, 96, 96))
    found["MONAI UNet 3d"] = (_monai("UNet", 3, 1, 2, channels, strides, num_res_units=2), (1, 1, 32, 32, 32))
    return found | further()


def further() -> dict[str, tuple[Builder, tuple[int, ...]]]:
    """Architectures whose code handles channels in ways of its own."""
    channels, strides = (16, 32, 64, 128, 256), (2, 2, 2, 2)
    found: dict[str, tuple[Builder, tuple[int, ...]]] = {}
    for entry in FURTHER:
        file, name = entry.split(".")
        found[name] = (_pytorchcv(file, name), (1, 3, 224, 224))
    found["FocalNet (transformers)"] = (_transformers("focalnet", "FocalNetForImageClassification"), (1, 3, 224, 224))
    found["BasicUNet, odd sizes (MONAI)"] = (_monai("BasicUNet", 2, 1, 2), (1, 1, 95, 87))
    shuffled = _monai("SegResNet", 2, 16, 1, 2, upsample_mode="pixelshuffle")
    found["SegResNet, PixelShuffle (MONAI)"] = (shuffled, (1, 1, 96, 96))
    found["AttentionUnet (MONAI)"] = (_monai("AttentionUnet", 2, 1, 2, channels, strides), (1, 1, 96, 96))
    found["split stages (C2f)"] = (idioms.SplitStages, (1, 3, 224, 224))
    found["gated sequence (GLU)"] = (idioms.GatedSequence, (1, 20, 64))
    found["temporal shift (slices)"] = (idioms.TemporalShift, (1, 4, 3, 48, 48))
    found["super-resolution (PixelShuffle)"] = (idioms.SuperResolution, (1, 3, 32, 32))
    return found


def _pytorchcv(file: str, name: str) -> Builder:
    return lambda: getattr(importlib.import_module(f"pytorchcv.models.{file}"), name)()


def _transformers(package: str, model: str) -> Builder:
    def build() -> nn.Module:
        module = importlib.import_module(f"transformers.models.{package}")
        kind = getattr(module, model)
        return kind(kind.config_class())

    return build


def _monai(model: str, *arguments: object, **options: object) -> Builder:
    return lambda: getattr(importlib.import_module("monai.networks.nets"), model)(*arguments, **options)


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", choices=zoos.ZOOS, help="models of this library instead")
    parser.add_argument("--only", nargs="*", help="parts of names")
    parser.add_argument("--kept", type=Path, help="file of finished outcomes, from which an interrupted run goes on")
    parser.add_argument("--finished", action="store_true", help="write what --kept has, compute nothing")
    parser.add_argument("--print", action="store_true", help="print lines only, leave RESULTS.md alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = zoos.ZOOS[options.zoo]() if options.zoo else architectures()
    kept = json.loads(options.kept.read_text()) if options.kept and options.kept.exists() else {}
    outcomes = []
    for name, (build, shape) in chosen.items():
        if options.only and not any(part in name for part in options.only):
            continue
        if options.finished and name not in kept:
            continue
        if name not in kept:
            kept[name] = asdict(measure(name, build, shape))
            if options.kept:
                options.kept.write_text(json.dumps(kept))
        outcomes.append(Outcome(**kept[name]))
        print(outcomes[-1], flush=True)
    shares = "" if options.zoo else f": {_shares(outcomes)}"
    notes = [summary(outcomes, shares), reasons(outcomes), *LEGEND]
    print("\n\n".join(notes[:2]))
    if not (options.print or options.only):
        _write(options.zoo, outcomes, notes)


def _write(zoo: str | None, outcomes: Sequence[Outcome], notes: Sequence[str]) -> None:
    """The section of the results; a zoo has one of its own."""
    write_section(
        f"architectures-{zoo}" if zoo else "architectures",
        f"Growing {zoo}'s models" if zoo else "Growing other people's architectures",
        "python -m experiments.benchmarks.architectures" + (f" --zoo {zoo}" if zoo else ""),
        COLUMNS,
        [_row(outcome) for outcome in outcomes],
        notes,
        packages=(zoo,) if zoo else ("pytorchcv", "transformers", "monai"),
    )


COLUMNS = (
    "architecture", "convs", "proved", "share", "sites", "find CPU s", "allowed", "grow CPU s", "change, eval",
    "change, train", "no gradient", "parameters, replay", "not growable",
)  # fmt: skip
LEGEND = (
    'A convolution counts as proved if `find_sites` returns a rehearsed site for its outputs. "allowed": 2 s plus '
    '20 forward passes of the example, on one thread. "change": the largest change of an output divided by the largest '
    "output, in float32, after all sites have grown by 3 channels or the next number of whole groups at amplitude 0; "
    'by copies where channels depend on each other ("n by copies").',
    '"no gradient": layers whose new weights get no gradient in three training steps, the first at amplitude 0; '
    'layers whose old weights get none either are not counted. "(draw n)": three random channels behind a ReLU, most '
    "often in squeeze-and-excite layers, were all zero on the batch of 3 and were drawn again.",
)


def summary(outcomes: Sequence[Outcome], shares: str = "") -> str:
    """What the table says as a whole, with the shares of some of its parts."""
    convolutions, growable = (sum(getattr(o, field) for o in outcomes) for field in ("convolutions", "growable"))
    over = [f"{o.name} ({o.find_seconds:.1f} s, allowed {o.allowed_seconds:.1f})" for o in outcomes if not o.in_time]
    rounded = [
        f"{o.name} ({mode}): {o.changes[mode]:.0e} in float32, {exact:.0e} in float64"
        for o in outcomes
        for mode, exact in o.exact_changes.items()
        if o.changes[mode] > TOLERANCE
    ]
    text = (
        f"{len(outcomes)} architectures, {convolutions} convolutions, {growable} proved growable "
        f"({growable / max(1, convolutions):.1%}){shares}. Output unchanged in eval and train mode in "
        f"{sum(o.unchanged for o in outcomes)} ({TOLERANCE:.0e} in float32, or {EXACT:.0e} in float64 where float32 "
        f"rounds more); parameter count as predicted in {sum(o.counted for o in outcomes)}; replay on a fresh model "
        f"gives the same network in {sum(o.replayed for o in outcomes)}; new weights of "
        f"{sum(o.dead for o in outcomes)} layers get no gradient; sites found within the allowed time in "
        f"{len(outcomes) - len(over)}."
    )
    text += f" Over time: {', '.join(over)}." if over else ""
    return text + (f" Where float32 changes more: {'; '.join(rounded)}." if rounded else "")


def _shares(outcomes: Sequence[Outcome]) -> str:
    """The shares of the widely used families and of the first version of the table."""
    common = [outcome for outcome in outcomes if outcome.name.startswith(WIDELY_USED)]
    first = [outcome for outcome in outcomes if outcome.name not in further()]
    return (
        f"{_share(common)} in the {len(common)} architectures of the most widely used families, {_share(first)} in the "
        f"{len(first)} of the first version"
    )


def _share(outcomes: Sequence[Outcome]) -> str:
    return f"{sum(o.growable for o in outcomes) / max(1, sum(o.convolutions for o in outcomes)):.1%}"


def reasons(outcomes: Sequence[Outcome]) -> str:
    """Why the others cannot grow, and what the code says itself."""
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        counts.update(outcome.reasons)
    if not counts:
        return "All of them grow."
    why = "; ".join(f"{n} {reason}" for reason, n in counts.most_common())
    text = f"{sum(counts.values())} cannot grow: {why}."
    said = [f"{o.name}: {' / '.join(o.errors)}" for o in outcomes if o.errors]
    return text + (f" In the words of the error: {'; '.join(said)}." if said else "")


def _row(outcome: Outcome) -> list[str]:
    """One line of the table."""
    ticks = ("as predicted" if outcome.counted else "NOT as predicted", "same" if outcome.replayed else "NOT the same")
    why = Counter(outcome.reasons).most_common()
    return [
        outcome.name,
        str(outcome.convolutions),
        str(outcome.growable),
        f"{outcome.growable / outcome.convolutions:.0%}",
        str(outcome.sites) + (f" ({outcome.copied} by copies)" if outcome.copied else ""),
        f"{outcome.find_seconds:.2f}",
        f"{outcome.allowed_seconds:.1f}",
        f"{outcome.grow_seconds:.2f}",
        f"{outcome.changes['eval']:.1e}",
        f"{outcome.changes['train']:.1e}",
        str(outcome.dead) + (f" (draw {outcome.redrawn + 1})" if outcome.redrawn else ""),
        ", ".join(ticks),
        "; ".join(f"{count}: {reason}" for reason, count in why) or "–",
    ]


if __name__ == "__main__":
    main()
