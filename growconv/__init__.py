"""growconv: convolutional networks that grow while they train.

Every name below is loaded when it is first used, so that the command line can answer before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from growconv.convolution.cost import conv_cost
    from growconv.convolution.cp import CPConv, CPConv1d, CPConv2d, CPConv3d
    from growconv.convolution.kernels import (
        commute_average_pool,
        compose_convs,
        compose_kernels,
        composite_matrix,
        composite_size,
        conv_pair,
        exact_locations,
    )
    from growconv.convolution.split import split_kernel
    from growconv.convolution.toeplitz import toeplitz_adjoint, toeplitz_matrix
    from growconv.convolution.tucker import TuckerConv, TuckerConv1d, TuckerConv2d, TuckerConv3d
    from growconv.convolution.unfold import mask_tensor
    from growconv.errors import GrowthError, GrowthWarning
    from growconv.growth import Budget, GrowthScheduler
    from growconv.network.depth import insert_copy, insert_layer, merge_pair, split_conv
    from growconv.network.entry_ages import follow_ages
    from growconv.network.event import GrowthEvent, GrowthHistory, apply_edits, grow, shrink
    from growconv.network.find import explain_sites, find_sites, site
    from growconv.network.proposal import ChannelGrowth
    from growconv.network.rank import RankSite, find_rank_sites
    from growconv.network.site import GrowthSite
    from growconv.solvers import Solver, solve
    from growconv.solvers.energy import captured_energy
    from growconv.solvers.rank import collect_rank_statistics, grow_rank
    from growconv.statistics import PairStatistics, StatisticsCollector, best_update, collect_statistics
    from growconv.training.checkpoint import load_checkpoint, save_checkpoint
    from growconv.training.trained import load_run

__version__ = "0.1.0"

__all__ = [
    "Budget", "CPConv", "CPConv1d", "CPConv2d", "CPConv3d", "ChannelGrowth", "GrowthError", "GrowthEvent",
    "GrowthHistory", "GrowthScheduler", "GrowthSite", "GrowthWarning", "PairStatistics", "RankSite", "Solver",
    "StatisticsCollector", "TuckerConv", "TuckerConv1d", "TuckerConv2d", "TuckerConv3d", "apply_edits", "best_update",
    "captured_energy", "collect_rank_statistics", "collect_statistics", "commute_average_pool", "compose_convs",
    "compose_kernels", "composite_matrix", "composite_size", "conv_cost", "conv_pair", "exact_locations",
    "explain_sites", "find_rank_sites", "find_sites", "follow_ages", "grow", "grow_rank", "insert_copy", "insert_layer",
    "load_checkpoint", "load_run", "mask_tensor", "merge_pair", "save_checkpoint", "shrink", "site", "solve",
    "split_conv", "split_kernel", "toeplitz_adjoint", "toeplitz_matrix",
]  # fmt: skip

_PACKAGES = (
    "convolution", "errors", "growth", "integrations", "linalg", "network", "solvers", "statistics", "training",
)  # fmt: skip
# Module by module, the names it gives; the imports above say the same to type checkers and editors.
_HOMES = {
    "convolution.cost": "conv_cost",
    "convolution.cp": "CPConv CPConv1d CPConv2d CPConv3d",
    "convolution.kernels": "commute_average_pool compose_convs compose_kernels composite_matrix composite_size "
    "conv_pair exact_locations",
    "convolution.split": "split_kernel",
    "convolution.toeplitz": "toeplitz_adjoint toeplitz_matrix",
    "convolution.tucker": "TuckerConv TuckerConv1d TuckerConv2d TuckerConv3d",
    "convolution.unfold": "mask_tensor",
    "errors": "GrowthError GrowthWarning",
    "growth": "Budget GrowthScheduler",
    "network.depth": "insert_copy insert_layer merge_pair split_conv",
    "network.entry_ages": "follow_ages",
    "network.event": "GrowthEvent GrowthHistory apply_edits grow shrink",
    "network.find": "explain_sites find_sites site",
    "network.proposal": "ChannelGrowth",
    "network.rank": "RankSite find_rank_sites",
    "network.site": "GrowthSite",
    "solvers": "Solver solve",
    "solvers.energy": "captured_energy",
    "solvers.rank": "collect_rank_statistics grow_rank",
    "statistics": "PairStatistics StatisticsCollector best_update collect_statistics",
    "training.checkpoint": "load_checkpoint save_checkpoint",
    "training.trained": "load_run",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Load the module behind a name at its first use."""
    if name in _PACKAGES:
        return import_module(f"growconv.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'growconv' has no attribute {name!r}")
    value = getattr(import_module(f"growconv.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
