"""The baseline: new filters drawn as at initialisation; their outgoing weights are zero or small."""

from dataclasses import dataclass

from growconv.limits import limited
from growconv.network.proposal import ChannelGrowth
from growconv.solvers.base import Request, Solver, register
from growconv.solvers.weights import (
    columns_of,
    normal,
    norms_of,
    random_filters,
    scaled_units,
    silent_outgoing,
    units_of,
)


@register("random")
@dataclass(frozen=True)
class Random(Solver):
    """Random filters for any site, streams and groups included; reads no statistics.

    Attributes:
        gain: standard deviation of the incoming weights times √fan-in; √2 is He et al. 2015, for the ReLU family.
        outgoing: norm of a channel's outgoing weights relative to the mean over the existing channels. 0 changes no
            output, and the first gradient step already differs from channel to channel.
    """

    gain: float = limited(2**0.5, above=0)
    outgoing: float = limited(0.0, least=0)
    counts = False

    @property
    def function_preserving(self) -> bool:
        """Whether the outgoing weights of new channels are zero at first."""
        return self.outgoing == 0

    def solve(self, request: Request) -> ChannelGrowth:
        """See `Solver.solve`."""
        site, count, generator = request.site, request.number, request.generator
        filters, outgoing = random_filters(site, count, generator), silent_outgoing(site, count)
        for path, zeros in outgoing.items() if self.outgoing > 0 else ():
            norm = norms_of([columns_of(site, path)], units_of(site), 1).mean() * self.outgoing
            drawn = normal(tuple(zeros.shape), zeros, generator)
            outgoing[path] = scaled_units(drawn, norm / norms_of([drawn], filters.units, 1), 1)
        return filters.each(lambda rows: self.gain * rows).proposed(self.name, outgoing, requested=count)
