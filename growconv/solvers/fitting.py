"""The fit behind `functional`: filters by L-BFGS, with the consumers' weights solved for at every step.

δz is linear in the outgoing weights ω, so that for given filters the best ω is a small least-squares problem: the Gram
matrix of what the consumers read, and its correlation with v⊥ (variable projection, Golub and Pereyra 1973). What is
left is a function of the filters alone, whose gradient needs no derivative of ω, since ω is optimal. All of it looks at
kept samples whose v is what new channels should give: `kept.projected()`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.linalg import Point, QuasiNewton, descending, eliminated, solve_blocks, solve_psd
from growconv.network.seats import Inserted
from growconv.network.site import GrowthSite
from growconv.solvers.energy import captured_share
from growconv.solvers.weights import Filters, normal, norms_of, old_filters
from growconv.statistics.columns import columns
from growconv.statistics.own_update import Equations
from growconv.statistics.samples import KeptPass, KeptSamples, Maps

COLUMN_BYTES = {"cpu": 4 * 2**20, "cuda": 512 * 2**20}
"""Memory of the columns of one chunk of samples: what a CPU's cache holds is read back twice as fast."""

POSITIONS = 100_000
"""Patches whose second moment stands for that of all."""

RIDGE = 1e-6
"""Added to the diagonal of a Gram matrix scaled to ones on it: keeps the solve finite, changes nothing else."""

Weights = dict[str, Tensor]
Path = tuple[str, int]
"""A consumer, and one of its groups."""


