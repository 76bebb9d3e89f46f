"""The methods that come with the package and grow channels: what a test of every method runs over."""

from growconv.network.site import GrowthSite
from growconv.solvers import SOLVERS

METHODS = sorted(
    name for name, each in SOLVERS.items() if each.__module__.startswith("growconv.") and each.serves is GrowthSite
)
