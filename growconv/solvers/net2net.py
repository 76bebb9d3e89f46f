"""Net2WiderNet (Chen, Goodfellow and Shlens 2016, "Net2Net: Accelerating Learning via Knowledge Transfer", ICLR).

A new channel j is a copy of an old channel g(j), drawn at random; all copies of a channel share its outgoing weights,
so that the network computes the same function (section 2.2: U_kj = W_k,g(j) on the incoming side, and the outgoing
weights divided by the number of copies, |{x : g(x) = g(j)}|).

The other choice keeps the scale of the consumer's weights in place of the function: squares of the shares sum to 1, so
that Σ_k ω_k² over a channel's copies stays, and with it the variance of what the consumer puts out once the copies have
become independent. Yu et al. 2026 ("SPARKLING", arXiv 2602.02472) found copies that keep the root mean square better at
the end than copies that keep the function.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from growconv.limits import limited
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite
from growconv.solvers.base import Request, Solver, register
from growconv.solvers.weights import (
    columns_of,
    normal,
    not_plain,
    not_rewritable,
    of_units,
    old_filters,
    scaled_units,
    with_scaled_columns,
)


def draw_copies(old: int, new: int, generator: torch.Generator | None = None) -> Int[Tensor, " new"]:
    """Which old channel each new one copies, both in units: uniform with replacement (g of section 2.2)."""
    place = generator.device if generator is not None else "cpu"
    return torch.randint(old, (new,), generator=generator, device=place).cpu()


def draw_shares(
    copied: Int[Tensor, " new"],
    old: int,
    imbalance: float = 0.0,
    generator: torch.Generator | None = None,
    power: int = 1,
) -> tuple[Float[Tensor, " old"], Float[Tensor, " new"]]:
    """Shares of the outgoing weights: those of all copies of one unit sum to 1, or with power 2 their squares do.

    Args:
        copied: index of the old unit that each new one copies.
        old: number of old units.
        imbalance: 0 gives equal shares, as in the paper; u in (0, 1) draws them within a factor (1 ± u) of each other
            before they are normalised.

    Returns:
        Shares of the old units and of the new ones, float64.
    """
    source = torch.cat([torch.arange(old), copied])
    place = generator.device if generator is not None else "cpu"
    drawn = torch.rand(len(source), generator=generator, dtype=torch.float64, device=place).cpu()
    raw = 1 + imbalance * (2 * drawn - 1)
    total = torch.zeros(old, dtype=torch.float64).index_add_(0, source, raw**power)
    shares = raw / total[source] ** (1 / power)
    return shares[:old], shares[old:]


@register("net2net")
@dataclass(frozen=True)
class Net2Net(Solver):
    """Copies of old channels that share their outgoing weights. Norm entries and optimizer options are copied, too.

    Attributes:
        noise: standard deviation of Gaussian noise on the copies' filters, as a share of the filter's own root mean
            square (section 2.2: "a small amount of noise", to break the symmetry). Above 0 the function changes a
            little.
        imbalance: how unequal the shares of the outgoing weights are. In the paper this is 0; exact copies then get
            equal gradients and stay copies forever, unless there is noise or dropout. The default breaks the symmetry
            without changing the function.
        keeps: "function": the shares of all copies of a channel sum to 1, as in the paper. "rms": their squares do, so
            that the root mean square of the consumer's weights keeps its proportion to 1/√fan-in; the function changes.
    """

    noise: float = limited(0.0, least=0)
    imbalance: float = limited(0.2, least=0, below=1)
    keeps: str = limited("function", choices=("function", "rms"))
    counts = False

    @property
    def function_preserving(self) -> bool:
        """Whether the shares sum to 1."""
        return self.keeps == "function"

    def refusal(self, site: GrowthSite) -> str | None:
        """Where consumers' weights are computed from other tensors, or copied filters would not copy channels."""
        return not_rewritable(site, *site.consumers) or not_plain(site, *site.producers)

    def solve(self, request: Request) -> ChannelGrowth:
        """See `Solver.solve`; the old outgoing weights are reduced to their share."""
        site, requested, generator = request.site, request.number, request.generator
        old, size = old_filters(site), site.granularity
        copied = draw_copies(old.units, requested // size, generator)
        kept, shared = draw_shares(copied, old.units, self.imbalance, generator, 1 if self.keeps == "function" else 2)
        units, outgoing, revised = copied.tolist(), {}, {}
        for path in site.consumers:
            outgoing[path] = scaled_units(columns_of(site, path)[:, units].flatten(1, 2), shared, 1).contiguous()
            revised[f"{path}.weight"] = with_scaled_columns(site, path, kept)
        growth = old.picked(units).proposed(
            self.name,
            outgoing,
            requested=requested,
            revised=revised,
            copied_from=torch.tensor(of_units(units, size), device=old.like.device),
        )
        for path, filters in growth.incoming.items() if self.noise else ():
            scale = filters.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (filters.dim() - 1))
            noise = normal(tuple(filters.shape), filters, generator)
            growth.incoming[path] = filters + self.noise * scale * noise
        return growth
