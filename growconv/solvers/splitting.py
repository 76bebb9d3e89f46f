"""Splitting steepest descent: old channels split in two along the direction of most negative curvature.

Liu, Wu and Wang 2019, "Splitting Steepest Descent for Growing Neural Architectures", NeurIPS.

A neuron θ is replaced by two, θ ± εv, each with half of its outgoing weights. To first order nothing changes; to second
order the loss changes by ε²/2·vᵀS(θ)v (theorem 2.2), where S(θ) = E[∇_σ L · ∇²_θθ σ(θ, x)] is the splitting matrix
(equation 5). The best direction is the eigenvector of its lowest eigenvalue (theorem 2.4), and the neurons to split are
those with the lowest eigenvalues (algorithm 1). A neuron whose lowest eigenvalue is not negative is splitting-stable
and is not split.

Here σ is everything between the producer and v, so S is the second derivative of −⟨v, δz⟩ with respect to the channel's
filter, with v fixed. S is never formed: Lanczos' method needs only its products with vectors, for all channels at
once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from growconv.limits import limited
from growconv.network.layout import OUT
from growconv.network.proposal import ChannelGrowth
from growconv.network.seats import Inserted
from growconv.network.site import GrowthSite
from growconv.solvers.assembly import require_samples
from growconv.solvers.base import Request, Solver, register
from growconv.solvers.weights import (
    bias_of,
    columns_of,
    filter_norms,
    filters_of,
    normal,
    not_rewritable,
    of_units,
    old_filters,
    units_of,
    with_scaled_columns,
)
from growconv.statistics.samples import KeptSamples

Product = Callable[[Tensor], Tensor]


def lowest_eigenpairs(
    product: Product,
    start: Float[Tensor, "c a"],
    iterations: int = 24,
    tolerance: float = 0.0,
    wanted: int | None = None,
) -> tuple[Float[Tensor, " c"], Float[Tensor, "c a"]]:
    """Lowest eigenvalue and its eigenvector of many symmetric matrices at once, by Lanczos' method.

    Args:
        product: takes one vector per matrix (c, a), gives the matrices' products with them.
        start: vectors to start from, not orthogonal to those sought.
        iterations: largest size of the Krylov spaces; a is enough for the exact answer.
        tolerance: stop earlier where ‖Sv − λv‖ is below this share of |λ|; λ is then right to about its square.
        wanted: of how many matrices, those with the lowest eigenvalues; None: of all.

    Returns:
        Eigenvalues (c,) and unit eigenvectors (c, a), the entry of largest magnitude positive.
    """
    iterations, wanted = min(iterations, start.shape[1]), len(start) if wanted is None else wanted
    basis, products = [start / start.norm(dim=1, keepdim=True)], []
    values, lowest = start[:, 0], start
    for count in range(1, iterations + 1):
        products.append(product(basis[-1]))
        following = products[-1]
        for _ in range(2):
            for vector in basis:
                following = following - (following * vector).sum(1, keepdim=True) * vector
        length = following.norm(dim=1, keepdim=True)
        if count == iterations or (tolerance > 0 and count % 4 == 0):
            vectors = torch.stack(basis, 1)
            small = vectors @ torch.stack(products, 1).mT
            small = (small + small.mT) / 2
            # directions that add nothing must not pass for an eigenvalue of zero
            empty = vectors.norm(dim=2) < 0.5
            small = small + torch.diag_embed(empty * (1 + small.abs().amax((1, 2)))[:, None])
            ritz, rotations = torch.linalg.eigh(small)
            values, rotation = ritz[:, 0], rotations[:, :, 0]
            lowest = torch.einsum("cj,cja->ca", rotation, vectors)
            missing = length[:, 0] * rotation[:, -1].abs()  # ‖Sv − λv‖
            order = values.argsort()[:wanted]
            if bool((missing[order] <= tolerance * values[order].abs()).all()):
                break
        # where a Krylov space is complete, a vector of zeros adds nothing to it
        scale = products[-1].norm(dim=1, keepdim=True)
        basis.append(torch.where(length > 1e-10 * scale, following / length.clamp_min(1e-300), 0.0))
    lowest = lowest / lowest.norm(dim=1, keepdim=True).clamp_min(1e-300)
    largest = lowest.gather(1, lowest.abs().argmax(1, keepdim=True))
    return values, lowest * torch.where(largest < 0, -1.0, 1.0)


def smooth_kinks(width: float) -> dict[str, Callable[..., Tensor]]:
    """ReLU and LeakyReLU with the curvature of a softplus, as in the paper's experiments, by name of the operation.

    Their own second derivative is zero almost everywhere and hides the kink, which is all there is to gain. The width
    is a share of the root mean square of what comes in.
    """

    def softplus(x: Tensor) -> Tensor:
        scale = (width * x.detach().square().mean().sqrt()).clamp_min(torch.finfo(x.dtype).tiny)
        return functional.softplus(x / scale, threshold=50) * scale

    def leaky(x: Tensor, slope: float = 0.01) -> Tensor:
        return slope * x + (1 - slope) * softplus(x)

    return {"relu": softplus, "leaky_relu": leaky}


def splitting_matrices(kept: KeptSamples, smoothing: float) -> tuple[Product, Float[Tensor, "u a"]]:
    """Products (u, a) → (u, a) with the splitting matrices of all old units, and the old filters.

    The axis a runs over the filter entries and biases of a unit, one producer after the other.
    """
    site, old = kept.site, old_filters(kept.site)
    columns = {path: columns_of(site, path).flatten(1, 2) for path in site.consumers}
    inserted = Inserted(copied=torch.arange(old.units), instead=smooth_kinks(smoothing))
    theta = old.matrix.requires_grad_()

    def objective() -> Tensor:
        weights, total = old.from_matrix(theta).weights, theta.new_zeros(())
        for each in kept.passes:
            total = total + each.agreement(each.added(each.read(*weights, inserted), columns))
        return -total / len(kept)

    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(objective(), theta, create_graph=True)

    def product(vectors: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(vectors)
        found = torch.autograd.grad((gradient * vectors).sum(), theta, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(vectors) if found is None else found

    return product, theta.detach()


@register("splitting")
@dataclass(frozen=True)
class Splitting(Solver):
    """Old channels split in two along the direction of most negative curvature.

    Attributes:
        step: ε.
        relative: ε is a share of the channel's own filter norm; False: a length, as in the paper (its code: 0.01).
        smoothing: width of the softplus that replaces the kink of a ReLU in the second derivative, as a share of the
            root mean square of its inputs.
        iterations: largest size of the Krylov spaces.
        tolerance: residual of the eigenvectors, relative to their eigenvalues, at which the search stops early.
    """

    step: float = limited(0.1, above=0)
    relative: bool = True
    smoothing: float = limited(0.25, above=0)
    iterations: int = limited(24, least=1)
    tolerance: float = limited(0.1, least=0)
    reads = frozenset({"samples"})
    gain_unit = "loss"

    def solve(self, request: Request) -> ChannelGrowth:
        """See `Solver.solve`; `gains` are −λ_min of the channels that split, in the unit of the loss per filter².

        "auto" asks for every channel that is not splitting-stable.
        """
        site, size = request.site, request.site.granularity
        requested = site.width if request.channels == "auto" else request.channels
        wanted = min(requested // size, units_of(site))
        values, vectors = self.curvatures(require_samples(request.subject, self.name), request.generator, wanted)
        order = values.argsort()[:wanted]
        order = order[values[order] < -1e-7 * values.abs().max().clamp_min(0)]
        return self.split(site, order, values, vectors, requested)

    def curvatures(
        self, kept: KeptSamples, generator: torch.Generator | None, wanted: int | None = None
    ) -> tuple[Float[Tensor, " u"], Float[Tensor, "u a"]]:
        """Lowest eigenvalue of every old unit's splitting matrix and its eigenvector, exact for the `wanted` lowest."""
        product, start = splitting_matrices(kept, self.smoothing)
        drawn = normal(tuple(start.shape), start, generator)
        return lowest_eigenpairs(product, drawn, self.iterations, self.tolerance, wanted)

    def refusal(self, site: GrowthSite) -> str | None:
        """Where old weights are computed from other tensors, so that the old half cannot be moved."""
        return not_rewritable(site, *site.producers, *site.consumers)

    def split(self, site: GrowthSite, order: Tensor, values: Tensor, vectors: Tensor, requested: int) -> ChannelGrowth:
        """The proposal that splits the units `order`, by the lowest eigenvalues of all units and their eigenvectors."""
        old, norms, size, chosen = old_filters(site), filter_norms(site), site.granularity, order.tolist()
        step = self.step * norms if self.relative else torch.full_like(norms, self.step)
        moves = vectors * step[:, None]
        split_now = torch.zeros_like(values, dtype=torch.bool).index_fill(0, order, value=True).to(values)
        halves = old.from_matrix(old.matrix - moves).picked(chosen)
        moved, shifted = old.from_matrix(old.matrix + split_now[:, None] * moves).weights
        revised, outgoing = {}, {}
        for path in site.producers:
            entries, layer = torch.tensor(site.entries(path, OUT), device=old.like.device), site.layer(path)
            revised[f"{path}.weight"] = layer.as_stored(filters_of(site, path).index_copy(0, entries, moved[path]))
            bias = bias_of(site, path)
            if bias is not None:
                revised[f"{path}.bias"] = bias.index_copy(0, entries, shifted[path])
        for path in site.consumers:
            outgoing[path] = (columns_of(site, path)[:, order] / 2).flatten(1, 2).contiguous()
            name = f"{path}.weight"
            revised[name] = with_scaled_columns(site, path, 1 - split_now / 2, revised.get(name))
        found, reason = len(order), None
        if found * size < requested:
            stable = int((values >= 0).sum()) * size
            reason = (
                f"asked for {requested}, got {found * size}: of {site.width} channels {stable} are splitting-stable"
            )
        return halves.proposed(
            self.name,
            outgoing,
            (-values[order]).repeat_interleave(size) / size,
            requested=requested,
            reason=reason,
            revised=revised if found else {},
            copied_from=torch.tensor(of_units(chosen, size), device=order.device, dtype=torch.long),
            expected_decrease=float((step[order] ** 2 * -values[order]).sum() / 2),
            spectrum=(-values).clamp_min(0).sort(descending=True).values.repeat_interleave(size) / size,
        )
