"""New channels of a CP or Tucker convolution: rows of its channel factor, and the rank terms that they need.

A new filter is first written as well as possible in the terms that the layer has; what is left gets new terms, whose
weights on the old channels are zero, so that the layer computes the same on them. The rank grows by the same share as
the channels, which keeps the layer as small as it was meant to be; a CP layer gets at least one term per new channel,
so that separable filters stay exact.
"""

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from growconv.convolution.cp import CPConv
from growconv.convolution.decomposition import (
    ConvergenceWarning,
    best_rank_one,
    cp_kernel,
    decompose_cp,
    decompose_tucker,
)
from growconv.convolution.factorized import FactorizedConv
from growconv.convolution.tucker import TuckerConv
from growconv.errors import SurgeryError
from growconv.linalg import solve_psd
from growconv.network.proposal import ChannelGrowth
from growconv.network.rank_site import RankSite
from growconv.network.site import GrowthSite
from growconv.network.tensors import Insertion


@dataclass(frozen=True)
class FactorFit:
    """New channels of a factorized convolution.

    Attributes:
        rows: (K, terms), new rows of the channel factor over old and new terms.
        terms: tensor name, insertion and values (None for zeros) of every tensor that gets new terms.
        error: ‖kernels as stored − kernels asked for‖ / ‖kernels asked for‖.
        stored: the kernels that the factors hold, shaped like those asked for.
    """

    rows: Tensor
    terms: list[tuple[str, Insertion, Tensor | None]]
    error: float
    stored: Tensor


