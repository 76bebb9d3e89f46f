"""Rank growth: the best new terms of a CP or Tucker convolution, by the criterion that chooses channels.

With h the layer's input, Hp its unfolded patches and v the change that the loss asks for in its output, M = (1/n) Σ Hp
v and S2 = (1/n) Σ Hp Hpᵀ. First the part that an update of the existing factors can provide (their tangent space) is
removed from v, then

    J(Θ) = ⟨Θ, S2 Θ⟩ − 2⟨M⊥, Θ⟩

is minimised over kernels Θ of the form that new terms have: rank-one for CP, low rank in one channel axis for Tucker.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from growconv.convolution.cp import CPConv
from growconv.convolution.factorized import FactorizedConv
from growconv.convolution.tucker import TuckerConv
from growconv.errors import ArgumentTypeError, ArgumentValueError, SolverError, StatisticsError
from growconv.linalg import Point, QuasiNewton, bilinear_least_squares, conjugate_gradients, solve_psd
from growconv.network import layers
from growconv.network.event import GrowthEvent, Optimizers, grow
from growconv.network.proposal import ChannelGrowth
from growconv.network.rank import RankSite
from growconv.solvers.base import Request, Solver, register
from growconv.solvers.tiny import tiny
from growconv.statistics.collect import collect_statistics
from growconv.statistics.consumer import ConsumerStatistics
from growconv.statistics.pair import PairStatistics


@register("rank")
@dataclass(frozen=True)
class Rank(Solver):
    """The best new terms of a factorized convolution; a schedule asks it about every RankSite."""

    serves = RankSite
    reads = frozenset({"M", "S2"})
    gain_unit = "energy"
    counts = False

    def solve(self, request: Request) -> ChannelGrowth:
        """See `solve_rank`."""
        return solve_rank(cast(RankSite, request.subject.growth_site), request.subject, request.number)


def collect_rank_statistics(
    model: nn.Module, sites: Iterable[RankSite], batches: Iterable[object], loss: Callable[[Any, Any], Tensor]
) -> dict[str, PairStatistics]:
    """M and S2 of factorized convolutions, by `collect_statistics`, which also tells the arguments and errors.

    Returns:
        Statistics by site name, M (D, C2) and S2 (D, D) in float64. D runs over (C1, *kernel_size), with a constant
        entry last where the layer has a bias. Both ranks of a Tucker convolution share their tensors.

    Example:
        >>> net = nn.Sequential(growconv.CPConv2d(1, 10, 8, rank=2), nn.Flatten())
        >>> found = growconv.collect_rank_statistics(net, growconv.find_rank_sites(net), batches, loss)
    """
    return collect_statistics(model, sites, batches, loss, quantities=Rank.reads)


def grow_rank(
    module: nn.Module,
    ranks: int | tuple[int, ...],
    statistics: PairStatistics | ConsumerStatistics | None = None,
    *,
    amplitude: float | int = 1.0,
    optimizer: Optimizers = None,
    generator: torch.Generator | None = None,
) -> GrowthEvent:
    """Add the best rank terms to a factorized convolution, in place.

    Args:
        module: CP or Tucker convolution.
        ranks: number of terms to add; for Tucker a pair (output rank, input rank), of which one may be 0, or one number
            for both.
        statistics: M and S2 of the layer, from `collect_rank_statistics` or of a consumer of `PairStatistics`. None
            adds terms with random incoming and zero outgoing vectors, which preserves the function at any amplitude.
        amplitude: factor on the outgoing side of the new terms; 0 preserves the function.
        optimizer: the optimizer (or a list) that trains the layer; its state follows.
        generator: source of the random directions.

    Returns:
        The event; `channels` is the number of terms added, `predicted_decrease` the first-order decrease of the mean
        loss.

    Raises:
        ArgumentValueError: for an invalid number of terms; nothing has changed then.

    Example:
        >>> layer = growconv.CPConv2d(1, 4, 3, rank=2)
        >>> event = growconv.grow_rank(layer, 1)
        >>> layer.rank
        3
    """
    sides = list(layers.ranks(module))
    if not sides:
        raise ArgumentTypeError(
            "only a factorized convolution has a rank",
            expected="CPConv or TuckerConv",
            got=type(module).__name__,
            where="grow_rank",
        )
    counts = (ranks,) * len(sides) if isinstance(ranks, int) else tuple(ranks)
    if len(counts) != len(sides) or max(counts) < 1:
        raise ArgumentValueError(
            "a CP convolution has one rank, a Tucker convolution two, and one of them has to grow",
            expected="one number, or (output rank, input rank)",
            got=ranks,
            where="grow_rank",
        )
    # New input terms of a Tucker convolution come first, so that new output terms can read them.
    order = reversed(list(zip(sides, counts, strict=True)))
    plan = [(RankSite(module, "", side), count) for side, count in order if count]
    for site, count in plan:
        site.require_room(count)
    events: list[GrowthEvent] = []
    for site, count in plan:
        best = statistics is not None
        growth = solve_rank(site, statistics, count) if best else _random_terms(site, count, generator)
        events.append(grow(module, site, growth, amplitude=float(amplitude), optimizer=optimizer))
    first, last = events[0], events[-1]
    return replace(
        last,
        site=f"{type(module).__name__} rank",
        channels=sum(event.channels for event in events),
        width_before=sum(event.width_before for event in events),
        width_after=sum(event.width_after for event in events),
        gains=tuple(gain for event in events for gain in event.gains),
        edits=tuple(edit for event in events for edit in event.edits),
        parameters_before=first.parameters_before,
        predicted_decrease=None if statistics is None else sum(event.predicted_decrease or 0.0 for event in events),
    )


def solve_rank(site: RankSite, statistics: PairStatistics | ConsumerStatistics, terms: int) -> ChannelGrowth:
    """The best new terms of one rank: minimise ⟨Θ, S2 Θ⟩ − 2⟨M⊥, Θ⟩ over kernels that so many terms can make.

    Args:
        statistics: M and S2 of the layer.
        terms: number of terms K.

    Returns:
        Terms in falling order of captured energy, old and new of the same mean norm on the incoming side.

    Raises:
        ArgumentValueError: for an impossible number of terms.
        StatisticsError: for a consumer whose M and S2 were not collected.
        SolverError: for moments of another layer, or of an output that the loss does not depend on.
    """
    site.require_room(terms)
    module = site.module
    size = module.in_channels * math.prod(module.kernel_size)
    if statistics.M is None or statistics.S2 is None:
        raise StatisticsError("M and S2 were not collected", where=site.name, fix="collect with quantities={'M', 'S2'}")
    moment, gram = statistics.M.double(), statistics.S2.double()
    total = size + (module.bias is not None)
    if moment.shape != (total, module.out_channels) or gram.shape != (total, total):
        raise SolverError(
            "these moments belong to another layer",
            expected=f"M ({total}, {module.out_channels}) and S2 ({total}, {total})",
            got=f"M {tuple(moment.shape)} and S2 {tuple(gram.shape)}",
            where=site.name,
        )
    residual = _beyond_existing(module, moment, gram)[:size]
    gram, moment = gram[:size, :size], moment[:size]
    if not bool((residual != 0).any()):
        raise SolverError("the loss asks nothing of this layer that its factors cannot provide", where=site.name)
    if isinstance(module, CPConv):
        incoming, outgoing, carried = _cp_terms(residual, gram, module, terms)
    else:
        best = _input_terms if site.side == "in" else _output_terms
        (incoming, outgoing), carried = best(residual, gram, cast(TuckerConv, module), terms), {}
    growth = _growth(site, incoming, outgoing, carried)
    shares = [(residual * site.kernel(growth.subset([term])).flatten(1).T).sum() for term in range(terms)]
    gains = torch.stack(shares).clamp_min(0)  # they add up to the captured energy
    growth = replace(growth, gains=gains).subset(gains.argsort(descending=True).tolist())
    kernel = site.kernel(growth).flatten(1).T
    return replace(growth, expected_decrease=float((moment * kernel).sum()))


def _growth(site: RankSite, incoming: Tensor, outgoing: Tensor, carried: dict[str, Tensor]) -> ChannelGrowth:
    """Terms with the scale that the layer's own have on the incoming side."""
    terms = incoming.shape[0]
    typical = float(site.term_norms()[0].mean())
    parts = [incoming, *carried.values()]
    share = (typical or 1.0) ** (1 / len(parts))
    norms = [part.flatten(1).norm(dim=1).clamp_min(torch.finfo(part.dtype).tiny) for part in parts]
    parts = [part * (share / norm).view(-1, *[1] * (part.dim() - 1)) for part, norm in zip(parts, norms, strict=True)]
    factor = torch.stack(norms).prod(0) / share ** len(parts)
    return ChannelGrowth(
        site=site.name,
        method="rank",
        incoming={site.producers[0]: parts[0]},
        outgoing={site.consumers[0]: outgoing * factor.view(1, -1, *[1] * (outgoing.dim() - 2))},
        gains=torch.zeros(terms, dtype=torch.float64, device=incoming.device),
        entries=dict(zip(site.followers, parts[1:], strict=True)),
        requested=terms,
    )


