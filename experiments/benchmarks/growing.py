"""Grow every site of a model and measure what it does to it: the change of the output, gradients, replays, prices."""

import copy
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growconv.network import layers
from growconv.network.analysis import analyse
from growconv.network.event import GrowthEvent, apply_edits, grow
from growconv.network.find import LayerRow, rows_of
from growconv.network.layout import IN, OUT
from growconv.network.model import attribute, same_chance, tensors_in
from growconv.network.plan import plan_size
from growconv.network.proof import copied_growth, silent_growth
from growconv.network.site import GrowthSite

CHANNELS = 3
TOLERANCE = 1e-5
"""Change of the output, relative to its largest entry, that counts as none in float32."""
EXACT = 1e-9
"""The same in float64."""
DRAWS = 8  # at most: three random channels of a squeeze-and-excite layer are all off on a batch of 3 one time in 8
SECONDS, PASSES = 2.0, 20
"""What finding the sites may cost: seconds, and forward passes of the example, on one thread."""
OUTPUT, DEPENDENT, LITERAL, JOINT, INTERLEAVED, OTHER = (
    "the model's output",
    "channels that depend on each other",
    "literal sizes in the code",
    "only grow together",
    "interleaved with others",
    "other",
)
Builder = Callable[[], nn.Module]


@dataclass(frozen=True)
class Outcome:
    """What growing one architecture gave.

    Attributes:
        name: of the architecture.
        convolutions: how many it has.
        growable: those whose outputs are proved to grow.
        sites: where it can grow.
        copied: sites that grow by copies.
        find_seconds: CPU time to find them.
        forward_seconds: CPU time of one forward pass of the example.
        grow_seconds: CPU time to grow all of them.
        changes: change of the output by mode, float32.
        exact_changes: the same in float64, where float32 changes more than it should.
        dead: layers whose new weights get no gradient although their old ones do.
        redrawn: how often new filters were drawn again because they were all off.
        counted: the number of parameters is as predicted.
        replayed: a fresh model that is given the events and the weights gives the same outputs.
        reasons: convolutions that cannot grow, by class of reason.
        errors: what the code itself says of other widths, and reasons of no class.
    """

    name: str
    convolutions: int
    growable: int
    sites: int
    copied: int
    find_seconds: float
    forward_seconds: float
    grow_seconds: float
    changes: dict[str, float]
    exact_changes: dict[str, float]
    dead: int
    redrawn: int
    counted: bool
    replayed: bool
    reasons: dict[str, int]
    errors: list[str]

    @property
    def allowed_seconds(self) -> float:
        """What finding the sites may cost."""
        return SECONDS + PASSES * self.forward_seconds

    @property
    def in_time(self) -> bool:
        """Whether it cost no more."""
        return self.find_seconds <= self.allowed_seconds

    @property
    def unchanged(self) -> bool:
        """Whether the output stays as it is in both modes, as far as float32 or else float64 can tell."""
        return all(
            change <= TOLERANCE or self.exact_changes.get(mode, 1.0) <= EXACT for mode, change in self.changes.items()
        )


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


def prepared(build: Builder, shape: tuple[int, ...]) -> nn.Module:
    """A calibrated model without dropout."""
    torch.manual_seed(0)
    model = build()
    calibrate(model, shape)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if "drop_rate" in vars(module):  # of a functional dropout, in timm
            vars(module)["drop_rate"] = 0.0
    return model


