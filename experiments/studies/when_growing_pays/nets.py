"""The study's residual networks: the stages of ResNet-20 with as many blocks as the study asks for."""

from collections.abc import Sequence
from typing import Any

from growconv.training.models import BasicBlock, ResidualNet


def residual(blocks: Sequence[int], **arguments: Any) -> ResidualNet:
    """A residual network for small images, 16, 32 and 64 channels at width 1.

    Args:
        blocks: of each of the three stages.
        arguments: of every model of growconv.
    """
    first, second, third = blocks
    return ResidualNet(BasicBlock, ((16, first), (32, second), (64, third)), 16, **arguments)