def _random_terms(site: RankSite, terms: int, generator: torch.Generator | None) -> ChannelGrowth:
    """Random incoming sides, and nothing on the outgoing side."""
    drawn: list[Tensor] = []
    for path in (*site.producers, *site.followers):
        factor = site.model.get_parameter(path)
        shape = factor.movedim(site.layout.dims[path], 0).shape[1:]
        drawn.append(torch.randn(terms, *shape, dtype=torch.float64, generator=generator).to(factor.device))
    (path,) = site.consumers
    shape = site.model.get_parameter(path).movedim(site.layout.dims[path], 1).shape
    outgoing = drawn[0].new_zeros(shape[0], terms, *shape[2:])
    carried = dict(zip(site.followers, drawn[1:], strict=True))
    return replace(_growth(site, drawn[0], outgoing, carried), method="random rank")


def _beyond_existing(
    module: FactorizedConv, moment: Float[Tensor, "d c"], gram: Float[Tensor, "d d"]
) -> Float[Tensor, "d c"]:
    """M⊥ = M − S2·δW for the best first-order update δW that the existing factors (and the bias) can make.

    Conjugate gradients on the normal equations of the tangent space, which is never formed.
    """
    twin = copy.deepcopy(module).double().requires_grad_()
    values = tuple(twin.parameters())
    with torch.enable_grad():
        output = twin.weight.flatten(1).T
        output = output if twin.bias is None else torch.cat([output, twin.bias[None]])
        probe = torch.zeros_like(output).requires_grad_()
        # Linear in the probe, so that its own derivative is the forward product.
        slopes = torch.autograd.grad(output, values, probe, create_graph=True)
        pulled = torch.cat([slope.flatten() for slope in slopes])

    def pull(change: Tensor) -> Tensor:
        slopes = torch.autograd.grad(output, values, change, retain_graph=True)
        return torch.cat([slope.flatten() for slope in slopes])

    def forward(step: Tensor) -> Tensor:
        return torch.autograd.grad(pulled, probe, step, retain_graph=True)[0]

    step = conjugate_gradients(lambda step: pull(gram @ forward(step)), pull(moment), 200, 1e-8)
    return moment - gram @ forward(step)


