"""RankSite: the rank of a CP or Tucker convolution as a place where a model can grow.

A rank term is a hidden channel inside the layer: one factor produces it, the kernel's own factors carry it, another
factor consumes it. So it has a layout like channels between two layers, and is planned, put in and scheduled like them.
"""

from typing import cast

import torch
from torch import Tensor, nn

from growconv.convolution.decomposition import cp_kernel
from growconv.convolution.factorized import FactorizedConv
from growconv.errors import ArgumentValueError, SiteError
from growconv.network import layers
from growconv.network.layout import ENTRY, Layout, Run
from growconv.network.model import unwrapped
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import Site


class RankSite(Site):
    """The terms of one factorized convolution, as channels that can grow.

    Its growths name factors where those of other sites name layers. CP: incoming the input vectors (K, C1), outgoing
    the output vectors (C2, K), entries the vectors (K, taps) of every axis. Tucker, input rank: incoming the input
    vectors (K, C1), outgoing the core's slices (r2, K, *kernel_size). Tucker, output rank: incoming slices (K, r1,
    *kernel_size), outgoing the output vectors (C2, K).

    Args:
        model: the raw model, or the layer itself.
        path: module path of the layer; "" for the layer itself.
        side: for a Tucker convolution which rank, "out" or "in".

    Attributes:
        own_method: "rank".
        width: the rank now.
        bound: the rank above which no kernel of this shape needs another term.

    Example:
        >>> net = nn.Sequential(growconv.CPConv2d(1, 4, 3, rank=2))
        >>> growconv.find_rank_sites(net)[0].width
        2
    """

    own_method = "rank"

    def __init__(self, model: nn.Module, path: str, side: str | None = None) -> None:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise SiteError("there is no such module", where=path, fix="see model.named_modules()") from None
        ranks = layers.ranks(module)
        if not ranks:
            expected, got = "CPConv or TuckerConv", type(module).__name__
            raise SiteError("only a factorized convolution has a rank", where=path, expected=expected, got=got)
        if side not in ranks:
            raise ArgumentValueError(
                "a Tucker convolution has two ranks, a CP convolution has one",
                expected=" or ".join(f"side={each!r}" for each in ranks),
                got=repr(side),
                where=path,
            )
        self.model, self.path, self.side, rank = model, path, side, ranks[side]
        self.name = f"{path or type(module).__name__} {side + 'put ' if side else ''}rank"
        self.kind, self.bound = "rank", rank.bound
        dims = {f"{path}.{name}".lstrip("."): dim for name, dim in rank.dims.items()}
        at = dict(zip(rank.dims, dims, strict=True))
        self.producers, self.consumers = (at[rank.producer],), (at[rank.consumer],)
        self.followers = tuple(at[name] for name in rank.carriers)
        self.layout, self.space = Layout({(each, ENTRY): (Run(0, 1),) for each in dims}, (1,), dims), 0

    def of(self, model: nn.Module | None) -> "RankSite":
        """The same rank of another model with the same names; this one for None or its own model."""
        model = self.model if model is None else unwrapped(model)
        return self if model is self.model else RankSite(model, self.path, self.side)

    def check(self, *, trains: bool = True) -> None:
        """Check that the model has such a layer, trainable or not.

        Raises:
            SiteError: it has not, or not any more.
            ArgumentValueError: the layer is of the other kind.
        """
        RankSite(self.model, self.path, self.side)

    @property
    def module(self) -> FactorizedConv:
        """The layer."""
        return cast(FactorizedConv, self.model.get_submodule(self.path))

    @property
    def room(self) -> int:
        """Terms that it can still get."""
        return max(0, self.bound - self.width)

    @property
    def multiplications(self) -> dict[str, float]:
        """Multiply-adds that one more term costs: its entries in all factors."""
        factors = ((self.model.get_parameter(path), dim) for path, dim in self.layout.dims.items())
        return {self.path: sum(each.numel() / each.shape[dim] for each, dim in factors)}

    def require_room(self, terms: int) -> None:
        """Refuse no terms, and more than any kernel of this shape needs, with an ArgumentValueError."""
        if isinstance(terms, bool) or not 1 <= terms <= self.room:
            expected = f"1 to {self.room}: the rank is {self.width} of at most {self.bound}"
            raise ArgumentValueError(
                "this number of new terms is impossible", expected=expected, got=terms, where=self.name
            )

    def kernel(self, growth: ChannelGrowth) -> Tensor:
        """What new terms add to the full kernel at amplitude 1, (C2, C1, *kernel_size)."""
        incoming, outgoing = growth.incoming[self.producers[0]], growth.outgoing[self.consumers[0]]
        if self.side is None:
            return cp_kernel([outgoing, incoming.T, *(growth.entries[path].T for path in self.followers)])
        if self.side == "in":
            half = self._factor("out_factor").to(outgoing) @ outgoing.flatten(1)
            kernel = torch.einsum("ckt,ki->cit", half.unflatten(1, (growth.channels, -1)), incoming)
        else:
            inputs = self._factor("in_factor").to(incoming) @ incoming.flatten(2)
            kernel = torch.einsum("ck,kit->cit", outgoing, inputs)
        return kernel.unflatten(2, layers.weighted(self.module).kernel_size)

    def _factor(self, name: str) -> Tensor:
        return self.module.get_parameter(name).detach()

    def added(self, growth: ChannelGrowth, x: Tensor) -> Tensor:
        """What new terms add to the layer's output at amplitude 1, given its input."""
        return layers.weighted(self.module).apply(x, self.kernel(growth).to(x))

    def term_norms(self) -> tuple[Tensor, Tensor]:
        """Norms (rank,) of the old terms: on the incoming side, with what carries them, and on the outgoing side."""
        norms = []
        for path in (*self.producers, *self.followers, *self.consumers):
            tensor = self.model.get_parameter(path).detach().double()
            norms.append(tensor.movedim(self.layout.dims[path], 0).flatten(1).norm(dim=1))
        return torch.stack(norms[:-1]).prod(0), norms[-1]

    def cap(self, growth: ChannelGrowth) -> float:
        """The amplitude at which the strongest new term is as strong as the mean of the old ones."""
        incoming = growth.incoming[self.producers[0]].double().flatten(1).norm(dim=1)
        for path in self.followers:
            incoming = incoming * growth.entries[path].double().norm(dim=1)
        outgoing = growth.outgoing[self.consumers[0]].double().transpose(0, 1).flatten(1).norm(dim=1)
        strongest = float((incoming * outgoing).max())
        old = self.term_norms()
        return float(old[0].mean() * old[1].mean()) / strongest if strongest > 0 else 0.0

    def __repr__(self) -> str:
        """One line."""
        return f"RankSite({self.name!r}, width={self.width})"

    def __str__(self) -> str:
        """One line, with what the rank can become."""
        return f"{self.name}  (rank, {self.width} of at most {self.bound} terms)"


def find_rank_sites(model: nn.Module) -> tuple[RankSite, ...]:
    """The ranks of every CP and Tucker convolution of a raw model, in its order, those at their bound left out.

    A CP convolution has one, a Tucker convolution two: the output rank, then the input rank.

    Example:
        >>> net = nn.Sequential(growconv.CPConv2d(1, 4, 3, rank=2))
        >>> [site.name for site in growconv.find_rank_sites(net)]
        ['0 rank']
    """
    ranks = [(path, side) for path, module in model.named_modules() for side in layers.ranks(module)]
    sites = [RankSite(model, path, side) for path, side in ranks]
    return tuple(site for site in sites if site.width < site.bound)
