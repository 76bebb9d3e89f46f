"""What the data says: the tensors S, N and their kin, and how they are collected."""

from growconv.statistics.collect import collect_statistics
from growconv.statistics.collector import QUANTITIES, StatisticsCollector
from growconv.statistics.consumer import ConsumerStatistics
from growconv.statistics.own_update import best_update
from growconv.statistics.pair import PairStatistics, best_updates
from growconv.statistics.samples import KeptSamples

__all__ = [
    "QUANTITIES",
    "ConsumerStatistics",
    "KeptSamples",
    "PairStatistics",
    "StatisticsCollector",
    "best_update",
    "best_updates",
    "collect_statistics",
]