def _input_terms(residual: Tensor, gram: Tensor, module: TuckerConv, terms: int) -> tuple[Tensor, Tensor]:
    """Input vectors (K, C1), core slices (r2, K, *kernel_size): bilinear least squares in the output factor's span."""
    outputs = module.out_factor.detach().double()
    basis, mixing = torch.linalg.qr(outputs)
    target = (residual @ basis).reshape(module.in_channels, -1, basis.shape[1])
    fit = bilinear_least_squares([(gram, target)], terms, random_starts=2)
    left, right = _filled(fit.left, terms, live=True), _filled(fit.rights[0], terms)
    slices = torch.linalg.pinv(mixing) @ right.flatten(0, 1).T  # (r2, K·taps)
    return left, slices.reshape(-1, terms, *module.kernel_size)


def _output_terms(residual: Tensor, gram: Tensor, module: TuckerConv, terms: int) -> tuple[Tensor, Tensor]:
    """Core slices (K, r1, *kernel_size) and output vectors (C2, K): the closed form inside the input factor's span."""
    inputs = module.in_factor.detach().double()
    taps, rank = math.prod(module.kernel_size), inputs.shape[1]
    form = gram.reshape(module.in_channels, taps, module.in_channels, taps)
    inside = torch.einsum("ip,itju,jq->ptqu", inputs, form, inputs).reshape(rank * taps, -1)
    target = torch.einsum("ip,itc->ptc", inputs, residual.unflatten(0, (module.in_channels, taps))).flatten(0, 1)
    slices, vectors, _ = tiny(inside, target, terms)
    return _filled(slices, terms, live=True).reshape(terms, rank, *module.kernel_size), _filled(vectors, terms).T


