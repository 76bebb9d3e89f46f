"""Models that cut the outputs of a layer into parts by what an attribute says."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Split(nn.Module):
    """Parts of the sizes that an attribute has, each to a layer of its own; another has such a size by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.frames = [2, 3], 3
        self.a = nn.Conv2d(3, 5, 1)
        self.b, self.c, self.d = nn.Conv2d(2, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.a(x)).split(self.sizes, 1)
        y = torch.cat([self.b(first), self.c(second)], 1)
        return self.d(y.repeat(1, 1, self.frames, 1))


class Halves(nn.Module):
    """As in cross-stage networks: halves by a size that is worked out from an attribute, unpacked one by one."""

    def __init__(self, literal: bool) -> None:
        super().__init__()
        self.literal, self.channels = literal, 8
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.a(x)).split(4 if self.literal else self.channels // 2, 1)
        return self.c(torch.cat([first, self.b(second)], 1))
