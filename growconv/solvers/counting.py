"""How well gains are known, and how many channels are worth having."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from growconv.network.proposal import ChannelGrowth
from growconv.solvers.assembly import empty
from growconv.solvers.energy import captured_by_sample, require_samples
from growconv.solvers.request import Request
from growconv.statistics.held_out import without
from growconv.statistics.pair import PairStatistics

Solve = Callable[[Request], ChannelGrowth]

HELD_OUT = 0.5
CONFIDENCE = 2.0


@dataclass(frozen=True, eq=False)
class MeasuredGains:
    """First-order gain of every channel on samples, with the standard error of its mean.

    Attributes:
        gains: (k,) mean of ⟨v⊥, δz_k⟩ over the samples, through the real activation.
        errors: (k,) its standard error.
        samples: number of samples.
    """

    gains: Float[Tensor, " k"]
    errors: Float[Tensor, " k"]
    samples: int

    @property
    def relative_error(self) -> float:
        """Error of the summed gains (channels taken as independent) over that sum; infinite if the sum is no gain."""
        total = float(self.gains.sum())
        return float(self.errors.square().sum().sqrt()) / total if total > 0 else float("inf")

    def __str__(self) -> str:
        """One channel a line."""
        lines = [f"gains on {self.samples} samples"]
        pairs = zip(self.gains.tolist(), self.errors.tolist(), strict=True)
        lines += [f"  {channel}: {gain:.3g} ± {error:.1g}" for channel, (gain, error) in enumerate(pairs)]
        return "\n".join(lines)


def measure_gains(subject: PairStatistics, growth: ChannelGrowth) -> MeasuredGains:
    """Gains of a proposal on the kept samples, with error bars.

    Args:
        subject: statistics with kept samples; the gains are unbiased where the solver has not seen these samples.

    Raises:
        StatisticsError: fewer than two samples were kept.
    """
    kept = require_samples(subject, "an error bar", least=2)
    captured = captured_by_sample(subject, growth)
    return MeasuredGains(captured.mean(0), captured.std(0) / len(kept) ** 0.5, len(kept))


def held_out_gains(solve: Solve, request: Request) -> tuple[ChannelGrowth, MeasuredGains]:
    """What a solver proposes without half of the kept samples, and its gains on those.

    Args:
        solve: of a method on statistics.
        request: with statistics that hold samples, and a number of channels.

    Raises:
        StatisticsError: fewer than four samples were kept, or none are left to solve on.
    """
    subject = request.subject
    fitting, held_out = require_samples(subject, "a held-out gain", least=4).split(1 - HELD_OUT)
    rest = without(subject, held_out, fitting)
    proposal = solve(replace(request, statistics=rest))
    return proposal, measure_gains(replace(rest, samples_kept=held_out), proposal)


def worthwhile(solve: Solve, request: Request) -> ChannelGrowth:
    """As many channels as hold their gain on samples that the solver has not seen.

    The solver proposes up to as many channels as there are (at least 8), and those whose held-out gain is above two
    error bars are counted. The solver is then asked for that number on all samples.

    Args:
        solve: of a method on statistics.
        request: with statistics that hold samples; its number of channels is not read.

    Returns:
        The proposal with the reason for its number; no channels where none is above its error bar.
    """
    site = request.site
    most = site.growable_channels(max(8, site.width))
    candidates, measured = held_out_gains(solve, replace(request, channels=most))
    if candidates.channels == 0:
        return candidates
    count = int((measured.gains > CONFIDENCE * measured.errors).sum()) // site.granularity * site.granularity
    why = (
        f"{count} of {candidates.channels} gains exceed {CONFIDENCE:g} error bars "
        f"on {measured.samples} held-out samples"
    )
    asked = replace(request, channels=count)
    return replace(solve(asked), reason=why) if count else empty(asked, candidates.method, why)
