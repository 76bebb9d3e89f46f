"""One file a method: statistics in, new channels out.

`tiny`, `gradmax` and `exact` are the methods on bare tensors; the classes are what `solve` looks up by name.
"""

from growconv.solvers.assembly import expected_decrease
from growconv.solvers.base import SOLVERS, Channels, LinearisationWarning, Request, Solver, get_solver, register, solve
from growconv.solvers.energy import MeasuredGains, captured_energy, collect_until_known, measure_gains
from growconv.solvers.exact import Exact, ExactChannels, exact
from growconv.solvers.firefly import Firefly
from growconv.solvers.functional import FewSamplesWarning, Functional
from growconv.solvers.gradmax import GradMax, GradMaxChannels, gradmax
from growconv.solvers.net2net import Net2Net
from growconv.solvers.north import North
from growconv.solvers.random import Random
from growconv.solvers.rank import Rank
from growconv.solvers.senn import Senn
from growconv.solvers.splitting import Splitting
from growconv.solvers.tiny import Tiny, TinyChannels, tiny
from growconv.solvers.variance_transfer import VarianceTransfer

__all__ = [
    "SOLVERS",
    "Channels",
    "Exact",
    "ExactChannels",
    "FewSamplesWarning",
    "Firefly",
    "Functional",
    "GradMax",
    "GradMaxChannels",
    "LinearisationWarning",
    "MeasuredGains",
    "Net2Net",
    "North",
    "Random",
    "Rank",
    "Request",
    "Senn",
    "Solver",
    "Splitting",
    "Tiny",
    "TinyChannels",
    "VarianceTransfer",
    "captured_energy",
    "collect_until_known",
    "exact",
    "expected_decrease",
    "get_solver",
    "gradmax",
    "measure_gains",
    "register",
    "solve",
    "tiny",
]
