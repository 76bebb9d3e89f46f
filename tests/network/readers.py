"""Small models in which something else than the next layer reads a layer's channels."""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal
from torch.utils.checkpoint import checkpoint

from tests.network.hand import Net

Builder = Callable[[], nn.Module]
Extra = Callable[[Net, Tensor], Tensor]


class TwoHeads(nn.Module):
    """`aux` and `b` read `a`; what calls `aux` differs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.aux = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor, more: bool = False) -> tuple[Tensor, ...]:
        y = F.relu(self.a(x))
        out = self.head(F.relu(self.b(y)).mean((2, 3)))
        wanted = {"training": self.training, "argument": more, "method": False}[self.how]
        return (out, self.aux(y)) if wanted else (out,)

    def project(self, x: Tensor) -> Tensor:
        return self.aux(F.relu(self.a(x)))


class Prototypes(nn.Module):
    """A method besides forward measures distances to a parameter with an entry for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.prototypes = nn.Parameter(torch.randn(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))

    def distances(self, x: Tensor) -> Tensor:
        return torch.cdist(F.relu(self.a(x)).mean((2, 3)), self.prototypes)


class Silent(nn.Module):
    """The first layer runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = F.relu(self.a(x))
        return self.c(F.relu(self.b(y)))


def reading(extra: Extra, **modules: nn.Module) -> Callable[[], Net]:
    """`a -> b`, and what else is made of the channels is added to the output."""

    def build() -> Net:
        def forward(m: Net, x: Tensor) -> Tensor:
            y = F.relu(m.a(x))
            return m.b(y) + extra(m, y)

        return Net(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 2, 1), **modules)

    return build


def in_numpy(_: Net, y: Tensor) -> Tensor:
    return torch.from_numpy(y.detach().numpy().max(1, keepdims=True))


def in_vmap(_: Net, y: Tensor) -> Tensor:
    return torch.vmap(lambda each: each.square().sum(0, keepdim=True))(y)


def in_python(_: Net, y: Tensor) -> Tensor:
    return torch.tensor(max(y.detach()[0, :, 0, 0].tolist()), dtype=y.dtype)


def ranks(_: Net, y: Tensor) -> Tensor:
    """Nothing that a larger or shifted map of a channel would change."""
    return torch.from_numpy(F.instance_norm(y).detach().numpy().argmax(1))[:, None]


def _strongest(y: Tensor) -> Tensor:
    return y.amax(1, keepdim=True)


def in_script(_: Net, y: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(_strongest)(y)


def in_functional_call(m: Net, y: Tensor) -> Tensor:
    doubled = {name: 2 * parameter for name, parameter in m.c.named_parameters()}
    return torch.func.functional_call(m.c, doubled, (y,))


def by_weight(m: Net, y: Tensor) -> Tensor:
    return F.conv2d(y, m.b.weight * 0.5)


def scripted_head() -> Net:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = torch.jit.script(nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU()))
    return reading(lambda m, y: m.c(y), c=head)()


def autoencoder() -> Net:
    """The decoder has the encoder's weight."""
    model = Net(
        lambda m, x: m.d(F.relu(m.e(x))), e=nn.Conv2d(3, 4, 3, padding=1), d=nn.ConvTranspose2d(4, 3, 3, padding=1)
    )
    model.d.weight = model.e.weight
    return model


def twins() -> Net:
    """Two layers with one weight between other layers."""
    model = Net(
        lambda m, x: m.e(F.relu(m.d(F.relu(m.c(F.relu(m.a(x))))))),
        a=nn.Conv2d(3, 5, 1), c=nn.Conv2d(5, 5, 1), d=nn.Conv2d(5, 5, 1), e=nn.Conv2d(5, 2, 1),
    )  # fmt: skip
    model.d.weight = model.c.weight
    return model


def siamese() -> Net:
    """Two layers with one weight side by side."""
    model = Net(
        lambda m, x: m.e(F.relu(m.c(x)) - F.relu(m.d(x.flip(-1)))),
        c=nn.Conv2d(3, 5, 3), d=nn.Conv2d(3, 5, 3), e=nn.Conv2d(5, 2, 1),
    )  # fmt: skip
    model.d.weight = model.c.weight
    return model


def between(operation: Extra) -> Builder:
    """`a`, an operation on positive values, `b`."""

    def build() -> Net:
        model = Net(lambda m, x: m.b(operation(m, m.a(x))), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 2, 1))
        nn.init.constant_(model.a.bias, 9.0)
        return model

    return build


def hidden() -> Net:
    """The number of channels counts in a branch whose last norm starts at zero."""
    model = Net(
        lambda m, x: m.c(x + m.n(m.b(F.relu(m.a(x)) / len(m.a.weight)))),
        a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 3, 1), n=nn.BatchNorm2d(3), c=nn.Conv2d(3, 2, 1),
    )  # fmt: skip
    nn.init.zeros_(model.n.weight)
    return model


class Slots:
    """Something else than a mapping around an output."""

    __slots__ = ("given", "itself")

    def __init__(self, given: object) -> None:
        self.given, self.itself = given, self


def counted(m: Net, y: Tensor) -> Tensor:
    """Keeps a number, a list and an average that is assigned anew in every run."""
    m.steps = getattr(m, "steps", 0) + 1
    m.kept.append(y.detach().mean((0, 2, 3)))
    m.average = 0.9 * m.average + 0.1 * m.kept[-1].view(1, -1, 1, 1)
    return y * (len(m.kept) + m.steps) / (1 + m.average)


def counting() -> Net:
    model = between(counted)()
    model.kept = []
    model.register_buffer("average", torch.ones(1, 4, 1, 1))
    return model


def graded(m: Net, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(m.training):
        return m.b(F.relu(m.a(x)))


def own(forward: Callable[[Net, Tensor], object]) -> Builder:
    return lambda: Net(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 2, 1))


RUNS: dict[str, Builder] = {
    "writes to its input": own(lambda m, x: m.b(F.relu(m.a(x.sub_(0.5).mul_(2))))),
    "keeps a state": counting,
    "gradients in training only": own(graded),
    "checkpoints": own(lambda m, x: checkpoint(lambda y: m.b(F.relu(m.a(y))), x.requires_grad_(), use_reentrant=True)),
    "asks whether all is finite": between(lambda _, y: y if torch.isfinite(y).all() else 0 * y),
    "draws": between(lambda m, y: Normal(y, 1.0).rsample() + torch.normal(y, 0.1) if m.training else y),
    "leaks at random": between(lambda m, y: F.rrelu(y - 9, training=m.training)),
    "gives an object": own(lambda m, x: Slots([Normal(m.b(F.relu(m.a(x))), 1.0, validate_args=False)])),
    "reads the width of a layer": own(lambda m, x: m.b(F.relu(m.a(x)).view(len(x), m.b.in_channels, 4, 4))),
}