def _cp_terms(residual: Tensor, gram: Tensor, module: CPConv, terms: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Input vectors (K, C1), output vectors (C2, K) and axis factors (K, taps).

    Variable projection: for given input vectors and axis factors the best output vectors solve one linear system, so
    only the former are searched, by L-BFGS, from the bilinear solution with the window free and then made separable.
    """
    sizes = (module.in_channels, *module.kernel_size)
    target = residual.reshape(module.in_channels, -1, module.out_channels)
    fit = bilinear_least_squares([(gram, target)], terms, random_starts=0, rounds=3)
    windows = _filled(fit.rights[0], terms, live=True).reshape(terms, *module.kernel_size, module.out_channels)
    along = [windows.movedim(axis + 1, 1).flatten(2) for axis in range(module.axes)]
    starts = [
        torch.cat([_filled(fit.left, terms, live=True), *(torch.linalg.svd(each)[0][:, :, 0] for each in along)], 1)
    ]
    generator = torch.Generator().manual_seed(0)
    starts += [torch.randn(terms, sum(sizes), generator=generator, dtype=torch.float64).to(residual) for _ in range(2)]
    problem = _Separable(residual, gram, sizes)
    searches = []
    for start in starts:
        newton = QuasiNewton(memory=20)
        searches.append((newton, newton.run(problem, problem(start), 40, tolerance=1e-6)[0]))
    newton, point = min(searches, key=lambda each: each[1].loss)
    vectors = problem.vectors(newton.run(problem, point, 100, tolerance=1e-6)[0].theta)
    names = [f"axis_factor_{axis}" for axis in range(module.axes)]
    return vectors[0], problem.partner(vectors)[0].T, dict(zip(names, vectors[1:], strict=True))


@dataclass(frozen=True)
class _Separable:
    """The objective of rank-one terms as a function of their input vectors and axis factors, side by side in a row."""

    residual: Tensor
    gram: Tensor
    sizes: tuple[int, ...]

    def vectors(self, theta: Tensor) -> list[Tensor]:
        """Unit input vectors (K, C1) and axis factors (K, taps)."""
        return [normalize(part) for part in theta.split(self.sizes, 1)]

    def partner(self, vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Best output vectors (K, C2) and the objective with them."""
        columns = vectors[0]
        for part in vectors[1:]:
            columns = (columns.unsqueeze(2) * part.unsqueeze(1)).flatten(1)  # (K, D)
        linear = columns @ self.residual
        form = columns @ self.gram @ columns.T
        lift = 1e-8 * form.diagonal().mean().clamp_min(torch.finfo(form.dtype).tiny)
        factor, failed = torch.linalg.cholesky_ex(form + lift * torch.eye(len(form)).to(form))
        outgoing = solve_psd(form.detach(), linear) if bool(failed) else torch.cholesky_solve(linear, factor)
        return outgoing, -(linear * outgoing).sum()

    def __call__(self, theta: Tensor) -> Point:
        """Objective and gradient at one place."""
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            loss = self.partner(self.vectors(theta))[1]
        return Point(theta.detach(), float(loss.detach()), torch.autograd.grad(loss, theta)[0])


def _filled(part: Tensor, terms: int, live: bool = False) -> Tensor:
    """As many terms as asked for. Where the data support fewer, the rest read anything (`live`) and write nothing."""
    missing = terms - part.shape[0]
    if missing <= 0:
        return part
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(missing, *part.shape[1:], generator=generator, dtype=torch.float64) * float(live)
    return torch.cat([part, rest.to(part)])
