"""Channels that truly minimise J(Θ) = ‖v⊥‖²/n − 2⟨N, Θ⟩ + ⟨Θ, S_full Θ⟩ over Θ of rank K, taps and all."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.convolution.unfold import convolve, unfold
from growconv.errors import ArgumentValueError, StatisticsError
from growconv.limits import limited
from growconv.linalg import (
    BilinearMetric,
    DenseMetric,
    bilinear_least_squares,
    descending,
    eliminated,
    fix_signs,
    solve_blocks,
)
from growconv.network.proposal import ChannelGrowth
from growconv.solvers.assembly import assemble, require_moments, require_samples, require_statistics, shortfall
from growconv.solvers.base import Request, Solver, register
from growconv.solvers.energy import worthwhile
from growconv.statistics.consumer import ConsumerStatistics
from growconv.statistics.pair import PairStatistics, sample_averages, sample_batches
from growconv.statistics.problem import PairProblem

ROUTES = ("auto", "dense", "samples")
CHUNK_ENTRIES = 1 << 21
"""Entries of patches held at once (16 MiB): larger blocks are taken from the system anew each time, and cleared."""
DENSE_ENTRIES = 1 << 22
"""Entries of S_full up to which the route "auto" forms it from kept samples (32 MiB): descents then cost little."""


class ExactChannels(NamedTuple):
    """Factors of the minimiser.

    Attributes:
        alpha: (k, a), filters of the first conv, the bias last where it has one.
        omega: one tensor (k, b, c), weights of the second conv.
        gains: (k,) descending; the first k of them sum to what the first k filters capture with their best ω.
        history: the objective after each round, in the unit of ‖v⊥‖²/n and 0 for no channels; never rising.
    """

    alpha: Tensor
    omega: tuple[Tensor, ...]
    gains: Tensor
    history: tuple[float, ...]


def exact(
    S_full: Float[Tensor, "ab ab"],
    N: Float[Tensor, "a *columns"],
    channels: int = 8,
    rank_tolerance: float = 1e-4,
    **options: Any,
) -> ExactChannels:
    """Minimiser of J on bare tensors.

    Args:
        S_full: second moment of X (a·b, a·b), entries in the order (a, b).
        N: correlation of X and expressivity bottleneck (a, b, c), or as a matrix (a, b·c).
        channels: how many, at least 1.
        rank_tolerance: singular values of Θ below this share of the largest count as zero; the energy that goes with
            them is of the order of its square.
        **options: of `growconv.linalg.bilinear_least_squares`.

    Returns:
        `channels` channels, or fewer where no more can help; none where N is zero. ω is (k, b, c) in either case.

    Raises:
        ArgumentTypeError: channels that are no integer, or half precision.
        ArgumentValueError: fewer than one channel, shapes that do not belong together, entries that are not finite.
    """
    require_moments(channels, N, S_full=S_full)
    size, patch = S_full.shape[0], N.shape[0]
    taps = size // max(patch, 1)
    if not taps or taps * patch != size or N.numel() % size or (N.dim() > 2 and N.shape[1] != taps):
        raise ArgumentValueError(
            "S_full and N do not belong together",
            expected="S_full (a·b, a·b) with N (a, b, c) or (a, b·c)",
            got=f"S_full {tuple(S_full.shape)}, N {tuple(N.shape)}",
            where="S_full",
        )
    terms = [(DenseMetric(S_full, patch), N.reshape(patch, taps, -1))]
    alpha, omega, gains, history = minimise(terms, channels, rank_tolerance, **options)
    return ExactChannels(alpha, (omega.unflatten(1, (taps, -1)),), gains, history)


def minimise(
    terms: Sequence[tuple[BilinearMetric, Tensor]], channels: int, rank_tolerance: float, **options: Any
) -> tuple[Float[Tensor, "k a"], Float[Tensor, "k columns"], Float[Tensor, " k"], tuple[float, ...]]:
    """Minimise the sum of J over the consumers, which share the filters.

    Args:
        terms: per consumer its quadratic form and N (a, b, c).
        channels: how many, at least 1.
        rank_tolerance: share of the largest singular value of Θ below which one counts as zero.
        **options: of `growconv.linalg.bilinear_least_squares`.

    Returns:
        Filters in greedy order, the weights (b, c) of one consumer after the other, gains and history. A mix of the K
        channels by any invertible matrix gives the same Θ; in this one the first channel is the best single one of the
        span, and so on, filters orthogonal in S and both sides of one norm.
    """
    fit = bilinear_least_squares(terms, channels, **options)
    omega = torch.cat([right.flatten(1) for right in fit.rights], 1)
    if len(omega) == 0:
        return fit.left, omega, omega.new_zeros(0), fit.history
    turn, sigma, _ = torch.linalg.svd(omega, full_matrices=False)
    turn = turn[:, sigma > rank_tolerance * sigma[0]].mT
    rotation, gains = _greedy(turn @ fit.left, terms)
    alpha, omega = rotation @ (turn @ fit.left), rotation @ (turn @ omega)
    scale = omega.norm(dim=1, keepdim=True).clamp_min(torch.finfo(omega.dtype).tiny).sqrt()
    return *fix_signs(alpha * scale, omega / scale), gains, fit.history


def _greedy(
    left: Float[Tensor, "k a"], terms: Sequence[tuple[BilinearMetric, Tensor]]
) -> tuple[Float[Tensor, "k k"], Float[Tensor, " k"]]:
    """Orthogonal mix of the filters in which each adds the most to those before it, every ω refitted.

    One filter at a time: the best single one within the span (a rank-one problem of size K), after which what it
    explains is projected out of the rest. Filters that pay only together (the second adding more than the first) share
    their gain evenly, so that the gains descend and keep their sum.
    """
    channels = left.shape[0]
    grams, linears = [], []
    for form, target in terms:
        gram = form.gram(left)
        lift = 1e-10 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        grams.append(gram + lift)
        linears.append(torch.einsum("ka,abc->kbc", left, target))
    basis = torch.eye(channels, dtype=left.dtype, device=left.device)  # of what is not chosen yet
    chosen, gains = [], []
    for remaining in range(channels, 0, -1):
        single = [(DenseMetric(gram, remaining), linear) for gram, linear in zip(grams, linears, strict=True)]
        best = bilinear_least_squares(single, 1, random_starts=0, tolerance=1e-4).left
        if len(best) == 0:  # nothing is left to capture
            chosen.append(basis)
            gains += [0.0] * remaining
            break
        unit = torch.eye(remaining, dtype=left.dtype, device=left.device)
        turn = torch.linalg.qr(torch.cat([best.mT, unit], 1))[0].mT
        basis, captured = turn @ basis, 0.0
        for index, (gram, linear) in enumerate(zip(grams, linears, strict=True)):
            taps = linear.shape[1]
            turned = torch.einsum("jk,kbld,ml->jbmd", turn, gram.view(remaining, taps, remaining, taps), turn)
            linear = torch.einsum("jk,kbc->jbc", turn, linear)
            captured += float((linear[0] * solve_blocks(turned[0, :, 0], linear[0])).sum())
            rest, linears[index] = eliminated(turned, linear, 0)
            grams[index] = rest.flatten(2).flatten(0, 1)
        chosen.append(basis[:1])
        gains.append(captured)
        basis = basis[1:]
    return torch.cat(chosen), left.new_tensor(descending(gains))


class SampleMetric:
    """The quadratic form of one consumer from the samples themselves: nothing of size (a·b)² is ever formed.

    Args:
        parts: of batches and calls the pair and the input of the producer (n, C0, *size), float64.
        samples: how many there are.
        reduced: S of these samples.
    """

    def __init__(
        self, parts: Sequence[tuple[PairProblem, Tensor]], samples: int, reduced: Float[Tensor, "a a"]
    ) -> None:
        self._parts, self._samples, self._reduced = parts, samples, reduced

    def reduced(self) -> Tensor:
        """S."""
        return self._reduced

    def gram(self, left: Tensor) -> Tensor:
        """Second moment of the patches that the consumer would see of channels with these filters."""
        total: Tensor | None = None
        for problem, chunk in self._chunks(left):
            rows = unfold(self._hidden(problem, left, chunk), problem.second).transpose(0, 1).flatten(1)
            total = rows @ rows.mT if total is None else total + rows @ rows.mT
        if total is None:
            raise StatisticsError("no samples were kept", fix="collect with keep_samples=512, say")
        return total / self._samples

    def pull(self, left: Tensor, coupling: Tensor) -> Tensor:
        """Half the gradient of ⟨coupling, gram⟩: that of ½‖conv2(conv1(x))‖² with a root of the coupling as conv2."""
        total = torch.zeros_like(left)
        values, vectors = torch.linalg.eigh(coupling)
        root = (vectors * values.clamp_min(0).sqrt()).mT
        for problem, chunk in self._chunks(left):
            with torch.enable_grad():
                variable = left.detach().requires_grad_()
                hidden = self._hidden(problem, variable, chunk)
                kernels = root.reshape(-1, len(left), *problem.second.kernel_size)
                energy = convolve(hidden, kernels, problem.second).square().sum() / (2 * self._samples)
                total += torch.autograd.grad(energy, variable)[0]
        return total

    def _chunks(self, left: Tensor) -> Iterator[tuple[PairProblem, Tensor]]:
        for problem, x in self._parts:
            new = len(left) * problem.second.taps * math.prod(problem.output_size)
            per_sample = max(new, problem.patch_entries * math.prod(problem.first_output_size))
            for chunk in x.split(max(1, CHUNK_ENTRIES // per_sample)):
                yield problem, chunk

    def _hidden(self, problem: PairProblem, left: Tensor, x: Tensor) -> Tensor:
        entries, left = problem.patch_entries, problem.here(left)
        kernels = left[:, :entries].reshape(len(left), problem.channels[0], *problem.first.kernel_size)
        hidden = problem.between(convolve(x, kernels, problem.first))
        if problem.first_bias:
            bias = left[:, entries].view(1, -1, *[1] * problem.first.axes)
            hidden = hidden + bias * problem.constant(left.dtype, left.device)
        return hidden


@register("exact")
@dataclass(frozen=True)
class Exact(Solver):
    """The rank-K minimiser of J.

    Attributes:
        route: where the quadratic form comes from. "dense" reads S_full, "samples" works on the kept samples alone,
            N included; "auto" takes S_full where it was collected and fits.
        rank_tolerance: share of the largest singular value of Θ below which one counts as zero.
        random_starts: descents from random filters besides the one from `tiny`, against local minima. None takes 16 on
            a dense S_full, 3 on one above 64 MiB, and 0 where it is not held and each step is dear.
        tolerance: stop when ten iterations lower the objective by less than this share of what is captured, and of what
            is left.
        rounds: most rounds of ten iterations. None takes 60, and 20 on an S_full above 64 MiB.
        signs: choose the sign of each channel on kept samples, through the real activation.
    """

    route: str = limited("auto", choices=ROUTES)
    rank_tolerance: float = 1e-4
    random_starts: int | None = limited(None, least=0)
    tolerance: float = 1e-4
    rounds: int | None = limited(None, least=1)
    signs: bool = True
    gain_unit = "energy"
    linearises = True
    needs_closed_form = True

    @property
    def reads(self) -> frozenset[str]:
        """What the route needs, what norm layers need, and samples for the signs."""
        if self.route == "samples":
            return frozenset({"update", "patch", "samples"})
        samples = self.signs or self.route == "auto"  # S_full may not fit
        return frozenset({"S", "N", "S_full", "patch"} | ({"samples"} if samples else set()))

    def solve(self, request: Request) -> ChannelGrowth:
        """See `Solver.solve`; several consumers share their filters."""
        subject, channels = request.subject, request.channels
        if channels == "auto":
            return worthwhile(self.solve, request)
        terms = [self._term(subject, consumer) for consumer in subject.consumers]
        starts = self.random_starts
        if starts is None:
            starts = None if all(isinstance(metric, DenseMetric) for metric, _ in terms) else 0
        alpha, omega, gains, _ = minimise(
            terms,
            channels,
            self.rank_tolerance,
            random_starts=starts,
            tolerance=self.tolerance,
            rounds=self.rounds,
            energy=subject.bottleneck_energy,
        )
        return assemble(
            request, self.name, alpha, omega, gains, shortfall(len(alpha), channels, "the best Θ"), self.signs
        )

    def _term(self, subject: PairStatistics, consumer: ConsumerStatistics) -> tuple[BilinearMetric, Tensor]:
        full = consumer.S_full
        if self.route == "samples" or (self.route == "auto" and full is None):
            return self._sample_term(subject, consumer.consumer)
        require_statistics(subject, "N")
        N = consumer.N
        if N is None or full is None:
            raise StatisticsError(
                "S_full was not collected",
                where=f"{subject.site}, consumer {consumer.consumer}",
                fix="collect with full=True and scratch_bytes that hold it, or use route='samples' with keep_samples",
            )
        return DenseMetric(full, N.shape[0]), N

    def _sample_term(self, subject: PairStatistics, path: str) -> tuple[BilinearMetric, Tensor]:
        kept = require_samples(subject, "exact on samples").projected()
        batches = sample_batches(kept, path)
        small = self.route == "auto" and max(each.problem.full_entries for each in batches) <= DENSE_ENTRIES
        averages = sample_averages(kept, path, frozenset({"N_raw", "S_full" if small else "S"}))
        N = averages["N_raw"]
        if small:
            return DenseMetric(averages["S_full"], N.shape[0]), N
        return SampleMetric([(each.problem, each.x) for each in batches], len(kept), averages["S"]), N