def outputs_of(model: nn.Module, examples: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The outputs of a model in every mode; the model stays as it is."""
    found = {}
    state = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for mode, example in examples.items():
        same_chance()
        with torch.no_grad():
            found[mode] = [tensor.clone() for tensor in tensors_in(model.train(mode == "train")(example))]
    with torch.no_grad():
        for buffer, value in state:
            buffer.copy_(value)
    model.eval()
    return found


def changes(after: Mapping[str, Sequence[Tensor]], before: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """Per mode the largest change of an output, relative to its largest entry."""
    return {
        mode: max(
            float((new - old).abs().max() / old.abs().max().clamp(min=1e-30))
            for new, old in zip(after[mode], before[mode], strict=True)
        )
        for mode in before
    }


def grow_all(model: nn.Module, sites: Sequence[GrowthSite], **options: Any) -> tuple[list[GrowthEvent], bool]:
    """Grow all sites at amplitude 0, or by copies; the events, and whether the parameters are those predicted."""
    events, counted = [], True
    for site in sites:
        site = site.of(model)
        if site.copied:
            growth, amplitude = copied_growth(site, site.width), 1.0
        else:
            growth, amplitude = silent_growth(site, site.growable_channels(CHANNELS)), 0.0
        predicted = plan_size(site, growth.channels)
        events.append(grow(model, site, growth, amplitude, **options))
        counted &= events[-1].parameters_after - events[-1].parameters_before == predicted
    total = sum(parameter.numel() for parameter in model.parameters())
    return events, counted and (not events or total == events[-1].parameters_after)


def measure(name: str, build: Builder, shape: tuple[int, ...]) -> Outcome:
    """Grow every site of an architecture and measure what the table tells."""
    model, example = prepared(build, shape), torch.randn(shape)
    forward = min(_seconds(lambda: outputs_of(model, {"eval": example})) for _ in range(3))
    start = time.process_time()
    analysis = analyse(model, example)
    found = time.process_time() - start
    rows = [row for row in rows_of(analysis) if "Conv" in row.layer]
    original = copy.deepcopy(model)
    examples = {"eval": example, "train": torch.cat([example, 0.5 * torch.randn_like(example)])}
    before = outputs_of(model, examples)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    start = time.process_time()
    events, counted = grow_all(model, analysis.sites, optimizer=optimizer)
    grown = time.process_time() - start
    after = outputs_of(model, examples)
    changed, exact = changes(after, before), {}
    if max(changed.values()) > TOLERANCE:
        exact = _exact_changes(original, analysis.sites, examples)
    fresh = build().eval()
    apply_edits(fresh, [edit for event in events for edit in event.edits])
    fresh.load_state_dict(model.state_dict())
    again = outputs_of(fresh, {"eval": example})["eval"]
    replayed = all(torch.equal(a, b) for a, b in zip(again, after["eval"], strict=True))
    dead, redrawn = _untrained(model, analysis.sites, example, optimizer)
    stuck = [row for row in rows if not row.growable]
    return Outcome(
        name, len(rows), len(rows) - len(stuck), len(analysis.sites), sum(site.copied for site in analysis.sites),
        found, forward, grown, changed, exact, dead, redrawn, counted, replayed,
        dict(Counter(_class_of(row) for row in stuck)), _errors(stuck),
    )  # fmt: skip


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _exact_changes(
    original: nn.Module, sites: Sequence[GrowthSite], examples: Mapping[str, Tensor]
) -> dict[str, float]:
    """The changes in float64, which tell rounding from a change."""
    model, exact = original.double(), {mode: example.double() for mode, example in examples.items()}
    before = outputs_of(model, exact)
    grow_all(model, sites)
    return changes(outputs_of(model, exact), before)


def _class_of(row: LayerRow) -> str:
    """The class of the reason why a layer cannot grow."""
    reason = str(row.reason)
    if "model's output" in reason:
        return OUTPUT
    if "together" in reason:
        return JOINT
    if "interleaved" in reason:
        return INTERLEAVED
    if "literal size" in reason or "the code fails at another width" in reason or "takes other channels" in reason:
        return LITERAL
    return DEPENDENT if "depend on each other" in reason or "of all channels" in reason else OTHER


def _errors(rows: Sequence[LayerRow]) -> list[str]:
    """Reasons beyond their class, the most frequent ones first."""
    said = Counter(
        str(row.reason).removeprefix("the code fails at another width: ")
        for row in rows
        if _class_of(row) in (LITERAL, JOINT, OTHER)
    )
    return [reason for reason, _ in said.most_common(2)]


# ---------------------------------------------------------------------------------------------- gradients


def _untrained(
    model: nn.Module, sites: Sequence[GrowthSite], example: Tensor, optimizer: torch.optim.Optimizer
) -> tuple[int, int]:
    """Layers whose new weights get no gradient in three training steps, and how often filters were drawn again.

    The first step is at amplitude 0, where outgoing weights have gradients, or in the second where a norm whose scale
    begins at 0 keeps those of a whole branch; then incoming ones have too.
    """
    redrawn, found = 0, 0
    sites = [site.of(model) for site in sites]
    _dead(model, sites, IN, example, optimizer)
    for side in (IN, OUT):
        dead = _dead(model, sites, side, example, optimizer)
        while dead and redrawn < DRAWS:
            redrawn += 1
            for site in {id(site): site for site, _ in dead}.values():
                _draw_again(site)
            dead = _dead(model, sites, side, example, optimizer)
        found += len(dead)
    return found, redrawn


def _dead(
    model: nn.Module, sites: Sequence[GrowthSite], side: str, example: Tensor, optimizer: torch.optim.Optimizer
) -> list[tuple[GrowthSite, str]]:
    """One training step; the layers whose new weights along a side got no gradient although their old ones did."""
    batch = torch.cat([example, 0.5 * torch.randn_like(example), 2 * example.flip(-1)])
    optimizer.zero_grad()
    found = [tensor for tensor in tensors_in(model.train()(batch)) if tensor.requires_grad]
    torch.stack([(tensor * torch.randn_like(tensor)).mean() for tensor in found]).sum().backward()
    dead = []
    for site in sites:
        for path in site.consumers if side == IN else site.producers:
            for weight, new, old in _parts(site, path, side):
                gradient = weight.grad
                if gradient is not None and bool(gradient[old].any()) and not bool(gradient[new].any()):
                    dead.append((site, path))
    optimizer.step()
    return dead


def _parts(site: GrowthSite, path: str, side: str) -> list[tuple[Tensor, tuple, tuple]]:
    """The weights of a layer along a side, with where their new and their old entries are; none for grouped ones."""
    module = site.model.get_submodule(path)
    entries, found = site.entries(path, side), []
    channels = site.width // 2 if site.copied else site.growable_channels(CHANNELS)
    new = int(channels * site.ratio(path, side))
    for slot in layers.adapter(module).slots(side) if layers.groups_of(module) == 1 else ():
        weight = attribute(module, slot.name)
        if slot.name != "bias" and isinstance(weight, Tensor) and weight.requires_grad:
            lead = (slice(None),) * slot.axis
            found.append((weight, (*lead, entries[-new:]), (*lead, entries[:-new])))
    return found


def _draw_again(site: GrowthSite) -> None:
    """Other new filters for a site whose new channels are all off behind a ReLU on the whole batch."""
    with torch.no_grad():
        for path in site.producers:
            for weight, new, old in _parts(site, path, OUT):
                weight[new] = torch.randn_like(weight[new]) * weight[old].square().mean().sqrt()
