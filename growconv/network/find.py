"""Finding where a model can grow: find_sites, explain_sites and site."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from growconv.errors import SiteError
from growconv.network import layers
from growconv.network.analysis import Analysis, analyse
from growconv.network.layout import GROUP_IN, GROUP_OUT, IN, OUT
from growconv.network.model import found_at, unwrapped
from growconv.network.site import GrowthSite


def find_sites(
    model: nn.Module, example_input: object, *, modes: Sequence[str] = ("eval", "train"), rehearse: bool = True
) -> tuple[GrowthSite, ...]:
    """All places where a model can grow, in forward order, each tested on a copy of the model.

    The copy runs on the example: the numbers of its channels are sent through it, at its
    current widths and at others; then it is checked that nothing else reads the channels, and that new ones at
    amplitude 0 change nothing. The model itself is not touched.

    Args:
        model: the raw model, on any device, in any mode.
        example_input: what its forward takes: a tensor, a tuple of arguments or a mapping of keyword arguments; a list
            of several such examples where different inputs call different layers. A batch of one is enough; where
            training needs two, it is taken twice, mirrored and halved the second time.
        modes: the modes in which it runs: "eval", "train" or both, which also finds heads used only in training.
        rehearse: False only follows the numbers at the current widths; the sites returned are presumed, not proved.

    Returns:
        The sites; `explain_sites` says why other layers cannot grow.

    Raises:
        ArgumentTypeError: the arguments are no raw model or no example.
        TraceError: the model does not run on the example, or cannot be copied.

    Example:
        >>> import growconv
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> [site.name for site in growconv.find_sites(net, torch.randn(1, 3, 8, 8))]
        ['0 -> 3']
    """
    return analyse(model, example_input, modes=modes, rehearse=rehearse).sites


def site(
    model: nn.Module, producers: str | Sequence[str], consumers: str | Sequence[str], *, example_input: object
) -> GrowthSite:
    """The site between layers that the user names, for models that cannot be traced as a whole.

    Args:
        model: the raw model.
        producers: path of the layer that writes the channels; several for a stream.
        consumers: paths of the layers that read them.
        example_input: what the model's forward takes.

    Returns:
        The site.

    Raises:
        SiteError: for unknown names, or layers that do not belong together, with the reason.

    Example:
        >>> growconv.site(model, "0", "2", example_input=images).name
        '0 -> 2'
    """
    model = unwrapped(model)
    written, read = ((each,) if isinstance(each, str) else tuple(each) for each in (producers, consumers))
    for path in (*written, *read):
        module = found_at(model, path)
        if not layers.is_weighted(module):
            raise SiteError(
                "this is no convolution or linear layer of the model",
                where=path,
                got="nothing" if module is None else type(module).__name__,
                fix="name layers as in model.named_modules()",
            )
    found = analyse(model, example_input)
    for each in found.sites:
        if set(each.producers) == set(written) and set(each.consumers) == set(read):
            return replace(each, by_hand=True)
    reason = next((row.reason for row in rows_of(found) if row.path == written[0] and row.reason), None)
    near = [each.name for each in found.sites if set(each.producers) & set(written)]
    raise SiteError(
        "these layers do not make up a site",
        where=f"{' + '.join(written)} -> {', '.join(read)}",
        expected="; ".join(near) or None,
        got=reason,
        fix="see growconv.explain_sites(model, example_input)",
    )


@dataclass(frozen=True)
class LayerRow:
    """What was found for one convolution or linear layer.

    Attributes:
        path: module path.
        layer: the layer in words.
        width: its output channels now.
        site: name of the first site that its outputs belong to; None where there is none.
        kind: kind of that site.
        reason: why its outputs cannot grow; None where they can.
        reads: names of the sites that it reads.
        grows: the site itself, to be asked `grows.refusal(method)`.
    """

    path: str
    layer: str
    width: int
    site: str | None
    kind: str | None
    reason: str | None
    reads: tuple[str, ...]
    grows: GrowthSite | None = field(default=None, repr=False, compare=False)

    @property
    def growable(self) -> bool:
        """Whether new output channels can be added."""
        return self.site is not None


class SiteTable(tuple[LayerRow, ...]):
    """All rows; prints itself as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        """One line per layer."""
        rows = [("layer", "outputs", "site, or why it cannot grow")]
        rows += [(row.path, str(row.width), row.site or f"– {row.reason}") for row in self]
        wide, count = (max(len(row[column]) for row in rows) for column in (0, 1))
        return "\n".join(f"{path:<{wide}}  {width:>{count}}  {text}" for path, width, text in rows)


def explain_sites(
    model: nn.Module, example_input: object, *, modes: Sequence[str] = ("eval", "train"), rehearse: bool = True
) -> SiteTable:
    """Every convolution and linear layer of a model: its site, or the reason why it has none.

    Args:
        model: the raw model.
        example_input: as for `find_sites`.
        modes: as for `find_sites`.
        rehearse: as for `find_sites`.

    Returns:
        A tuple of LayerRow that prints itself as a table.

    Example:
        >>> print(growconv.explain_sites(model, images))
        layer  outputs  site, or why it cannot grow
        0            4  0 -> 2
        2            6  2 -> 6
        6           10  – it is the model's output
    """
    return SiteTable(rows_of(analyse(model, example_input, modes=modes, rehearse=rehearse)))


def rows_of(found: Analysis) -> Iterator[LayerRow]:
    """One row per convolution and linear layer of an analysed model."""
    for path, module in found.model.named_modules():
        if not layers.is_weighted(module):
            continue
        own, read = (
            [n for side in sides for n, space in enumerate(found.spaces) if (path, side) in space.counts]
            for sides in ((OUT, GROUP_OUT), (IN, GROUP_IN))
        )
        grown = next((found.of_space[number] for number in own if number in found.of_space), None)
        reasons = [found.spaces[number].reason for number in own]
        apart = [found.outputs.get((path, side)) for side in (OUT, GROUP_OUT)]
        across = not found.numbers.across.keys().isdisjoint(found.numbers.range_of((path, OUT)))
        reasons = (
            apart + reasons if across else reasons + apart
        )  # as half of a gate, which keeps the other from growing
        if path not in found.numbers.calls:
            outside = found.numbers.used_outside.get(path)
            reasons = [
                f"its weights are used outside of it ({outside})" if outside else "none of the examples calls it"
            ]
        reason = next((text for text in reasons if text), "its outputs are not followed") if grown is None else None
        yield LayerRow(
            path, _described(module), layers.size(module, OUT), grown and grown.name, grown and grown.kind, reason,
            tuple(dict.fromkeys(found.of_space[number].name for number in read if number in found.of_space)), grown,
        )  # fmt: skip


def _described(module: nn.Module) -> str:
    kernel = "x".join(str(size) for size in layers.weighted(module).kernel_size)
    groups = layers.groups_of(module)
    text = f"{type(module).__name__} {layers.size(module, IN)} -> {layers.size(module, OUT)}"
    return text + (f", {kernel}" if kernel else "") + (f", {groups} groups" if groups > 1 else "")