@dataclass(frozen=True)
class Coordinates:
    """Filters from a matrix of parameters, one row a unit, in which patches have about one size in every direction.

    Attributes:
        old: the site's own filters, whose shapes new ones have.
        roots: per producer damped G^(-1/2) of its patches (a, a): a filter is a row of parameters times it.
        inverses: G^(1/2).
        longest: largest norm of a unit's filters, biases included, over all producers: longer ones are shortened to it.
    """

    old: Filters
    roots: dict[str, Tensor]
    inverses: dict[str, Tensor]
    longest: float = math.inf

    def filters(self, theta: Float[Tensor, "k q"]) -> Filters:
        """The filters that parameters stand for; differentiable."""
        found = self.old.from_matrix(theta)
        found = replace(found, rows={path: rows @ self.roots[path] for path, rows in found.rows.items()})
        return found if math.isinf(self.longest) else found.scaled(self.longest / found.norms.clamp_min(self.longest))

    def encode(self, filters: Filters) -> Float[Tensor, "k q"]:
        """Parameters of filters; exact for those that are not too long."""
        inverses = self.inverses
        found = {path: rows.to(inverses[path]) @ inverses[path] for path, rows in filters.rows.items()}
        return replace(filters, rows=found).matrix

    def random(self, units: int, generator: torch.Generator | None) -> Filters:
        """Filters of unit size with random directions, all those that the patches take being alike."""
        found = {}
        for path, root in self.roots.items():
            noise = normal((units * len(self.old.rows[path]) // self.old.units, len(root)), root, generator)
            found[path] = torch.nn.functional.normalize(noise, dim=1) @ root
        return Filters(self.old.site, units, found)


def whitened(samples: KeptSamples, damping: float) -> Coordinates:
    """Coordinates that whiten the patches of all producers of a site.

    The damping, a share of the mean eigenvalue of the patches' second moment, keeps directions that the data hardly
    uses short: together with early stopping it is the regulariser.
    """
    site, roots, inverses = samples.site, {}, {}
    for path in site.producers:
        values, vectors = torch.linalg.eigh(patch_gram(samples, path))
        floor = max(float(values.mean()) * damping, torch.finfo(torch.float32).tiny)
        size = (values.clamp_min(0) + floor).sqrt()
        roots[path] = ((vectors / size) @ vectors.mT).to(samples.like.dtype)
        inverses[path] = ((vectors * size) @ vectors.mT).to(samples.like.dtype)
    return Coordinates(old_filters(site), roots, inverses)


def patch_gram(samples: KeptSamples, path: str) -> Float[Tensor, "a a"]:
    """Second moment of a producer's patches per location, the constant entry of a bias last.

    With groups it is the mean over them. About POSITIONS patches are looked at: beyond, of evenly spread samples.
    """
    layer, inputs = samples.site.layer(path), [x for each in samples.passes for x in each.x[path]]
    one = columns(layer.module, inputs[0][:1])
    skip = max(1, sum(len(each) for each in inputs) // max(1, POSITIONS // max(one.shape[1], 1)))
    total, count = None, 0
    step = max(1, 2**24 // max(one.numel(), 1))
    for chunk in (chunk for each in inputs for chunk in each[::skip].split(step)):
        for own in chunk.chunk(layer.groups, layer.channel_axis(chunk.dim())):
            patches = columns(layer.module, own)
            if layer.bias() is not None:
                patches = torch.cat([patches, torch.ones_like(patches[:1])])
            product = (patches @ patches.mT).double()
            total = product if total is None else total + product
            count += patches.shape[1]
    return torch.as_tensor(total) / max(count, 1)


def pieces(samples: KeptSamples, filters: Filters) -> Iterator[KeptPass]:
    """The samples in pieces on which the columns of new channels fit into the scratch memory."""
    first, like = samples.passes[0], filters.like
    with torch.no_grad():
        one = first.part(slice(0, 1)) if first.region.divisible else first
        size = 0
        for path, read in one.read(*filters.weights).items():
            size += sum(each.numel() for each in one.design(path, read))
    room = COLUMN_BYTES.get(like.device.type, COLUMN_BYTES["cuda"]) // like.element_size()
    return samples.pieces(size // one.samples, room)


@torch.no_grad()
def is_homogeneous(samples: KeptSamples, filters: Filters) -> bool:
    """Whether what lies between is positively homogeneous, as the ReLU family is: a filter's norm can move into ω."""
    (piece, *_) = samples.few(8).passes
    once = piece.read(*filters.weights)
    for factor in (0.5, 4.0):
        read = piece.read(*filters.each(lambda rows, factor=factor: rows * factor).weights)
        for path, calls in read.items():
            for value, before in zip(calls, once[path], strict=True):
                if not torch.allclose(value, factor * before, rtol=1e-3, atol=1e-4 * float(value.abs().max())):
                    return False
    return True


def normal_equations(samples: KeptSamples, filters: Filters, inserted: Inserted | None = None) -> dict[Path, Equations]:
    """Gram matrices and correlations of what the consumers would read, per consumer and group; float64.

    Where nothing is `inserted`, norm layers are as for values of mean 0 and variance 1.
    """
    with torch.no_grad():
        return _summed((piece, piece.read(*filters.weights, inserted)) for piece in pieces(samples, filters))


def _summed(reads: Iterable[tuple[KeptPass, Maps]]) -> dict[Path, Equations]:
    """The normal equations of pieces with what the consumers would read there."""
    result: dict[Path, Equations] = {}
    for piece, found in reads:
        for path, read in found.items():
            for group, (design, target) in enumerate(zip(piece.design(path, read), piece.targets(path), strict=True)):
                key, rows = (path, group), design.shape[1]
                own = Equations((design @ design.mT).double(), (design @ target.mT).double(), rows)
                result[key] = result[key] + own if key in result else own
    return result


def best_outgoing(equations: Mapping[Path, Equations], site: GrowthSite, like: Tensor, ridge: float = RIDGE) -> Weights:
    """The weights (out, K·ratio/groups, *kernel) per consumer that take the most off v⊥, of the dtype of `like`.

    The columns of a design are brought to one size before the ridge is added; one that is never read gets zeros.
    """
    rows: dict[str, list[Tensor]] = {}
    for (path, _), equation in equations.items():
        scale = equation.gram.diagonal().clamp_min(0).sqrt()
        inverse = torch.where(scale > 0, 1 / torch.where(scale > 0, scale, 1.0), 0.0)[:, None]
        gram, cross = equation.gram * inverse * inverse[:, 0], equation.cross * inverse
        gram.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(gram)
        weights = inverse * (solve_psd(gram, cross) if bool(failed) else torch.cholesky_solve(cross, factor))
        weights = weights.mT.reshape(weights.shape[1], -1, *site.layer(path).kernel_size)
        rows.setdefault(path, []).append(weights.to(like))
    # in torch's own layout: a convolution picks its algorithm by the strides of its weights
    return {path: torch.cat(parts).contiguous() for path, parts in rows.items()}


@dataclass(eq=False)
class Fitted(Point):
    """One place of the search; its loss is what is left of ‖v⊥‖² on the fitting samples, as a share, minus one.

    Attributes:
        curvature: size of the loss's second derivative per unit, up to a common factor: ‖ω_k‖².
        outgoing: per consumer the best weights (out, K·ratio/groups, *kernel).
    """

    curvature: Tensor
    outgoing: Weights


@dataclass(frozen=True)
class Objective:
    """The loss as a function of the filters alone.

    Attributes:
        samples: what to fit.
        coordinates: from parameters to filters.
        ridge: added to the diagonal of the scaled Gram matrix; small, it keeps the solve finite.
    """

    samples: KeptSamples
    coordinates: Coordinates
    ridge: float = RIDGE

    def __call__(self, theta: Tensor) -> Fitted:
        """Loss and gradient at one place."""
        energy, theta = self.samples.energy, theta.detach().requires_grad_()
        filters = self.coordinates.filters(theta)
        leaves = filters.each(lambda rows: rows.detach().requires_grad_())
        # what the consumers read is kept between the two uses: about as much as the samples themselves
        reads = [(piece, piece.read(*leaves.weights)) for piece in pieces(self.samples, leaves)]
        with torch.no_grad():
            equations = _summed(reads)
        outgoing = best_outgoing(equations, self.samples.site, theta, self.ridge)
        loss = 0.0
        for (path, group), equation in equations.items():
            outputs = equation.cross.shape[1]
            weights = outgoing[path].flatten(1)[group * outputs : (group + 1) * outputs].mT.double()
            loss += equation.loss(weights) / energy
        free = list(leaves.rows.values())
        slopes = [torch.zeros_like(rows) for rows in free]
        for piece, read in reads:
            pairs = piece.beside_v(piece.added(read, outgoing))
            left_over = torch.stack([(delta - target).square().sum() for delta, target in pairs]).sum() / energy
            for slope, part in zip(slopes, torch.autograd.grad(left_over, free, allow_unused=True), strict=True):
                slope += 0 if part is None else part
        (gradient,) = torch.autograd.grad(list(filters.rows.values()), theta, slopes)
        return Fitted(theta.detach(), loss, gradient, norms_of(outgoing.values(), len(theta), 1).square(), outgoing)


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

    def __init__(self, objective: Objective, held_out: KeptSamples | None, start: Tensor, patience: int = 5) -> None:
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
        judge, outgoing = self._judge, self.point.outgoing
        if judge is None:
            return -self.point.loss
        filters = self.objective.coordinates.filters(self.point.theta)
        added = ((piece, piece.added(piece.read(*filters.weights), outgoing)) for piece in pieces(judge, filters))
        return captured_share(judge, added)


def greedy_order(
    equations: Mapping[Path, Equations], channels: int, wanted: int | None = None, ridge: float = 1e-6
) -> tuple[list[int], Float[Tensor, " k"]]:
    """Order in which each unit adds the most captured energy to those before it, all outgoing weights refitted.

    A pivoted block elimination: what the chosen channels explain is projected out of the rest.

    Args:
        equations: normal equations per consumer and group.
        channels: number of units.
        wanted: how many of them to order; None: all.
        ridge: share that is added to the diagonal of the Gram matrix.

    Returns:
        The order, and what each of the channels adds, in that order, in the unit of ‖v⊥‖² summed over samples. Channels
        that pay only together share their gain evenly, so that the gains descend and keep their sum.
    """
    pairs = []
    for equation in equations.values():
        gram = equation.gram.clone()
        gram.diagonal().mul_(1 + ridge).add_(torch.finfo(gram.dtype).tiny)
        blocks = (channels, len(gram) // channels)
        pairs.append((gram.view(*blocks, *blocks), equation.cross.view(*blocks, -1)))
    left, order, gains = list(range(channels)), [], []
    while left and len(order) != wanted:
        captured = pairs[0][0].new_zeros(len(left))
        for gram, cross in pairs:
            captured += (cross * solve_blocks(gram.diagonal(0, 0, 2).movedim(2, 0), cross)).sum((1, 2))
        chosen = int(captured.argmax())
        order.append(left.pop(chosen))
        gains.append(captured[chosen])
        pairs = [eliminated(gram, cross, chosen) for gram, cross in pairs]
    added = torch.stack(gains).clamp_min(0)
    return order, added.new_tensor(descending(added.tolist()))
