"""The fit behind `functional`: filters by L-BFGS, with the consumers' weights solved for at every step.

δz is linear in the outgoing weights ω, so that for given filters the best ω is a small least-squares problem: the Gram
matrix of what the consumers read, and its correlation with v⊥ (variable projection, Golub and Pereyra 1973). What is
left is a function of the filters alone, whose gradient needs no derivative of ω, since ω is optimal.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.linalg import QuasiNewton, solve_psd
from growconv.network.seats import Calls, Inserted
from growconv.network.site import GrowthSite
from growconv.solvers.exact import descending
from growconv.solvers.filters import Coordinates, Filters
from growconv.statistics.samples import KeptPass, KeptSamples

COLUMN_BYTES = {"cpu": 4 * 2**20, "cuda": 512 * 2**20}
"""Memory of the columns of one chunk of samples: what a CPU's cache holds is read back twice as fast."""

RIDGE = 1e-6
"""Added to the diagonal of a Gram matrix scaled to ones on it: keeps the solve finite, changes nothing else."""

Weights = dict[str, Tensor]
Path = tuple[str, int]
"""A consumer, and one of its groups."""


@dataclass(frozen=True)
class Fit:
    """What new channels are fitted to: samples whose v is what they should give, and the way to the consumers.

    Attributes:
        samples: the samples.
        inserted: what comes in between; None: norm layers are as for values of mean 0 and variance 1.
    """

    samples: KeptSamples
    inserted: Inserted | None = None

    @property
    def site(self) -> GrowthSite:
        """The site."""
        return self.samples.site

    def reads(self, piece: KeptPass, filters: Filters) -> Mapping[str, Calls]:
        """What the consumers would read of new channels with some filters, on one piece of the samples."""
        return piece.read(filters.incoming, filters.biases, self.inserted)

    def pieces(self, filters: Filters) -> Iterator[KeptPass]:
        """The samples in pieces whose columns fit into the scratch memory."""
        first, like = self.samples.passes[0], filters.like
        with torch.no_grad():
            one = first.part(slice(0, 1)) if first.region.divisible else first
            size = 0
            for path, read in self.reads(one, filters).items():
                size += sum(each.numel() for each in one.design(path, read))
        room = COLUMN_BYTES.get(like.device.type, COLUMN_BYTES["cuda"]) // like.element_size()
        return self.samples.pieces(size // one.samples, room)


@torch.no_grad()
def is_homogeneous(fit: Fit, filters: Filters) -> bool:
    """Whether what lies between is positively homogeneous, as the ReLU family is: a filter's norm can move into ω."""
    (piece, *_) = fit.samples.few(8).passes
    once = fit.reads(piece, filters)
    for factor in (0.5, 4.0):
        read = fit.reads(piece, filters.each(lambda tensor, factor=factor: tensor * factor))
        for path, calls in read.items():
            for value, before in zip(calls, once[path], strict=True):
                if not torch.allclose(value, factor * before, rtol=1e-3, atol=1e-4 * float(value.abs().max())):
                    return False
    return True


@dataclass
class Normal:
    """The normal equations of one consumer's outgoing weights.

    Attributes:
        gram: (d, d) Σ over positions of columns · columnsᵀ, d running over new channels and taps.
        cross: (d, c) Σ of columns · v⊥.
    """

    gram: Tensor
    cross: Tensor

    def solve(self, ridge: float) -> Float[Tensor, "d c"]:
        """The outgoing weights, each column of the design scaled to the same size; zeros for one that is never read."""
        scale = self.gram.diagonal().clamp_min(0).sqrt()
        inverse = torch.where(scale > 0, 1 / torch.where(scale > 0, scale, 1.0), 0.0)
        gram = self.gram * inverse[:, None] * inverse
        gram.diagonal().add_(ridge)
        cross = self.cross * inverse[:, None]
        factor, failed = torch.linalg.cholesky_ex(gram)
        solution = solve_psd(gram, cross) if bool(failed) else torch.cholesky_solve(cross, factor)
        return solution * inverse[:, None]


def normal_equations(fit: Fit, filters: Filters) -> dict[Path, Normal]:
    """Gram matrices and correlations of what the consumers would read, per consumer and group; float64.

    Args:
        fit: what to fit.
        filters: the new filters.
    """
    with torch.no_grad():
        return _summed((piece, fit.reads(piece, filters)) for piece in fit.pieces(filters))


def _summed(reads: Iterable[tuple[KeptPass, Mapping[str, Calls]]]) -> dict[Path, Normal]:
    """The normal equations of pieces with what the consumers would read there."""
    result: dict[Path, Normal] = {}
    for piece, found in reads:
        for path, read in found.items():
            for group, (design, target) in enumerate(zip(piece.design(path, read), piece.targets(path), strict=True)):
                gram, cross = (design @ design.mT).double(), (design @ target.mT).double()
                known = result.setdefault((path, group), Normal(torch.zeros_like(gram), torch.zeros_like(cross)))
                known.gram += gram
                known.cross += cross
    return result


def best_outgoing(equations: Mapping[Path, Normal], site: GrowthSite, like: Tensor, ridge: float = RIDGE) -> Weights:
    """The weights (out, K·ratio/groups, *kernel) per consumer that take the most off v⊥.

    Args:
        equations: normal equations per consumer and group.
        site: the site, for the kernels of its consumers.
        like: a tensor of the dtype and on the device that the weights should have.
        ridge: see `Normal.solve`.
    """
    rows: dict[str, list[Tensor]] = {}
    for (path, _), normal in equations.items():
        weights = normal.solve(ridge)
        weights = weights.mT.reshape(weights.shape[1], -1, *site.layer(path).kernel_size)
        rows.setdefault(path, []).append(weights.to(like))
    # in torch's own layout: a convolution picks its algorithm by the strides of its weights
    return {path: torch.cat(parts).contiguous() for path, parts in rows.items()}


def captured_share(fit: Fit, filters: Filters, outgoing: Weights) -> float:
    """⟨v⊥, δz⟩² / (‖δz‖² ‖v⊥‖²): the captured energy at the best single scale.

    Args:
        fit: what to measure on.
        filters: the new filters.
        outgoing: per consumer (out, K·ratio/groups, *kernel).
    """
    agreement, size = 0.0, 0.0
    with torch.no_grad():
        for piece in fit.pieces(filters):
            for delta, target in piece.beside_v(piece.added(fit.reads(piece, filters), outgoing)):
                agreement += float((target * delta).sum(dtype=torch.float64))
                size += float(delta.square().sum(dtype=torch.float64))
    energy = fit.samples.energy
    return 0.0 if size <= 0 or energy <= 0 or agreement <= 0 else agreement**2 / (size * energy)


@dataclass
class Point:
    """One place of the search.

    Attributes:
        theta: parameters of the filters, one row a unit.
        loss: what is left of ‖v⊥‖² on the fitting samples, as a share, minus one.
        gradient: of the loss with respect to theta.
        curvature: size of the loss's second derivative per unit, up to a common factor: ‖ω_k‖².
        outgoing: per consumer the best weights (out, K·ratio/groups, *kernel).
    """

    theta: Tensor
    loss: float
    gradient: Tensor
    curvature: Tensor
    outgoing: Weights


@dataclass(frozen=True)
class Objective:
    """The loss as a function of the filters alone.

    Attributes:
        fit: what to fit.
        coordinates: from parameters to filters.
        ridge: added to the diagonal of the scaled Gram matrix; small, it keeps the solve finite.
    """

    fit: Fit
    coordinates: Coordinates
    ridge: float = RIDGE

    def __call__(self, theta: Tensor) -> Point:
        """Loss and gradient at one place."""
        fit, energy = self.fit, self.fit.samples.energy
        theta = theta.detach().requires_grad_()
        filters = self.coordinates.filters(theta)
        leaves = filters.each(lambda tensor: tensor.detach().requires_grad_())
        # what the consumers read is kept between the two uses: about as much as the samples themselves
        reads = [(piece, fit.reads(piece, leaves)) for piece in fit.pieces(leaves)]
        with torch.no_grad():
            equations = _summed(reads)
        outgoing = best_outgoing(equations, fit.site, theta, self.ridge)
        loss = 0.0
        for normal, weights in zip(equations.values(), _by_group(equations, outgoing), strict=True):
            loss += float((weights * (normal.gram @ weights - 2 * normal.cross)).sum()) / energy
        totals = [torch.zeros_like(tensor) for tensor in leaves.tensors]
        for piece, read in reads:
            pairs = piece.beside_v(piece.added(read, outgoing))
            left_over = torch.stack([(delta - target).square().sum() for delta, target in pairs]).sum() / energy
            parts = torch.autograd.grad(left_over, leaves.tensors, allow_unused=True)
            for total, part in zip(totals, parts, strict=True):
                total += 0 if part is None else part
        pulled = torch.stack([(tensor * total).sum() for tensor, total in zip(filters.tensors, totals, strict=True)])
        (gradient,) = torch.autograd.grad(pulled.sum(), theta)
        curvature = sum(
            weights.unflatten(1, (theta.shape[0], -1)).movedim(1, 0).flatten(1).square().sum(1)
            for weights in outgoing.values()
        )
        return Point(theta.detach(), loss, gradient, torch.as_tensor(curvature), outgoing)


def _by_group(equations: Mapping[Path, Normal], outgoing: Weights) -> Iterator[Tensor]:
    """The weights (d, c) of each group, in float64."""
    groups = {path: sum(each == path for each, _ in equations) for path in outgoing}
    for path, group in equations:
        yield outgoing[path].flatten(1).chunk(groups[path])[group].mT.double()


class Search:
    """L-BFGS with backtracking, stopped when the captured energy on held-out samples has not risen for some steps.

    Args:
        objective: the loss of the filters.
        held_out: samples that the objective does not see; None: the captured energy is that of the fit.
        start: parameters to start from, one row a unit.
        patience: steps without a better held-out captured energy before stopping.

    Attributes:
        best: the best place so far by held-out captured energy.
        held_out: that energy, as a share of ‖v⊥‖².
        iterations: steps taken.
        history: (fitted share, held-out share) of every step.
    """

    def __init__(self, objective: Objective, held_out: Fit | None, start: Tensor, patience: int = 5) -> None:
        self.objective, self._judge, self.patience = objective, held_out, patience
        self.point = self.best = objective(start)
        self.held_out = self._share()
        self.iterations, self.history = 0, [(-self.point.loss, self.held_out)]
        self._newton = QuasiNewton(memory=12)
        self._waited = 0

    def onto(self, objective: Objective) -> "Search":
        """A search from the best place with another objective, and with what is known of the curvature."""
        other = Search(objective, self._judge, self.best.theta, self.patience)
        other._newton, other.iterations = self._newton, self.iterations
        return other

    def run(self, iterations: int) -> "Search":
        """Go on for so many steps at most; the search itself comes back."""
        for _ in range(iterations):
            if self._waited >= self.patience or not self._step():
                break
            self.iterations += 1
            share = self._share()
            self.history.append((-self.point.loss, share))
            if share > self.held_out:
                self.best, self.held_out, self._waited = self.point, share, 0
            else:
                self._waited += 1
        return self

    def _step(self) -> bool:
        """One quasi-Newton step; whether there was one. The first inverse Hessian is diagonal, one entry a channel."""
        curvature = self.point.curvature
        damped = (curvature + 1e-3 * curvature.mean() + torch.finfo(curvature.dtype).tiny)[:, None]
        following = self._newton.step(self.objective, self.point, lambda gradient: gradient / damped)
        self.point = following or self.point
        return following is not None

    def _share(self) -> float:
        if self._judge is None:
            return -self.point.loss
        with torch.no_grad():
            filters = self.objective.coordinates.filters(self.point.theta)
        return captured_share(self._judge, filters, self.point.outgoing)


def greedy_order(
    equations: Mapping[Path, Normal], channels: int, wanted: int | None = None, ridge: float = 1e-6
) -> tuple[list[int], Float[Tensor, " k"]]:
    """Order in which each unit adds the most captured energy to those before it, all outgoing weights refitted.

    A pivoted block elimination: what the chosen channels explain is projected out of the rest.

    Args:
        equations: normal equations per consumer and group.
        channels: number of units.
        wanted: how many of them to order; None: all.
        ridge: as in `Normal.solve`.

    Returns:
        The order, and what each of the channels adds, in that order, in the unit of ‖v⊥‖² summed over samples. Channels
        that pay only together share their gain evenly, so that the gains descend and keep their sum.
    """
    grams, crosses = [], []
    for normal in equations.values():
        size = normal.gram.shape[0] // channels
        gram = normal.gram.clone()
        gram.diagonal().mul_(1 + ridge).add_(torch.finfo(gram.dtype).tiny)
        grams.append(gram.view(channels, size, channels, size))
        crosses.append(normal.cross.view(channels, size, -1).clone())
    left, order, gains = list(range(channels)), [], []
    while left and len(order) != wanted:
        blocks = [(gram[left, :, left], cross[left]) for gram, cross in zip(grams, crosses, strict=True)]
        captured = torch.stack([(cross * _solve(gram, cross)).sum((1, 2)) for gram, cross in blocks]).sum(0)
        chosen = left.pop(int(captured.argmax()))
        order.append(chosen)
        gains.append(captured.max())
        for r, gram in enumerate(grams):
            explained = _solve(gram[chosen, :, chosen], gram[chosen].flatten(1)).view_as(gram[chosen])
            crosses[r] = crosses[r] - torch.einsum("bld,bc->ldc", explained, crosses[r][chosen])
            grams[r] = gram - torch.einsum("kgb,bld->kgld", gram[:, :, chosen], explained)
    added = torch.stack(gains).clamp_min(0)
    return order, added.new_tensor(descending(added.tolist()))


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """G⁻¹·right, one matrix or a batch; a block that is not positive definite any more has nothing left to give."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    solution = torch.cholesky_solve(right, factor)
    return torch.where((failed == 0)[..., None, None], solution.nan_to_num(), torch.zeros_like(right))
