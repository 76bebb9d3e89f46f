"""Situations and proposals made up, for the tests of policies."""

import torch

from growconv.growth.decision import Proposal, Situation
from growconv.network.proposal import ChannelGrowth


def situation(three, **fields):
    defaults = {"step": 0, "metrics": {}, "initial_widths": {site.name: site.width for site in three.sites}}
    return Situation(model=three.model, sites=three.sites, **(defaults | fields))


def proposal(site, gains, parameters=10.0, flops=100.0, energy=1.0):
    gains = torch.tensor(gains, dtype=torch.float64)
    growth = ChannelGrowth(
        site=site.name, method="made up", incoming={"a": torch.zeros(len(gains), 1, 3, 3)},
        outgoing={"b": torch.zeros(2, len(gains), 3, 3)}, gains=gains,
    )  # fmt: skip
    return Proposal(site, growth, energy, parameters, flops)
