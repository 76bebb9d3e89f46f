"""RankSite: the rank of a CP or Tucker convolution as a place where a model can grow.

A rank term is a hidden channel inside the layer: one factor produces it, the kernel's own factors carry it, another
factor consumes it. So it has a layout like channels between two layers, and is planned, put in and scheduled like them.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from growconv.convolution.factorized import FactorizedConv
from growconv.errors import ArgumentValueError, SiteError
from growconv.network import layers
from growconv.network.layout import ENTRY, Layout, Run
from growconv.network.proposal import ChannelGrowth
from growconv.network.site import GrowthSite, Site


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

    @property
    def measured(self) -> GrowthSite:
        """The layer alone, as a consumer."""
        return GrowthSite(self.model, self.name, self.kind, (), (), (self.path,), (), {}, self.layout, self.space)

    def _in(self, model: nn.Module) -> "RankSite":
        return RankSite(model, self.path, self.side)

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
        twin, new = object.__new__(type(self.module)), self._terms(growth)
        dtype = next(iter(new.values())).dtype
        factors = {
            name: None if each is None else each.detach().to(dtype) for name, each in self.module._parameters.items()
        }
        for path, terms in new.items():
            factors[path.rpartition(".")[2]] = terms.movedim(0, self.layout.dims[path])
        vars(twin).update(vars(self.module), _parameters=factors)
        return twin.weight

    def _terms(self, growth: ChannelGrowth) -> dict[str, Tensor]:
        """By factor the entries of new terms along axis 0."""
        outgoing = {path: each.transpose(0, 1) for path, each in growth.outgoing.items()}
        return growth.incoming | growth.entries | outgoing

    def _norms(self, factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Norms of terms: on the incoming side, with what carries them, and on the outgoing side."""
        order = (*self.producers, *self.followers, *self.consumers)
        norms = [factors[path].double().flatten(1).norm(dim=1) for path in order]
        return torch.stack(norms[:-1]).prod(0), norms[-1]

    def term_norms(self) -> tuple[Tensor, Tensor]:
        """Norms (rank,) of the old terms: on the incoming side, with what carries them, and on the outgoing side."""
        factors = {path: self.model.get_parameter(path).detach() for path in self.layout.dims}
        return self._norms({path: each.movedim(self.layout.dims[path], 0) for path, each in factors.items()})

    def cap(self, growth: ChannelGrowth) -> float:
        """The amplitude at which the strongest new term is as strong as the mean of the old ones."""
        incoming, outgoing = self._norms(self._terms(growth))
        strongest, old = float((incoming * outgoing).max()), self.term_norms()
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
