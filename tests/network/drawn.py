"""Networks drawn at random: programs of steps over a growing list of feature maps, all of one grid."""

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[["Drawn", list[Tensor]], Tensor]

KINDS = (
    *("conv", "conv", "conv", "norm", "norm", "activation", "add", "add", "cat", "depthwise", "group", "transposed"),
    *("gate", "scale", "linear", "twice", "chunk", "glu", "shuffle", "pixels", "halves", "evens", "zeros", "slice"),
    *("pool", "grid", "stack", "softmax", "again", "standard", "between", "written"),
)


class Drawn(nn.Module):
    """A network of random steps; a convolution reads the last three maps.

    Args:
        seed: of the steps.
        steps: how many.
        kinds: which there are.
    """

    def __init__(self, seed: int, steps: int, kinds: tuple[str, ...] = KINDS) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self.layers = nn.ModuleDict()
        self.scales = nn.ParameterDict()
        self.widths = [3]
        self.program: list[tuple[str, Step]] = []
        while len(self.program) < steps:
            kind = self.draw.choice(kinds)
            first = self.draw.randrange(max(0, len(self.widths) - 4), len(self.widths))
            found = getattr(self, f"_{kind}")(first, self.widths[first])
            if found is not None:
                step, width = found
                self.program.append((kind, step))
                self.widths.append(width)
        self.head = nn.Conv2d(sum(self.widths[-3:]), 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for _, step in self.program:
            values.append(step(self, values))
        return self.head(torch.cat(values[-3:], 1))

    def __str__(self) -> str:
        return " ".join(f"{kind}:{width}" for (kind, _), width in zip(self.program, self.widths[1:], strict=True))

    def __deepcopy__(self, memo: dict) -> "Drawn":
        twin = Drawn.__new__(Drawn)
        nn.Module.__init__(twin)
        for name in ("layers", "scales", "head"):
            setattr(twin, name, _copied(getattr(self, name), memo))
        twin.program, twin.widths, twin.training = self.program, self.widths, self.training
        return twin

    def _layer(self, module: nn.Module) -> str:
        name = f"l{len(self.layers)}"
        self.layers[name] = module
        return name

    def _other(self, width: int) -> int | None:
        """Another map of the same width."""
        found = [index for index, each in enumerate(self.widths) if each == width]
        return self.draw.choice(found) if found else None

    def _call(self, first: int, module: nn.Module, width: int) -> tuple[Step, int]:
        name = self._layer(module)
        return lambda m, v: m.layers[name](v[first]), width

    # ------------------------------------------------------------------------------------------ layers

    def _conv(self, first: int, width: int) -> tuple[Step, int]:
        out, size = self.draw.choice([1, 2, 3, 4, 4, 6, 8]), self.draw.choice([1, 3])
        return self._call(first, nn.Conv2d(width, out, size, padding=size // 2, bias=self.draw.random() < 0.5), out)

    def _transposed(self, first: int, width: int) -> tuple[Step, int]:
        return self._call(first, nn.ConvTranspose2d(width, 4, 3, padding=1), 4)

    def _linear(self, first: int, width: int) -> tuple[Step, int]:
        name = self._layer(nn.Linear(width, 4))
        return lambda m, v: m.layers[name](v[first].permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 4

    def _depthwise(self, first: int, width: int) -> tuple[Step, int]:
        ratio = self.draw.choice([1, 1, 2])
        return self._call(first, nn.Conv2d(width, ratio * width, 3, padding=1, groups=width), ratio * width)

    def _group(self, first: int, width: int) -> tuple[Step, int] | None:
        groups = self.draw.choice([each for each in (2, 3, 4) if width % each == 0] or [0])
        out = groups * self.draw.choice([1, 2])
        return self._call(first, nn.Conv2d(width, out, 1, groups=groups), out) if groups else None

    def _norm(self, first: int, width: int) -> tuple[Step, int]:
        norms = [nn.BatchNorm2d(width), nn.InstanceNorm2d(width, affine=True), nn.GroupNorm(width, width)]
        return self._call(first, self.draw.choice(norms), width)

    def _activation(self, first: int, width: int) -> tuple[Step, int]:
        return self._call(first, self.draw.choice([nn.GELU(), nn.Tanh(), nn.PReLU(width), nn.Hardswish()]), width)

    def _again(self, first: int, width: int) -> tuple[Step, int] | None:
        """A layer that was called before, on another map."""
        fitting = [
            name for name, each in self.layers.items()
            if isinstance(each, nn.Conv2d) and each.groups == 1 and each.in_channels == width
        ]  # fmt: skip
        if not fitting:
            return None
        name = self.draw.choice(fitting)
        return lambda m, v: m.layers[name](v[first]), self.layers[name].out_channels

    def _gate(self, first: int, width: int) -> tuple[Step, int]:
        down, up = self._layer(nn.Linear(width, 2)), self._layer(nn.Linear(2, width))

        def step(m: Drawn, v: list[Tensor]) -> Tensor:
            b, c, _, _ = v[first].size()
            gate = torch.sigmoid(m.layers[up](F.gelu(m.layers[down](v[first].mean((2, 3))))))
            return v[first] * gate.view(b, c, 1, 1)

        return step, width

    def _scale(self, first: int, width: int) -> tuple[Step, int]:
        name = f"s{len(self.scales)}"
        self.scales[name] = nn.Parameter(torch.rand(width) + 0.5)
        return lambda m, v: v[first] * m.scales[name][:, None, None], width

    # ------------------------------------------------------------------------------------------ operations

    def _add(self, first: int, width: int) -> tuple[Step, int] | None:
        other = self._other(width)
        return None if other is None else (lambda m, v: v[first] + v[other], width)

    def _stack(self, first: int, width: int) -> tuple[Step, int]:
        other = self._other(width)
        return lambda m, v: torch.stack([v[first], v[other].tanh()], 0).mean(0), width

    def _cat(self, first: int, width: int) -> tuple[Step, int] | None:
        other = self.draw.randrange(len(self.widths))
        return (lambda m, v: torch.cat([v[first], v[other]], 1), width + self.widths[other]) if width < 12 else None

    def _twice(self, first: int, width: int) -> tuple[Step, int] | None:
        return (lambda m, v: torch.cat([v[first], -v[first]], 1), 2 * width) if width < 9 else None

    def _chunk(self, first: int, width: int) -> tuple[Step, int] | None:
        def step(m: Drawn, v: list[Tensor]) -> Tensor:
            a, b = v[first].chunk(2, 1)
            return a * torch.sigmoid(b)

        return None if width % 2 else (step, width // 2)

    def _glu(self, first: int, width: int) -> tuple[Step, int] | None:
        return None if width % 2 else (lambda m, v: F.glu(v[first], 1), width // 2)

    def _shuffle(self, first: int, width: int) -> tuple[Step, int] | None:
        def step(m: Drawn, v: list[Tensor]) -> Tensor:
            n, c, h, w = v[first].shape
            return v[first].view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

        return None if width % 2 else (step, width)

    def _pixels(self, first: int, width: int) -> tuple[Step, int] | None:
        return None if width % 4 else (lambda m, v: F.avg_pool2d(F.pixel_shuffle(v[first], 2), 2), width // 4)

    def _halves(self, first: int, width: int) -> tuple[Step, int] | None:
        def step(m: Drawn, v: list[Tensor]) -> Tensor:
            half = v[first].shape[1] // 2
            return torch.cat([v[first][:, half:], v[first][:, :half].roll(1, 2)], 1)

        return None if width % 2 else (step, width)

    def _evens(self, first: int, width: int) -> tuple[Step, int] | None:
        return None if width % 2 else (lambda m, v: v[first][:, ::2] - v[first][:, 1::2], width // 2)

    def _written(self, first: int, width: int) -> tuple[Step, int] | None:
        def step(m: Drawn, v: list[Tensor]) -> Tensor:
            part, out = v[first].shape[1] // 2, torch.zeros_like(v[first])
            out[:, :part, 1:] = v[first][:, :part, :-1]
            out[:, part:] = v[first][:, part:]
            return out

        return None if width % 2 else (step, width)

    def _zeros(self, first: int, width: int) -> tuple[Step, int]:
        return lambda m, v: F.pad(v[first], (0, 0, 0, 0, 0, 1)), width + 1

    def _slice(self, first: int, width: int) -> tuple[Step, int] | None:
        return (lambda m, v: v[first][:, 1:], width - 1) if width > 2 else None

    def _pool(self, first: int, width: int) -> tuple[Step, int]:
        return lambda m, v: F.max_pool2d(v[first], 3, 1, 1), width

    def _grid(self, first: int, width: int) -> tuple[Step, int]:
        mode = self.draw.choice(["reflect", "circular", "replicate", "constant"])
        return lambda m, v: F.avg_pool2d(F.pad(v[first], (1, 1, 1, 1), mode=mode), 3, 1).flip(-1), width

    def _softmax(self, first: int, width: int) -> tuple[Step, int]:
        return lambda m, v: v[first] * v[first].flatten(2).softmax(-1).view_as(v[first]), width

    def _standard(self, first: int, width: int) -> tuple[Step, int]:
        return lambda m, v: F.instance_norm(v[first]), width

    def _between(self, first: int, width: int) -> tuple[Step, int]:
        return lambda m, v: F.interpolate(F.interpolate(v[first], scale_factor=2), (4, 4), mode="bilinear"), width


def _copied(module: nn.Module, memo: dict) -> nn.Module:
    import copy

    return copy.deepcopy(module, memo)


def build(seed: int, steps: int, kinds: tuple[str, ...] = KINDS) -> tuple[Drawn, Tensor]:
    """A drawn network, and an example input."""
    torch.manual_seed(seed)
    return Drawn(seed, steps, kinds), torch.randn(2, 3, 4, 4, dtype=torch.float64)