def new_terms(module: FactorizedConv, channels: int, factor: str) -> tuple[int, ...]:
    """How many terms come with new channels: (terms,) for CP, (output, input) for Tucker.

    Args:
        module: the layer.
        channels: number of new channels K.
        factor: "out_factor" where they are written, "in_factor" where they are read.

    Returns:
        Numbers of at least 1.
    """
    own, other = module.out_channels, module.in_channels
    if factor == "in_factor":
        own, other = other, own
    taps = math.prod(module.kernel_size)
    if isinstance(module, CPConv):
        sizes = (channels, other, *module.kernel_size)
        return (min(math.prod(sizes) // max(sizes), max(channels, math.ceil(module.rank * channels / own))),)
    outputs, inputs = _tucker(module).rank
    mine, theirs = (outputs, inputs) if factor == "out_factor" else (inputs, outputs)
    mine = min(channels, other * taps, math.ceil(mine * channels / own))
    theirs = min(other, channels * taps, math.ceil(theirs * channels / own))
    return (mine, theirs) if factor == "out_factor" else (theirs, mine)


def term_insertions(module: FactorizedConv, terms: tuple[int, ...]) -> list[tuple[str, Insertion]]:
    """Where new terms come in every tensor of the kernel: after the old ones."""
    if isinstance(module, CPConv):
        names = [name for name, _ in module.named_parameters() if name != "bias"]
        return [(name, Insertion(1, module.rank, terms[0])) for name in names]
    outputs, inputs = _tucker(module).rank
    return [
        ("core", Insertion(0, outputs, terms[0])),
        ("core", Insertion(1, inputs, terms[1])),
        ("out_factor", Insertion(1, outputs, terms[0])),
        ("in_factor", Insertion(1, inputs, terms[1])),
    ]


def fit_channels(module: FactorizedConv, block: Tensor, factor: str, *, more_terms: bool = True) -> FactorFit:
    """The rows and terms that stand for the kernels of new channels.

    Args:
        module: the layer.
        block: (K, C1, *kernel_size) filters to write, or (C2, K, *kernel_size) weights to read with.
        factor: "out_factor" or "in_factor", as fits the block.
        more_terms: False to use the terms that there are.

    Returns:
        The fit; its error says how well the factors stand for the block.
    """
    block = (block if factor == "out_factor" else block.transpose(0, 1)).detach().double()  # (K, others, *kernel_size)
    columns = _columns(module, factor)
    rows = _least_squares(block, columns)
    if not more_terms:
        return _fit(block, rows, columns, [], factor)
    residual = block - (rows @ columns.T).view_as(block)
    count = new_terms(module, block.shape[0], factor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if isinstance(module, CPConv):
            extra = _cp_terms(block, residual, columns, count[0])
            added = cp_kernel([torch.eye(count[0]).to(block), *extra]).flatten(1).T
        else:
            ranks = (count[0], count[1]) if factor == "out_factor" else (count[1], count[0])
            core, _, others, _ = decompose_tucker(residual, ranks)
            extra = [core, others]
            added = (others @ core.flatten(2)).flatten(1).T
    both = torch.cat([columns, added], dim=1)
    rows = _least_squares(block, both)
    return _fit(block, rows, both, _values(module, factor, count, extra), factor)


def as_stored(site: GrowthSite, growth: ChannelGrowth) -> ChannelGrowth:
    """A proposal as the model's factorized convolutions will hold it; the proposal itself where there are none.

    Args:
        site: where.
        growth: the proposal.
    """
    if isinstance(site, RankSite):
        return growth
    replaced: dict[str, dict[str, Tensor]] = {"incoming": dict(growth.incoming), "outgoing": dict(growth.outgoing)}
    for weights, factor in ((replaced["incoming"], "out_factor"), (replaced["outgoing"], "in_factor")):
        for path, block in weights.items():
            module = site.model.get_submodule(path)
            if isinstance(module, FactorizedConv):
                more = factor == "out_factor" or path not in growth.incoming
                weights[path] = fit_channels(module, block, factor, more_terms=more).stored.to(block)
    return replace(growth, **replaced)


def _columns(module: FactorizedConv, factor: str) -> Tensor:
    """(others·taps, terms): what a channel of a factor is a combination of."""
    other = "in_factor" if factor == "out_factor" else "out_factor"
    others = getattr(module, other).detach().double()
    if isinstance(module, CPConv):
        eye = torch.eye(module.rank).to(others)
        return cp_kernel([eye, others, *(each.detach().double() for each in module.axis_factors)]).flatten(1).T
    core = _tucker(module).core.detach().double()
    core = core if factor == "out_factor" else core.transpose(0, 1)
    return (others @ core.flatten(2)).flatten(1).T


def _cp_terms(block: Tensor, residual: Tensor, columns: Tensor, count: int) -> list[Tensor]:
    """Factors (others, R'), (taps, R'), ... of new terms: one per channel where that is exact, else of the residual."""
    singles = best_rank_one(block)
    single = cp_kernel([torch.eye(len(block)).to(block), *(vectors.T for vectors in singles)]).flatten(1).T
    both = torch.cat([columns, single], dim=1)
    rows = _least_squares(block, both)
    if _error(block, rows, both) > 1e-6 or count < len(block):
        factors, _ = decompose_cp(residual, count)
        return list(factors[1:])
    generator = torch.Generator().manual_seed(0)  # terms that are left over start anywhere, and train from there
    extra = []
    for vectors in singles:
        spare = torch.randn(vectors.shape[1], count - len(block), generator=generator, dtype=torch.float64)
        extra.append(torch.cat([vectors.T, spare.to(block) * vectors.square().mean().sqrt()], dim=1))
    return extra


def _values(
    module: FactorizedConv, factor: str, count: tuple[int, ...], extra: list[Tensor]
) -> list[tuple[str, Insertion, Tensor | None]]:
    other = "in_factor" if factor == "out_factor" else "out_factor"
    values: dict[tuple[str, int], Tensor] = {(other, 1): extra[0]}
    if isinstance(module, CPConv):
        values |= {(f"axis_factor_{axis}", 1): each for axis, each in enumerate(extra[1:])}
    else:
        core, others = extra
        core = core if factor == "out_factor" else core.transpose(0, 1)
        old = core.new_zeros(core.shape[0], _tucker(module).rank[1], *core.shape[2:])
        values = {(other, 1): others, ("core", 0): torch.cat([old, core], dim=1)}
    return [(name, insertion, values.get((name, insertion.axis))) for name, insertion in term_insertions(module, count)]


def _least_squares(block: Tensor, columns: Tensor) -> Tensor:
    return solve_psd(columns.T @ columns, columns.T @ block.flatten(1).T, 1e-12).T


def _fit(block: Tensor, rows: Tensor, columns: Tensor, terms: list, factor: str) -> FactorFit:
    stored = (rows @ columns.T).view_as(block)
    return FactorFit(
        rows, terms, _error(block, rows, columns), stored if factor == "out_factor" else stored.transpose(0, 1)
    )


def _error(block: Tensor, rows: Tensor, columns: Tensor) -> float:
    norm = float(block.norm())
    return float((block.flatten(1) - rows @ columns.T).norm()) / norm if norm else 0.0


def _tucker(module: FactorizedConv) -> TuckerConv:
    if not isinstance(module, TuckerConv):
        raise SurgeryError(
            "this factorized layer does not say how its channels grow",
            expected="CPConv1d to CPConv3d or TuckerConv1d to TuckerConv3d",
            got=type(module).__name__,
        )
    return module
