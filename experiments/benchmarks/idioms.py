"""Small models in the style of published ones whose code handles channels in ways of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _normed(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, SiLU."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU(inplace=True))


class _C2f(nn.Module):
    """Half of the channels goes through bottlenecks; all that comes out on the way is concatenated (YOLOv8)."""

    def __init__(self, inputs: int, outputs: int, count: int) -> None:
        super().__init__()
        self.hidden = outputs // 2
        self.first = _normed(inputs, 2 * self.hidden, 1)
        self.last = _normed((2 + count) * self.hidden, outputs, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(_normed(self.hidden, self.hidden), _normed(self.hidden, self.hidden)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class SplitStages(nn.Module):
    """Stages that split their channels, pooled at several sizes in the end, as in YOLOv8's backbone: chunk, cat."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = _normed(3, width, stride=2)
        stages = []
        for stage in range(4):
            inputs, outputs = width << stage, width << (stage + 1)
            stages += [_normed(inputs, outputs, stride=2), _C2f(outputs, outputs, (1, 2, 2, 1)[stage])]
        self.stages = nn.Sequential(*stages)
        self.before, self.after = _normed(16 * width, 8 * width, 1), _normed(32 * width, 16 * width, 1)
        self.head = nn.Linear(16 * width, 100)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.before(self.stages(self.stem(x)))]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], 5, 1, 2))
        return self.head(self.after(torch.cat(maps, 1)).mean((2, 3)))


class GatedSequence(nn.Module):
    """Convolutions over a sequence with gated linear units and scaled residuals (Dauphin et al. 2017): GLU."""

    def __init__(self, width: int = 48, layers: int = 6) -> None:
        super().__init__()
        self.enter = nn.Conv1d(20, width, 1)
        self.convs = nn.ModuleList(nn.Conv1d(width, 2 * width, 5, padding=2) for _ in range(layers))
        self.leave = nn.Linear(width, 30)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for conv in self.convs:
            x = (x + F.glu(conv(F.dropout(x, 0.0)), dim=1)) * 0.5**0.5
        return self.leave(x.transpose(1, 2))


class _Shifted(nn.Module):
    """A residual block in front of which an eighth of the channels moves to the next frame, an eighth to the last."""

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.first(self._moved(x))))
        return F.relu(x + self.scale * self.norm2(self.second(y)))

    def _moved(self, x: Tensor) -> Tensor:
        frames = x.view(-1, self.frames, *x.shape[1:])
        part, out = frames.shape[2] // 8, torch.zeros_like(frames)
        out[:, :-1, :part] = frames[:, 1:, :part]
        out[:, 1:, part : 2 * part] = frames[:, :-1, part : 2 * part]
        out[:, :, 2 * part :] = frames[:, :, 2 * part :]
        return out.view_as(x)


class TemporalShift(nn.Module):
    """Frames of a video that exchange channels (TSM, Lin et al. 2019): slice assignment, layer scale."""

    def __init__(self, width: int = 32, blocks: int = 4, frames: int = 4) -> None:
        super().__init__()
        self.frames = frames
        self.stem = nn.Conv2d(3, width, 5, 2, 2)
        self.blocks = nn.Sequential(*(_Shifted(width, frames) for _ in range(blocks)))
        self.head = nn.Linear(width, 50)

    def forward(self, clips: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(clips.flatten(0, 1))))
        return self.head(x.mean((2, 3))).view(len(clips), self.frames, -1).mean(1)


class SuperResolution(nn.Module):
    """Residual blocks on the small image, then two enlargements (EDSR, Lim et al. 2017): PixelShuffle."""

    def __init__(self, width: int = 32, blocks: int = 6) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        )
        enlarge = (nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        again = (nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.tail = nn.Sequential(*enlarge, *again, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = kept = self.head(x)
        for block in self.body:
            x = x + 0.1 * block(x)
        return self.tail(x + kept)
