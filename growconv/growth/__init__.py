"""When, where, how many and how strong: the growth schedule, its policies and its history."""

from growconv.growth.amount import Auto, Exponential, Fixed, Fraction, ToWidth
from growconv.growth.cost import ModelCost
from growconv.growth.decision import Decision, Policy, Proposal, Situation
from growconv.growth.distributed import parameter_hash, require_equal_parameters, rewrap
from growconv.growth.learning_rate import StageRates, WarmUp, WidthRates
from growconv.growth.pruning import PruneBack
from growconv.growth.scheduler import GrowthScheduler
from growconv.growth.stop import Budget, NoGain, TargetAccuracy
from growconv.growth.when import AllOf, AnyOf, AtFlops, AtSteps, Every, GainAbove, LengtheningStages, Plateau
from growconv.growth.where import All, Best, Greedy, RankTrigger, RoundRobin
from growconv.network.event import GrowthHistory
from growconv.network.model import undisturbed

__all__ = [
    "All",
    "AllOf",
    "AnyOf",
    "AtFlops",
    "AtSteps",
    "Auto",
    "Best",
    "Budget",
    "Decision",
    "Every",
    "Exponential",
    "Fixed",
    "Fraction",
    "GainAbove",
    "Greedy",
    "GrowthHistory",
    "GrowthScheduler",
    "LengtheningStages",
    "ModelCost",
    "NoGain",
    "Plateau",
    "Policy",
    "Proposal",
    "PruneBack",
    "RankTrigger",
    "RoundRobin",
    "Situation",
    "StageRates",
    "TargetAccuracy",
    "ToWidth",
    "WarmUp",
    "WidthRates",
    "parameter_hash",
    "require_equal_parameters",
    "rewrap",
    "undisturbed",
]
