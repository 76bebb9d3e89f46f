"""The study's own networks: residual ones with as many blocks as asked for, and two whose inner widths are free."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from growconv.training.models import BasicBlock, InvertedResidual, Kit, ResidualNet, scaled

STAGES = ((8, 2), (8, 1), (16, 2), (16, 1), (32, 2))
"""Channels of the stream after each block of the two nets below, and the block's stride."""


def residual(blocks: Sequence[int], **arguments: Any) -> ResidualNet:
    """A residual network for small images, 16, 32 and 64 channels at width 1.

    Args:
        blocks: of each of the three stages.
        arguments: of every model of growconv.
    """
    first, second, third = blocks
    return ResidualNet(BasicBlock, ((16, first), (32, second), (64, third)), 16, **arguments)


class _Net(nn.Module):
    """A stem that halves images of 16 pixels and more, blocks, the mean over the grid, a linear layer."""

    def __init__(self, blocks: Sequence[nn.Module], in_channels: int, classes: int, image_size: int):
        super().__init__()
        stream = STAGES[0][0]
        stride = 2 if image_size >= 16 else 1
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, stream, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(stream), nn.ReLU()
        )
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(STAGES[-1][0], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.mean(self.blocks(self.stem(x)), dim=(2, 3)))


def residual_blocks(
    in_channels: int, classes: int, image_size: int, hidden: float = 1.0, middles: Sequence[int] = (8, 8, 16, 16, 32)
) -> nn.Module:
    """Five basic blocks; the channels inside each are free.

    Args:
        middles: channels inside each block at factor 1.
    """
    kit, blocks, incoming = Kit(in_channels, classes, image_size), [], STAGES[0][0]
    for (outgoing, stride), middle in zip(STAGES, middles, strict=True):
        blocks.append(BasicBlock(kit, incoming, scaled(middle, hidden), outgoing, stride))
        incoming = outgoing
    return _Net(blocks, in_channels, classes, image_size)


def mobile_blocks(
    in_channels: int, classes: int, image_size: int, hidden: float = 1.0, middles: Sequence[int] = (32, 32, 32, 64, 64)
) -> nn.Module:
    """Five inverted residuals, as in MobileNetV2; the expanded channels of each are free.

    Args:
        middles: expanded channels of each block at factor 1.
    """
    kit, blocks, incoming = Kit(in_channels, classes, image_size), [], STAGES[0][0]
    for (outgoing, stride), middle in zip(STAGES, middles, strict=True):
        blocks.append(InvertedResidual(kit, incoming, scaled(middle, hidden), outgoing, stride))
        incoming = outgoing
    return _Net(blocks, in_channels, classes, image_size)
