"""Splitting steepest descent: old channels split in two along the direction of most negative curvature.

Liu, Wu and Wang 2019, "Splitting Steepest Descent for Growing Neural Architectures", NeurIPS.

A neuron θ is replaced by two, θ ± εv, each with half of its outgoing weights. To first order nothing changes; to second
order the loss changes by ε²/2·vᵀS(θ)v (theorem 2.2), S(θ) = E[∇_σ L · ∇²_θθ σ(θ, x)] being the splitting matrix
(equation 5). The best direction is its eigenvector of lowest eigenvalue (theorem 2.4), the neurons to split are those
with the lowest eigenvalues (algorithm 1), and one whose lowest eigenvalue is not negative is splitting-stable: it
stays whole.

Here σ is everything between the producer and v, so that S is the second derivative of −⟨v, δz⟩ by the channel's filter,
with v fixed. It is never formed: Lanczos' method needs its products with vectors only, for all channels at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from growconv.errors import ArgumentValueError, SolverError
from growconv.network.proposal import ChannelGrowth
from growconv.network.routes import Norm
from growconv.solvers.base import Channels, Solver, register
from growconv.solvers.existing import (
    bias_of,
    filter_norms,
    filters_of,
    normal,
    own_layout,
    readings_of,
    require_number,
    revised_readings,
)
from growconv.solvers.sampled import SampledSite, inner

Product = Callable[[Tensor], Tensor]


def lowest_eigenpairs(
    product: Product, start: Float[Tensor, "c a"], iterations: int = 24
) -> tuple[Float[Tensor, " c"], Float[Tensor, "c a"]]:
    """Lowest eigenvalue and its eigenvector of many symmetric matrices at once, by Lanczos' method.

    Args:
        product: takes one vector per matrix (c, a), gives the matrices' products with them.
        start: vectors to start from, not orthogonal to those sought.
        iterations: size of the Krylov spaces; a is enough for the exact answer.

    Returns:
        Eigenvalues (c,) and unit eigenvectors (c, a), the entry of largest magnitude positive.
    """
    iterations = min(iterations, start.shape[1])
    basis = [start / start.norm(dim=1, keepdim=True)]
    products = []
    for _ in range(iterations):
        products.append(product(basis[-1]))
        following = products[-1]
        for _ in range(2):
            for vector in basis:
                following = following - (following * vector).sum(1, keepdim=True) * vector
        length = following.norm(dim=1, keepdim=True)
        # where a Krylov space is complete, a vector of zeros adds nothing to it
        scale = products[-1].norm(dim=1, keepdim=True)
        basis.append(torch.where(length > 1e-10 * scale, following / length.clamp_min(1e-300), 0.0))
    vectors, images = torch.stack(basis[:iterations], 1), torch.stack(products, 1)
    small = torch.einsum("cja,cka->cjk", vectors, images)
    small = (small + small.mT) / 2
    # directions that add nothing must not pass for an eigenvalue of zero
    empty = vectors.norm(dim=2) < 0.5
    small = small + torch.diag_embed(empty * (1 + small.abs().amax((1, 2)))[:, None])
    values, rotations = torch.linalg.eigh(small)
    lowest = torch.einsum("cj,cja->ca", rotations[:, :, 0], vectors)
    lowest = lowest / lowest.norm(dim=1, keepdim=True).clamp_min(1e-300)
    largest = lowest.gather(1, lowest.abs().argmax(1, keepdim=True))
    return values[:, 0], lowest * torch.where(largest < 0, -1.0, 1.0)


class SmoothKinks(TorchFunctionMode):
    """Inside, ReLU and LeakyReLU have the curvature of a softplus, as in the paper's experiments.

    Their own second derivative is zero almost everywhere and hides the kink, which is all there is to gain.

    Args:
        width: of the smoothed kink, as a share of the root mean square of what comes in.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the piecewise linear functions, let all others pass."""
        name = getattr(func, "__name__", "")
        if name in ("relu", "relu_"):
            return self._softplus(args[0])
        if name in ("leaky_relu", "leaky_relu_"):
            slope = args[1] if len(args) > 1 else (kwargs or {}).get("negative_slope", 0.01)
            return slope * args[0] + (1 - slope) * self._softplus(args[0])
        return func(*args, **(kwargs or {}))

    def _softplus(self, x: Tensor) -> Tensor:
        scale = (self.width * x.detach().square().mean().sqrt()).clamp_min(torch.finfo(x.dtype).tiny)
        return functional.softplus(x / scale, threshold=50) * scale


def splitting_matrices(sampled: SampledSite, smoothing: float) -> tuple[Product, Float[Tensor, "c a"]]:
    """Products with the splitting matrices of all old channels.

    Args:
        sampled: the site on samples.
        smoothing: of kinks, see `SmoothKinks`.

    Returns:
        The products (c, a) → (c, a), a over all producers' filter entries and biases, and the old filters (c, a).
    """
    site, model = sampled.site, sampled.model
    norm = _norm_in_front(site, model)
    kernels = _old_kernels(site, model)
    readings = {path: readings_of(site, model, path).flatten(1, 2) for path in site.consumers}
    parts, biased = {}, {}
    for path in site.producers:
        if len(site.spans(path, "writes")) != 1 or site.spans(path, "writes")[0] != (
            0,
            filters_of(model, path).shape[0],
        ):
            raise SolverError(
                "splitting moves all filters of a producer",
                where=path,
                expected="a producer of the site's channels only",
                fix="choose another method for this site",
            )
        bias = bias_of(model, path)
        parts[path], biased[path] = filters_of(model, path), bias is not None
    rows = []
    for path, filters in parts.items():
        rows.append(filters.flatten(1))
        bias = bias_of(model, path)
        rows += [] if bias is None else [bias[:, None]]
    theta = torch.cat(rows, 1).detach().requires_grad_()

    def objective() -> Tensor:
        incoming, biases, offset = {}, {}, 0
        for path, filters in parts.items():
            entries = filters[0].numel()
            incoming[path] = theta[:, offset : offset + entries].reshape(filters.shape)
            offset += entries
            if biased[path]:
                biases[path] = theta[:, offset]
                offset += 1
        written = sampled.write(incoming, biases)
        if norm is not None:
            written = {path: _as_in_eval(norm, values) for path, values in written.items()}
        change = sampled.change(site.between(written, carried=kernels), readings)
        return -inner(change, sampled.wanted) / sampled.samples

    with torch.enable_grad(), SmoothKinks(smoothing):
        (gradient,) = torch.autograd.grad(objective(), theta, create_graph=True)

    def product(vectors: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(vectors)
        found = torch.autograd.grad(gradient, theta, vectors, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(vectors) if found is None else found

    return product, theta.detach()


def _norm_in_front(site: Any, model: nn.Module) -> nn.Module | None:
    """The BatchNorm that directly follows every producer, None where there is no norm layer."""
    norms = {tuple(step.path for step in route.steps if isinstance(step, Norm)) for route in site.routes}
    first = {route.steps[0] if route.steps else None for route in site.routes}
    if norms == {()}:
        return None
    step = next(iter(first))
    if len(norms) == 1 and len(first) == 1 and isinstance(step, Norm) and len(next(iter(norms))) == 1:
        module = model.get_submodule(step.path)
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            return module
    raise SolverError(
        "splitting needs the old channels' own way through the norm layers",
        expected="no norm layer, or one BatchNorm with running statistics right behind the producer",
        got=", ".join(sorted({path for paths in norms for path in paths})),
        where=site.name,
        fix="use another method for this site",
    )


def _as_in_eval(norm: Any, values: Tensor) -> Tensor:
    weight = None if norm.weight is None else norm.weight.detach()
    bias = None if norm.bias is None else norm.bias.detach()
    return functional.batch_norm(values, norm.running_mean, norm.running_var, weight, bias, False, 0.0, norm.eps)


def _old_kernels(site: Any, model: nn.Module) -> dict[str, Tensor]:
    """Kernels of the depthwise convolutions in between."""
    kernels = {}
    for binding in site.bindings:
        if binding.role == "carries":
            if bias_of(model, binding.path) is not None:
                raise SolverError(
                    "splitting cannot see past a depthwise convolution with a bias",
                    where=f"{site.name}, {binding.path}",
                    fix="use another method for this site",
                )
            kernels[binding.path] = model.get_submodule(binding.path).weight.detach()  # pyright: ignore
    return kernels


@register("splitting")
@dataclass(frozen=True)
class Splitting(Solver):
    """Old channels split in two along the direction of most negative curvature.

    Attributes:
        step: ε, as a share of the channel's own filter norm.
        smoothing: width of the softplus that stands for a ReLU's kink in the second derivative, as a share of the root
            mean square of its inputs.
        iterations: size of the Krylov spaces.
    """

    step: float = 0.1
    smoothing: float = 0.25
    iterations: int = 24
    reads = frozenset({"samples"})
    function_preserving = True

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        if not self.step > 0 or not self.smoothing > 0 or self.iterations < 1:
            raise ArgumentValueError(
                "impossible hyperparameters of splitting",
                expected="step > 0, smoothing > 0, iterations ≥ 1",
                got=(self.step, self.smoothing, self.iterations),
                where="splitting",
            )

    def solve(
        self,
        subject: Any,
        site: Any,
        channels: Channels,
        model: nn.Module,
        generator: torch.Generator | None = None,
    ) -> ChannelGrowth:
        """See `Solver.solve`; `gains` are −λ_min of the channels that split, in the unit of the loss per filter²."""
        requested = require_number(channels, self.name, site)
        if site.granularity > 1:
            raise SolverError(
                "splitting splits channels one by one",
                got=f"a site that grows in groups of {site.granularity}",
                where=site.name,
                fix="use another method",
            )
        sampled = SampledSite.of(subject, model, self.name)
        product, start = splitting_matrices(sampled, self.smoothing)
        values, vectors = lowest_eigenpairs(product, normal(tuple(start.shape), start, generator), self.iterations)
        order = values.argsort()[: min(requested, site.width)]
        order = order[values[order] < -1e-7 * values.abs().max().clamp_min(0)]
        return self._split(site, model, order, values, vectors, requested)

    def _split(
        self, site: Any, model: nn.Module, order: Tensor, values: Tensor, vectors: Tensor, requested: int
    ) -> ChannelGrowth:
        step = self.step * filter_norms(site, model)
        incoming, biases, revised, outgoing = {}, {}, {}, {}
        offset = 0
        for path in site.producers:
            old, bias = filters_of(model, path), bias_of(model, path)
            entries = old[0].numel()
            moves = (vectors[:, offset : offset + entries] * step[:, None]).to(old).reshape(old.shape)
            offset += entries
            incoming[path] = (old - moves)[order].contiguous()
            moved = old.index_add(0, order, moves[order])
            revised[f"{path}.weight"] = own_layout(model, path, moved)
            if bias is not None:
                shift = (vectors[:, offset] * step).to(bias)
                offset += 1
                biases[path] = (bias - shift)[order]
                revised[f"{path}.bias"] = bias.index_add(0, order, shift[order])
        for path in site.consumers:
            readings = readings_of(site, model, path).clone()
            readings[:, order] /= 2
            outgoing[path] = readings[:, order].flatten(1, 2).contiguous()
            revised[f"{path}.weight"] = revised_readings(site, model, path, readings)
        found = len(order)
        reason = None
        if found < requested:
            stable = int((values >= 0).sum())
            reason = f"asked for {requested}, got {found}: of {site.width} channels {stable} are splitting-stable"
        decrease = float((step[order] ** 2 * -values[order]).sum() / 2)
        return ChannelGrowth(
            site=site.name,
            method=self.name,
            incoming=incoming,
            incoming_bias=biases,
            outgoing=outgoing,
            gains=-values[order],
            requested=requested,
            reason=reason,
            revised=revised if found else {},
            copied_from=order,
            expected_decrease=decrease,
            spectrum=(-values).clamp_min(0).sort(descending=True).values,
        )
